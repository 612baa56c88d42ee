#include "rows.h"

#include <algorithm>
#include <cstring>

#include "../score.h"

namespace elang {
namespace {

void copy_strided(const char* from, int64_t item, int dims, const int64_t* sizes, const int64_t* strides, char*& to) {
  if (dims == 0) {
    std::memcpy(to, from, item);
    to += item;
    return;
  }
  for (int64_t i = 0; i < sizes[0]; ++i)
    copy_strided(from + i * strides[0] * item, item, dims - 1, sizes + 1, strides + 1, to);
}

class RowCopier {
  const Rows& from_;
  const int64_t bytes_ = from_.row_bytes();
  const bool contiguous_ = from_.rows_are_contiguous();

 public:
  explicit RowCopier(const Rows& from) : from_(from) {}

  void operator()(int64_t row, char* out, int64_t slot) const {
    const char* source = from_.data + row * from_.row_stride * from_.item_bytes;
    char* to = out + slot * bytes_;
    if (contiguous_) std::memcpy(to, source, bytes_);
    else copy_strided(source, from_.item_bytes, from_.inner_dims, from_.sizes, from_.strides, to);
  }
};

}  // namespace

int64_t Rows::row_bytes() const {
  int64_t bytes = item_bytes;
  for (int d = 0; d < inner_dims; ++d) bytes *= sizes[d];
  return bytes;
}

bool Rows::rows_are_contiguous() const {
  int64_t expected = 1;
  for (int d = inner_dims - 1; d >= 0; expected *= sizes[d--])
    if (sizes[d] != 1 && strides[d] != expected) return false;
  return true;
}

void partition(const float* score, int64_t n, float threshold, int64_t* order, int32_t* n_routed) {
  int64_t routed = 0;
  for (int64_t i = 0; i < n; ++i) routed += !keep(score[i], threshold);
  *n_routed = static_cast<int32_t>(routed);
  int64_t to_routed = 0, to_kept = routed;
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = keep(score[i], threshold);
    order[kept ? to_kept : to_routed] = i;
    to_kept += kept;
    to_routed += !kept;
  }
}

void gather(const Rows& from, const int64_t* order, int64_t last, int64_t begin, int64_t end, char* out) {
  const RowCopier copy(from);
  for (int64_t slot = begin; slot < end; ++slot) copy(order[std::min(slot, last)], out, slot);
}

void scatter(const Rows& from, const int64_t* order, int64_t begin, int64_t end, char* out) {
  const RowCopier copy(from);
  for (int64_t slot = begin; slot < end; ++slot) copy(slot, out, order ? order[slot] : slot);
}

}  // namespace elang

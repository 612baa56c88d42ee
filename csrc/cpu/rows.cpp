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

bool counts(const Mask& mask, int64_t row, int64_t column) {
  uint64_t item = 0;  // little-endian: the low bytes
  std::memcpy(&item, mask.data + (row * mask.row_stride + column * mask.col_stride) * mask.item_bytes, mask.item_bytes);
  return (mask.is_float ? item << (65 - 8 * mask.item_bytes) : item) != 0;
}

int64_t routed_length(const Mask& mask, const int64_t* order, int64_t n_routed) {
  int64_t longest = 0;
  for (int64_t slot = 0; slot < n_routed; ++slot) {
    int64_t end = mask.columns;  // a row no longer than the longest so far need not be looked at further
    while (end > longest && !counts(mask, order[slot], end - 1)) --end;
    longest = std::max(longest, end);
  }
  return longest;
}

}  // namespace elang

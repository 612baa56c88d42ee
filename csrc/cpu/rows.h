// Row movement on the CPU: partition, gather, merge. Bytes only, whatever the element type. Torch-free.
#pragma once

#include <cstdint>

namespace elang {

// A tensor [N, ...] of any strides: sizes and strides of its inner dimensions, in elements, outermost first.
struct Rows {
  const char* data;
  int64_t item_bytes;
  int64_t row_stride;
  int inner_dims;
  const int64_t* sizes;
  const int64_t* strides;

  int64_t row_bytes() const;
  bool rows_are_contiguous() const;
};

// Stable partition by score, routed rows first: order [n], n_routed [1].
void partition(const float* score, int64_t n, float threshold, int64_t* order, int32_t* n_routed);

// out[slot] = from[order[min(slot, last)]] for every slot of [begin, end); out is contiguous.
void gather(const Rows& from, const int64_t* order, int64_t last, int64_t begin, int64_t end, char* out);

// out[order[slot]] = from[slot] for every slot of [begin, end), or out[slot] without an order; out is contiguous.
void scatter(const Rows& from, const int64_t* order, int64_t begin, int64_t end, char* out);

}  // namespace elang

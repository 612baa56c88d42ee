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

// out[slot] = from[order[min(slot, n_routed - 1)]] for every slot < capacity; out is contiguous.
void gather(const Rows& from, const int64_t* order, int64_t n_routed, int64_t capacity, char* out);

// out = kept, then out[order[slot]] = routed[slot] for every slot < n_routed; out is contiguous.
void merge(const Rows& kept, int64_t n, const Rows& routed, const int64_t* order, int64_t n_routed, char* out);

}  // namespace elang

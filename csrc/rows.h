// Tensors as rows of bytes, for kernels that move them whatever their element type. Torch-free.
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

  int64_t row_bytes() const {
    int64_t bytes = item_bytes;
    for (int d = 0; d < inner_dims; ++d) bytes *= sizes[d];
    return bytes;
  }

  bool rows_are_contiguous() const {
    int64_t expected = 1;
    for (int d = inner_dims - 1; d >= 0; expected *= sizes[d--])
      if (sizes[d] != 1 && strides[d] != expected) return false;
    return true;
  }
};

// An attention mask [N, M], of any integer, bool or float type: an element counts iff it is not zero.
struct Mask {
  const char* data;
  int64_t item_bytes;  // 1, 2, 4 or 8
  bool is_float;       // whose sign bit makes no difference to zero
  int64_t row_stride, col_stride;  // in elements
  int64_t rows, columns;           // N, M
};

// The partition that the row kernels follow.
struct Order {
  const int64_t* row;  // [rows], routed rows first
  int64_t stride;      // in elements
  const int32_t* n_routed;
  int64_t rows;
};

}  // namespace elang

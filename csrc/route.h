// `route` and `route_logits` as every backend's kernels see them. Torch-free.
#pragma once

#include <stdint.h>

#include "score.h"

namespace elang {

enum class DType : int { float32, bfloat16, float16 };

// A matrix [rows, cols]; strides in elements.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t row_stride, col_stride;
};

struct RouteArgs {
  bool head;           // false: route_logits, `hidden` holds the logits [N, C] and the rest of the head is unused
  Matrix hidden;       // [N, H]
  Matrix weight;       // [C, H]
  Matrix bias;         // [C, 1]; no data where the head has none
  void* logits;        // [N, C] contiguous, dtype of `hidden`; unused by route_logits
  float* score;        // [N]
  int64_t rows, width, classes;  // N, H, C
  Score kind;
  float temperature;
};

}  // namespace elang

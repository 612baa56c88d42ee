// The CPU kernel of `route` and `route_logits`, as its launcher in ops.cpp sees it. Torch-free.
#pragma once

#include <stdint.h>

#include "../score.h"

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

// One instruction set's build of cpu/route.cpp.
struct RouteKernel {
  const char* isa;
  int lanes;  // rows that are scored together: a block
  // Floats of scratch that a call of `rows` needs.
  int64_t (*scratch)(const RouteArgs&);
  // Logits and scores of rows [begin, end). Every row's result depends on that row and the head alone.
  void (*rows)(const RouteArgs&, int64_t begin, int64_t end, float* scratch);
};

// The widest instruction set that this machine has; ELANG_ISA=baseline|avx2|avx512 in the environment caps it.
const RouteKernel& route_kernel();

}  // namespace elang

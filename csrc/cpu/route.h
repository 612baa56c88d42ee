// The CPU kernel of `route` and `route_logits`, as its launcher in ops.cpp sees it. Torch-free.
#pragma once

#include "../route.h"

namespace elang {

// One instruction set's build of cpu/route.cpp.
struct RouteKernel {
  int lanes;  // rows that are scored together: a block
  // Floats of scratch that a call of `rows` needs.
  int64_t (*scratch)(const RouteArgs&);
  // Logits and scores of rows [begin, end). Every row's result depends on that row and the head alone.
  void (*rows)(const RouteArgs&, int64_t begin, int64_t end, float* scratch);
};

// The widest instruction set that this machine has; ELANG_ISA=baseline|avx2|avx512 in the environment caps it.
const RouteKernel& route_kernel();

}  // namespace elang

// The kernel that decides on the device which of Super's graphs a batch runs.
#pragma once

#include "compact.cuh"
#include "launch.h"

#if ELANG_CONDITIONAL_NODES

namespace elang {

// One warp: the least bucket that holds the routed rows, none for none. A condition that is not set keeps its default, by
// which no body runs.
__global__ void __launch_bounds__(kWarp) branch_kernel(const __grid_constant__ Branch p) {
  const int lane = threadIdx.x, routed = *p.n_routed;
  int chosen = 0;
  for (int first = 0; first < p.buckets; first += kWarp) {
    const bool too_small = first + lane < p.buckets && p.size[first + lane] < routed;
    chosen += __popc(__ballot_sync(kAllLanes, too_small));
  }
  if (lane != 0) return;
  // Atomic, as calls outside of this graph may count too.
  atomicAdd(&p.counts[0], static_cast<unsigned long long>(p.rows));
  atomicAdd(&p.counts[1], static_cast<unsigned long long>(routed));
  if (routed == 0) return;
  assert(chosen < p.buckets && "size: wanted a bucket for every row");
  ++p.batches[chosen];
  if (p.with_switch) cudaGraphSetConditional(p.handle[0], static_cast<unsigned>(chosen));
  else cudaGraphSetConditional(p.handle[chosen], 1);
}

}  // namespace elang

#endif

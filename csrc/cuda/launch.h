// The CUDA kernels as host code sees them. Torch-free. Each call enqueues one launch on `stream` of the current device and
// returns its error; nothing waits. Tensors are checked and not empty.
#pragma once

#include <cuda_runtime_api.h>

#include "../route.h"
#include "../rows.h"

namespace elang {

constexpr int kMaxFinishers = 32;

// What the blocks of one launch share: see compact.cuh. All zero before a launch and after it. Launches that may overlap
// need tickets of their own.
struct Ticket {
  unsigned started;            // blocks that have taken a role
  unsigned finished;           // finishers that have written their part
  unsigned long long arrived;  // high half: blocks that have scored their rows; low half: the rows they route
  unsigned routed[kMaxFinishers];  // of the rows in each finisher's part
};

// What a host waits for, in memory that it shares with the device. `sequence` is written last.
struct Mail {
  int32_t n_routed, length;
  uint64_t sequence;
};

// A ticket for the next launch on `stream`. Launches on one stream follow each other and share one; a
// launch that is being captured gets its own for good, as its graph may be replayed at any time.
cudaError_t ticket_for(cudaStream_t stream, Ticket** ticket);

// Multiprocessors of the current device.
cudaError_t multiprocessors(int* count);

// What route leaves besides logits and scores, and how it decides.
struct RouteOut {
  int64_t* order;     // [rows]
  int32_t* n_routed;  // [1]
  float threshold;
  const float* device_threshold;  // [1], in place of `threshold` where it is not null
};

// The most classes that `route` takes, bounded by shared memory; route_logits takes any.
constexpr int64_t kMaxHeadClasses = 12000;

cudaError_t launch_route(const RouteArgs& args, const RouteOut& out, cudaStream_t stream);

struct GatherTensor {
  Rows from;  // rows are contiguous
  char* to;
};
cudaError_t launch_gather(const GatherTensor* tensors, int count, const Order& order, int64_t capacity, cudaStream_t stream);

// kept [order.rows, ...] and routed [routed_rows, ...] into merged [order.rows, ...]; rows are contiguous.
cudaError_t launch_merge(
    const Rows& kept, const Rows& routed, int64_t routed_rows, const Order& order, char* merged, cudaStream_t stream);

// Into extent [2] on the device, or into `mail` with `sequence`.
cudaError_t launch_extent(
    const Mask& mask, const Order& order, int32_t* extent, Mail* mail, uint64_t sequence, cudaStream_t stream);

}  // namespace elang

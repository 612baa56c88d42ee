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

// Conditional nodes came with CUDA 12.4, those of many bodies with 12.8.
#define ELANG_CONDITIONAL_NODES (CUDART_VERSION >= 12040)

#if ELANG_CONDITIONAL_NODES
// Kernels as nodes of a graph, each behind another node; null: the first.

constexpr int kMaxCopies = 16;  // of one node

struct Copy {
  const void* from;
  void* to;
  int64_t bytes;
};

cudaError_t add_copies(cudaGraph_t graph, cudaGraphNode_t behind, const Copy* copies, int count, cudaGraphNode_t* node);
// Other copies for the next launches of an instantiated graph.
cudaError_t set_copies(cudaGraphExec_t exec, cudaGraphNode_t node, const Copy* copies, int count);

constexpr int kMaxBuckets = 64;

// Which of Super's graphs is to run: see branch.cuh.
struct Branch {
  const int32_t* n_routed;  // [1]
  int64_t rows;
  int buckets;
  int32_t size[kMaxBuckets];  // ascending; the last holds all rows
  bool with_switch;
  cudaGraphConditionalHandle handle[kMaxBuckets];  // one, of a SWITCH node; else as many as buckets, each of an IF node
  unsigned long long* counts;  // [4] rows and routed, counted up here, and two more
  int64_t* batches;            // [buckets] of each size, counted up here
};
cudaError_t add_branch(cudaGraph_t graph, cudaGraphNode_t behind, const Branch& branch, cudaGraphNode_t* node);
#endif

}  // namespace elang

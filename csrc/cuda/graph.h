// The C ABI of cuda/graph.cpp in libelang_ops.so: a whole inference as one CUDA graph. Graphs are cudaGraph_t, which any
// CUDA runtime of the process may have made. An error is a text that lives until the thread's next call, null is success.
#pragma once

#include <cstdint>

struct elang_graph;

struct elang_graph_parts {
  int device;
  void* decide;         // Swift and route, which leave n_routed
  void* const* bodies;  // Super on `sizes` rows each, ascending; the last takes all
  const int32_t* sizes;
  int buckets;
  void* merge;  // the answers of both
  bool with_switch;  // one SWITCH node; else an IF node for each body
  int64_t rows;
  const int32_t* n_routed;  // [1]
  int64_t* counts;          // [4] rows and routed, counted up in each launch
  int64_t* batches;         // [buckets] of each size, counted up too
};

// A tensor that the graph reads or writes at an address of its own, and gets or gives at another in each launch.
struct elang_graph_tensor {
  void* own;
  int64_t bytes;
};

// "switch" or "if": the conditional nodes that this build and this driver know; null, and why in *error: none.
using elang_graph_nodes_t = const char*(const char** error);
using elang_graph_new_t = const char*(const elang_graph_parts* parts, const elang_graph_tensor* inputs, int input_count,
                                      const elang_graph_tensor* outputs, int output_count, elang_graph** out);
using elang_graph_delete_t = void(elang_graph* graph);
// On torch's current stream. One launch: copy in, decide, the one body that fits, merge, copy out.
using elang_graph_launch_t = const char*(elang_graph* graph, const void* const* inputs, void* const* outputs);

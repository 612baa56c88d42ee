// A whole inference as one CUDA graph: copy in, Swift and route, a kernel that picks one of Super's graphs, that graph in a
// conditional node, merge, copy out. The parts were captured elsewhere and are cloned here; the memory they use is not ours.
#include "graph.h"

#include <new>
#include <vector>

#include "device.h"
#include "error.h"
#include "launch.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using elang::failed;

EXPORT const char* elang_graph_nodes(const char** error) {
  if ((*error = elang::cuda_obstacle())) return nullptr;
  int driver = 0;
  if (const cudaError_t code = cudaDriverGetVersion(&driver)) {
    *error = cudaGetErrorString(code);
    return nullptr;
  }
  const int known = driver < CUDART_VERSION ? driver : CUDART_VERSION;
  if (known >= 12080) return "switch";
  if (known >= 12040) return "if";
  *error = driver < CUDART_VERSION ? "conditional nodes need a driver for CUDA 12.4 or later"
                                   : "conditional nodes need elang to be built with CUDA 12.4 or later";
  return nullptr;
}

#if ELANG_CONDITIONAL_NODES

struct elang_graph {
  int device = 0;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cudaGraphNode_t copy_in = nullptr, copy_out = nullptr;
  std::vector<elang::Copy> inputs, outputs;

  ~elang_graph() {
    if (exec) cudaGraphExecDestroy(exec);
    if (graph) cudaGraphDestroy(graph);
  }
};

namespace {

using elang::Branch;
using elang::Copy;

// Nodes one behind the other, up to the first that fails.
class Chain {
  cudaGraph_t graph_;

 public:
  cudaGraphNode_t last = nullptr;
  const char* what = nullptr;
  cudaError_t error = cudaSuccess;

  explicit Chain(cudaGraph_t graph) : graph_(graph) {}

  // add_behind(graph, last node, &new node)
  template <class F>
  void add(const char* doing, const F& add_behind) {
    if (error) return;
    what = doing;
    cudaGraphNode_t node = nullptr;
    error = add_behind(graph_, last, &node);
    last = node;
  }

  void add_copies(const char* doing, const std::vector<Copy>& copies) {
    add(doing, [&](cudaGraph_t graph, cudaGraphNode_t behind, cudaGraphNode_t* node) {
      return elang::add_copies(graph, behind, copies.data(), static_cast<int>(copies.size()), node);
    });
  }

  void add_child(const char* doing, void* child) {
    add(doing, [&](cudaGraph_t graph, cudaGraphNode_t behind, cudaGraphNode_t* node) {
      return cudaGraphAddChildGraphNode(node, graph, &behind, 1, static_cast<cudaGraph_t>(child));
    });
  }

  void add_conditional(
      cudaGraphConditionalHandle handle, cudaGraphConditionalNodeType type, void* const* bodies, int count) {
    add("adding a conditional node", [&](cudaGraph_t graph, cudaGraphNode_t behind, cudaGraphNode_t* node) {
      cudaGraphNodeParams p = {cudaGraphNodeTypeConditional, {}, {}, 0};
      p.conditional.handle = handle, p.conditional.type = type, p.conditional.size = static_cast<unsigned>(count);
#if CUDART_VERSION >= 13000
      cudaError_t failure = cudaGraphAddNode(node, graph, &behind, nullptr, 1, &p);
#else
      cudaError_t failure = cudaGraphAddNode(node, graph, &behind, 1, &p);
#endif
      cudaGraphNode_t whole;
      for (int i = 0; i < count && !failure; ++i)
        failure = cudaGraphAddChildGraphNode(
            &whole, p.conditional.phGraph_out[i], nullptr, 0, static_cast<cudaGraph_t>(bodies[i]));
      return failure;
    });
  }
};

// The other end of each is not known yet.
std::vector<Copy> copies_of(const elang_graph_tensor* tensors, int count) {
  std::vector<Copy> copies;
  for (int i = 0; i < count; ++i) copies.push_back({tensors[i].own, tensors[i].own, tensors[i].bytes});
  return copies;
}

cudaError_t create_handles(const elang_graph_parts& parts, cudaGraph_t graph, Branch* branch) {
  // What the condition is where the kernel does not set it: past the last body, or false.
  const unsigned nobody = parts.with_switch ? parts.buckets : 0;
  branch->with_switch = parts.with_switch;
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < (parts.with_switch ? 1 : parts.buckets) && !error; ++i)
    error = cudaGraphConditionalHandleCreate(&branch->handle[i], graph, nobody, cudaGraphCondAssignDefault);
  return error;
}

const char* compose(const elang_graph_parts& parts, elang_graph* g) {
  if (const cudaError_t error = cudaGraphCreate(&g->graph, 0)) return failed("creating a graph", cudaGetErrorString(error));
  Branch branch{};
  branch.n_routed = parts.n_routed, branch.rows = parts.rows, branch.buckets = parts.buckets;
  branch.counts = reinterpret_cast<unsigned long long*>(parts.counts), branch.batches = parts.batches;
  for (int i = 0; i < parts.buckets; ++i) branch.size[i] = parts.sizes[i];
  if (const cudaError_t error = create_handles(parts, g->graph, &branch))
    return failed("creating a condition", cudaGetErrorString(error));

  Chain chain(g->graph);
  chain.add_copies("adding the copies of the inputs", g->inputs);
  g->copy_in = chain.last;
  chain.add_child("adding Swift's graph", parts.decide);
  chain.add("adding the kernel that picks a bucket", [&](cudaGraph_t graph, cudaGraphNode_t behind, cudaGraphNode_t* node) {
    return elang::add_branch(graph, behind, branch, node);
  });
#if CUDART_VERSION >= 12080
  if (parts.with_switch) chain.add_conditional(branch.handle[0], cudaGraphCondTypeSwitch, parts.bodies, parts.buckets);
#endif
  if (!parts.with_switch)
    for (int i = 0; i < parts.buckets; ++i) chain.add_conditional(branch.handle[i], cudaGraphCondTypeIf, parts.bodies + i, 1);
  chain.add_child("adding the graph that merges", parts.merge);
  chain.add_copies("adding the copies of the answers", g->outputs);
  g->copy_out = chain.last;
  chain.add("instantiating the graph", [&](cudaGraph_t graph, cudaGraphNode_t, cudaGraphNode_t*) {
    return cudaGraphInstantiate(&g->exec, graph, 0);
  });
  return chain.error ? failed(chain.what, cudaGetErrorString(chain.error)) : nullptr;
}

}  // namespace

EXPORT const char* elang_graph_new(
    const elang_graph_parts* parts, const elang_graph_tensor* inputs, int input_count, const elang_graph_tensor* outputs,
    int output_count, elang_graph** out) {
  const char* why;
  const char* const nodes = elang_graph_nodes(&why);
  if (!nodes) return failed("building a graph", why);
  if (parts->with_switch && nodes[0] != 's') return failed("building a graph", "there is no SWITCH node here");
  if (parts->buckets < 1 || parts->buckets > elang::kMaxBuckets) return failed("building a graph", "wanted 1 to 64 buckets");
  if (input_count > elang::kMaxCopies || output_count > elang::kMaxCopies)
    return failed("building a graph", "wanted at most 16 tensors in and out");
  const elang::DeviceGuard guard(parts->device);
  auto* g = new (std::nothrow) elang_graph;
  if (!g) return failed("building a graph", "out of memory");
  g->device = parts->device;
  g->inputs = copies_of(inputs, input_count), g->outputs = copies_of(outputs, output_count);
  if (const char* error = compose(*parts, g)) {
    delete g;
    return error;
  }
  *out = g;
  return nullptr;
}

EXPORT void elang_graph_delete(elang_graph* graph) {
  const elang::DeviceGuard guard(graph->device);
  delete graph;
}

EXPORT const char* elang_graph_launch(elang_graph* graph, const void* const* inputs, void* const* outputs) {
  const elang::DeviceGuard guard(graph->device);
  cudaStream_t stream;
  if (const cudaError_t error = elang::current_stream(graph->device, &stream))
    return failed("finding torch's stream", cudaGetErrorString(error));
  for (size_t i = 0; i < graph->inputs.size(); ++i) graph->inputs[i].from = inputs[i];
  for (size_t i = 0; i < graph->outputs.size(); ++i) graph->outputs[i].to = outputs[i];
  const auto set = [&](cudaGraphNode_t node, const std::vector<Copy>& copies) {
    return elang::set_copies(graph->exec, node, copies.data(), static_cast<int>(copies.size()));
  };
  cudaError_t error = set(graph->copy_in, graph->inputs);
  if (!error) error = set(graph->copy_out, graph->outputs);
  if (error) return failed("giving the graph this batch's addresses", cudaGetErrorString(error));
  error = cudaGraphLaunch(graph->exec, stream);
  return error ? failed("the launch of the graph", cudaGetErrorString(error)) : nullptr;
}

#else

EXPORT const char* elang_graph_new(
    const elang_graph_parts*, const elang_graph_tensor*, int, const elang_graph_tensor*, int, elang_graph**) {
  const char* why;
  elang_graph_nodes(&why);
  return failed("building a graph", why);
}
EXPORT void elang_graph_delete(elang_graph*) {}
EXPORT const char* elang_graph_launch(elang_graph*, const void* const*, void* const*) { return "there is no graph"; }

#endif

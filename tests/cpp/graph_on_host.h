// What csrc/cuda/graph.cpp asks of the CUDA runtime, on the host: a graph is a list of nodes that run one behind the other.
// As in CUDA a child is cloned, an instantiated graph keeps parameters of its own, and a condition starts each launch from
// its default. A node that does not follow the last one is an error: these graphs are chains.
#pragma once

#include <map>

#include "cuda_on_host.h"

namespace cuda_on_host {

inline std::map<cudaGraphConditionalHandle, unsigned> conditions;

}  // namespace cuda_on_host

struct CUgraphNode_st {
  std::function<void()> kernel;
  std::shared_ptr<CUgraph_st> child;
  std::vector<std::shared_ptr<CUgraph_st>> bodies;
  std::vector<cudaGraph_t> bodies_out;  // what the caller fills them through
  cudaGraphConditionalNodeType type;
  cudaGraphConditionalHandle condition;
};

struct CUgraph_st {
  std::vector<std::shared_ptr<CUgraphNode_st>> nodes;
  std::map<cudaGraphConditionalHandle, unsigned> defaults;

  cudaError_t add(CUgraphNode_st node, const cudaGraphNode_t* behind, size_t count, cudaGraphNode_t* out) {
    if (nodes.empty() ? count != 0 : count != 1 || behind[0] != nodes.back().get()) return cudaErrorInvalidValue;
    nodes.push_back(std::make_shared<CUgraphNode_st>(std::move(node)));
    *out = nodes.back().get();
    return cudaSuccess;
  }
};

struct CUgraphExec_st {
  CUgraph_st graph;
  std::map<cudaGraphNode_t, std::function<void()>> changed;

  void run(const CUgraph_st& part) {
    using cuda_on_host::conditions;
    for (const auto& node : part.nodes) {
      if (node->kernel) {
        const auto found = changed.find(node.get());
        (found == changed.end() ? node->kernel : found->second)();
      } else if (node->child) {
        run(*node->child);
      } else if (node->type == cudaGraphCondTypeSwitch) {
        if (conditions[node->condition] < node->bodies.size()) run(*node->bodies[conditions[node->condition]]);
      } else if (conditions[node->condition]) {
        run(*node->bodies[0]);
      }
    }
  }
};

inline void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
  cuda_on_host::conditions[handle] = value;
}

extern "C" {
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorInvalidValue ? "invalid argument" : "an error"; }
cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) { return *graph = new CUgraph_st, cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphConditionalHandleCreate(
    cudaGraphConditionalHandle* handle, cudaGraph_t graph, unsigned initial, unsigned flags) {
  static cudaGraphConditionalHandle last = 0;
  if (flags != cudaGraphCondAssignDefault) return cudaErrorInvalidValue;
  graph->defaults[*handle = ++last] = initial;
  return cudaSuccess;
}
cudaError_t cudaGraphAddChildGraphNode(
    cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* behind, size_t count, cudaGraph_t child) {
  return graph->add({{}, std::make_shared<CUgraph_st>(*child), {}, {}, {}, {}}, behind, count, node);
}
cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* behind,
                             const cudaGraphEdgeData*, size_t count, cudaGraphNodeParams* params) {
  auto& p = params->conditional;
  if (params->type != cudaGraphNodeTypeConditional || !graph->defaults.count(p.handle)) return cudaErrorInvalidValue;
  if (p.type == cudaGraphCondTypeIf && p.size != 1) return cudaErrorInvalidValue;
  CUgraphNode_st conditional{{}, {}, {}, {}, p.type, p.handle};
  for (unsigned i = 0; i < p.size; ++i) {
    conditional.bodies.push_back(std::make_shared<CUgraph_st>());
    conditional.bodies_out.push_back(conditional.bodies.back().get());
  }
  const cudaError_t error = graph->add(std::move(conditional), behind, count, node);
  if (!error) p.phGraph_out = (*node)->bodies_out.data();
  return error;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  return *exec = new CUgraphExec_st{*graph, {}}, cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  cuda_on_host::conditions = exec->graph.defaults;
  exec->run(exec->graph);
  return cudaSuccess;
}
}

namespace elang {
namespace {

template <class P>
std::function<void()> launch_of(void (*kernel)(P), int64_t blocks, int threads, P params) {
  return [=] {
    cuda_on_host::launch(blocks, [&] {
      if (cuda_on_host::block().thread() < threads) kernel(params);
    });
  };
}

template <class P>
cudaError_t add_node(
    cudaGraph_t graph, cudaGraphNode_t behind, void (*kernel)(P), int64_t blocks, int threads, P params, cudaGraphNode_t* node) {
  return graph->add({launch_of(kernel, blocks, threads, params), {}, {}, {}, {}, {}}, &behind, behind ? 1 : 0, node);
}

template <class P>
cudaError_t set_node(cudaGraphExec_t exec, cudaGraphNode_t node, void (*kernel)(P), int64_t blocks, int threads, P params) {
  exec->changed[node] = launch_of(kernel, blocks, threads, params);
  return cudaSuccess;
}

}  // namespace
}  // namespace elang

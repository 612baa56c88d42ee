// Which kernel, on which grid.
#include "launch.h"

#include <cstdint>
#include <initializer_list>

#include "branch.cuh"
#include "route.cuh"
#include "rows.cuh"

namespace elang {
namespace {

// Up to here the last block to arrive writes the order, alone; beyond, writing it would take one multiprocessor too long.
constexpr int64_t kFewRows = 4096;
constexpr int64_t kSharedBytes = 48000;  // of block_logits; a block has 48 KiB without asking for more
static_assert(kMaxHeadClasses * sizeof(float) <= kSharedBytes, "a row's logits fit");

constexpr int64_t kMaxUnits = int64_t{1} << 31;  // of a row

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__CUDACC__)
template <class P>
cudaError_t enqueue(void (*kernel)(P), int64_t blocks, size_t shared_bytes, cudaStream_t stream, P params) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  void* arguments[] = {&params};
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes, stream);
}

#if ELANG_CONDITIONAL_NODES
// A launch as a node has it, for the call that `use` makes of it, which copies the parameters.
template <class P, class F>
cudaError_t as_node(void (*kernel)(P), int64_t blocks, int threads, P& params, const F& use) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  void* arguments[] = {&params};
  cudaKernelNodeParams launch{};
  launch.func = reinterpret_cast<void*>(kernel);
  launch.gridDim = dim3(static_cast<unsigned>(blocks)), launch.blockDim = dim3(threads);
  launch.kernelParams = arguments;
  return use(&launch);
}

template <class P>
cudaError_t add_node(
    cudaGraph_t graph, cudaGraphNode_t behind, void (*kernel)(P), int64_t blocks, int threads, P params, cudaGraphNode_t* node) {
  return as_node(kernel, blocks, threads, params, [&](const cudaKernelNodeParams* launch) {
    return cudaGraphAddKernelNode(node, graph, behind ? &behind : nullptr, behind ? 1 : 0, launch);
  });
}

template <class P>
cudaError_t set_node(cudaGraphExec_t exec, cudaGraphNode_t node, void (*kernel)(P), int64_t blocks, int threads, P params) {
  return as_node(kernel, blocks, threads, params,
                 [&](const cudaKernelNodeParams* changed) { return cudaGraphExecKernelNodeSetParams(exec, node, changed); });
}
#endif
#endif

cudaError_t set_partition(Partition& p, const RouteArgs& args, const RouteOut& out, int block_rows, cudaStream_t stream) {
  p.score = args.score, p.order = out.order, p.n_routed = out.n_routed, p.rows = args.rows;
  p.threshold = out.threshold, p.device_threshold = out.device_threshold;
  p.block_rows = block_rows;
  p.row_blocks = static_cast<int>(ceil_div(args.rows, block_rows));
  const bool few = args.rows <= kFewRows;
  p.blocks_per_finisher = static_cast<int>(few ? p.row_blocks : ceil_div(p.row_blocks, kMaxFinishers));
  p.finishers = few ? 0 : static_cast<int>(ceil_div(p.row_blocks, p.blocks_per_finisher));
  return ticket_for(stream, &p.ticket);
}

bool in_vectors(const Matrix& m, int64_t item_bytes) {
  return m.col_stride == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.row_stride * item_bytes % 16 == 0;
}

int64_t item_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

template <class Tile>
cudaError_t launch_head(RouteParams& p, const RouteOut& out, int sms, cudaStream_t stream) {
  const RouteArgs& args = p.args;
  const auto block_rows = [&] { return kWarps / p.class_warps * Tile::kRows; };
  const auto too_large = [&] { return block_rows() * args.classes * int64_t{sizeof(float)} > kSharedBytes; };
  const auto too_few = [&] { return ceil_div(args.rows, block_rows()) < 2 * sms && p.class_warps * Tile::kClasses < args.classes; };
  for (p.class_warps = 1; p.class_warps < kWarps && (too_large() || too_few());) p.class_warps *= 2;
  if (const cudaError_t error = set_partition(p.partition, args, out, block_rows(), stream)) return error;
  return enqueue(route_kernel<Tile>, p.partition.row_blocks + p.partition.finishers,
                 block_rows() * args.classes * sizeof(float), stream, p);
}

// Larger tiles read the head less often, once there are enough of them to fill the device.
template <class H, class W>
cudaError_t launch_vectors(RouteParams& p, const RouteOut& out, int sms, cudaStream_t stream) {
  using Large = VectorTile<H, W, 4>;
  const int64_t tiles = ceil_div(p.args.rows, Large::kRows) * ceil_div(p.args.classes, Large::kClasses);
  const bool fits = Large::kRows * p.args.classes * int64_t{sizeof(float)} <= kSharedBytes;
  if (tiles >= sms * kWarps && fits) return launch_head<Large>(p, out, sms, stream);
  return launch_head<VectorTile<H, W, 1>>(p, out, sms, stream);
}

UnitRows unit_rows(const Rows& rows, char* to, std::initializer_list<uintptr_t> also = {}) {
  const int64_t bytes = rows.row_bytes(), stride = rows.row_stride * rows.item_bytes;
  uintptr_t bits = reinterpret_cast<uintptr_t>(rows.data) | reinterpret_cast<uintptr_t>(to) | bytes | stride | 16;
  for (uintptr_t more : also) bits |= more;
  const int unit_log2 = __builtin_ctzll(bits);
  return {rows.data, to, stride, bytes >> unit_log2, unit_log2};
}

// One more tensor, of which `slots` rows are copied; none if they are empty.
cudaError_t append(Tensors& of, const UnitRows& rows, int64_t slots) {
  if (rows.row_units >= kMaxUnits) return cudaErrorInvalidValue;
  const int64_t blocks = of.first_block[of.count] + ceil_div(rows.row_units * slots, kUnitsPerBlock);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (blocks == of.first_block[of.count]) return cudaSuccess;
  of.tensor[of.count++] = rows;
  of.first_block[of.count] = static_cast<unsigned>(blocks);
  return cudaSuccess;
}

int64_t blocks_of(const Tensors& of) { return of.first_block[of.count]; }

}  // namespace

cudaError_t launch_route(const RouteArgs& args, const RouteOut& out, cudaStream_t stream) {
  RouteParams p{};
  p.args = args;
  p.score_lanes = 1;
  while (p.score_lanes < kWarp && p.score_lanes < args.classes) p.score_lanes *= 2;
  if (!args.head) {
    if (const cudaError_t error = set_partition(p.partition, args, out, kThreads / p.score_lanes, stream)) return error;
    return enqueue(route_logits_kernel, p.partition.row_blocks + p.partition.finishers, 0, stream, p);
  }
  int sms;
  if (const cudaError_t error = multiprocessors(&sms)) return error;
  const DType h = args.hidden.dtype, w = args.weight.dtype;
  const bool vectors = in_vectors(args.hidden, item_bytes(h)) && in_vectors(args.weight, item_bytes(w)) &&
                       args.width * item_bytes(h) % 16 == 0;
  if (vectors && h == DType::float32 && w == h) return launch_vectors<float, float>(p, out, sms, stream);
  if (vectors && h == DType::bfloat16 && w == h) return launch_vectors<__nv_bfloat16, __nv_bfloat16>(p, out, sms, stream);
  if (vectors && h == DType::float16 && w == h) return launch_vectors<__half, __half>(p, out, sms, stream);
  if (vectors && h == DType::bfloat16 && w == DType::float32) return launch_vectors<__nv_bfloat16, float>(p, out, sms, stream);
  if (vectors && h == DType::float16 && w == DType::float32) return launch_vectors<__half, float>(p, out, sms, stream);
  return launch_head<ElementTile>(p, out, sms, stream);
}

cudaError_t launch_gather(const GatherTensor* tensors, int count, const Order& order, int64_t capacity, cudaStream_t stream) {
  for (int done = 0; done < count;) {
    GatherParams p{order, capacity, {}};
    for (; done < count && p.of.count < kMaxTensors; ++done)
      if (const cudaError_t error = append(p.of, unit_rows(tensors[done].from, tensors[done].to), capacity)) return error;
    if (!p.of.count) continue;
    if (const cudaError_t error = enqueue(gather_kernel, blocks_of(p.of), 0, stream, p)) return error;
  }
  return cudaSuccess;
}

cudaError_t launch_merge(
    const Rows& kept, const Rows& routed, int64_t routed_rows, const Order& order, char* merged, cudaStream_t stream) {
  const auto of = [&](const Rows& rows, const Rows& other) {
    return unit_rows(rows, merged, {reinterpret_cast<uintptr_t>(other.data),
                                    static_cast<uintptr_t>(other.row_stride * other.item_bytes)});
  };
  const MergeParams p{order, of(kept, routed), of(routed, kept), routed_rows};
  if (p.kept.row_units >= kMaxUnits) return cudaErrorInvalidValue;
  return enqueue(merge_kernel, ceil_div(p.kept.row_units * order.rows, kUnitsPerBlock), 0, stream, p);
}

cudaError_t launch_extent(
    const Mask& mask, const Order& order, int32_t* extent, Mail* mail, uint64_t sequence, cudaStream_t stream) {
  int sms;
  if (const cudaError_t error = multiprocessors(&sms)) return error;
  ExtentParams p{mask, order, nullptr, extent, mail, sequence};
  if (const cudaError_t error = ticket_for(stream, &p.ticket)) return error;
  // A few rows a warp are quicker than an arrival of many blocks.
  constexpr int64_t kRowsPerWarp = 4;
  const int64_t blocks = ceil_div(order.rows, kWarps * kRowsPerWarp);
  return enqueue(extent_kernel, blocks < 1 ? 1 : blocks < sms ? blocks : sms, 0, stream, p);
}

#if ELANG_CONDITIONAL_NODES
namespace {

static_assert(kMaxCopies <= kMaxTensors, "one launch copies them all");

cudaError_t tensors_of(const Copy* copies, int count, Tensors* of) {
  if (count > kMaxCopies) return cudaErrorInvalidValue;
  for (int i = 0; i < count; ++i) {
    const Rows whole{static_cast<const char*>(copies[i].from), 1, copies[i].bytes, 1, &copies[i].bytes, nullptr};
    if (const cudaError_t error = append(*of, unit_rows(whole, static_cast<char*>(copies[i].to)), 1)) return error;
  }
  return blocks_of(*of) ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t add_copies(cudaGraph_t graph, cudaGraphNode_t behind, const Copy* copies, int count, cudaGraphNode_t* node) {
  Tensors of{};
  if (const cudaError_t error = tensors_of(copies, count, &of)) return error;
  return add_node(graph, behind, copy_kernel, blocks_of(of), kThreads, of, node);
}

cudaError_t set_copies(cudaGraphExec_t exec, cudaGraphNode_t node, const Copy* copies, int count) {
  Tensors of{};
  if (const cudaError_t error = tensors_of(copies, count, &of)) return error;
  return set_node(exec, node, copy_kernel, blocks_of(of), kThreads, of);
}

cudaError_t add_branch(cudaGraph_t graph, cudaGraphNode_t behind, const Branch& branch, cudaGraphNode_t* node) {
  return add_node(graph, behind, branch_kernel, 1, kWarp, branch, node);
}
#endif

}  // namespace elang

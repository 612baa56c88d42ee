// Every op schema, and the CPU's launchers of the ops on rows, on torch's stable ABI: one binary for every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/route.h"
#include "cpu/rows.h"

namespace elang {
namespace {

// A thread is worth waking for about this many multiply-adds, or bytes to copy.
constexpr int64_t kGrain = 1 << 18;

// `work` on ranges of [0, n), on other threads too where n items of `cost` each are worth it.
template <class F>
void share_out(int64_t n, int64_t cost, const F& work) {
  const int64_t grain = kGrain / std::max<int64_t>(cost, 1) + 1;
  if (n <= grain) work(0, n);
  else torch::stable::parallel_for(0, n, grain, work);
}

Decision decide(RouteArgs& args, const Threshold& threshold, Device device) {
  Decision decision(args.rows, device);
  args.score = decision.score.data_as<float>();
  const RouteKernel& kernel = route_kernel();
  const int64_t scratch = kernel.scratch(args);
  const auto run_blocks = [&](int64_t begin, int64_t end) {
    constexpr int64_t kOnStack = 4096;
    float stack[kOnStack];
    const std::unique_ptr<float[]> heap(scratch > kOnStack ? new float[scratch] : nullptr);
    kernel.rows(args, begin * kernel.lanes, std::min(end * kernel.lanes, args.rows), heap ? heap.get() : stack);
  };
  const int64_t blocks = (args.rows + kernel.lanes - 1) / kernel.lanes;
  share_out(blocks, kernel.lanes * args.classes * (args.width + 1), run_blocks);
  partition(args.score, args.rows, threshold.data() ? *threshold.data() : threshold.value(),
            decision.order.data_as<int64_t>(), decision.n_routed.data_as<int32_t>());
  return decision;
}

template <class T>
std::tuple<Handle, Handle, Handle, Handle> route_cpu(
    Handle hidden, Handle weight, std::optional<Handle> bias, T threshold, int64_t score, double temperature) {
  const RouteInputs in(hidden, weight, bias, threshold);
  RouteArgs args = in.check(kCPU, score, temperature);
  Tensor logits = empty({args.rows, args.classes}, in.hidden.dtype, in.hidden.device);
  args.logits = logits.data_as<void>();
  Decision d = decide(args, in.threshold, in.hidden.device);
  return {logits.release(), d.score.release(), d.order.release(), d.n_routed.release()};
}

template <class T>
std::tuple<Handle, Handle, Handle> route_logits_cpu(Handle logits, T threshold, int64_t score, double temperature) {
  const LogitsInputs in(logits, threshold);
  RouteArgs args = in.check(kCPU, score, temperature);
  Decision d = decide(args, in.threshold, in.logits.device);
  return {d.score.release(), d.order.release(), d.n_routed.release()};
}

// The partition that the row ops follow; its numbers become addresses, so each is checked.
struct Partition {
  std::vector<int64_t> order;
  int64_t n_routed;

  explicit Partition(const PartitionInputs& in) {
    in.check(kCPU);
    const int64_t rows = in.rows(), stride = in.order.strides[0];
    order.resize(rows);
    for (int64_t i = 0; i < rows; ++i) {
      order[i] = in.row()[i * stride];
      STD_TORCH_CHECK(order[i] >= 0 && order[i] < rows, "order: got ", order[i], ", wanted rows in [0, ", rows, ")");
    }
    n_routed = *in.count();
    STD_TORCH_CHECK(n_routed >= 0 && n_routed <= rows, "n_routed: got ", n_routed, ", wanted 0 to N = ", rows);
  }
};

HandleList gather_rows_cpu(HandleList handles, Handle order, Handle n_routed, int64_t capacity) {
  const std::vector<Input> tensors = inputs(handles);
  const PartitionInputs in(order, n_routed);
  const Partition partition(in);
  check_gather(tensors, in, capacity);
  std::vector<Tensor> gathered;
  for (const Input& t : tensors) {
    gathered.push_back(empty_rows(t, capacity));
    const Rows from = rows_of(t);
    char* const out = gathered.back().data_as<char>();
    share_out(capacity, from.row_bytes(), [&](int64_t begin, int64_t end) {
      gather(from, partition.order.data(), std::max<int64_t>(partition.n_routed - 1, 0), begin, end, out);
    });
  }
  return release(gathered);
}

Handle merge_rows_cpu(Handle kept_handle, Handle routed_handle, Handle order, Handle n_routed) {
  const Input kept(kept_handle), routed(routed_handle);
  const PartitionInputs in(order, n_routed);
  const Partition partition(in);
  check_merge(kept, routed, in);
  Tensor merged = empty_rows(kept, in.rows());
  char* const out = merged.data_as<char>();
  const Rows from_kept = rows_of(kept), from_routed = rows_of(routed);
  share_out(in.rows(), from_kept.row_bytes(),
            [&](int64_t begin, int64_t end) { scatter(from_kept, nullptr, begin, end, out); });
  share_out(std::min(partition.n_routed, routed.sizes[0]), from_routed.row_bytes(),
            [&](int64_t begin, int64_t end) { scatter(from_routed, partition.order.data(), begin, end, out); });
  return merged.release();
}

Handle routed_extent_cpu(Handle mask_handle, Handle order, Handle n_routed) {
  const Input mask(mask_handle);
  const PartitionInputs in(order, n_routed);
  const Partition partition(in);
  const int64_t length = routed_length(routed_mask(mask, in), partition.order.data(), partition.n_routed);
  Tensor extent = empty({2}, kInt32, mask.device);
  extent.data_as<int32_t>()[0] = static_cast<int32_t>(partition.n_routed);
  extent.data_as<int32_t>()[1] = static_cast<int32_t>(length);
  return extent.release();
}

}  // namespace
}  // namespace elang

STABLE_TORCH_LIBRARY(elang, m) {
  // `score` indexes elang.reference.SCORES. Results: logits [N, C], score [N] float32, order [N] int64, n_routed [1] int32.
  m.def("route(Tensor hidden, Tensor weight, Tensor? bias, float threshold, int score, float temperature)"
        " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("route.device_threshold(Tensor hidden, Tensor weight, Tensor? bias, Tensor threshold, int score, float temperature)"
        " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("route_logits(Tensor logits, float threshold, int score, float temperature) -> (Tensor, Tensor, Tensor)");
  m.def("route_logits.device_threshold(Tensor logits, Tensor threshold, int score, float temperature)"
        " -> (Tensor, Tensor, Tensor)");
  // Results: score [N] or [B] float32, argmax [N] or [B, M] int64.
  m.def("vocab_energy(Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, float temperature) -> (Tensor, Tensor)");
  m.def("gather_rows(Tensor[] tensors, Tensor order, Tensor n_routed, SymInt capacity) -> Tensor[]");
  m.def("merge_rows(Tensor kept, Tensor routed, Tensor order, Tensor n_routed) -> Tensor");
  m.def("routed_extent(Tensor mask, Tensor order, Tensor n_routed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(elang, CPU, m) {
  m.impl("route", TORCH_BOX(&elang::route_cpu<double>));
  m.impl("route.device_threshold", TORCH_BOX(&elang::route_cpu<elang::Handle>));
  m.impl("route_logits", TORCH_BOX(&elang::route_logits_cpu<double>));
  m.impl("route_logits.device_threshold", TORCH_BOX(&elang::route_logits_cpu<elang::Handle>));
  m.impl("gather_rows", TORCH_BOX(&elang::gather_rows_cpu));
  m.impl("merge_rows", TORCH_BOX(&elang::merge_rows_cpu));
  m.impl("routed_extent", TORCH_BOX(&elang::routed_extent_cpu));
}

// Every op schema and its registration, on torch's stable ABI: one binary for every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/route.h"
#include "cpu/rows.h"
#include "tensor.h"

namespace elang {
namespace {

using HandleList = std::vector<Handle>;

// A thread is worth waking for about this many multiply-adds, or bytes to copy.
constexpr int64_t kGrain = 1 << 18;

// `work` on ranges of [0, n), on other threads too where n items of `cost` each are worth it.
template <class F>
void share_out(int64_t n, int64_t cost, const F& work) {
  const int64_t grain = kGrain / std::max<int64_t>(cost, 1) + 1;
  if (n <= grain) work(0, n);
  else torch::stable::parallel_for(0, n, grain, work);
}

struct Decision {
  Tensor score, order, n_routed;  // [N] float32, [N] int64, [1] int32

  explicit Decision(int64_t rows)
      : score(empty_cpu({rows}, kFloat32)),
        order(empty_cpu({rows}, kInt64)),
        n_routed(empty_cpu({1}, kInt32)) {}
};

Matrix matrix(const Input& t, const char* name) {
  return {t.data(), float_type(t, name), t.strides[0], t.strides[1]};
}

void set_score(RouteArgs& args, int64_t kind, double temperature) {
  STD_TORCH_CHECK(kind >= 0 && kind < kNumScores, "score: got ", kind, ", wanted an index into elang.reference.SCORES");
  args.kind = static_cast<Score>(kind);
  const bool fits = args.classes > 0 && (args.kind == Score::logit) == (args.classes == 1);
  STD_TORCH_CHECK(fits, "score: got C = ", args.classes, ", wanted C = 1 with `logit` and C >= 2 with any other");
  const bool finite = temperature > 0 && temperature < __builtin_inf();
  STD_TORCH_CHECK(finite, "temperature: got ", temperature, ", wanted a finite number > 0");
  args.temperature = static_cast<float>(temperature);
}

float read_threshold(double threshold) {
  STD_TORCH_CHECK(threshold == threshold, "threshold: got NaN, wanted a number");
  return static_cast<float>(threshold);
}

float read_threshold(Handle handle) {
  const Input threshold(handle);
  check_cpu(threshold, "threshold");
  check_dtype(threshold, "threshold", kFloat32, "float32");
  if (threshold.dim > 0) check_shape(threshold, "threshold", {1}, "[] or [1]");
  return *static_cast<const float*>(threshold.data());
}

Decision decide(RouteArgs& args, float threshold) {
  Decision decision(args.rows);
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
  partition(args.score, args.rows, threshold, decision.order.data_as<int64_t>(), decision.n_routed.data_as<int32_t>());
  return decision;
}

template <class Threshold>
std::tuple<Handle, Handle, Handle, Handle> route_cpu(
    Handle hidden_handle, Handle weight_handle, std::optional<Handle> bias_handle, Threshold threshold_arg, int64_t score,
    double temperature) {
  const Input hidden(hidden_handle), weight(weight_handle), bias(bias_handle.value_or(Handle{nullptr}));
  const float threshold = read_threshold(threshold_arg);
  check_cpu(hidden, "hidden");
  check_shape(hidden, "hidden", {-1, -1}, "[N, H]");
  RouteArgs args{};
  args.head = true;
  args.rows = hidden.sizes[0], args.width = hidden.sizes[1];
  check_cpu(weight, "weight");
  check_shape(weight, "weight", {-1, args.width}, "[C, H] with the H of hidden");
  args.classes = weight.sizes[0];
  args.hidden = matrix(hidden, "hidden"), args.weight = matrix(weight, "weight");
  if (bias_handle) {
    check_cpu(bias, "bias");
    check_shape(bias, "bias", {args.classes}, "[C] with the C of weight");
    args.bias = {bias.data(), float_type(bias, "bias"), bias.strides[0], 1};
  }
  set_score(args, score, temperature);
  Tensor logits = empty_cpu({args.rows, args.classes}, hidden.dtype);
  args.logits = logits.data_as<void>();
  Decision d = decide(args, threshold);
  return {logits.release(), d.score.release(), d.order.release(), d.n_routed.release()};
}

template <class Threshold>
std::tuple<Handle, Handle, Handle> route_logits_cpu(
    Handle logits_handle, Threshold threshold_arg, int64_t score, double temperature) {
  const Input logits(logits_handle);
  const float threshold = read_threshold(threshold_arg);
  check_cpu(logits, "logits");
  check_shape(logits, "logits", {-1, -1}, "[N, C]");
  RouteArgs args{};
  args.rows = logits.sizes[0], args.classes = logits.sizes[1];
  args.hidden = matrix(logits, "logits");
  set_score(args, score, temperature);
  Decision d = decide(args, threshold);
  return {d.score.release(), d.order.release(), d.n_routed.release()};
}

Rows rows_of(const Input& t) {
  return {static_cast<const char*>(t.data()), t.item_bytes(), t.strides[0], static_cast<int>(t.dim) - 1,
          t.sizes + 1, t.strides + 1};
}

// The partition that gather and merge follow; its numbers become addresses, so each is checked.
struct Partition {
  std::vector<int64_t> order;
  int64_t n_routed = 0;

  Partition(Handle order_handle, Handle n_routed_handle) {
    const Input order_input(order_handle), n_routed_input(n_routed_handle);
    check_cpu(order_input, "order");
    check_dtype(order_input, "order", kInt64, "int64");
    check_shape(order_input, "order", {-1}, "[N]");
    const auto* row = static_cast<const int64_t*>(order_input.data());
    const int64_t rows = order_input.sizes[0], stride = order_input.strides[0];
    order.resize(rows);
    for (int64_t i = 0; i < rows; ++i) {
      order[i] = row[i * stride];
      STD_TORCH_CHECK(order[i] >= 0 && order[i] < rows, "order: got ", order[i], ", wanted rows in [0, ", rows, ")");
    }
    check_cpu(n_routed_input, "n_routed");
    check_dtype(n_routed_input, "n_routed", kInt32, "int32");
    check_shape(n_routed_input, "n_routed", {1}, "[1]");
    n_routed = *static_cast<const int32_t*>(n_routed_input.data());
    STD_TORCH_CHECK(n_routed >= 0 && n_routed <= rows, "n_routed: got ", n_routed, ", wanted 0 to N = ", rows);
  }

  int64_t rows() const { return static_cast<int64_t>(order.size()); }
};

HandleList gather_rows_cpu(HandleList handles, Handle order, Handle n_routed, int64_t capacity) {
  std::vector<Input> tensors;
  for (Handle h : handles) tensors.emplace_back(h);
  const Partition partition(order, n_routed);
  STD_TORCH_CHECK(capacity >= 0 && (capacity == 0 || partition.rows() > 0), "capacity: got ", capacity,
                  ", wanted 0 where there are no rows and at least 0 elsewhere");
  std::vector<Tensor> gathered;
  for (const Input& t : tensors) {
    check_cpu(t, "tensors");
    check_rows(t, "tensors", partition.rows());
    std::vector<int64_t> sizes(t.sizes, t.sizes + t.dim);
    sizes[0] = capacity;
    gathered.push_back(empty_cpu(t.dim, sizes.data(), t.dtype));
    const Rows from = rows_of(t);
    char* const out = gathered.back().data_as<char>();
    share_out(capacity, from.row_bytes(), [&](int64_t begin, int64_t end) {
      gather(from, partition.order.data(), std::max<int64_t>(partition.n_routed - 1, 0), begin, end, out);
    });
  }
  HandleList out;
  for (Tensor& t : gathered) out.push_back(t.release());
  return out;
}

Handle merge_rows_cpu(Handle kept_handle, Handle routed_handle, Handle order, Handle n_routed) {
  const Input kept(kept_handle), routed(routed_handle);
  const Partition partition(order, n_routed);
  check_cpu(kept, "kept");
  check_cpu(routed, "routed");
  check_rows(kept, "kept", partition.rows());
  const bool same_inner = routed.dim == kept.dim && std::equal(kept.sizes + 1, kept.sizes + kept.dim, routed.sizes + 1);
  STD_TORCH_CHECK(same_inner, "routed: got shape ", shape_of(routed), ", wanted [K, ...] as in kept ", shape_of(kept));
  check_dtype(kept, "kept", routed.dtype, "that of routed");
  Tensor merged = empty_cpu(kept.dim, kept.sizes, kept.dtype);
  char* const out = merged.data_as<char>();
  const Rows from_kept = rows_of(kept), from_routed = rows_of(routed);
  share_out(partition.rows(), from_kept.row_bytes(),
            [&](int64_t begin, int64_t end) { scatter(from_kept, nullptr, begin, end, out); });
  share_out(std::min(partition.n_routed, routed.sizes[0]), from_routed.row_bytes(),
            [&](int64_t begin, int64_t end) { scatter(from_routed, partition.order.data(), begin, end, out); });
  return merged.release();
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
  m.def("gather_rows(Tensor[] tensors, Tensor order, Tensor n_routed, SymInt capacity) -> Tensor[]");
  m.def("merge_rows(Tensor kept, Tensor routed, Tensor order, Tensor n_routed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(elang, CPU, m) {
  m.impl("route", TORCH_BOX(&elang::route_cpu<double>));
  m.impl("route.device_threshold", TORCH_BOX(&elang::route_cpu<elang::Handle>));
  m.impl("route_logits", TORCH_BOX(&elang::route_logits_cpu<double>));
  m.impl("route_logits.device_threshold", TORCH_BOX(&elang::route_logits_cpu<elang::Handle>));
  m.impl("gather_rows", TORCH_BOX(&elang::gather_rows_cpu));
  m.impl("merge_rows", TORCH_BOX(&elang::merge_rows_cpu));
}

// The ops on CUDA: checks, empty return, device guard, current stream, launch, launch check.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "device.h"
#include "launch.h"

namespace elang {
namespace {

// A tensor's device, made current, and torch's stream on it.
class Launch {
  DeviceGuard guard_;
  const char* kernel_;
  cudaStream_t stream_ = nullptr;

  static int usable(int device) {
    const char* const obstacle = cuda_obstacle();
    STD_TORCH_CHECK(!obstacle, "elang's CUDA kernels cannot run: ", obstacle ? obstacle : "");
    return device;
  }

 public:
  Launch(const char* kernel, Device device) : guard_(usable(device.index)), kernel_(kernel) {
    check(current_stream(device.index, &stream_), [] { return "finding torch's stream"; });
  }

  operator cudaStream_t() const { return stream_; }

  // what() says what was tried; only a failure pays for the words.
  template <class F>
  void check(cudaError_t error, const F& what) const {
    STD_TORCH_CHECK(error == cudaSuccess, kernel_, ": ", what(), " failed: ", cudaGetErrorString(error));
  }
};

RouteOut decide(const RouteArgs& args, const Decision& decision, const Threshold& threshold) {
  STD_TORCH_CHECK(args.rows < int64_t{1} << 31, "got N = ", args.rows, " rows, wanted fewer than 2^31");
  return {decision.order.data_as<int64_t>(), decision.n_routed.data_as<int32_t>(), threshold.value(), threshold.data()};
}

template <class F>
void run(const Launch& launch, RouteArgs& args, const Decision& decision, const RouteOut& out, const F& what) {
  args.score = decision.score.data_as<float>();
  if (args.rows == 0) launch.check(cudaMemsetAsync(out.n_routed, 0, sizeof(int32_t), launch), what);
  else launch.check(launch_route(args, out, launch), what);
}

template <class T>
std::tuple<Handle, Handle, Handle, Handle> route_cuda(
    Handle hidden, Handle weight, std::optional<Handle> bias, T threshold, int64_t score, double temperature) {
  const RouteInputs in(hidden, weight, bias, threshold);
  RouteArgs args = in.check(kCUDA, score, temperature);
  STD_TORCH_CHECK(args.classes <= kMaxHeadClasses, "weight: got C = ", args.classes, ", wanted at most ", kMaxHeadClasses,
                  " on CUDA; compute the logits and use route_logits");
  const Device device = in.hidden.device;
  const Launch launch("route", device);
  Tensor logits = empty({args.rows, args.classes}, in.hidden.dtype, device);
  args.logits = logits.data_as<void>();
  Decision d(args.rows, device);
  const RouteOut out = decide(args, d, in.threshold);
  run(launch, args, d, out, [&] { return "a launch for hidden " + shape_of(in.hidden) + ", weight " + shape_of(in.weight); });
  return {logits.release(), d.score.release(), d.order.release(), d.n_routed.release()};
}

template <class T>
std::tuple<Handle, Handle, Handle> route_logits_cuda(Handle logits, T threshold, int64_t score, double temperature) {
  const LogitsInputs in(logits, threshold);
  RouteArgs args = in.check(kCUDA, score, temperature);
  const Launch launch("route_logits", in.logits.device);
  Decision d(args.rows, in.logits.device);
  const RouteOut out = decide(args, d, in.threshold);
  run(launch, args, d, out, [&] { return "a launch for logits " + shape_of(in.logits); });
  return {d.score.release(), d.order.release(), d.n_routed.release()};
}

// The kernels copy rows as runs of bytes: a row that is not one is made so first.
Input with_contiguous_rows(Input tensor) {
  if (rows_of(tensor).rows_are_contiguous()) return tensor;
  Tensor copy = empty_rows(tensor, tensor.sizes[0]);
  copy.copy_from(tensor);
  return Input(copy.release());
}

Order order_of(const PartitionInputs& in) { return {in.row(), in.order.strides[0], in.count(), in.rows()}; }

HandleList gather_rows_cuda(HandleList handles, Handle order, Handle n_routed, int64_t capacity) {
  std::vector<Input> tensors = inputs(handles);
  const PartitionInputs in(order, n_routed);
  in.check(kCUDA);
  check_gather(tensors, in, capacity);
  const Launch launch("gather_rows", in.order.device);
  std::vector<Tensor> gathered;
  std::vector<GatherTensor> moves;
  for (Input& t : tensors) {
    t = with_contiguous_rows(std::move(t));
    gathered.push_back(empty_rows(t, capacity));
    moves.push_back({rows_of(t), gathered.back().data_as<char>()});
  }
  if (capacity > 0)
    launch.check(launch_gather(moves.data(), static_cast<int>(moves.size()), order_of(in), capacity, launch),
                 [&] { return "a launch for " + std::to_string(moves.size()) + " tensors of " + std::to_string(in.rows()) + " rows"; });
  return release(gathered);
}

Handle merge_rows_cuda(Handle kept_handle, Handle routed_handle, Handle order, Handle n_routed) {
  Input kept(kept_handle), routed(routed_handle);
  const PartitionInputs in(order, n_routed);
  in.check(kCUDA);
  check_merge(kept, routed, in);
  const Launch launch("merge_rows", in.order.device);
  const int64_t routed_rows = routed.sizes[0];
  Tensor merged = empty_rows(kept, in.rows());
  kept = with_contiguous_rows(std::move(kept)), routed = with_contiguous_rows(std::move(routed));
  const Rows rows = rows_of(kept);
  if (in.rows() > 0 && rows.row_bytes() > 0)
    launch.check(launch_merge(rows, rows_of(routed), routed_rows, order_of(in), merged.data_as<char>(), launch),
                 [&] { return "a launch for kept " + shape_of(kept) + ", routed " + shape_of(routed); });
  return merged.release();
}

Handle routed_extent_cuda(Handle mask_handle, Handle order, Handle n_routed) {
  const Input mask(mask_handle);
  const PartitionInputs in(order, n_routed);
  in.check(kCUDA);
  const Mask m = routed_mask(mask, in);
  const Launch launch("routed_extent", in.order.device);
  Tensor extent = empty({2}, kInt32, in.order.device);
  launch.check(launch_extent(m, order_of(in), extent.data_as<int32_t>(), nullptr, 0, launch),
               [&] { return "a launch for mask " + shape_of(mask); });
  return extent.release();
}

}  // namespace
}  // namespace elang

STABLE_TORCH_LIBRARY_IMPL(elang, CUDA, m) {
  m.impl("route", TORCH_BOX(&elang::route_cuda<double>));
  m.impl("route.device_threshold", TORCH_BOX(&elang::route_cuda<elang::Handle>));
  m.impl("route_logits", TORCH_BOX(&elang::route_logits_cuda<double>));
  m.impl("route_logits.device_threshold", TORCH_BOX(&elang::route_logits_cuda<elang::Handle>));
  m.impl("gather_rows", TORCH_BOX(&elang::gather_rows_cuda));
  m.impl("merge_rows", TORCH_BOX(&elang::merge_rows_cuda));
  m.impl("routed_extent", TORCH_BOX(&elang::routed_extent_cuda));
}

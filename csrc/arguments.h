// The ops' arguments, owned and checked: what the launchers of every device have in common. Constructors own and nothing
// more, so that a check that throws finds every argument owned. No value that lies in a tensor is read here.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "rows.h"
#include "tensor.h"

namespace elang {

using HandleList = std::vector<Handle>;

inline Matrix matrix(const Input& t, const char* name) {
  return {t.data(), float_type(t, name), t.strides[0], t.strides[1]};
}

inline float checked_temperature(double temperature) {
  const bool finite = temperature > 0 && temperature < __builtin_inf();
  STD_TORCH_CHECK(finite, "temperature: got ", temperature, ", wanted a finite number > 0");
  return static_cast<float>(temperature);
}

inline void set_score(RouteArgs& args, int64_t kind, double temperature) {
  STD_TORCH_CHECK(kind >= 0 && kind < kNumScores, "score: got ", kind, ", wanted an index into elang.reference.SCORES");
  args.kind = static_cast<Score>(kind);
  const bool fits = args.classes > 0 && (args.kind == Score::logit) == (args.classes == 1);
  STD_TORCH_CHECK(fits, "score: got C = ", args.classes, ", wanted C = 1 with `logit` and C >= 2 with any other");
  args.temperature = checked_temperature(temperature);
}

// A head's weight [C, H] and, where it is defined, bias [C].
inline void check_head(const Input& weight, const Input& bias, int64_t width, Device device) {
  check_device(weight, "weight", device);
  check_shape(weight, "weight", {-1, width}, "[C, H] with the H of hidden");
  if (!bias.defined()) return;
  check_device(bias, "bias", device);
  check_shape(bias, "bias", {weight.sizes[0]}, "[C] with the C of weight");
}

inline Matrix bias_column(const Input& bias) {
  return bias.defined() ? Matrix{bias.data(), float_type(bias, "bias"), bias.strides[0], 1} : Matrix{};
}

// A threshold on the host, or a float32 tensor [] or [1].
class Threshold {
  double value_ = 0;
  std::optional<Input> tensor_;

 public:
  explicit Threshold(double value) : value_(value) {}
  explicit Threshold(Handle handle) : tensor_(handle) {}

  void check(Device device) const {
    STD_TORCH_CHECK(value_ == value_, "threshold: got NaN, wanted a number");
    if (!tensor_) return;
    check_device(*tensor_, "threshold", device);
    check_dtype(*tensor_, "threshold", kFloat32, "float32");
    if (tensor_->dim > 0) check_shape(*tensor_, "threshold", {1}, "[] or [1]");
  }

  float value() const { return static_cast<float>(value_); }
  const float* data() const { return tensor_ ? static_cast<const float*>(tensor_->data()) : nullptr; }
};

struct RouteInputs {
  Input hidden, weight, bias;
  Threshold threshold;

  template <class T>
  RouteInputs(Handle hidden_handle, Handle weight_handle, std::optional<Handle> bias_handle, T threshold_arg)
      : hidden(hidden_handle), weight(weight_handle), bias(bias_handle.value_or(Handle{nullptr})),
        threshold(threshold_arg) {}

  RouteArgs check(int32_t device_type, int64_t score, double temperature) const {
    check_device_type(hidden, "hidden", device_type);
    check_shape(hidden, "hidden", {-1, -1}, "[N, H]");
    RouteArgs args{};
    args.head = true;
    args.rows = hidden.sizes[0], args.width = hidden.sizes[1];
    check_head(weight, bias, args.width, hidden.device);
    args.classes = weight.sizes[0];
    args.hidden = matrix(hidden, "hidden"), args.weight = matrix(weight, "weight"), args.bias = bias_column(bias);
    threshold.check(hidden.device);
    set_score(args, score, temperature);
    return args;
  }
};

// An attention mask [rows, columns].
inline Mask mask_of(const Input& t) {
  const bool is_float = t.dtype == kFloat32 || t.dtype == kBFloat16 || t.dtype == kFloat16 || t.dtype == kFloat64;
  const bool is_whole = t.dtype == kBool || t.dtype == kUInt8 || t.dtype == kInt8 || t.dtype == kInt16 ||
                        t.dtype == kInt32 || t.dtype == kInt64;
  STD_TORCH_CHECK(is_float || is_whole, "mask: got another dtype, wanted bool, an integer or a float");
  return {static_cast<const char*>(t.data()), t.item_bytes(), is_float, t.strides[0], t.strides[1],
          t.sizes[0], t.sizes[1]};
}

struct LogitsInputs {
  Input logits;
  Threshold threshold;

  template <class T>
  LogitsInputs(Handle logits_handle, T threshold_arg) : logits(logits_handle), threshold(threshold_arg) {}

  RouteArgs check(int32_t device_type, int64_t score, double temperature) const {
    check_device_type(logits, "logits", device_type);
    check_shape(logits, "logits", {-1, -1}, "[N, C]");
    RouteArgs args{};
    args.rows = logits.sizes[0], args.classes = logits.sizes[1];
    args.hidden = matrix(logits, "logits");
    threshold.check(logits.device);
    set_score(args, score, temperature);
    return args;
  }
};

// What a route decided: score [N] float32, order [N] int64, n_routed [1] int32.
struct Decision {
  Tensor score, order, n_routed;

  Decision(int64_t rows, Device device)
      : score(empty({rows}, kFloat32, device)),
        order(empty({rows}, kInt64, device)),
        n_routed(empty({1}, kInt32, device)) {}
};

// order [N] and n_routed [1] as arguments of the row ops.
struct PartitionInputs {
  Input order, n_routed;

  PartitionInputs(Handle order_handle, Handle n_routed_handle) : order(order_handle), n_routed(n_routed_handle) {}

  void check(int32_t device_type) const {
    check_device_type(order, "order", device_type);
    check_dtype(order, "order", kInt64, "int64");
    check_shape(order, "order", {-1}, "[N]");
    check_device(n_routed, "n_routed", order.device);
    check_dtype(n_routed, "n_routed", kInt32, "int32");
    check_shape(n_routed, "n_routed", {1}, "[1]");
  }

  int64_t rows() const { return order.sizes[0]; }
  const int64_t* row() const { return static_cast<const int64_t*>(order.data()); }
  const int32_t* count() const { return static_cast<const int32_t*>(n_routed.data()); }
};

inline Rows rows_of(const Input& t) {
  return {static_cast<const char*>(t.data()), t.item_bytes(), t.strides[0], static_cast<int>(t.dim) - 1,
          t.sizes + 1, t.strides + 1};
}

inline std::vector<Input> inputs(const HandleList& handles) {
  std::vector<Input> tensors;
  for (Handle h : handles) tensors.emplace_back(h);
  return tensors;
}

inline void check_gather(const std::vector<Input>& tensors, const PartitionInputs& partition, int64_t capacity) {
  STD_TORCH_CHECK(capacity >= 0 && (capacity == 0 || partition.rows() > 0), "capacity: got ", capacity,
                  ", wanted 0 where there are no rows and at least 0 elsewhere");
  for (const Input& t : tensors) {
    check_device(t, "tensors", partition.order.device);
    check_rows(t, "tensors", partition.rows());
  }
}

inline Tensor empty_rows(const Input& like, int64_t rows) {
  std::vector<int64_t> sizes(like.sizes, like.sizes + like.dim);
  sizes[0] = rows;
  return empty(like.dim, sizes.data(), like.dtype, like.device);
}

inline HandleList release(std::vector<Tensor>& tensors) {
  HandleList handles;
  for (Tensor& t : tensors) handles.push_back(t.release());
  return handles;
}

inline void check_merge(const Input& kept, const Input& routed, const PartitionInputs& partition) {
  check_device(kept, "kept", partition.order.device);
  check_device(routed, "routed", partition.order.device);
  check_rows(kept, "kept", partition.rows());
  const bool same_inner = routed.dim == kept.dim && std::equal(kept.sizes + 1, kept.sizes + kept.dim, routed.sizes + 1);
  STD_TORCH_CHECK(same_inner, "routed: got shape ", shape_of(routed), ", wanted [K, ...] as in kept ", shape_of(kept));
  check_dtype(kept, "kept", routed.dtype, "that of routed");
}

inline Mask routed_mask(const Input& t, const PartitionInputs& partition) {
  check_device(t, "mask", partition.order.device);
  check_shape(t, "mask", {partition.rows(), -1}, "[N, M] with the N of order");
  return mask_of(t);
}

}  // namespace elang

// Argument checks of the launchers: each names the argument and what was wanted, to keep the raw ops safe to call.
// elang/checks.py says the same at more length, as ValueError or TypeError.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

#include "route.h"
#include "tensor.h"

namespace elang {

inline std::string shape_of(const Input& t) {
  std::string s = "[";
  for (int64_t d = 0; d < t.dim; ++d) s += (d ? ", " : "") + std::to_string(t.sizes[d]);
  return s + "]";
}

// A negative size stands for any.
inline void check_shape(const Input& t, const char* name, std::initializer_list<int64_t> sizes, const char* wanted) {
  bool same = t.dim == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = sizes.begin()[d] < 0 || sizes.begin()[d] == t.sizes[d];
  STD_TORCH_CHECK(same, name, ": got shape ", shape_of(t), ", wanted ", wanted);
}

inline void check_rows(const Input& t, const char* name, int64_t rows) {
  const bool same = t.dim > 0 && t.sizes[0] == rows;
  STD_TORCH_CHECK(same, name, ": got shape ", shape_of(t), ", wanted [", rows, ", ...], the N of order");
}

inline void check_dtype(const Input& t, const char* name, int32_t dtype, const char* wanted) {
  STD_TORCH_CHECK(t.dtype == dtype, name, ": got another dtype, wanted ", wanted);
}

inline void check_device_type(const Input& t, const char* name, int32_t type) {
  STD_TORCH_CHECK(t.device.type == type, name, ": got another device, wanted that of the other arguments");
}

inline void check_device(const Input& t, const char* name, Device device) {
  STD_TORCH_CHECK(t.device == device, name, ": got another device, wanted that of the other arguments");
}

inline DType float_type(const Input& t, const char* name) {
  if (t.dtype == kFloat32) return DType::float32;
  if (t.dtype == kBFloat16) return DType::bfloat16;
  if (t.dtype == kFloat16) return DType::float16;
  STD_TORCH_CHECK(false, name, ": got another dtype, wanted float32, bfloat16 or float16");
}

}  // namespace elang

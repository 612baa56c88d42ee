// Tensors as the launchers see them: owning wrappers over the stable C shim. torch::stable::Tensor would do, at the price of
// a reference-counted allocation for every argument and a second tensor object for every result, on each call.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <utility>

namespace elang {

// A tensor on the dispatcher's stack. Its receiver owns it: wrap it in a Tensor first of all.
struct Handle {
  AtenTensorHandle raw;
};

// Sizes and strides live as long as the tensor.
class Tensor {
  AtenTensorHandle handle_ = nullptr;

 public:
  explicit Tensor(Handle owned) : handle_(owned.raw) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  Handle release() { return {std::exchange(handle_, nullptr)}; }

  int64_t dim() const { return read<int64_t>(aoti_torch_get_dim); }
  int32_t dtype() const { return read<int32_t>(aoti_torch_get_dtype); }
  int32_t device_type() const { return read<int32_t>(aoti_torch_get_device_type); }
  const int64_t* sizes() const { return read<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return read<int64_t*>(aoti_torch_get_strides); }
  const void* data() const { return read<const void*>(torch_get_const_data_ptr); }
  int64_t item_bytes() const { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype())); }
  template <class T>
  T* data_as() const {
    return static_cast<T*>(read<void*>(torch_get_mutable_data_ptr));
  }

 private:
  template <class T, class F>
  T read(F getter) const {
    T value;
    TORCH_ERROR_CODE_CHECK(getter(handle_, &value));
    return value;
  }
};

// Contiguous and uninitialised. Through the shim: half the cost of the stable new_empty.
inline Tensor empty_cpu(int64_t dims, const int64_t* sizes, int32_t dtype) {
  constexpr int64_t kMaxDims = 16;
  STD_TORCH_CHECK(dims <= kMaxDims, "got a tensor of ", dims, " dimensions, wanted at most ", kMaxDims);
  int64_t strides[kMaxDims];
  for (int64_t d = dims - 1, stride = 1; d >= 0; stride *= sizes[d--]) strides[d] = stride;
  Handle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle.raw));
  return Tensor(handle);
}

template <size_t D>
Tensor empty_cpu(const int64_t (&sizes)[D], int32_t dtype) {
  return empty_cpu(static_cast<int64_t>(D), sizes, dtype);
}

}  // namespace elang

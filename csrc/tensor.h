// Tensors as the launchers see them: owning wrappers over the stable C shim. torch::stable::Tensor would do, at the price of
// a reference-counted allocation for every argument and a second tensor object for every result, on each call.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <utility>

namespace elang {

inline const int32_t kFloat32 = aoti_torch_dtype_float32();
inline const int32_t kFloat64 = aoti_torch_dtype_float64();
inline const int32_t kBFloat16 = aoti_torch_dtype_bfloat16();
inline const int32_t kFloat16 = aoti_torch_dtype_float16();
inline const int32_t kInt32 = aoti_torch_dtype_int32();
inline const int32_t kInt64 = aoti_torch_dtype_int64();
inline const int32_t kInt16 = aoti_torch_dtype_int16();
inline const int32_t kInt8 = aoti_torch_dtype_int8();
inline const int32_t kUInt8 = aoti_torch_dtype_uint8();
inline const int32_t kBool = aoti_torch_dtype_bool();
inline const int32_t kCPU = aoti_torch_device_type_cpu();
inline const int32_t kCUDA = aoti_torch_device_type_cuda();

struct Device {
  int32_t type = 0, index = 0;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// A tensor on the dispatcher's stack. Its receiver owns it: wrap it in an Input first of all.
struct Handle {
  AtenTensorHandle raw;
};

class Tensor {
  AtenTensorHandle handle_ = nullptr;

 public:
  explicit Tensor(Handle owned) : handle_(owned.raw) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  bool defined() const { return handle_; }
  AtenTensorHandle raw() const { return handle_; }
  void copy_from(const Tensor& other) { TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(handle_, other.handle_, 0)); }
  Handle release() { return {std::exchange(handle_, nullptr)}; }

  template <class T>
  T* data_as() const {
    return static_cast<T*>(read<void*>(torch_get_mutable_data_ptr));
  }

 protected:
  template <class T, class F>
  T read(F getter) const {
    T value;
    TORCH_ERROR_CODE_CHECK(getter(handle_, &value));
    return value;
  }
};

// An argument. What the checks look at is read once: every look is a call across the shim.
class Input : public Tensor {
 public:
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int32_t dtype = 0;
  Device device;

  explicit Input(Handle owned) : Tensor(owned) {
    if (!defined()) return;
    dim = read<int64_t>(aoti_torch_get_dim);
    sizes = read<int64_t*>(aoti_torch_get_sizes);
    strides = read<int64_t*>(aoti_torch_get_strides);
    dtype = read<int32_t>(aoti_torch_get_dtype);
    device.type = read<int32_t>(aoti_torch_get_device_type);
    if (device.type != kCPU) device.index = read<int32_t>(aoti_torch_get_device_index);
  }

  const void* data() const { return read<const void*>(torch_get_const_data_ptr); }
  int64_t item_bytes() const { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)); }
};

// Contiguous and uninitialised. Through the shim: half the cost of the stable new_empty.
inline Tensor empty(int64_t dims, const int64_t* sizes, int32_t dtype, Device device) {
  constexpr int64_t kMaxDims = 16;
  STD_TORCH_CHECK(dims <= kMaxDims, "got a tensor of ", dims, " dimensions, wanted at most ", kMaxDims);
  int64_t strides[kMaxDims];
  for (int64_t d = dims - 1, stride = 1; d >= 0; stride *= sizes[d--]) strides[d] = stride;
  Handle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, device.type, device.index, &handle.raw));
  return Tensor(handle);
}

template <size_t D>
Tensor empty(const int64_t (&sizes)[D], int32_t dtype, Device device) {
  return empty(static_cast<int64_t>(D), sizes, dtype, device);
}

// A float32 matrix on the CPU over memory of someone else's.
inline Tensor view(const float* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  Handle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<float*>(data), 2, sizes, strides, 0, kFloat32, kCPU, 0, &handle.raw));
  return Tensor(handle);
}

}  // namespace elang

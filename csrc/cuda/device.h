// The CUDA device as the launchers see it.
#pragma once

#include <cuda_runtime_api.h>

namespace elang {

// Why no CUDA kernel can run in this process, or null. Probed once.
const char* cuda_obstacle();

// torch's current stream of a device. Looked up in torch's CUDA library at run time, so that this library also loads into a
// torch that has none.
cudaError_t current_stream(int device, cudaStream_t* stream);

// Makes a device current while it lives.
class DeviceGuard {
  int previous_ = -1;

 public:
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&previous_) == cudaSuccess && previous_ != device) cudaSetDevice(device);
    else previous_ = -1;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
};

}  // namespace elang

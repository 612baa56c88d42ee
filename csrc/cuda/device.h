// The CUDA device as the launchers see it.
#pragma once

#include <cuda_runtime_api.h>

namespace elang {

// Why no CUDA kernel can run in this process, or null. Probed once.
const char* cuda_obstacle();

// torch's current stream of a device. Looked up in torch's CUDA library at run time, so that this library also loads into a
// torch that has none.
cudaError_t current_stream(int device, cudaStream_t* stream);

// Makes a device current while it lives. It puts back the driver's context rather than a device number: torch has a CUDA
// runtime of its own, and what this one takes for the previous device need not be what torch does.
class DeviceGuard {
  bool changed_ = false;
  void* previous_ = nullptr;  // a CUcontext

 public:
  explicit DeviceGuard(int device);
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard();
};

}  // namespace elang

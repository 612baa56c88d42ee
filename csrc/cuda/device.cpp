#include "device.h"

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <mutex>
#include <unordered_map>

#include "launch.h"

namespace elang {
namespace {

constexpr int kMaxDevices = 64;

// Tickets of one device, taken from blocks of device memory that live as long as the process.
class TicketPool {
  std::mutex mutex_;
  std::unordered_map<unsigned long long, Ticket*> of_stream_;
  Ticket* next_ = nullptr;
  int left_ = 0;

  // Also in the middle of a capture, to which this allocation and its clearing do not belong.
  cudaError_t grow() {
    constexpr int kTickets = 1024;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
    if (error) return error;
    void* memory = nullptr;
    cudaStream_t side = nullptr;
    error = cudaMalloc(&memory, kTickets * sizeof(Ticket));
    if (!error) error = cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking);
    if (!error) error = cudaMemsetAsync(memory, 0, kTickets * sizeof(Ticket), side);
    if (!error) error = cudaStreamSynchronize(side);
    if (side) cudaStreamDestroy(side);
    if (error) cudaFree(memory);
    else next_ = static_cast<Ticket*>(memory), left_ = kTickets;
    cudaThreadExchangeStreamCaptureMode(&mode);
    return error;
  }

  cudaError_t take(Ticket** ticket) {
    if (!left_)
      if (const cudaError_t error = grow()) return error;
    *ticket = next_++;
    --left_;
    return cudaSuccess;
  }

 public:
  cudaError_t ticket_for(cudaStream_t stream, Ticket** ticket) {
    cudaStreamCaptureStatus capture;
    if (const cudaError_t error = cudaStreamIsCapturing(stream, &capture)) return error;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (capture != cudaStreamCaptureStatusNone) return take(ticket);
    unsigned long long id;  // of the stream for good, where its handle may come again
    if (const cudaError_t error = cudaStreamGetId(stream, &id)) return error;
    Ticket*& mine = of_stream_[id];
    if (!mine)
      if (const cudaError_t error = take(&mine)) return error;
    *ticket = mine;
    return cudaSuccess;
  }
};

std::array<TicketPool, kMaxDevices>& pools() {
  static auto* all = new std::array<TicketPool, kMaxDevices>;  // outlives every static that still launches
  return *all;
}

cudaError_t current_device(int* device) {
  const cudaError_t error = cudaGetDevice(device);
  return error || *device < kMaxDevices ? error : cudaErrorInvalidDevice;
}

// A function of the driver, which is loaded wherever there is a device.
template <class F>
F* driver_function(const char* name) {
  void* const library = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_LAZY);
  return library ? reinterpret_cast<F*>(dlsym(library, name)) : nullptr;
}

const char* find_obstacle() {
  static char text[200];
  int built = 0, driver = 0, devices = 0;
  cudaRuntimeGetVersion(&built);
  cudaDriverGetVersion(&driver);
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (!error && devices > 0) return nullptr;
  if (error == cudaErrorInsufficientDriver && driver > 0)
    std::snprintf(text, sizeof(text), "the driver knows CUDA %d.%d, elang was built with CUDA %d.%d and needs a newer one",
                  driver / 1000, driver % 1000 / 10, built / 1000, built % 1000 / 10);
  else if (driver == 0) std::snprintf(text, sizeof(text), "there is no NVIDIA driver");
  else std::snprintf(text, sizeof(text), "%s", error ? cudaGetErrorString(error) : "there is no CUDA device");
  return text;
}

}  // namespace

const char* cuda_obstacle() {
  static const char* const obstacle = find_obstacle();
  return obstacle;
}

DeviceGuard::DeviceGuard(int device) {
  static const auto current_context = driver_function<int(void**)>("cuCtxGetCurrent");
  int previous;
  if (!current_context || cudaGetDevice(&previous) || previous == device) return;
  changed_ = current_context(&previous_) == 0;
  cudaSetDevice(device);
}

DeviceGuard::~DeviceGuard() {
  static const auto set_context = driver_function<int(void*)>("cuCtxSetCurrent");
  if (changed_) set_context(previous_);
}

cudaError_t current_stream(int device, cudaStream_t* stream) {
  using Lookup = int (*)(int32_t, void**);
  static const auto lookup = [] {
    void* const torch = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return torch ? reinterpret_cast<Lookup>(dlsym(torch, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!lookup) return cudaErrorSharedObjectSymbolNotFound;
  void* found = nullptr;
  if (lookup(device, &found)) return cudaErrorInvalidDevice;
  *stream = static_cast<cudaStream_t>(found);
  return cudaSuccess;
}

cudaError_t ticket_for(cudaStream_t stream, Ticket** ticket) {
  int device;
  if (const cudaError_t error = current_device(&device)) return error;
  return pools()[device].ticket_for(stream, ticket);
}

cudaError_t multiprocessors(int* count) {
  static std::array<int, kMaxDevices> known{};
  int device;
  if (const cudaError_t error = current_device(&device)) return error;
  // Threads that race here all write the same.
  *count = __atomic_load_n(&known[device], __ATOMIC_RELAXED);
  if (*count) return cudaSuccess;
  const cudaError_t error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (!error) __atomic_store_n(&known[device], *count, __ATOMIC_RELAXED);
  return error;
}

}  // namespace elang

// For `elang info`: why the CUDA kernels cannot run, or null.
extern "C" __attribute__((visibility("default"))) const char* elang_cuda_obstacle() { return elang::cuda_obstacle(); }

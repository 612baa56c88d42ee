// A count without a stream-wide synchronisation: a kernel writes it to pinned, mapped host memory, where the host polls for
// it. The C ABI that elang._C calls; an error is a text that lives until the thread's next call, null is success.
#include <new>

#include "device.h"
#include "error.h"
#include "launch.h"
#include "mail.h"
#include "mailbox.h"

using elang::failed;

struct elang_mailbox {
  int device = 0;
  elang::Mail* host = nullptr;  // the same memory
  elang::Mail* mapped = nullptr;
  uint64_t sequence = 0;
};

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* elang_mailbox_new(int device, elang_mailbox** out) {
  if (const char* obstacle = elang::cuda_obstacle()) return failed("opening a mailbox", obstacle);
  const elang::DeviceGuard guard(device);
  auto* box = new (std::nothrow) elang_mailbox{device, nullptr, nullptr, 0};
  if (!box) return failed("opening a mailbox", "out of memory");
  void* memory = nullptr;
  void* mapped = nullptr;
  cudaError_t error = cudaHostAlloc(&memory, sizeof(elang::Mail), cudaHostAllocMapped | cudaHostAllocPortable);
  if (!error) error = cudaHostGetDevicePointer(&mapped, memory, 0);
  if (error) {
    if (memory) cudaFreeHost(memory);
    delete box;
    return failed("mapping host memory", cudaGetErrorString(error));
  }
  box->host = new (memory) elang::Mail{};
  box->mapped = static_cast<elang::Mail*>(mapped);
  *out = box;
  return nullptr;
}

EXPORT void elang_mailbox_delete(elang_mailbox* box) {
  cudaFreeHost(box->host);
  delete box;
}

EXPORT const char* elang_mailbox_read(
    elang_mailbox* box, const elang::Mask* mask, const elang::Order* order, double seconds, int32_t extent[2]) {
  const elang::DeviceGuard guard(box->device);
  cudaStream_t stream;
  cudaError_t error = elang::current_stream(box->device, &stream);
  if (error) return failed("finding torch's stream", cudaGetErrorString(error));
  cudaStreamCaptureStatus capture;
  error = cudaStreamIsCapturing(stream, &capture);
  if (error) return failed("asking whether the stream is capturing", cudaGetErrorString(error));
  if (capture != cudaStreamCaptureStatusNone) return failed("reading a count", "the stream is capturing a graph");
  error = elang::launch_extent(*mask, *order, nullptr, box->mapped, ++box->sequence, stream);
  if (error) return failed("the launch of routed_extent", cudaGetErrorString(error));
  // An error of the device, or a stream that is done and has left no mail, ends the wait.
  cudaError_t state = cudaErrorNotReady;
  const auto alive = [&] { return (state = cudaStreamQuery(stream)) == cudaErrorNotReady; };
  if (!elang::await_mail(*box->host, box->sequence, seconds, alive))
    return failed("waiting for the count", state == cudaErrorNotReady ? "timed out"
                                           : state == cudaSuccess     ? "the stream is done but left none"
                                                                      : cudaGetErrorString(state));
  extent[0] = box->host->n_routed, extent[1] = box->host->length;
  return nullptr;
}

// Which build of cpu/route.cpp runs on this machine.
#include <cstdlib>
#include <cstring>

#include "route.h"

namespace elang {

#if defined(__x86_64__)
namespace avx512 {
extern const RouteKernel kRoute;
}
namespace avx2 {
extern const RouteKernel kRoute;
}
#endif
namespace baseline {
extern const RouteKernel kRoute;
}

namespace {

const RouteKernel& widest() {
#if defined(__x86_64__)
  const char* cap = std::getenv("ELANG_ISA");
  const auto capped_to = [cap](const char* isa) { return cap && std::strcmp(cap, isa) == 0; };
  __builtin_cpu_init();
  if (capped_to("baseline")) return baseline::kRoute;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && !capped_to("avx2")) return avx512::kRoute;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kRoute;
#endif
  return baseline::kRoute;
}

}  // namespace

const RouteKernel& route_kernel() {
  static const RouteKernel& chosen = widest();
  return chosen;
}

}  // namespace elang

// For `elang info`.
extern "C" __attribute__((visibility("default"))) const char* elang_cpu_isa() { return elang::route_kernel().isa; }

// Which instruction set's build of the kernels runs on this machine.
#include <cstdlib>
#include <cstring>

#include "route.h"
#include "vocab.h"

namespace elang {

#define ELANG_DECLARE(isa)         \
  namespace isa {                  \
  extern const RouteKernel kRoute; \
  extern const VocabKernel kVocab; \
  }
ELANG_DECLARE(baseline)
#if defined(__x86_64__)
ELANG_DECLARE(avx2)
ELANG_DECLARE(avx512)
#endif

namespace {

struct Kernels {
  const char* isa;
  const RouteKernel& route;
  const VocabKernel& vocab;
};

#define ELANG_KERNELS(isa) \
  { #isa, isa::kRoute, isa::kVocab }

Kernels widest() {
#if defined(__x86_64__)
  const char* cap = std::getenv("ELANG_ISA");
  const auto capped_to = [cap](const char* isa) { return cap && std::strcmp(cap, isa) == 0; };
  __builtin_cpu_init();
  if (capped_to("baseline")) return ELANG_KERNELS(baseline);
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && !capped_to("avx2")) return ELANG_KERNELS(avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return ELANG_KERNELS(avx2);
#endif
  return ELANG_KERNELS(baseline);
}

const Kernels& kernels() {
  static const Kernels chosen = widest();
  return chosen;
}

}  // namespace

const RouteKernel& route_kernel() { return kernels().route; }
const VocabKernel& vocab_kernel() { return kernels().vocab; }

}  // namespace elang

// For `elang info`.
extern "C" __attribute__((visibility("default"))) const char* elang_cpu_isa() { return elang::kernels().isa; }

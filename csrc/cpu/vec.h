// A SIMD register as a value, through the compiler's vector extensions: one source serves every ISA. Each ISA's copy lives
// in its own namespace, and this header includes nothing with inline library code: the linker merges equal symbols of
// different objects, and an AVX-512 copy must never reach a machine without it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../route.h"

#if !defined(ELANG_ISA)
#error "compile with -DELANG_ISA=<name>: CMakeLists.txt does, once per instruction set"
#endif

namespace elang {
namespace ELANG_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls f with a null pointer of the element type that `dtype` names.
template <class F>
ELANG_HD void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::bfloat16: return f(static_cast<BFloat16*>(nullptr));
    case DType::float16: return f(static_cast<Float16*>(nullptr));
  }
}

template <class To, class From>
ELANG_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, class T>
ELANG_HD V load_raw(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

ELANG_HD Vec load(const float* p) { return load_raw<Vec>(p); }

ELANG_HD Vec load(const BFloat16* p) {
  return bit_cast<Vec>(__builtin_convertvector(load_raw<HVec>(p), UVec) << 16);
}

// Shifted into a float32's fields the exponent is 112 too small: the product by 2^112 mends normals and subnormals alike.
ELANG_HD Vec load(const Float16* p) {
  const UVec h = __builtin_convertvector(load_raw<HVec>(p), UVec);
  const UVec sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  const UVec finite = bit_cast<UVec>(bit_cast<Vec>(magnitude) * 0x1p112f);
  const UVec special = magnitude | 0x7f800000u;
  return bit_cast<Vec>((magnitude >= (0x7c00u << 13) ? special : finite) | sign);
}

template <class T>
ELANG_HD float load_scalar(const T* p) {
  T padded[kLanes] = {*p};
  return load(padded)[0];
}
ELANG_HD float load_scalar(const float* p) { return *p; }

ELANG_HD void store_scalar(float* p, float x) { *p = x; }

ELANG_HD void store_scalar(BFloat16* p, float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t nearest_even = u + 0x7fffu + ((u >> 16) & 1u);
  p->bits = static_cast<uint16_t>((x != x ? u | 0x400000u : nearest_even) >> 16);
}

ELANG_HD void store_scalar(Float16* p, float x) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude >= 0x47800000u) {  // 65536 and above, Inf, NaN
    h = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds to a multiple of 2^-24 in hardware
    h = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(h | sign);
}

}  // namespace ELANG_ISA

// Polynomials after Cephes (S. Moshier, netlib): below 2 ulp where they are used, x <= 1 for exp and x > 0 for log.
template <>
struct Math<ELANG_ISA::Vec> {
  using Vec = ELANG_ISA::Vec;
  using IVec = ELANG_ISA::IVec;

  static ELANG_HD Vec abs(Vec x) {
    return ELANG_ISA::bit_cast<Vec>(ELANG_ISA::bit_cast<IVec>(x) & 0x7fffffff);
  }

  static ELANG_HD Vec exp(Vec x) {
    const Vec zero{}, magic = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const Vec shifted = x * 1.44269504088896341f + magic;
    const Vec n = shifted - magic;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const IVec exponent = (ELANG_ISA::bit_cast<IVec>(shifted) + 127) << 23;
    // Results below the normal range are flushed to zero: a probability of 1e-38 changes no score.
    return x < -87.3f ? zero : p * ELANG_ISA::bit_cast<Vec>(exponent);
  }

  static ELANG_HD Vec log(Vec x) {
    const IVec bits = ELANG_ISA::bit_cast<IVec>(x);
    // x = m * 2^e with m in [sqrt(1/2), sqrt(2))
    const IVec e = (bits - 0x3f3504f3) >> 23;
    const Vec m = ELANG_ISA::bit_cast<Vec>(bits - (e << 23)) - 1.0f;
    const Vec n = __builtin_convertvector(e, Vec);
    Vec p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const Vec m2 = m * m;
    const Vec tail = (p * m * m2 - n * 2.12194440e-4f) - 0.5f * m2;
    const Vec result = (m + tail) + n * 0.693359375f;
    return x - x == Vec{} ? result : x;  // Inf and NaN pass through
  }
};

}  // namespace elang

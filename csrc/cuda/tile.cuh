// The head product: dot products of a few rows with a few classes, by one warp.
//
// Lane l holds the terms of columns [l * V, (l + 1) * V) of every 32 * V, V being the elements in 16 bytes of `hidden`, and
// sums them in that order; the lanes' sums then fold over lane bits 16, 8, 4, 2, 1. The order is the same in every tile, so
// a row's logits do not depend on its batch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../route.h"
#include "compact.cuh"

namespace elang {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline float load(const Matrix& m, int64_t row, int64_t col) {
  const int64_t at = row * m.row_stride + col * m.col_stride;
  switch (m.dtype) {
    case DType::float32: return static_cast<const float*>(m.data)[at];
    case DType::bfloat16: return to_float(static_cast<const __nv_bfloat16*>(m.data)[at]);
    default: return to_float(static_cast<const __half*>(m.data)[at]);
  }
}

__device__ inline void store(void* to, DType dtype, int64_t at, float x) {
  switch (dtype) {
    case DType::float32: static_cast<float*>(to)[at] = x; return;
    case DType::bfloat16: static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(x); return;
    default: static_cast<__half*>(to)[at] = __float2half_rn(x);
  }
}

// V elements from an address aligned to 16 bytes, in loads of 16 bytes.
template <int V, class T>
__device__ inline void load_vector(const T* from, float (&to)[V]) {
  constexpr int kPerLoad = 16 / sizeof(T);
  static_assert(V % kPerLoad == 0, "whole loads");
#pragma unroll
  for (int i = 0; i < V; i += kPerLoad) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from + i));
    T items[kPerLoad];
    memcpy(static_cast<void*>(items), &raw, sizeof(raw));
#pragma unroll
    for (int j = 0; j < kPerLoad; ++j) to[i + j] = to_float(items[j]);
  }
}

// Rows and head whose rows are contiguous, start at multiples of 16 bytes and have whole vectors of columns.
template <class H, class W, int R>
struct VectorTile {
  static constexpr int kRows = R, kClasses = 4;

  __device__ static void dot(
      const RouteArgs& args, const int64_t (&row)[R], const int64_t (&cls)[kClasses], float (&sums)[R * kClasses]) {
    constexpr int kVector = 16 / sizeof(H);
    const auto* hidden = static_cast<const H*>(args.hidden.data);
    const auto* weight = static_cast<const W*>(args.weight.data);
    for (int64_t k = threadIdx.x % kWarp * kVector; k < args.width; k += kWarp * kVector) {
      float h[R][kVector];
#pragma unroll
      for (int r = 0; r < R; ++r) load_vector(hidden + row[r] * args.hidden.row_stride + k, h[r]);
#pragma unroll
      for (int c = 0; c < kClasses; ++c) {
        float w[kVector];
        load_vector(weight + cls[c] * args.weight.row_stride + k, w);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int j = 0; j < kVector; ++j) sums[r * kClasses + c] = fmaf(h[r][j], w[j], sums[r * kClasses + c]);
      }
    }
  }
};

// Any strides, dtypes and alignment, an element at a time.
struct ElementTile {
  static constexpr int kRows = 1, kClasses = 4;

  __device__ static void dot(
      const RouteArgs& args, const int64_t (&row)[1], const int64_t (&cls)[kClasses], float (&sums)[kClasses]) {
    const int vector = args.hidden.dtype == DType::float32 ? 4 : 8;
    for (int64_t first = threadIdx.x % kWarp * vector; first < args.width; first += kWarp * vector)
      for (int64_t k = first; k < first + vector && k < args.width; ++k) {
        const float h = load(args.hidden, row[0], k);
#pragma unroll
        for (int c = 0; c < kClasses; ++c) sums[c] = fmaf(h, load(args.weight, cls[c], k), sums[c]);
      }
  }
};

// Sums every value over the warp: lanes [i * 32 / M, (i + 1) * 32 / M) return the sum of values[i].
template <int M, int Bit = kWarp / 2>
__device__ inline float fold(float (&values)[M]) {
  if constexpr (M > 1) {
    constexpr int kHalf = M / 2;
    const bool upper = threadIdx.x & Bit;
    float kept[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float mine = upper ? values[i + kHalf] : values[i], theirs = upper ? values[i] : values[i + kHalf];
      kept[i] = mine + __shfl_xor_sync(kAllLanes, theirs, Bit);
    }
    return fold<kHalf, Bit / 2>(kept);
  } else {
    float sum = values[0];
#pragma unroll
    for (int bit = Bit; bit > 0; bit /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
    return sum;
  }
}

// The logits of rows [first, first + valid) into z [valid, C] in shared memory. The block's warps stand `class_warps` to a
// row tile; a tile that overhangs repeats the last row or class.
template <class Tile>
__device__ inline void head_product(const RouteArgs& args, int64_t first, int valid, int class_warps, float* z) {
  constexpr int R = Tile::kRows, K = Tile::kClasses;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int tile_row = warp / class_warps * R;
  if (tile_row >= valid) return;
  int64_t row[R];
#pragma unroll
  for (int r = 0; r < R; ++r) row[r] = first + (tile_row + r < valid ? tile_row + r : valid - 1);
  // Where this lane's sum of each tile goes.
  constexpr int kLanesPerSum = kWarp / (R * K);
  const int my_row = tile_row + lane / kLanesPerSum / K, my_class = lane / kLanesPerSum % K;
  const bool writes = lane % kLanesPerSum == 0 && my_row < valid;
  for (int64_t c0 = warp % class_warps * K; c0 < args.classes; c0 += class_warps * K) {
    const bool in = c0 + my_class < args.classes;
    const float bias = writes && in && args.bias.data ? load(args.bias, c0 + my_class, 0) : 0.0f;
    int64_t cls[K];
#pragma unroll
    for (int c = 0; c < K; ++c) cls[c] = c0 + c < args.classes ? c0 + c : args.classes - 1;
    float sums[R * K] = {};
    Tile::dot(args, row, cls, sums);
    const float sum = fold(sums);
    if (writes && in) z[my_row * args.classes + c0 + my_class] = sum + bias;
  }
}

}  // namespace elang

// `route` and `route_logits`: logits, scores, decision and stable partition of all rows in one launch.
#pragma once

#include "../route.h"
#include "compact.cuh"
#include "tile.cuh"

namespace elang {

template <>
struct Math<float> {
  static ELANG_HD float exp(float x) { return expf(x); }
  static ELANG_HD float log(float x) { return logf(x); }
  static ELANG_HD float abs(float x) { return fabsf(x); }
};

struct RouteParams {
  RouteArgs args;
  Partition partition;
  int class_warps;  // warps that share a row tile's classes
  int score_lanes;  // lanes that share a row's score: a power of two, min(32, C) rounded up
};

// The score of a row, in lane 0 of the `lanes` neighbours that call this for it. logit(c) is the row's logit of class c.
// Classes are summed in chunks, so that rounding grows with C / (lanes * kChunk).
template <Score S, class F>
__device__ inline float score_row(const F& logit, int64_t classes, float temperature, int lanes) {
  using Accumulator = ScoreAccumulator<S, float>;
  constexpr int kChunk = 64;
  const int lane = threadIdx.x % lanes;
  const int busy = classes < lanes ? static_cast<int>(classes) : lanes;
  const auto scaled = [&](int64_t c) { return S == Score::logit ? logit(c) : logit(c) / temperature; };
  const float first = scaled(0);
  Accumulator acc(scaled(lane < busy ? lane : 0), first);
  for (int64_t begin = lane; begin < classes; begin += kChunk * lanes) {
    Accumulator part(scaled(begin), first);
    for (int64_t c = begin + lanes; c < classes && c < begin + kChunk * lanes; c += lanes) part.add(scaled(c));
    if (begin == lane) acc = part;
    else acc.merge(part);
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    const Accumulator other = acc.from_lane([&](float x) { return __shfl_down_sync(kAllLanes, x, step, lanes); });
    if (lane + step < busy) acc.merge(other);
  }
  float looked = 0.0f;
  if constexpr (Accumulator::kSecondLook) {
    const Accumulator whole = acc.from_lane([&](float x) { return __shfl_sync(kAllLanes, x, 0, lanes); });
    for (int64_t begin = lane; begin < classes; begin += kChunk * lanes) {
      float part = 0.0f;
      for (int64_t c = begin; c < classes && c < begin + kChunk * lanes; c += lanes) part += whole.second_look(scaled(c));
      looked += part;
    }
    for (int step = lanes / 2; step > 0; step /= 2) looked += __shfl_down_sync(kAllLanes, looked, step, lanes);
  }
  return acc.finish(static_cast<int>(classes), temperature, looked);
}

// Scores rows [first, first + valid) of the block, logit(row, c) being the logit of the block's row; returns how many are
// routed. Ends with a barrier behind the last score.
template <class F>
__device__ inline unsigned score_rows(const RouteParams& p, int64_t first, int valid, float threshold, const F& logit) {
  const int lanes = p.score_lanes;
  unsigned routed = 0;
  for (int base = 0; base < p.partition.block_rows; base += kThreads / lanes) {
    const int row = base + static_cast<int>(threadIdx.x) / lanes;
    const int read = row < valid ? row : valid - 1;
    const auto of_row = [&](int64_t c) { return logit(read, c); };
    const auto score_as = [&](auto kind) {
      return score_row<decltype(kind)::value>(of_row, p.args.classes, p.args.temperature, lanes);
    };
    float score = 0.0f;
    switch (p.args.kind) {
      case Score::energy: score = score_as(ScoreIs<Score::energy>{}); break;
      case Score::energy_probs: score = score_as(ScoreIs<Score::energy_probs>{}); break;
      case Score::energy_centered: score = score_as(ScoreIs<Score::energy_centered>{}); break;
      case Score::max_prob: score = score_as(ScoreIs<Score::max_prob>{}); break;
      case Score::neg_entropy: score = score_as(ScoreIs<Score::neg_entropy>{}); break;
      case Score::margin: score = score_as(ScoreIs<Score::margin>{}); break;
      case Score::logit: score = score_as(ScoreIs<Score::logit>{}); break;
    }
    const bool writes = threadIdx.x % lanes == 0 && row < valid;
    if (writes) p.args.score[first + row] = score;
    routed += __syncthreads_count(writes && !keep(score, threshold));
  }
  return routed;
}

__device__ inline int valid_rows(const RouteParams& p, int64_t first) {
  const int64_t rest = p.args.rows - first;
  return rest < p.partition.block_rows ? static_cast<int>(rest) : p.partition.block_rows;
}

extern __shared__ float block_logits[];  // [block_rows, C]

template <class Tile>
__global__ void __launch_bounds__(kThreads, 2) route_kernel(const __grid_constant__ RouteParams p) {
  const float threshold = p.partition.read_threshold();
  const int role = take_role(p.partition);
  unsigned routed = 0;
  if (role < p.partition.row_blocks) {
    const int64_t first = static_cast<int64_t>(role) * p.partition.block_rows, classes = p.args.classes;
    const int valid = valid_rows(p, first);
    head_product<Tile>(p.args, first, valid, p.class_warps, block_logits);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < valid * classes; i += kThreads)
      store(p.args.logits, p.args.hidden.dtype, first * classes + i, block_logits[i]);
    routed = score_rows(p, first, valid, threshold, 
                        [&](int row, int64_t c) { return block_logits[row * classes + c]; });
  }
  compact(p.partition, role, routed, threshold);
}

__global__ void __launch_bounds__(kThreads, 4) route_logits_kernel(const __grid_constant__ RouteParams p) {
  const float threshold = p.partition.read_threshold();
  const int role = take_role(p.partition);
  unsigned routed = 0;
  if (role < p.partition.row_blocks) {
    const int64_t first = static_cast<int64_t>(role) * p.partition.block_rows;
    routed = score_rows(p, first, valid_rows(p, first), threshold,
                        [&](int row, int64_t c) { return load(p.args.hidden, first + row, c); });
  }
  compact(p.partition, role, routed, threshold);
}

}  // namespace elang

// The stable partition at the end of a route kernel, in the same launch.
//
// A kept row's place needs the count of all routed rows, which is known once every block has scored its rows. So blocks
// count with integer atomics as they arrive, and finishers write the order when all have arrived. With few rows the last
// block to arrive is the finisher. With many, finishers are blocks of their own; a block takes its role in the order of
// starting, since blockIdx promises no order, and so a finisher waits only for blocks that were running before it.
// The last finisher leaves the ticket all zero, as it was found: nothing needs clearing between launches.
#pragma once

#include <cassert>

#include "../score.h"
#include "launch.h"

namespace elang {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Partition {
  Ticket* ticket;
  const float* score;       // [rows], written by this launch
  int64_t* order;           // [rows]
  int32_t* n_routed;        // [1]
  int64_t rows;             // below 2^31
  float threshold;
  const float* device_threshold;  // [1], in place of `threshold` where it is not null
  int row_blocks;           // blocks with rows to score
  int block_rows;           // rows of each
  int finishers;            // 0: the last row block to arrive
  int blocks_per_finisher;  // row blocks in each finisher's part

  __device__ float read_threshold() const { return device_threshold ? *device_threshold : threshold; }
};

// This block's role: a row block below row_blocks, a finisher from there on.
__device__ inline int take_role(const Partition& p) {
  if (!p.finishers) return static_cast<int>(blockIdx.x);
  __shared__ int role;
  if (threadIdx.x == 0) role = static_cast<int>(atomicAdd(&p.ticket->started, 1u));
  __syncthreads();
  return role;
}

// Thread 0 of a row block, after a barrier behind its last score: counts the block in. Returns the count before it.
__device__ inline unsigned long long arrive(const Partition& p, int block, unsigned routed) {
  if (p.finishers) atomicAdd(&p.ticket->routed[block / p.blocks_per_finisher], routed);
  __threadfence();  // the scores before the arrival
  const unsigned long long before = atomicAdd(&p.ticket->arrived, (1ull << 32) | routed);
  __threadfence();  // the arrivals before what a finisher reads
  return before;
}

// Thread 0 of a finisher block: returns the count of all blocks.
__device__ inline unsigned long long await(const Partition& p) {
  unsigned long long arrived;
  while (((arrived = atomicAdd(&p.ticket->arrived, 0ull)) >> 32) < static_cast<unsigned>(p.row_blocks)) __nanosleep(64);
  __threadfence();
  return arrived;
}

// The rows of finisher `part`: `before` rows are routed ahead of them and `total` in all.
__device__ inline void write_order(const Partition& p, int part, int before, int total, float threshold) {
  constexpr int kWords = 8;  // of 32 rows, looked at together by each warp
  __shared__ int counts[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t part_rows = static_cast<int64_t>(p.blocks_per_finisher) * p.block_rows;
  const int64_t begin = part * part_rows, end = begin + part_rows < p.rows ? begin + part_rows : p.rows;
  for (int64_t base = begin; base < end; base += kThreads * kWords) {
    const int64_t first = base + warp * (kWarp * kWords) + lane;
    const int words = static_cast<int>((end - first + kWarp - 1) / kWarp);  // in which this lane has a row
    float score[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) score[w] = w < words ? __ldcg(p.score + first + w * kWarp) : 0.0f;
    unsigned routed[kWords];
    int count = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      routed[w] = __ballot_sync(kAllLanes, w < words && !keep(score[w], threshold));
      count += __popc(routed[w]);
    }
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    int rank = before;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) rank += counts[w];
      before += counts[w];
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int row = static_cast<int>(first) + w * kWarp;
      const int ahead = rank + __popc(routed[w] & ((1u << lane) - 1));
      if (w < words) p.order[routed[w] >> lane & 1 ? ahead : total + row - ahead] = row;
      rank += __popc(routed[w]);
    }
    __syncthreads();  // before the next round's counts
  }
}

// What every block of a route kernel ends with: `routed` rows of a row block go to Super.
__device__ inline void compact(const Partition& p, int role, unsigned routed, float threshold) {
  const bool is_row_block = role < p.row_blocks;
  const bool alone = p.row_blocks == 1 && !p.finishers;
  __shared__ unsigned long long arrived;
  if (threadIdx.x == 0) {
    if (!is_row_block) arrived = await(p);
    else if (alone) arrived = (1ull << 32) | routed;
    else arrived = arrive(p, role, routed) + ((1ull << 32) | routed);
  }
  __syncthreads();
  // A row block is done here unless it is the last one and nobody else finishes.
  if (is_row_block && (p.finishers || arrived >> 32 != static_cast<unsigned>(p.row_blocks))) return;

  const int part = is_row_block ? 0 : role - p.row_blocks;
  const auto total = static_cast<int>(arrived & 0xffffffffu);
  int before = 0;
  for (int i = 0; i < part; ++i) before += static_cast<int>(__ldcg(p.ticket->routed + i));
  write_order(p, part, before, total, threshold);
  if (part == 0 && threadIdx.x == 0) *p.n_routed = total;
  if (alone) return;
  // write_order ended with a barrier: every thread of this block has read the ticket.
  if (threadIdx.x == 0) {
    __threadfence();
    if (!p.finishers || atomicAdd(&p.ticket->finished, 1u) + 1 == static_cast<unsigned>(p.finishers)) {
      __threadfence();
      *p.ticket = Ticket{};
    }
  }
}

}  // namespace elang

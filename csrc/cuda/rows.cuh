// Row movement: gather, merge, and the longest routed row. Bytes only, whatever the element type. The count and the order
// are read on the device. An order or a count that points outside is a bug of the caller and stops the kernel.
#pragma once

#include "../rows.h"
#include "compact.cuh"
#include "launch.h"

namespace elang {

constexpr int kUnitsPerThread = 4;
constexpr int kUnitsPerBlock = kThreads * kUnitsPerThread;
constexpr int kMaxTensors = 16;  // of one gather launch

// Rows as units of 1, 2, 4, 8 or 16 bytes, by which everything is aligned and every row contiguous.
struct UnitRows {
  const char* from;
  char* to;            // rows packed one behind the other
  int64_t row_stride;  // of `from`, in bytes
  int64_t row_units;   // below 2^31
  int unit_log2;
};

__device__ inline int64_t row_at(const Order& order, int64_t slot) {
  const int64_t row = order.row[slot * order.stride];
  assert(row >= 0 && row < order.rows && "order: wanted rows in [0, N)");
  return row;
}

__device__ inline int64_t routed_count(const Order& order) {
  const int32_t count = *order.n_routed;
  assert(count >= 0 && count <= order.rows && "n_routed: wanted 0 to N");
  return count;
}

// The tensors of one launch, each with blocks of its own.
struct Tensors {
  int count;
  UnitRows tensor[kMaxTensors];
  unsigned first_block[kMaxTensors + 1];  // of each tensor; the last entry is the grid
};

struct GatherParams {
  Order order;
  int64_t capacity;
  Tensors of;
};

struct MergeParams {
  Order order;
  UnitRows kept, routed;  // `to` is the same, and so are row_units and unit_log2
  int64_t routed_rows;    // K
};

struct alignas(16) Unit16 {
  unsigned long long half[2];
};

// Copies this block's share of `slots` rows: slot s from from_row(s), to to_row(s). All loads go before all stores.
template <class T, class From, class To>
__device__ inline void copy_units(int64_t row_units, int64_t slots, unsigned block, const From& from_row, const To& to_row) {
  const int64_t base = static_cast<int64_t>(block) * kUnitsPerBlock;
  const int64_t base_slot = base / row_units;
  const auto rest = static_cast<unsigned>(base - base_slot * row_units), units = static_cast<unsigned>(row_units);
  T unit[kUnitsPerThread];
  T* to[kUnitsPerThread];
#pragma unroll
  for (int i = 0; i < kUnitsPerThread; ++i) {
    const unsigned at = rest + i * kThreads + threadIdx.x;
    const int64_t slot = base_slot + at / units;
    to[i] = nullptr;
    if (slot >= slots) continue;
    unit[i] = reinterpret_cast<const T*>(from_row(slot))[at % units];
    to[i] = reinterpret_cast<T*>(to_row(slot)) + at % units;
  }
#pragma unroll
  for (int i = 0; i < kUnitsPerThread; ++i)
    if (to[i]) *to[i] = unit[i];
}

template <class From, class To>
__device__ inline void copy_rows(const UnitRows& rows, int64_t slots, unsigned block, const From& from_row, const To& to_row) {
  switch (rows.unit_log2) {
    case 0: return copy_units<unsigned char>(rows.row_units, slots, block, from_row, to_row);
    case 1: return copy_units<unsigned short>(rows.row_units, slots, block, from_row, to_row);
    case 2: return copy_units<unsigned>(rows.row_units, slots, block, from_row, to_row);
    case 3: return copy_units<unsigned long long>(rows.row_units, slots, block, from_row, to_row);
    default: return copy_units<Unit16>(rows.row_units, slots, block, from_row, to_row);
  }
}

__device__ inline char* packed_row(const UnitRows& rows, int64_t row) {
  return rows.to + (row * rows.row_units << rows.unit_log2);
}

__device__ inline int tensor_of_block(const Tensors& of) {
  int t = 0;
  while (blockIdx.x >= of.first_block[t + 1]) ++t;
  return t;
}

__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherParams p) {
  const int t = tensor_of_block(p.of);
  const UnitRows& tensor = p.of.tensor[t];
  const int64_t count = routed_count(p.order), last = count > 0 ? count - 1 : 0;
  copy_rows(
      tensor, p.capacity, blockIdx.x - p.of.first_block[t],
      [&](int64_t slot) { return tensor.from + row_at(p.order, slot < last ? slot : last) * tensor.row_stride; },
      [&](int64_t slot) { return packed_row(tensor, slot); });
}

// Each tensor as one row.
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ Tensors p) {
  const int t = tensor_of_block(p);
  const UnitRows& tensor = p.tensor[t];
  copy_rows(
      tensor, 1, blockIdx.x - p.first_block[t], [&](int64_t) { return tensor.from; }, [&](int64_t) { return tensor.to; });
}

__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeParams p) {
  const int64_t count = routed_count(p.order), routed = count < p.routed_rows ? count : p.routed_rows;
  copy_rows(
      p.kept, p.order.rows, blockIdx.x,
      [&](int64_t slot) {
        return slot < routed ? p.routed.from + slot * p.routed.row_stride
                             : p.kept.from + row_at(p.order, slot) * p.kept.row_stride;
      },
      [&](int64_t slot) { return packed_row(p.kept, row_at(p.order, slot)); });
}

struct ExtentParams {
  Mask mask;
  Order order;
  Ticket* ticket;
  int32_t* extent;  // [2] n_routed and the length of the longest routed row, or null
  Mail* mail;       // or null
  uint64_t sequence;
};

__device__ inline bool counts(const Mask& mask, int64_t row, int64_t column) {
  const char* at = mask.data + (row * mask.row_stride + column * mask.col_stride) * mask.item_bytes;
  switch (mask.item_bytes) {
    case 1: return *reinterpret_cast<const unsigned char*>(at);
    case 2: return *reinterpret_cast<const unsigned short*>(at) & (mask.is_float ? 0x7fffu : 0xffffu);
    case 4: return *reinterpret_cast<const unsigned*>(at) & (mask.is_float ? 0x7fffffffu : 0xffffffffu);
    default: return *reinterpret_cast<const unsigned long long*>(at) << mask.is_float;
  }
}

// A warp per routed row looks for its last column that counts, from the right, no further than the longest it has seen.
__global__ void __launch_bounds__(kThreads) extent_kernel(const __grid_constant__ ExtentParams p) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t count = routed_count(p.order);
  int longest = 0;
  for (int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarps + warp; slot < count; slot += gridDim.x * kWarps) {
    const int64_t row = row_at(p.order, slot);
    for (int64_t end = p.mask.columns; end > longest; end -= kWarp) {
      const int64_t column = end - 1 - lane;
      const unsigned found = __ballot_sync(kAllLanes, column >= longest && counts(p.mask, row, column));
      if (!found) continue;
      longest = static_cast<int>(end) - (__ffs(found) - 1);
      break;
    }
  }
  __shared__ int lengths[kWarps];
  if (lane == 0) lengths[warp] = longest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 0; w < kWarps; ++w) longest = lengths[w] > longest ? lengths[w] : longest;
  if (gridDim.x > 1) {
    atomicMax(&p.ticket->routed[0], static_cast<unsigned>(longest));
    __threadfence();
    if (atomicAdd(&p.ticket->arrived, 1ull) + 1 != gridDim.x) return;
    __threadfence();
    longest = static_cast<int>(__ldcg(&p.ticket->routed[0]));
    *p.ticket = Ticket{};
  }
  if (p.extent) p.extent[0] = static_cast<int>(count), p.extent[1] = longest;
  if (!p.mail) return;
  p.mail->n_routed = static_cast<int>(count), p.mail->length = longest;
  __threadfence_system();
  *static_cast<volatile uint64_t*>(&p.mail->sequence) = p.sequence;
}

}  // namespace elang

// Row movement on the CPU: partition, gather, merge, the longest routed row. Torch-free.
#pragma once

#include "../rows.h"

namespace elang {

// Stable partition by score, routed rows first: order [n], n_routed [1].
void partition(const float* score, int64_t n, float threshold, int64_t* order, int32_t* n_routed);

// out[slot] = from[order[min(slot, last)]] for every slot of [begin, end); out is contiguous.
void gather(const Rows& from, const int64_t* order, int64_t last, int64_t begin, int64_t end, char* out);

// out[order[slot]] = from[slot] for every slot of [begin, end), or out[slot] without an order; out is contiguous.
void scatter(const Rows& from, const int64_t* order, int64_t begin, int64_t end, char* out);

// Whether a mask's element counts.
bool counts(const Mask& mask, int64_t row, int64_t column);

// One past the last column that counts in any of the rows order[0 .. n_routed); 0 where none does.
int64_t routed_length(const Mask& mask, const int64_t* order, int64_t n_routed);

}  // namespace elang

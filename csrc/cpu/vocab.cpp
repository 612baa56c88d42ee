// Online maximum and sum over tiles of a row's logits. Compiled once per instruction set, see CMakeLists.txt.
#include "vocab.h"

#include <type_traits>

#include "vec.h"

namespace elang {
namespace ELANG_ISA {
namespace {

using M = Math<Vec>;

float exp(float x) { return M::exp(Vec{} + x)[0]; }

template <class F>
float reduce(Vec v, const F& combine) {
  float result = v[0];
  for (int i = 1; i < kLanes; ++i) result = combine(result, v[i]);
  return result;
}

void widen(const Matrix& from, int64_t width, float* to) {
  with_type(from.dtype, [&](auto* type) {
    const auto* items = static_cast<const std::remove_pointer_t<decltype(type)>*>(from.data);
    int64_t c = 0;
    if (from.col_stride == 1)
      for (; c + kLanes <= width; c += kLanes) {
        const Vec v = load(items + c);
        __builtin_memcpy(to + c, &v, sizeof(v));
      }
    for (; c < width; ++c) to[c] = load_scalar(items + c * from.col_stride);
  });
}

// What terms are taken relative to: the maximum, unless every logit so far is -inf, whose terms are then 0 and not NaN.
float shift(float max) { return max == -__builtin_inff() ? 0.0f : max; }

void fold(float* z, int64_t classes, const float* bias, int64_t first, float temperature, VocabState& state) {
  if (bias)
    for (int64_t c = 0; c < classes; ++c) z[c] += bias[c];
  for (int64_t c = classes; c % kLanes; ++c) z[c] = -__builtin_inff();
  Vec top = load(z);
  for (int64_t c = kLanes; c < classes; c += kLanes) {
    const Vec v = load(z + c);
    top = v > top ? v : top;
  }
  const float max = reduce(top, [](float a, float b) { return b > a ? b : a; });
  const float before = state.max;
  if (max > before) {
    int64_t c = 0;
    while (z[c] != max) ++c;
    state.max = max, state.argmax = first + c;
  }
  const float base = shift(state.max);
  Vec sum{};
  for (int64_t c = 0; c < classes; c += kLanes) sum += M::exp((load(z + c) - base) / temperature);
  state.sum = state.sum * exp((before - base) / temperature) + reduce(sum, [](float a, float b) { return a + b; });
}

float finish(const VocabState* states, int64_t count, int64_t stride, float temperature, int64_t* argmax) {
  VocabState whole = states[0];
  for (int64_t i = 1; i < count; ++i) {
    const VocabState& part = states[i * stride];
    const VocabState& top = part.max > whole.max ? part : whole;
    const float base = shift(top.max);
    const float sum = whole.sum * exp((whole.max - base) / temperature) + part.sum * exp((part.max - base) / temperature);
    whole = {top.max, sum, top.argmax};
  }
  *argmax = whole.argmax;
  return whole.max + temperature * M::log(Vec{} + whole.sum)[0];
}

}  // namespace

extern const VocabKernel kVocab = {widen, fold, finish};

}  // namespace ELANG_ISA
}  // namespace elang

// The CPU kernels of `vocab_energy`, as its launcher in csrc/vocab.cpp sees them. Torch-free.
#pragma once

#include "../route.h"

namespace elang {

// What is known of a row once some of its classes have been seen: sum of exp((z - max) / temperature).
struct VocabState {
  float max, sum;
  int64_t argmax;  // the lowest class with the logit `max`
};

constexpr VocabState kNothingSeen = {-__builtin_inff(), 0.0f, 0};

// One instruction set's build of cpu/vocab.cpp.
struct VocabKernel {
  // Row 0 of `from`, of any dtype, widened to float32.
  void (*widen)(const Matrix& from, int64_t width, float* to);
  // Folds the logits z of classes [first, first + classes) into `state`. Overwrites z, which has room for a multiple of
  // kVocabPad classes. `bias` is that of class `first` on, or null.
  void (*fold)(float* z, int64_t classes, const float* bias, int64_t first, float temperature, VocabState& state);
  // temperature * logsumexp(z / temperature) from the states of all classes, `stride` apart, taken in that order.
  float (*finish)(const VocabState* states, int64_t count, int64_t stride, float temperature, int64_t* argmax);
};

constexpr int kVocabPad = 16;

const VocabKernel& vocab_kernel();

}  // namespace elang

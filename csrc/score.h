// The confidence scores that README.md lists, as online accumulators over the logits of a row.
//
// One definition serves every backend: V is `float` in CUDA (a row per thread group) and a SIMD register on the CPU (a row
// per lane). Sums are kept around the running maximum, so no exponential overflows and nothing cancels; ternaries stay on
// values, not on control flow, so that they are selects in both.
#pragma once

#if defined(__CUDACC__)
#define ELANG_HD __host__ __device__ __forceinline__
#else
#define ELANG_HD inline __attribute__((always_inline))
#endif

namespace elang {

// The order is the ABI of the ops' `score` argument: elang.reference.SCORES lists the same names in the same order.
enum class Score : int { energy, energy_probs, energy_centered, max_prob, neg_entropy, margin, logit };
constexpr int kNumScores = 7;

template <Score S>
struct ScoreIs {
  static constexpr Score value = S;
};

template <class V>
struct Math;  // exp, log and abs of a V; each backend specialises it for its own V

template <Score S, class V>
class ScoreAccumulator {
  using M = Math<V>;
  V first_, max_, sum_;  // sum_ = sum of exp(z - max_)
  V aux_;  // neg_entropy: sum of (z - max_) exp(z - max_); margin: second largest z; energy_centered: sum of (z - first_)

 public:
  // energy_probs needs every probability, hence the maximum and the sum, before its own sum can start.
  static constexpr bool kSecondLook = S == Score::energy_probs;

  // Of one logit. Logits arrive already divided by the temperature; `first` is the same for all that will be merged.
  ELANG_HD ScoreAccumulator(V z, V first) : first_(first), max_(z), sum_(V{} + 1.0f), aux_(V{}) {
    if constexpr (S == Score::margin) aux_ = V{} - __builtin_inff();
    if constexpr (S == Score::energy_centered) aux_ = z - first;
  }

  ELANG_HD void add(V z) { merge(ScoreAccumulator(z, first_)); }

  ELANG_HD void merge(const ScoreAccumulator& other) {
    const V zero{}, one = zero + 1.0f;
    const V d = other.max_ - max_;
    // Equal infinities would give exp(inf - inf) = NaN: a row may start with masked (-inf) classes.
    const V e = other.max_ == max_ ? one : M::exp(zero - M::abs(d));
    if constexpr (S == Score::neg_entropy) {
      // Whose maximum is the smaller has its terms rescaled; a vanished exponential leaves 0 log 0 = 0.
      const V mine = d > zero ? (e > zero ? e * (aux_ - d * sum_) : zero) : aux_;
      const V theirs = d < zero ? (e > zero ? e * (other.aux_ + d * other.sum_) : zero) : other.aux_;
      aux_ = mine + theirs;
    } else if constexpr (S == Score::margin) {
      const V lesser = d > zero ? max_ : other.max_;
      const V second = other.aux_ > aux_ ? other.aux_ : aux_;
      aux_ = lesser > second ? lesser : second;
    } else if constexpr (S == Score::energy_centered) {
      aux_ += other.aux_;
    }
    sum_ = d > zero ? sum_ * e + other.sum_ : sum_ + other.sum_ * e;
    max_ = d > zero ? other.max_ : max_;
  }

  // The accumulator of another lane: `exchange` is a warp shuffle, called by all lanes for each field.
  template <class F>
  ELANG_HD ScoreAccumulator from_lane(const F& exchange) const {
    ScoreAccumulator other = *this;
    other.max_ = exchange(max_);
    other.sum_ = exchange(sum_);
    if constexpr (S == Score::margin || S == Score::neg_entropy || S == Score::energy_centered) other.aux_ = exchange(aux_);
    return other;
  }

  ELANG_HD V second_look(V z) const { return M::exp(M::exp(z - max_) / sum_); }

  // `classes` C, `temperature` T; `looked` = sum of second_look over the row, read by energy_probs alone.
  ELANG_HD V finish(int classes, float temperature, V looked) const {
    const V one = V{} + 1.0f;
    // 0, or NaN where the maximum is infinite: such a row has no probabilities and must not look confident.
    const V defined = max_ - max_;
    if constexpr (S == Score::energy) return (max_ + M::log(sum_)) * temperature;
    if constexpr (S == Score::energy_probs) return M::log(looked);
    if constexpr (S == Score::energy_centered)
      return ((max_ - first_) - aux_ / static_cast<float>(classes) + M::log(sum_)) * temperature;
    if constexpr (S == Score::max_prob) return one / sum_ + defined;
    if constexpr (S == Score::neg_entropy) return aux_ / sum_ - M::log(sum_) + defined;
    if constexpr (S == Score::margin) return (one - M::exp(aux_ - max_)) / sum_ + defined;
    return max_;  // logit: the only class
  }
};

// Keep iff finite and >= threshold. A NaN threshold keeps nothing.
ELANG_HD bool keep(float score, float threshold) { return score - score == 0.0f && score >= threshold; }

}  // namespace elang

// Head product, score and logits of a block of rows in one pass. Compiled once per instruction set, see CMakeLists.txt.
//
// The product runs in register tiles of R rows by K classes whose R * K running sums are reduced together at the end; the
// score then runs with a row per lane. Every sum has the same order whatever the tile, so results do not depend on the batch.
#include "route.h"

#include <type_traits>
#include <utility>

#include "vec.h"

namespace elang {
namespace ELANG_ISA {
namespace {

// a and b hold one running sum in every segment of S lanes: folds the segments' halves, giving segments of S / 2.
template <int S, size_t... I>
ELANG_HD Vec fold(Vec a, Vec b, std::index_sequence<I...>) {
  constexpr size_t half = S / 2;
  return __builtin_shufflevector(a, b, (I / half * S + I % half)...) +
         __builtin_shufflevector(a, b, (I / half * S + I % half + half)...);
}

// Lane i of the result is the sum of the lanes of sums[i].
template <int S = kLanes>
ELANG_HD Vec reduce(Vec (&sums)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < S / 2; ++i) sums[i] = fold<S>(sums[2 * i], sums[2 * i + 1], std::make_index_sequence<kLanes>());
  if constexpr (S > 2) return reduce<S / 2>(sums);
  return sums[0];
}

template <size_t... I>
ELANG_HD IVec lane_ids(std::index_sequence<I...>) {
  return IVec{static_cast<int32_t>(I)...};
}

// Dot products of R rows with K classes: lane r * K + c is row r with class c.
template <int R, int K, class H, class W>
ELANG_HD Vec tile(const H* const* rows, const W* const* classes, int64_t width) {
  static_assert(R * K <= kLanes, "one lane for each sum");
  Vec sums[kLanes] = {};
  const auto step = [&](auto&& load_at) __attribute__((always_inline)) {
    Vec w[K];
#pragma GCC unroll 16
    for (int c = 0; c < K; ++c) w[c] = load_at(classes[c]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec h = load_at(rows[r]);
#pragma GCC unroll 16
      for (int c = 0; c < K; ++c) sums[r * K + c] += h * w[c];
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) step([&](const auto* p) { return load(p + k); });
  const int rest = static_cast<int>(width - k);
  if (rest > 0 && width >= kLanes) {
    // The last kLanes columns once more, with zeros for those already summed: no read past the row.
    const IVec fresh = lane_ids(std::make_index_sequence<kLanes>()) >= kLanes - rest;
    step([&](const auto* p) { return fresh ? load(p + width - kLanes) : Vec{}; });
  } else if (rest > 0) {
    step([&](const auto* p) {
      std::remove_const_t<std::remove_pointer_t<decltype(p)>> padded[kLanes] = {};
      for (int i = 0; i < rest; ++i) padded[i] = p[i];
      return load(padded);
    });
  }
  return reduce(sums);
}

// The logits of one block: z [C, kLanes], a row per lane. A tile that overhangs repeats the last row and class.
template <class H, class W>
class BlockLogits {
  const RouteArgs& args_;
  const W* weight_;
  const int64_t weight_stride_;
  const float* bias_;
  float* z_;

  template <int R, int K>
  void put(const H* const* rows, int first_row, int64_t first_class) const {
    const W* classes[K];
    for (int c = 0; c < K; ++c) {
      const int64_t last = args_.classes - 1, id = first_class + c;
      classes[c] = weight_ + (id < last ? id : last) * weight_stride_;
    }
    const Vec sums = tile<R, K>(rows + first_row, classes, args_.width);
    for (int c = 0; c < K && first_class + c < args_.classes; ++c) {
      float* z = z_ + (first_class + c) * kLanes + first_row;
      const float bias = bias_[first_class + c];
      for (int r = 0; r < R; ++r) z[r] = sums[r * K + c] + bias;
    }
  }

  template <int R, int K>
  void put_rows(const H* const* rows, int valid, int64_t first_class) const {
    for (int r = 0; r < valid; r += R) put<R, K>(rows, r, first_class);
  }

 public:
  BlockLogits(const RouteArgs& args, const W* weight, int64_t weight_stride, const float* bias, float* z)
      : args_(args), weight_(weight), weight_stride_(weight_stride), bias_(bias), z_(z) {}

  void operator()(const H* const* rows, int valid) const {
    const int64_t classes = args_.classes;
    // Lanes without a row are scored with the others.
    if (valid < kLanes) __builtin_memset(z_, 0, classes * kLanes * sizeof(float));
    if (valid == 1) {
      if (classes <= 4) return put<1, 4>(rows, 0, 0);
      for (int64_t c = 0; c < classes; c += kLanes) put<1, kLanes>(rows, 0, c);
      return;
    }
    int64_t c = 0;
    for (; classes - c >= 4; c += 4) put_rows<kLanes / 4, 4>(rows, valid, c);
    if (classes - c == 3) put_rows<kLanes / 4, 3>(rows, valid, c);
    else if (classes > c) put_rows<kLanes / 2, 2>(rows, valid, c);
  }
};

// Classes whose terms are summed one after the other: their partial sums are merged, so rounding grows with C / kChunk.
constexpr int64_t kChunk = 64;

template <Score S>
Vec score_lanes(const float* z, int64_t classes, float temperature) {
  using Accumulator = ScoreAccumulator<S, Vec>;
  const bool scaled = temperature != 1.0f;
  const auto logit = [&](int64_t c) {
    const Vec v = load(z + c * kLanes);
    // Not the product with 1 / T, whose second rounding a large logit would carry into its exponential.
    return scaled ? v / temperature : v;
  };
  const auto chunk_end = [&](int64_t c) { return c + kChunk < classes ? c + kChunk : classes; };
  const auto chunk = [&](int64_t begin) {
    Accumulator acc(logit(begin), logit(0));
    for (int64_t c = begin + 1; c < chunk_end(begin); ++c) acc.add(logit(c));
    return acc;
  };
  Accumulator acc = chunk(0);
  for (int64_t begin = kChunk; begin < classes; begin += kChunk) acc.merge(chunk(begin));
  Vec looked{};
  if constexpr (Accumulator::kSecondLook)
    for (int64_t begin = 0; begin < classes; begin += kChunk) {
      Vec part{};
      for (int64_t c = begin; c < chunk_end(begin); ++c) part += acc.second_look(logit(c));
      looked += part;
    }
  return acc.finish(static_cast<int>(classes), temperature, looked);
}

void score_block(const RouteArgs& args, const float* z, int64_t first, int valid) {
  using F = Vec (*)(const float*, int64_t, float);
  static constexpr F kByScore[kNumScores] = {
      score_lanes<Score::energy>,   score_lanes<Score::energy_probs>, score_lanes<Score::energy_centered>,
      score_lanes<Score::max_prob>, score_lanes<Score::neg_entropy>,  score_lanes<Score::margin>,
      score_lanes<Score::logit>};
  const float temperature = args.kind == Score::logit ? 1.0f : args.temperature;
  const Vec score = kByScore[static_cast<int>(args.kind)](z, args.classes, temperature);
  for (int r = 0; r < valid; ++r) args.score[first + r] = score[r];
}

template <class T>
void pack(const T* from, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, T* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) to[r * cols + c] = from[r * row_stride + c * col_stride];
}

void widen_bias(const Matrix& bias, int64_t classes, float* to) {
  with_type(bias.dtype, [&](auto* type) {
    const auto* from = static_cast<const std::remove_pointer_t<decltype(type)>*>(bias.data);
    for (int64_t c = 0; c < classes; ++c) to[c] = from ? load_scalar(from + c * bias.row_stride) : 0.0f;
  });
}

template <class H, class W>
void head_rows(const RouteArgs& args, int64_t begin, int64_t end, float* scratch) {
  const auto* hidden = static_cast<const H*>(args.hidden.data);
  const auto* weight = static_cast<const W*>(args.weight.data);
  const int64_t width = args.width, classes = args.classes;
  float* const bias = scratch;
  float* const z = bias + classes;
  widen_bias(args.bias, classes, bias);
  // A vector load wants unit column strides; anything else is packed, the head once and the rows block by block.
  const bool pack_rows = args.hidden.col_stride != 1, pack_head = args.weight.col_stride != 1;
  auto* packed_rows = reinterpret_cast<H*>(z + classes * kLanes);
  auto* packed_head = reinterpret_cast<W*>(z + classes * kLanes + (pack_rows ? width * kLanes : 0));
  if (pack_head) pack(weight, args.weight.row_stride, args.weight.col_stride, classes, width, packed_head);
  const BlockLogits<H, W> logits(args, pack_head ? packed_head : weight, pack_head ? width : args.weight.row_stride, bias, z);
  auto* out = static_cast<H*>(args.logits);
  for (int64_t first = begin; first < end; first += kLanes) {
    const int valid = static_cast<int>(end - first < kLanes ? end - first : kLanes);
    const H* block = hidden + first * args.hidden.row_stride;
    if (pack_rows) pack(block, args.hidden.row_stride, args.hidden.col_stride, valid, width, packed_rows);
    const H* rows[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const int64_t row = r < valid ? r : valid - 1;
      rows[r] = pack_rows ? packed_rows + row * width : block + row * args.hidden.row_stride;
    }
    logits(rows, valid);
    for (int r = 0; r < valid; ++r)
      for (int64_t c = 0; c < classes; ++c) store_scalar(out + (first + r) * classes + c, z[c * kLanes + r]);
    score_block(args, z, first, valid);
  }
}

template <class T>
void logits_rows(const RouteArgs& args, int64_t begin, int64_t end, float* z) {
  const auto* logits = static_cast<const T*>(args.hidden.data);
  for (int64_t first = begin; first < end; first += kLanes) {
    const int valid = static_cast<int>(end - first < kLanes ? end - first : kLanes);
    for (int64_t c = 0; c < args.classes; ++c) {
      T lanes[kLanes];
      for (int r = 0; r < kLanes; ++r)
        lanes[r] = logits[(first + (r < valid ? r : 0)) * args.hidden.row_stride + c * args.hidden.col_stride];
      const Vec v = load(lanes);
      __builtin_memcpy(z + c * kLanes, &v, sizeof(v));
    }
    score_block(args, z, first, valid);
  }
}

void rows(const RouteArgs& args, int64_t begin, int64_t end, float* scratch) {
  with_type(args.hidden.dtype, [&](auto* h) {
    using H = std::remove_pointer_t<decltype(h)>;
    if (!args.head) return logits_rows<H>(args, begin, end, scratch);
    with_type(args.weight.dtype, [&](auto* w) {
      head_rows<H, std::remove_pointer_t<decltype(w)>>(args, begin, end, scratch);
    });
  });
}

// Of head_rows: the bias, a block of logits and, where columns are strided, a packed block of rows and the packed head.
int64_t scratch(const RouteArgs& args) {
  const int64_t rows = args.head && args.hidden.col_stride != 1 ? kLanes : 0;
  const int64_t head = args.head && args.weight.col_stride != 1 ? args.classes : 0;
  return args.classes * (1 + kLanes) + args.width * (rows + head);
}

}  // namespace

extern const RouteKernel kRoute = {kLanes, scratch, rows};

}  // namespace ELANG_ISA
}  // namespace elang

// `vocab_energy` on the CPU: torch's matrix product makes a tile of logits in scratch that stays in cache, an online
// maximum and sum takes it up, and the next tile overwrites it.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/rows.h"
#include "cpu/vocab.h"

namespace elang {
namespace {

constexpr int64_t kTileRows = 128, kTileClasses = 128;
static_assert(kTileClasses % kVocabPad == 0, "a row of a tile has room for the last vector");
// Classes are summed in parts, which threads share. Their number hangs on C alone.
constexpr int64_t kPartClasses = 2048, kMaxParts = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct VocabInputs {
  Input hidden, weight, bias, mask;
  int64_t sequences = 0, tokens = 0, width = 0, classes = 0;  // N or B, M (1 for [N, H]), H, C

  VocabInputs(Handle hidden_handle, Handle weight_handle, std::optional<Handle> bias_handle, std::optional<Handle> mask_handle)
      : hidden(hidden_handle), weight(weight_handle), bias(bias_handle.value_or(Handle{nullptr})),
        mask(mask_handle.value_or(Handle{nullptr})) {}

  void check() {
    check_device_type(hidden, "hidden", kCPU);
    STD_TORCH_CHECK(hidden.dim == 2 || hidden.dim == 3, "hidden: got shape ", shape_of(hidden), ", wanted [N, H] or [B, M, H]");
    sequences = hidden.sizes[0], tokens = hidden.dim == 3 ? hidden.sizes[1] : 1, width = hidden.sizes[hidden.dim - 1];
    check_head(weight, bias, width, hidden.device);
    classes = weight.sizes[0];
    float_type(hidden, "hidden"), matrix(weight, "weight"), bias_column(bias);
    STD_TORCH_CHECK(classes > 0, "weight: got C = 0, wanted at least one class");
    if (!mask.defined()) return;
    STD_TORCH_CHECK(hidden.dim == 3, "mask: got one for hidden [N, H], wanted hidden [B, M, H]");
    check_device(mask, "mask", hidden.device);
    check_shape(mask, "mask", {sequences, tokens}, "[B, M] as in hidden");
    mask_of(mask);
  }

  // Numbers of the tokens that count, of the B * M.
  std::vector<int64_t> real_tokens() const {
    std::vector<int64_t> real;
    const Mask m = mask.defined() ? mask_of(mask) : Mask{};
    for (int64_t i = 0; i < sequences * tokens; ++i)
      if (!mask.defined() || counts(m, i / tokens, i % tokens)) real.push_back(i);
    return real;
  }

  Matrix row(int64_t token) const {
    const int64_t inner = hidden.dim == 3 ? hidden.strides[1] : 0;
    const int64_t at = token / tokens * hidden.strides[0] + token % tokens * inner;
    return {static_cast<const char*>(hidden.data()) + at * hidden.item_bytes(), float_type(hidden, "hidden"), 0,
            hidden.strides[hidden.dim - 1]};
  }

  // Elements between a token and the next, where that is the same for all and every token counts; 0 where it is not.
  int64_t token_stride() const {
    if (mask.defined()) return 0;
    const int64_t outer = hidden.strides[0];
    if (hidden.dim == 2 || tokens == 1) return outer;
    return sequences == 1 || outer == tokens * hidden.strides[1] ? hidden.strides[1] : 0;
  }
};

// One thread's tiles. Rows and head are read in place where torch's matrix product can, and widened tile by tile elsewhere.
class Tiles {
  const VocabInputs& in_;
  const VocabKernel& kernel_ = vocab_kernel();
  const Matrix weight_, bias_column_;
  const bool rows_in_place_, weight_in_place_;
  Tensor z_, rows_, head_, bias_;

 public:
  Tiles(const VocabInputs& in, int64_t block_rows)
      : in_(in),
        weight_(matrix(in.weight, "weight")),
        bias_column_(bias_column(in.bias)),
        rows_in_place_(in.hidden.dtype == kFloat32 && in.token_stride() > 0),
        weight_in_place_(in.weight.dtype == kFloat32),
        z_(scratch(block_rows, kTileClasses)),
        rows_(scratch(rows_in_place_ ? 0 : block_rows, in.width)),
        head_(scratch(weight_in_place_ ? 0 : kTileClasses, in.width)),
        bias_(scratch(1, kTileClasses)) {}

  // Classes [begin, end) of `count` tokens into their states.
  void fold(const int64_t* tokens, int64_t count, int64_t begin, int64_t end, float temperature, VocabState* states) {
    const Tensor rows = hidden_rows(tokens, count);
    std::fill_n(states, count, kNothingSeen);
    float* const z = z_.data_as<float>();
    for (int64_t first = begin; first < end; first += kTileClasses) {
      const int64_t classes = std::min(kTileClasses, end - first);
      const Tensor logits = view(z, count, classes, kTileClasses, 1), head = head_columns(first, classes);
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(logits.raw(), rows.raw(), head.raw()));
      const float* const bias = bias_of(first, classes);
      for (int64_t r = 0; r < count; ++r) kernel_.fold(z + r * kTileClasses, classes, bias, first, temperature, states[r]);
    }
  }

 private:
  static Tensor scratch(int64_t rows, int64_t cols) { return empty({rows, cols}, kFloat32, {kCPU, 0}); }

  Tensor hidden_rows(const int64_t* tokens, int64_t count) {
    if (rows_in_place_)
      return view(static_cast<const float*>(in_.row(tokens[0]).data), count, in_.width, in_.token_stride(),
                  in_.hidden.strides[in_.hidden.dim - 1]);
    float* const to = rows_.data_as<float>();
    for (int64_t r = 0; r < count; ++r) kernel_.widen(in_.row(tokens[r]), in_.width, to + r * in_.width);
    return view(to, count, in_.width, in_.width, 1);
  }

  static Matrix from_row(Matrix m, int64_t row, int64_t item_bytes) {
    m.data = static_cast<const char*>(m.data) + row * m.row_stride * item_bytes;
    return m;
  }

  // [H, classes], the transpose of the head's rows.
  Tensor head_columns(int64_t first, int64_t classes) {
    if (weight_in_place_)
      return view(static_cast<const float*>(from_row(weight_, first, sizeof(float)).data), in_.width, classes,
                  weight_.col_stride, weight_.row_stride);
    float* const to = head_.data_as<float>();
    for (int64_t c = 0; c < classes; ++c)
      kernel_.widen(from_row(weight_, first + c, in_.weight.item_bytes()), in_.width, to + c * in_.width);
    return view(to, in_.width, classes, 1, in_.width);
  }

  const float* bias_of(int64_t first, int64_t classes) {
    if (!bias_column_.data) return nullptr;
    Matrix column = from_row(bias_column_, first, in_.bias.item_bytes());
    column.col_stride = column.row_stride;
    kernel_.widen(column, classes, bias_.data_as<float>());
    return bias_.data_as<float>();
  }
};

std::tuple<Handle, Handle> vocab_energy_cpu(
    Handle hidden, Handle weight, std::optional<Handle> bias, std::optional<Handle> mask, double temperature_arg) {
  VocabInputs in(hidden, weight, bias, mask);
  in.check();
  const float temperature = checked_temperature(temperature_arg);
  const std::vector<int64_t> tokens = in.real_tokens();
  const auto count = static_cast<int64_t>(tokens.size());

  const int64_t blocks = ceil_div(count, kTileRows), block_rows = blocks ? ceil_div(count, blocks) : 0;
  const int64_t parts = std::min(ceil_div(in.classes, kPartClasses), kMaxParts);
  const int64_t part_classes = ceil_div(ceil_div(in.classes, parts), kTileClasses) * kTileClasses;
  const Tensor memory = empty({parts * count, static_cast<int64_t>(sizeof(VocabState))}, kUInt8, in.hidden.device);
  auto* const states = memory.data_as<VocabState>();
  // One for each thread, all taken here, where a profiler of memory sees them.
  std::vector<Tiles> tiles;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), parts * blocks);
  for (int64_t i = 0; i < threads; ++i) tiles.emplace_back(in, block_rows);
  std::atomic<size_t> taken{0};
  torch::stable::parallel_for(0, parts * blocks, 1, [&](int64_t begin, int64_t end) {
    Tiles& mine = tiles.at(taken++);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / blocks, row = task % blocks * block_rows;
      const int64_t first = std::min(part * part_classes, in.classes), last = std::min(first + part_classes, in.classes);
      mine.fold(tokens.data() + row, std::min(block_rows, count - row), first, last, temperature, states + part * count + row);
    }
  });

  Tensor score = empty({in.sequences}, kFloat32, in.hidden.device);
  Tensor argmax = empty(in.hidden.dim - 1, in.hidden.sizes, kInt64, in.hidden.device);
  float* const scores = score.data_as<float>();
  int64_t* const top = argmax.data_as<int64_t>();
  std::fill_n(top, in.sequences * in.tokens, -1);
  for (int64_t s = 0, i = 0; s < in.sequences; ++s) {
    double sum = 0;
    const int64_t before = i;
    for (; i < count && tokens[i] / in.tokens == s; ++i)
      sum += vocab_kernel().finish(states + i, parts, count, temperature, top + tokens[i]);
    scores[s] = static_cast<float>(sum / static_cast<double>(i - before));  // NaN without a token: such a row is routed
  }
  return {score.release(), argmax.release()};
}

}  // namespace
}  // namespace elang

STABLE_TORCH_LIBRARY_IMPL(elang, CPU, m) { m.impl("vocab_energy", TORCH_BOX(&elang::vocab_energy_cpu)); }

// Runs the launches of a case file through csrc/cuda on the host: run_kernels CASES DATA RESULTS.
//
// CASES holds a line a launch, the op's name and its arguments; DATA the arguments' bytes; the results' bytes go to RESULTS.
// tests/test_kernels_on_host.py writes the first two and knows what to expect.
#include "cuda_on_host.h"
#include "graph_on_host.h"

#include <fstream>
#include <iostream>
#include <string>

namespace elang {

__shared__ float block_logits[12000];

namespace {
template <class P>
cudaError_t enqueue(void (*kernel)(P), int64_t blocks, size_t shared_bytes, cudaStream_t, P params) {
  if (shared_bytes > sizeof(block_logits)) return cudaErrorInvalidConfiguration;
  cuda_on_host::launch(blocks, [&] { kernel(params); });
  return cudaSuccess;
}
}  // namespace
}  // namespace elang

#include "../../csrc/cuda/graph.cpp"
#include "../../csrc/cuda/launch.cu"
#include "../../csrc/cuda/mail.h"

namespace elang {
namespace {

// One for all launches, as on a stream: each has to leave it as it was.
Ticket ticket{};

bool ticket_is_clear() {
  const Ticket clear{};
  return memcmp(&ticket, &clear, sizeof(ticket)) == 0;
}

}  // namespace

cudaError_t ticket_for(cudaStream_t, Ticket** t) {
  *t = &ticket;
  return cudaSuccess;
}

// Few, so that small cases already use the large tiles.
cudaError_t multiprocessors(int* count) {
  *count = 2;
  return cudaSuccess;
}

const char* cuda_obstacle() { return nullptr; }
cudaError_t current_stream(int, cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}

namespace {

std::ifstream cases, data;
std::ofstream results;

template <class T>
T next() {
  T value;
  if (!(cases >> value)) throw std::runtime_error("the case file ends early");
  return value;
}

// Memory of exactly this size, so that a sanitizer sees the first byte past it.
struct Buffer {
  int64_t bytes;
  char* data = nullptr;

  explicit Buffer(int64_t bytes) : bytes(bytes) {
    if (posix_memalign(reinterpret_cast<void**>(&data), 256, bytes ? bytes : 1)) throw std::bad_alloc();
    memset(data, 0xa5, bytes);  // poison: a kernel has to write all of a result
  }
  Buffer(Buffer&& other) : bytes(other.bytes), data(std::exchange(other.data, nullptr)) {}
  ~Buffer() { free(data); }
  void save() const { results.write(data, bytes); }
};

// A tensor: its storage from DATA, and from CASES bytes of the storage, offset, item bytes, dims, sizes and strides.
struct Tensor {
  Buffer storage;
  int64_t offset, item_bytes;
  std::vector<int64_t> sizes, strides;

  Tensor() : storage(next<int64_t>()), offset(next<int64_t>()), item_bytes(next<int64_t>()) {
    ::elang::data.read(storage.data, storage.bytes);
    sizes.resize(next<int64_t>());
    for (int64_t& size : sizes) size = next<int64_t>();
    strides.resize(sizes.size());
    for (int64_t& stride : strides) stride = next<int64_t>();
  }
  char* data() const { return storage.data + offset * item_bytes; }
  Matrix matrix(DType dtype) const { return {data(), dtype, strides[0], strides.size() > 1 ? strides[1] : 1}; }
  Rows rows() const {
    return {data(), item_bytes, strides[0], static_cast<int>(sizes.size()) - 1, sizes.data() + 1, strides.data() + 1};
  }
};

DType next_dtype() { return static_cast<DType>(next<int>()); }

void route(bool head) {
  RouteArgs args{};
  args.head = head;
  args.kind = static_cast<Score>(next<int>());
  args.temperature = next<float>();
  const bool on_device = next<bool>();
  const DType hidden_dtype = next_dtype(), weight_dtype = next_dtype(), bias_dtype = next_dtype();
  const bool has_bias = next<bool>();
  std::vector<Tensor> tensors;
  for (int i = 0; i < 2 + head + has_bias; ++i) tensors.emplace_back();
  const Tensor &threshold = tensors[0], &hidden = tensors[1];
  args.hidden = hidden.matrix(hidden_dtype);
  args.rows = hidden.sizes[0], args.classes = args.width = hidden.sizes[1];
  if (head) {
    args.weight = tensors[2].matrix(weight_dtype);
    args.classes = tensors[2].sizes[0];
  }
  if (has_bias) args.bias = tensors[3].matrix(bias_dtype);
  Buffer logits(head ? args.rows * args.classes * hidden.item_bytes : 0), score(args.rows * 4), order(args.rows * 8), n_routed(4);
  args.logits = logits.data;
  args.score = reinterpret_cast<float*>(score.data);
  const auto* t = reinterpret_cast<const float*>(threshold.data());
  const RouteOut out{reinterpret_cast<int64_t*>(order.data), reinterpret_cast<int32_t*>(n_routed.data),
                     on_device ? 0.0f : *t, on_device ? t : nullptr};
  if (launch_route(args, out, nullptr)) throw std::runtime_error("route: launch failed");
  for (const Buffer* b : {&logits, &score, &order, &n_routed}) b->save();
}

struct PartitionTensors {
  Tensor order, n_routed;
  Order as_order() const {
    return {reinterpret_cast<const int64_t*>(order.data()), order.strides[0],
            reinterpret_cast<const int32_t*>(n_routed.data()), order.sizes[0]};
  }
};

void gather() {
  const auto capacity = next<int64_t>();
  const PartitionTensors partition;
  std::vector<Tensor> tensors;
  for (int64_t left = next<int64_t>(); left > 0; --left) tensors.emplace_back();
  std::vector<Buffer> out;
  std::vector<GatherTensor> arguments;
  for (const Tensor& t : tensors) {
    out.emplace_back(capacity * t.rows().row_bytes());
    arguments.push_back({t.rows(), out.back().data});
  }
  if (launch_gather(arguments.data(), static_cast<int>(arguments.size()), partition.as_order(), capacity, nullptr))
    throw std::runtime_error("gather: launch failed");
  for (const Buffer& b : out) b.save();
}

void merge() {
  const PartitionTensors partition;
  const Tensor kept, routed;
  const Buffer merged(kept.sizes[0] * kept.rows().row_bytes());
  if (launch_merge(kept.rows(), routed.rows(), routed.sizes[0], partition.as_order(), merged.data, nullptr))
    throw std::runtime_error("merge: launch failed");
  merged.save();
}

void extent() {
  const bool is_float = next<bool>(), by_mail = next<bool>();
  const PartitionTensors partition;
  const Tensor mask;
  const Buffer out(8);
  Mail mail{};
  const Mask m{mask.data(), mask.item_bytes, is_float, mask.strides[0], mask.strides[1], mask.sizes[0], mask.sizes[1]};
  auto* extent = by_mail ? nullptr : reinterpret_cast<int32_t*>(out.data);
  if (launch_extent(m, partition.as_order(), extent, by_mail ? &mail : nullptr, 7, nullptr))
    throw std::runtime_error("extent: launch failed");
  if (by_mail) {
    if (!await_mail(mail, 7, 1.0, [] { return false; })) throw std::runtime_error("extent: no mail");
    memcpy(out.data, &mail, 8);
  }
  out.save();
}

// The host's end: mail that comes late, mail that never comes, a stream that is done without any.
void mail() {
  Mail box{};
  std::thread late([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    box.n_routed = 3, box.length = 5;
    __atomic_store_n(&box.sequence, uint64_t{1}, __ATOMIC_RELEASE);
  });
  const auto alive = [] { return true; };
  const bool came = await_mail(box, 1, 60.0, alive) && box.n_routed == 3 && box.length == 5;
  late.join();
  if (!came) throw std::runtime_error("mail: the late one was missed");
  if (await_mail(box, 2, 0.01, alive)) throw std::runtime_error("mail: one that never came");
  if (await_mail(box, 2, 60.0, [] { return false; })) throw std::runtime_error("mail: one of a stream that is done");
}

// Stands in for a captured part: to = from + add.
struct Step {
  const int32_t* from;
  int32_t* to;
  int32_t add;
};
void step_kernel(Step p) {
  if (threadIdx.x == 0) *p.to = *p.from + p.add;
}

struct Part {
  cudaGraph_t graph = nullptr;

  explicit Part(const Step& step) {
    cudaGraphCreate(&graph, 0);
    cudaGraphNode_t node;
    add_node(graph, nullptr, step_kernel, 1, 1, step, &node);
  }
  ~Part() { cudaGraphDestroy(graph); }
};

// A graph whose input says how many rows are routed, and whose answer is 10 for none, or 100 and the size of the bucket.
void graph() {
  const bool with_switch = next<bool>();
  const std::vector<int32_t> sizes = [] {
    std::vector<int32_t> all(next<int>());
    for (int32_t& size : all) size = next<int32_t>();
    return all;
  }();
  const int rows = sizes.back(), buckets = static_cast<int>(sizes.size());
  int32_t routed = 0, bytes_in[5] = {}, n_routed = -1, marked = 0, answer = 0;
  const int32_t zero = 0;
  std::vector<int64_t> counts(4), batches(buckets), wanted(buckets);
  elang_graph* g = nullptr;
  {
    const Part decide({&routed, &n_routed, 0}), merge({&marked, &answer, 10});
    std::vector<std::unique_ptr<Part>> bodies;
    std::vector<void*> graphs;
    for (int32_t size : sizes) {
      bodies.push_back(std::make_unique<Part>(Step{&zero, &marked, 90 + size}));
      graphs.push_back(bodies.back()->graph);
    }
    const elang_graph_parts parts{0, decide.graph, graphs.data(), sizes.data(), buckets, merge.graph, with_switch,
                                  rows, &n_routed, counts.data(), batches.data()};
    const elang_graph_tensor in[] = {{&routed, 4}, {bytes_in, sizeof(bytes_in)}}, out[] = {{&answer, 4}, {bytes_in, 20}};
    if (const char* error = elang_graph_new(&parts, in, 2, out, 2, &g)) throw std::runtime_error(error);
  }  // the graph has clones of its own
  int64_t total = 0;
  std::vector<int> launches{0, 1, rows};
  for (int32_t size : sizes)
    if (size == 2 || size == sizes[buckets / 2]) launches.insert(launches.end(), {size, size + 1 < rows ? size + 1 : rows});
  for (int n : launches) {
    marked = 0;
    // Addresses of this launch alone, the second two at odd offsets.
    const Buffer number(4), answered(4), from(21), to(23);
    memcpy(number.data, &n, 4);
    for (int i = 0; i < 20; ++i) from.data[1 + i] = static_cast<char>(n + i);
    const void* ins[] = {number.data, from.data + 1};
    void* outs[] = {answered.data, to.data + 3};
    if (const char* error = elang_graph_launch(g, ins, outs)) throw std::runtime_error(error);
    const auto bucket = std::lower_bound(sizes.begin(), sizes.end(), n) - sizes.begin();
    const int32_t want = n == 0 ? 10 : 100 + sizes[bucket];
    if (n) ++wanted[bucket];
    total += n;
    if (memcmp(answered.data, &want, 4) || memcmp(to.data + 3, from.data + 1, 20))
      throw std::runtime_error("graph: a wrong answer for " + std::to_string(n) + " routed rows");
  }
  elang_graph_delete(g);
  if (counts[0] != rows * static_cast<int64_t>(launches.size()) || counts[1] != total || batches != wanted)
    throw std::runtime_error("graph: a wrong count");
}

}  // namespace
}  // namespace elang

int main(int argc, char** argv) {
  using namespace elang;
  if (argc != 4) return 2;
  cases.open(argv[1]), data.open(argv[2], std::ios::binary), results.open(argv[3], std::ios::binary);
  for (std::string op; cases >> op;) {
    if (op == "route") route(true);
    else if (op == "route_logits") route(false);
    else if (op == "gather") gather();
    else if (op == "merge") merge();
    else if (op == "extent") extent();
    else if (op == "mail") mail();
    else if (op == "graph") graph();
    else throw std::runtime_error("unknown op " + op);
    if (!ticket_is_clear()) throw std::runtime_error(op + " left its ticket marked");
  }
  return 0;
}

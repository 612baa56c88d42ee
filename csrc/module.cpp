// elang._C: what was built, and the stateful handles. No torch header, so it depends on the Python version alone.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/graph.h"
#include "cuda/mailbox.h"

namespace py = pybind11;

namespace {

py::dict build_config() {
  py::dict config;
  config["compiler"] = ELANG_COMPILER;
  config["cuda"] = ELANG_CUDA_VERSION;
  config["cuda_archs"] = ELANG_CUDA_ARCHS;
  config["git_sha"] = ELANG_GIT_SHA;
  config["isa_levels"] = ELANG_ISA_LIST;
  config["torch_stable_abi"] = "2.10";
  return config;
}

// A function of the ops library, which must be loaded already.
template <class F>
F* find(const std::string& library, const char* name) {
  void* const handle = dlopen(library.c_str(), RTLD_NOLOAD | RTLD_NOW);
  void* const found = handle ? dlsym(handle, name) : nullptr;
  if (!found) throw std::runtime_error(library + " has no " + name + ": it was built without CUDA");
  return reinterpret_cast<F*>(found);
}

void raise_if(const char* error) {
  if (error) throw std::runtime_error(error);
}

class Mailbox {
  elang_mailbox_read_t* read_;
  elang_mailbox_delete_t* delete_;
  elang_mailbox* box_ = nullptr;

 public:
  Mailbox(const std::string& library, int device)
      : read_(find<elang_mailbox_read_t>(library, "elang_mailbox_read")),
        delete_(find<elang_mailbox_delete_t>(library, "elang_mailbox_delete")) {
    raise_if(find<elang_mailbox_new_t>(library, "elang_mailbox_new")(device, &box_));
  }
  Mailbox(const Mailbox&) = delete;
  ~Mailbox() {
    if (box_) delete_(box_);
  }

  py::tuple read(uintptr_t mask, int64_t item_bytes, bool is_float, int64_t row_stride, int64_t col_stride, int64_t columns,
                 uintptr_t order, int64_t order_stride, int64_t rows, uintptr_t n_routed, double seconds) {
    const elang::Mask m{reinterpret_cast<const char*>(mask), item_bytes, is_float, row_stride, col_stride, rows, columns};
    const elang::Order o{reinterpret_cast<const int64_t*>(order), order_stride,
                         reinterpret_cast<const int32_t*>(n_routed), rows};
    int32_t extent[2];
    const char* error;
    {
      const py::gil_scoped_release others_run;
      error = read_(box_, &m, &o, seconds, extent);
    }
    raise_if(error);
    return py::make_tuple(extent[0], extent[1]);
  }
};

std::string graph_nodes(const std::string& library) {
  const char* error;
  const char* const nodes = find<elang_graph_nodes_t>(library, "elang_graph_nodes")(&error);
  if (!nodes) raise_if(error);
  return nodes;
}

using Address = uintptr_t;

class Graph {
  elang_graph_launch_t* launch_;
  elang_graph_delete_t* delete_;
  elang_graph* graph_ = nullptr;
  size_t inputs_, outputs_;

  using Tensors = std::vector<std::pair<Address, int64_t>>;

  static std::vector<elang_graph_tensor> own(const Tensors& tensors) {
    std::vector<elang_graph_tensor> all;
    for (const auto& [address, bytes] : tensors) all.push_back({reinterpret_cast<void*>(address), bytes});
    return all;
  }

 public:
  Graph(const std::string& library, int device, Address decide, const std::vector<std::pair<int32_t, Address>>& bodies,
        Address merge, bool with_switch, int64_t rows, Address n_routed, Address counts, Address batches,
        const Tensors& inputs, const Tensors& outputs)
      : launch_(find<elang_graph_launch_t>(library, "elang_graph_launch")),
        delete_(find<elang_graph_delete_t>(library, "elang_graph_delete")),
        inputs_(inputs.size()),
        outputs_(outputs.size()) {
    std::vector<int32_t> sizes;
    std::vector<void*> graphs;
    for (const auto& [size, graph] : bodies) sizes.push_back(size), graphs.push_back(reinterpret_cast<void*>(graph));
    const elang_graph_parts parts{device, reinterpret_cast<void*>(decide), graphs.data(), sizes.data(),
                                  static_cast<int>(sizes.size()), reinterpret_cast<void*>(merge), with_switch, rows,
                                  reinterpret_cast<int32_t*>(n_routed), reinterpret_cast<int64_t*>(counts),
                                  reinterpret_cast<int64_t*>(batches)};
    const auto in = own(inputs), out = own(outputs);
    raise_if(find<elang_graph_new_t>(library, "elang_graph_new")(
        &parts, in.data(), static_cast<int>(in.size()), out.data(), static_cast<int>(out.size()), &graph_));
  }
  Graph(const Graph&) = delete;
  ~Graph() {
    if (graph_) delete_(graph_);
  }

  void launch(const std::vector<Address>& inputs, const std::vector<Address>& outputs) {
    if (inputs.size() != inputs_ || outputs.size() != outputs_)
      throw std::invalid_argument("inputs, outputs: wanted an address for each tensor that the graph was built with");
    std::vector<const void*> in;
    std::vector<void*> out;
    for (Address a : inputs) in.push_back(reinterpret_cast<const void*>(a));
    for (Address a : outputs) out.push_back(reinterpret_cast<void*>(a));
    raise_if(launch_(graph_, in.data(), out.data()));
  }
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_config", &build_config,
        "How the compiled parts were built: compiler, CUDA version and architectures, git revision, ISA levels of the CPU "
        "kernels and the oldest torch whose stable ABI they use. Values are strings; an empty one means none.");
  py::class_<Mailbox>(m, "Mailbox",
                      "Host memory that a kernel writes the routed extent to and the host polls. For one thread at a time.\n"
                      "RuntimeError: no CUDA here, in this library or this driver; a failed launch; a wait past `seconds`.")
      .def(py::init<const std::string&, int>(), py::arg("library"), py::arg("device"))
      .def("read", &Mailbox::read, py::arg("mask"), py::arg("item_bytes"), py::arg("is_float"), py::arg("row_stride"),
           py::arg("col_stride"), py::arg("columns"), py::arg("order"), py::arg("order_stride"), py::arg("rows"),
           py::arg("n_routed"), py::arg("seconds"),
           "(n_routed, length), as elang.ops.routed_extent gives them. Tensors as addresses on the device, strides in "
           "elements. Waits for what torch's current stream has queued, without the GIL.");
  m.def("graph_nodes", &graph_nodes, py::arg("library"),
        "The conditional nodes that the library and the driver know: \"switch\" or \"if\". RuntimeError: none, and why.");
  py::class_<Graph>(m, "Graph",
                    "One inference as one CUDA graph, composed of captured ones: see csrc/cuda/graph.h. Graphs and tensors are\n"
                    "addresses, and (size, graph), (address, bytes). For one thread at a time.\n"
                    "RuntimeError: what failed, and why.")
      .def(py::init<const std::string&, int, Address, const std::vector<std::pair<int32_t, Address>>&, Address, bool, int64_t,
                    Address, Address, Address, const std::vector<std::pair<Address, int64_t>>&,
                    const std::vector<std::pair<Address, int64_t>>&>(),
           py::kw_only(), py::arg("library"), py::arg("device"), py::arg("decide"), py::arg("bodies"), py::arg("merge"),
           py::arg("with_switch"), py::arg("rows"), py::arg("n_routed"), py::arg("counts"), py::arg("batches"),
           py::arg("inputs"), py::arg("outputs"))
      .def("launch", &Graph::launch, py::arg("inputs"), py::arg("outputs"),
           "Queues one inference on torch's current stream, from and to these addresses. Synchronizes: no.");
}

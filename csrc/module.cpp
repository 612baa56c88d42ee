// elang._C: what was built, and the stateful handles. No torch header, so it depends on the Python version alone.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

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

class Mailbox {
  elang_mailbox_read_t* read_;
  elang_mailbox_delete_t* delete_;
  elang_mailbox* box_ = nullptr;

 public:
  Mailbox(const std::string& library, int device)
      : read_(find<elang_mailbox_read_t>(library, "elang_mailbox_read")),
        delete_(find<elang_mailbox_delete_t>(library, "elang_mailbox_delete")) {
    if (const char* error = find<elang_mailbox_new_t>(library, "elang_mailbox_new")(device, &box_))
      throw std::runtime_error(error);
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
    if (error) throw std::runtime_error(error);
    return py::make_tuple(extent[0], extent[1]);
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
}

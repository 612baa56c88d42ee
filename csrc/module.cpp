// elang._C: what was built, and later the stateful handles. No torch header, so it depends on the Python version alone.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_config() {
  py::dict config;
  config["compiler"] = ELANG_COMPILER;
  config["cuda_archs"] = ELANG_CUDA_ARCHS;
  config["git_sha"] = ELANG_GIT_SHA;
  config["isa_levels"] = ELANG_ISA_LIST;
  config["torch_stable_abi"] = "2.10";
  return config;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_config", &build_config,
        "How the compiled parts were built: compiler, CUDA architectures, git revision, ISA levels of the CPU kernels and "
        "the oldest torch whose stable ABI they use. Values are strings; an empty one means none.");
}

// The Python module `_C`. Importing it registers the CPU ops; what it offers itself is what no tensor op can
// carry. pybind11 and the stable ABI live side by side: pybind11 binds to the interpreter, the ops bind to
// torch's C API.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU ops of panfpn_fast; importing it registers them with torch.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = PANFPN_VERSION;
        info["compiler"] = PANFPN_COMPILER;
        info["torch_headers"] = PANFPN_TORCH_HEADERS;
        info["cuda_toolkit"] = PANFPN_CUDA_TOOLKIT;
        info["cuda_architectures"] = PANFPN_CUDA_ARCHITECTURES;
        return info;
      },
      "What this build was made with; empty strings where it has no CUDA part.");
}

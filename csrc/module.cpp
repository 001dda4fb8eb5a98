// The Python module `_C`. Importing it registers the CPU ops; its own functions are those that cannot be
// tensor ops. It uses pybind11 next to the stable ABI: pybind11 binds to the interpreter, the ops bind to
// torch's C API.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "metrics/label_pairs.h"

namespace py = pybind11;

namespace {

// Checks a C-contiguous array [H, W] of int32 or [H, W, 3] of uint8. The caller keeps its memory alive.
panfpn::LabelMap label_map(const py::buffer_info& info, const char* name) {
  const bool is_rgb =
      info.ndim == 3 && info.shape[2] == 3 && info.format == py::format_descriptor<uint8_t>::format();
  const bool is_int =
      info.ndim == 2 && info.itemsize == 4 && info.format == py::format_descriptor<int32_t>::format();
  if (!is_rgb && !is_int) {
    throw py::value_error(std::string(name) + ": expected int32 [H, W] or uint8 [H, W, 3], got " +
                          std::to_string(info.ndim) + " dimensions of format " + info.format);
  }
  py::ssize_t expected = info.itemsize;
  for (py::ssize_t dim = info.ndim - 1; dim >= 0; --dim) {
    if (info.shape[dim] > 1 && info.strides[dim] != expected) {
      throw py::value_error(std::string(name) +
                            ": expected a C-contiguous array; use numpy.ascontiguousarray");
    }
    expected *= info.shape[dim];
  }
  return {info.ptr, is_rgb};
}

std::string size(const py::buffer_info& info) {
  return std::to_string(info.shape[0]) + " x " + std::to_string(info.shape[1]);
}

// Releases the GIL while it counts, so that images can be counted in parallel.
py::list count_label_pairs(const py::buffer& first, const py::buffer& second) {
  const py::buffer_info a = first.request(), b = second.request();
  const panfpn::LabelMap first_map = label_map(a, "first"), second_map = label_map(b, "second");
  if (a.shape[0] != b.shape[0] || a.shape[1] != b.shape[1]) {
    throw py::value_error("first, second: expected label maps of the same height and width, got " + size(a) +
                          " and " + size(b));
  }
  std::vector<panfpn::LabelPair> pairs;
  {
    py::gil_scoped_release release;
    pairs = panfpn::count_label_pairs(first_map, second_map, a.shape[0] * a.shape[1]);
  }
  py::list result(pairs.size());
  for (size_t i = 0; i < pairs.size(); ++i) {
    result[i] = py::make_tuple(pairs[i].first, pairs[i].second, pairs[i].count);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU ops of panfpn_fast. Importing this module registers them with torch.";
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
      "Versions that this build was compiled with; empty strings for CUDA if it has no CUDA ops.");
  m.def("count_label_pairs", &count_label_pairs, py::arg("first"), py::arg("second"),
        "Returns the sorted list of (label in first, label in second, pixels) for two label maps, each int32 "
        "[H, W] or COCO's colours uint8 [H, W, 3].");
}

// The only file that reaches below torch's stable C++ API, so that all other files read as ordinary tensor
// code. Each helper names the change in torch that will replace it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "arithmetic.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#elif defined(PANFPN_CUDA_ON_HOST)
#include "testing/cuda_types.h"
#endif

namespace panfpn::inline PANFPN_ARITHMETIC {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An uninitialised tensor of another shape and dtype on the device of `like`.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                                  dtype);
}

// Returns whether the 4-D tensor is channels-last. A tensor that fits both layouts (one channel, one pixel)
// counts as NCHW, so that the fake implementation can decide by the same rule. The stride of a dimension of
// size 1 has no meaning.
inline bool is_channels_last(const Tensor& t) {
  if (t.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

// An uninitialised tensor [N, C, H, W], channels-last or NCHW.
inline Tensor empty_nchw(std::initializer_list<int64_t> sizes, const Tensor& like, bool channels_last) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                              like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                            : torch::headeronly::MemoryFormat::Contiguous);
}

// Returns the same values in channels-last layout.
inline Tensor channels_last(const Tensor& t) {
  if (is_channels_last(t)) return t;
  Tensor copy = empty_nchw({t.size(0), t.size(1), t.size(2), t.size(3)}, t, true);
  return torch::stable::copy_(copy, t);
}

// Returns the indices that sort `values` along a dimension, equal values in their given order; NaN counts as
// the largest value. To be replaced by torch::stable::sort if torch adds it.
inline Tensor argsort(const Tensor& values, bool descending, int64_t dim = 0) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(values), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(dim), torch::stable::detail::from(descending)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  const Tensor sorted = torch::stable::detail::to<Tensor>(stack[0]);  // takes ownership, so that it is freed
  return torch::stable::detail::to<Tensor>(stack[1]);
}

// Returns -values. To be replaced by torch::stable::neg if torch adds it.
inline Tensor negate(const Tensor& values) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(values)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::neg", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Returns the value of an int64 tensor with one element. For a CUDA tensor the host waits for the device. To
// be replaced by torch::stable::Tensor::item if torch adds it.
inline int64_t item_int64(const Tensor& t) {
  int64_t value = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_item_int64(t.get(), &value));
  return value;
}

#if defined(__CUDACC__)
// The stream that torch currently uses on the device. To be replaced by Stream::nativeHandle when torch 2.13
// is the oldest supported version.
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
using torch::stable::accelerator::DeviceGuard;
#elif defined(PANFPN_CUDA_ON_HOST)
// The host run of the CUDA kernels has one queue and one device.
inline cudaStream_t current_stream(const Tensor&) {
  return nullptr;
}
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#endif

template <typename T>
struct TypeTag {
  using type = T;
};

// The three functions below call `f` with the TypeTag of a floating dtype. They accept the dtypes of feature
// maps on a GPU, all dtypes of the CPU ops, and the dtypes of boxes and masks. To be replaced by
// Dispatch_v2.h once its macros do not need the list of dtypes at each call.
template <typename F>
void dispatch_feature_type(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(TypeTag<float>{});
    case ScalarType::Half:
      return f(TypeTag<c10::Half>{});
    case ScalarType::BFloat16:
      return f(TypeTag<c10::BFloat16>{});
    default:
      STD_TORCH_CHECK(false, op, ": only float32, float16 and bfloat16 are supported");
  }
}

template <typename F>
void dispatch_floating(ScalarType dtype, const char* op, F&& f) {
  if (dtype == ScalarType::Double) return f(TypeTag<double>{});
  dispatch_feature_type(dtype, op, f);
}

template <typename F>
void dispatch_float_or_double(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(TypeTag<float>{});
    case ScalarType::Double:
      return f(TypeTag<double>{});
    default:
      STD_TORCH_CHECK(false, op, ": only float32 and float64 are supported");
  }
}

// The type of sums and coordinates: float32, or float64 for float64 tensors.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// PANFPN_LIBRARY_IMPL(m) registers a source's host functions for the device of the library that it is
// compiled into: CPU in _C, CUDA in _C_cuda (CMakeLists.txt defines PANFPN_DEVICE). In the host run of the
// CUDA kernels (csrc/testing), it registers them in a separate namespace for CPU tensors.
#if defined(PANFPN_CUDA_ON_HOST)
#define PANFPN_LIBRARY(m) STABLE_TORCH_LIBRARY(panfpn_fast_cuda_on_host, m)
#define PANFPN_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(panfpn_fast_cuda_on_host, CPU, m)
#else
#define PANFPN_LIBRARY(m) STABLE_TORCH_LIBRARY(panfpn_fast, m)
#define PANFPN_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(panfpn_fast, PANFPN_DEVICE, m)
#endif

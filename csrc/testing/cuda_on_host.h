// Lets g++ compile our .cu files as ordinary C++ and run their kernels on the host, so that kernels are
// tested where there is no GPU. Compile with `-x c++ -std=c++20 -DPANFPN_CUDA_ON_HOST -I csrc` and link
// csrc/testing/*.cpp. Kernels reach it through ops/cuda/launch.cuh only.
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

#include "testing/cuda_types.h"
#include "testing/device_functions.h"
#include "testing/scheduler.h"
#include "testing/sync_functions.h"

namespace panfpn::cuda_on_host {

template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;
};

// Each thread gets its own copy of the arguments, as on a GPU.
template <typename... Parameters>
void call_kernel(const void* call) {
  const auto& typed = *static_cast<const Call<Parameters...>*>(call);
  std::apply(typed.kernel, typed.arguments);
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments),
                "a kernel takes no default arguments at its launch");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernel parameters are copied as bytes");
  static_assert(!(std::is_reference_v<Parameters> || ...), "a kernel cannot take references");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a kernel takes at most 4096 bytes of parameters");
  const Call<Parameters...> call{kernel, {std::forward<Arguments>(arguments)...}};
  run_grid({name, grid, block, shared_bytes, cooperative}, call_kernel<Parameters...>, &call);
}

}  // namespace panfpn::cuda_on_host

// The host functions of the 3x3 convolutions.
#include "ops/conv3x3.h"

#include <optional>

#include "ops/cpu/pages.h"
#include "ops/cpu/winograd.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

Tensor run(const Tensor& input, int64_t outputs, int64_t tile, const float* weights,
           const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, bool relu) {
  const bool as_pixels = is_channels_last(input);
  const auto dense = [&](const Tensor& t) {
    return as_pixels ? channels_last(t) : torch::stable::contiguous(t);
  };
  Tensor out = empty_nchw({input.size(0), outputs, input.size(2), input.size(3)}, input, as_pixels);
  if (out.numel() == 0) return out;
  const Tensor from = dense(input);
  const std::optional<Tensor> added = residual.has_value() ? std::optional(dense(*residual)) : std::nullopt;
  const std::optional<Tensor> shift =
      bias.has_value() ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  convolve(
      tile, weights,
      {input.size(0), input.size(1), outputs, input.size(2), input.size(3), as_pixels,
       from.const_data_ptr<float>(), shift.has_value() ? shift->const_data_ptr<float>() : nullptr,
       added.has_value() ? added->const_data_ptr<float>() : nullptr, out.mutable_data_ptr<float>(), relu});
  return out;
}

Tensor transformed(const Tensor& weight, int64_t tile) {
  const WinogradWeights layout{weight.size(0), weight.size(1), (tile + 2) * (tile + 2)};
  const Tensor dense = torch::stable::contiguous(weight);
  Tensor out = empty({layout.taps, layout.channels, layout.padded()}, ScalarType::Float, weight);
  float* const to = out.mutable_data_ptr<float>();
  advise_huge_pages(to, layout.size() * static_cast<int64_t>(sizeof(float)));
  transform_weights(tile, dense.const_data_ptr<float>(), layout, to);
  return out;
}

Tensor conv3x3(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, bool relu,
               std::optional<Tensor> residual) {
  const char* op = "conv3x3";
  check_conv3x3_weight(weight, op);
  check_conv3x3_inputs(input, weight.size(0), weight.size(1), bias, residual, op);
  STD_TORCH_CHECK(weight.device() == input.device(), op, ": input and weight must be on one device");
  // The transform of the weights for smaller tiles is faster, which decides for small maps.
  constexpr int64_t kLeastPixels = 1024;
  const int64_t tile = input.size(0) * input.size(2) * input.size(3) < kLeastPixels ? 2 : 4;
  const Tensor weights = transformed(weight, tile);
  return run(input, weight.size(0), tile, weights.const_data_ptr<float>(), bias, residual, relu);
}

Tensor conv3x3_prepare(const Tensor& weight, int64_t tile) {
  const char* op = "conv3x3_prepare";
  check_conv3x3_weight(weight, op);
  STD_TORCH_CHECK(tile == 2 || tile == 4, op, ": tile must be 2 or 4, got ", tile);
  return transformed(weight, tile);
}

Tensor conv3x3_prepared(const Tensor& input, const Tensor& prepared, int64_t outputs,
                        std::optional<Tensor> bias, bool relu, std::optional<Tensor> residual) {
  const char* op = "conv3x3_prepared";
  STD_TORCH_CHECK(prepared.dim() == 3 && (prepared.size(0) == 16 || prepared.size(0) == 36) &&
                      prepared.size(1) > 0 && prepared.scalar_type() == ScalarType::Float,
                  op, ": prepared must come from conv3x3_prepare");
  const WinogradWeights layout{outputs, prepared.size(1), prepared.size(0)};
  STD_TORCH_CHECK(outputs > 0 && layout.padded() == prepared.size(2), op, ": prepared has room for ",
                  prepared.size(2), " outputs, got ", outputs);
  STD_TORCH_CHECK(prepared.device() == input.device(), op, ": input and prepared must be on one device");
  check_conv3x3_inputs(input, outputs, prepared.size(1), bias, residual, op);
  const Tensor dense = torch::stable::contiguous(prepared);
  return run(input, outputs, prepared.size(0) == 16 ? 2 : 4, dense.const_data_ptr<float>(), bias, residual,
             relu);
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_prepare", TORCH_BOX(&conv3x3_prepare));
  m.impl("conv3x3_prepared", TORCH_BOX(&conv3x3_prepared));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

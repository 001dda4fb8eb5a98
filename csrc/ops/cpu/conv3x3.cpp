// The host functions of the 3x3 convolutions.
#include "ops/conv3x3.h"

#include <optional>

#include "ops/cpu/pages.h"
#include "ops/cpu/winograd.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

Tensor run(const Tensor& input, int64_t outputs, int64_t tile, const Tensor& weights,
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
  dispatch_feature_type(input.scalar_type(), "conv3x3", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto data = [](const std::optional<Tensor>& t) {
      return t.has_value() ? t->const_data_ptr<T>() : nullptr;
    };
    convolve<T>(tile, weights.const_data_ptr<float>(),
                {input.size(0), input.size(1), outputs, input.size(2), input.size(3), as_pixels,
                 from.const_data_ptr<T>(), data(shift), data(added), out.mutable_data_ptr<T>(), relu});
  });
  return out;
}

Tensor transformed(const Tensor& weight, int64_t tile) {
  const WinogradWeights layout{weight.size(0), weight.size(1), (tile + 2) * (tile + 2)};
  Tensor dense = torch::stable::contiguous(weight);
  if (weight.scalar_type() != ScalarType::Float) {
    const Tensor given = dense;
    dense = empty({layout.outputs, layout.channels, 3, 3}, ScalarType::Float, weight);
    torch::stable::copy_(dense, given);
  }
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
  STD_TORCH_CHECK(weight.device() == input.device() && weight.scalar_type() == input.scalar_type(), op,
                  ": input and weight must have one device and one dtype");
  // The transform of the weights for smaller tiles is faster, which decides for small maps.
  constexpr int64_t kLeastPixels = 1024;
  const int64_t tile = input.size(0) * input.size(2) * input.size(3) < kLeastPixels ? 2 : 4;
  return run(input, weight.size(0), tile, transformed(weight, tile), bias, residual, relu);
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
  return run(input, outputs, prepared.size(0) == 16 ? 2 : 4, torch::stable::contiguous(prepared), bias,
             residual, relu);
}

Tensor conv3x3_weight_gradient(const Tensor& grad, const Tensor& input) {
  const char* op = "conv3x3_weight_gradient";
  STD_TORCH_CHECK(grad.dim() == 4 && input.dim() == 4 && grad.size(0) == input.size(0) &&
                      grad.size(2) == input.size(2) && grad.size(3) == input.size(3),
                  op, ": grad must be [N, K, H, W] for input [N, C, H, W]");
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && input.scalar_type() == ScalarType::Float, op,
                  ": grad and input must be float32");
  STD_TORCH_CHECK(grad.device() == input.device(), op, ": grad and input must be on one device");
  Tensor out = empty_nchw({grad.size(1), input.size(1), 3, 3}, input, true);
  if (out.numel() == 0 || input.numel() == 0) return torch::stable::zero_(out);
  const bool as_pixels = is_channels_last(input);
  const Tensor from = as_pixels ? input : torch::stable::contiguous(input);
  const Tensor gradient = as_pixels ? channels_last(grad) : torch::stable::contiguous(grad);
  weight_gradient({input.size(0), input.size(1), grad.size(1), input.size(2), input.size(3), as_pixels,
                   from.const_data_ptr<float>(), gradient.const_data_ptr<float>()},
                  out.mutable_data_ptr<float>());
  return out;
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_prepare", TORCH_BOX(&conv3x3_prepare));
  m.impl("conv3x3_prepared", TORCH_BOX(&conv3x3_prepared));
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&conv3x3_weight_gradient));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

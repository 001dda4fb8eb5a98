// The maps in 16-bit dtypes, in a source of their own, so that both compile at the same time.
#include "ops/cpu/winograd_convolution.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

template void convolve(int64_t, const float*, const ConvolutionMaps<c10::BFloat16>&);
template void convolve(int64_t, const float*, const ConvolutionMaps<c10::Half>&);

}  // namespace panfpn::inline PANFPN_ARITHMETIC

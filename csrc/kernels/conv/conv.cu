// Which convolution a call gets.
#include "conv.cuh"

#include <climits>

namespace kda {

namespace {

constexpr int kWarpsForSm = 32;  // so many runs at least, where there are tokens enough: two turns on each SM

int64_t ctas(const ConvParams& params, int tokens_at_a_time) {
  const int64_t runs = static_cast<int64_t>(params.B) * conv_runs(params, tokens_at_a_time);
  return (conv_head_groups(params) + (runs + kConvWarps - 1) / kConvWarps) * conv_channel_tiles(params);
}

// Long runs read fewer rows twice and weights less often; short ones keep all SMs busy.
int tokens_at_a_time(const ConvParams& params) {
  int tokens = kMostTokensOfConvRun;
  const int64_t warps = static_cast<int64_t>(kWarpsForSm) * params.num_sms;
  while (tokens > kFewestTokensOfConvRun &&
         static_cast<int64_t>(params.B) * conv_runs(params, tokens) * conv_channel_tiles(params) < warps)
    tokens /= 2;
  return tokens;
}

template <class Element, int W>
cudaError_t launch_conv(const ConvParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ctas(params, params.tokens_at_a_time)));
  return launch<causal_conv1d_kernel<Element, W>>(grid, 1, kConvThreads, 0, true, stream, params);
}

template <class Element>
cudaError_t launch_conv(const ConvParams& params, cudaStream_t stream) {
  switch (params.W) {
    case 2: return launch_conv<Element, 2>(params, stream);
    case 3: return launch_conv<Element, 3>(params, stream);
    default: return launch_conv<Element, 4>(params, stream);
  }
}

}  // namespace

const char* conv_refusal(const ConvParams& params) {
  if (params.W < 2 || params.W > 4) return "`weight` has a width other than 2, 3 and 4";
  if (params.D % 8 != 0) return "`x` has a number of channels that is no multiple of 8";
  if (params.weight_dtype != params.dtype && params.weight_dtype != DType::kFP32)
    return "`weight` has a dtype other than float32 and that of `x`";
  if (params.bias != nullptr && params.bias_dtype != params.dtype && params.bias_dtype != DType::kFP32)
    return "`bias` has a dtype other than float32 and that of `x`";
  if (ctas(params, kFewestTokensOfConvRun) > INT_MAX / kConvWarps) return "`x` is too large";
  return nullptr;
}

cudaError_t causal_conv1d(const ConvParams& given, cudaStream_t stream) {
  ConvParams params = given;
  params.tokens_at_a_time = tokens_at_a_time(params);
  switch (params.dtype) {
    case DType::kBF16: return launch_conv<__nv_bfloat16>(params, stream);
    case DType::kFP16: return launch_conv<__half>(params, stream);
    default: return launch_conv<float>(params, stream);
  }
}

}  // namespace kda

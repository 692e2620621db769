// Which low-rank step a call gets.
#include "low_rank_step.cuh"

namespace kda {

namespace {

constexpr int kWide = 128;  // channels of a head, and inputs of the low-rank layers

template <class Element, int kSplits, class State>
cudaError_t launch_low_rank(const LowRankStepParams& params, cudaStream_t stream) {
  constexpr int kBytes = sizeof(LowRankSmem<kWide, kWide / kSplits, kSplits, State>);
  static_assert(kLowRankCtas * (kBytes + kSmemOfSystem) <= kSmemOfSm);
  const LowRankCall call = {
      .g_weight = params.g_weight,
      .output_gate_weight = params.output_gate_weight,
      .q_conv_weight = params.q_conv_weight,
      .k_conv_weight = params.k_conv_weight,
      .v_conv_weight = params.v_conv_weight,
      .A_log = params.A_log,
      .dt_bias = params.dt_bias,
      .norm_weight = params.norm_weight,
      .recurrent_state = params.final_state,
      .conv_state = params.conv_state,
      .q = params.q,
      .k = params.k,
      .v = params.v,
      .g = params.g,
      .beta = params.beta,
      .output_gate = params.output_gate,
      .out = params.out,
      .q_stride = params.q_strides[0],
      .k_stride = params.k_strides[0],
      .v_stride = params.v_strides[0],
      .g_stride = params.g_strides[0],
      .beta_stride = params.beta_strides[0],
      .output_gate_stride = params.output_gate_strides[0],
      .out_stride = params.out_strides[0],
      .H = params.H,
      .scale = params.scale,
      .lower_bound = params.lower_bound,
      .norm_eps = params.norm_eps,
      .gate = params.gate,
      .allow_neg_eigval = params.allow_neg_eigval,
  };
  return launch<low_rank_step<Element, kWide, kWide, kSplits, State>>(dim3(params.H * kSplits, params.N), kSplits,
                                                                      kLowRankThreads, kBytes, true, stream, call);
}

template <class Element, int kSplits>
cudaError_t launch_low_rank(const LowRankStepParams& params, cudaStream_t stream) {
  return params.state_dtype == DType::kFP32 ? launch_low_rank<Element, kSplits, float>(params, stream)
                                            : launch_low_rank<Element, kSplits, __nv_bfloat16>(params, stream);
}

// As many CTAs a head as leave an SM to each, with room for one of the next kernel.
template <class Element>
cudaError_t launch_low_rank(const LowRankStepParams& params, cudaStream_t stream) {
  const int64_t items = static_cast<int64_t>(params.N) * params.H;
  return 4 * items <= params.num_sms   ? launch_low_rank<Element, 4>(params, stream)
         : 2 * items <= params.num_sms ? launch_low_rank<Element, 2>(params, stream)
                                       : launch_low_rank<Element, 1>(params, stream);
}

}  // namespace

const char* low_rank_step_refusal(const LowRankStepParams& params) {
  if (const char* reason = decode_step_refusal(params)) return reason;
  if (params.dtype == DType::kFP32) return "`q` is float32; with `g_weight` it has to be bfloat16 or float16";
  if (params.K != kWide || params.V != kWide) return "with `g_weight`, heads have to be 128 wide";
  if (params.H != params.HV) return "with `g_weight`, `v` has to have as many heads as `q`";
  if (params.conv_width != kLowRankTaps) return "with `g_weight`, `q_conv_weight` has to be 4 wide";
  if (params.N > 65535) return "with `g_weight`, there may be 65535 sequences at most";
  if (params.state_v_first) return "with `g_weight`, states have to be [K, V]";
  return nullptr;
}

cudaError_t low_rank_step(const LowRankStepParams& params, cudaStream_t stream) {
  return params.dtype == DType::kBF16 ? launch_low_rank<__nv_bfloat16>(params, stream)
                                      : launch_low_rank<__half>(params, stream);
}

}  // namespace kda

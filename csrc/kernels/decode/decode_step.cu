// Which step a call gets.
#include "decode_step.cuh"

namespace kda {

namespace {

template <class Element, int K, int V, bool kValuesFirst, class State>
cudaError_t launch_step(const DecodeStepParams& params, cudaStream_t stream) {
  constexpr int kBytes = sizeof(StepSmem<Element, K, V, kValuesFirst, State>);
  static_assert(kStepCtas * (kBytes + kSmemOfSystem) <= kSmemOfSm);
  return launch<decode_step<Element, K, V, kValuesFirst, State>>(dim3(static_cast<unsigned>(params.N) * params.H), 1,
                                                                 kStepThreads, kBytes, true, stream, params);
}

template <class Element, int K, int V, bool kValuesFirst>
cudaError_t launch_step(const DecodeStepParams& params, cudaStream_t stream) {
  return params.state_dtype == DType::kFP32 ? launch_step<Element, K, V, kValuesFirst, float>(params, stream)
                                            : launch_step<Element, K, V, kValuesFirst, __nv_bfloat16>(params, stream);
}

template <class Element, int K, int V>
cudaError_t launch_step(const DecodeStepParams& params, cudaStream_t stream) {
  return params.state_v_first ? launch_step<Element, K, V, true>(params, stream)
                              : launch_step<Element, K, V, false>(params, stream);
}

template <class Element, int K>
cudaError_t launch_step(const DecodeStepParams& params, cudaStream_t stream) {
  return params.V == 64 ? launch_step<Element, K, 64>(params, stream) : launch_step<Element, K, 128>(params, stream);
}

template <class Element>
cudaError_t launch_step(const DecodeStepParams& params, cudaStream_t stream) {
  return params.K == 64 ? launch_step<Element, 64>(params, stream) : launch_step<Element, 128>(params, stream);
}

}  // namespace

const char* decode_step_refusal(const DecodeStepParams& params) {
  if (const char* reason = recurrent_refusal(params)) return reason;
  if (params.conv_width < 2 || params.conv_width > kWidestConv)
    return "`q_conv_weight` has a width other than 2, 3 and 4";
  return nullptr;
}

cudaError_t decode_step(const DecodeStepParams& params, cudaStream_t stream) {
  switch (params.dtype) {
    case DType::kBF16: return launch_step<__nv_bfloat16>(params, stream);
    case DType::kFP16: return launch_step<__half>(params, stream);
    default: return launch_step<float>(params, stream);
  }
}

}  // namespace kda

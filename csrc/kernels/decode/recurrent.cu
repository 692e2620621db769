// Which recurrence a call gets.
#include "recurrent.cuh"

#include <algorithm>

namespace kda {

namespace {

constexpr int kMostInGrid = 65535;  // in its second and third dimension

template <class Element, int K, bool kValuesFirst, class State>
cudaError_t launch_recurrent(const RecurrentParams& params, cudaStream_t stream) {
  const dim3 grid(params.V / kSliceWidth, params.HV, params.N);
  const int bytes = RecurrentSmem<K>::bytes(kValuesFirst, params.tokens_at_a_time);
  return launch<recurrent<Element, K, kValuesFirst, State>>(grid, 1, kSliceThreads, bytes, true, stream, params);
}

template <class Element, int K, bool kValuesFirst>
cudaError_t launch_recurrent(const RecurrentParams& params, cudaStream_t stream) {
  return params.state_dtype == DType::kFP32 ? launch_recurrent<Element, K, kValuesFirst, float>(params, stream)
                                            : launch_recurrent<Element, K, kValuesFirst, __nv_bfloat16>(params, stream);
}

template <class Element, int K>
cudaError_t launch_recurrent(const RecurrentParams& params, cudaStream_t stream) {
  return params.state_v_first ? launch_recurrent<Element, K, true>(params, stream)
                              : launch_recurrent<Element, K, false>(params, stream);
}

template <class Element>
cudaError_t launch_recurrent(const RecurrentParams& params, cudaStream_t stream) {
  return params.K == 64 ? launch_recurrent<Element, 64>(params, stream)
                        : launch_recurrent<Element, 128>(params, stream);
}

}  // namespace

const char* recurrent_refusal(const RecurrentParams& params) {
  if (params.state_dtype == DType::kFP16)
    return "`initial_state` is float16; the CUDA kernels take float32 and bfloat16";
  if (params.K != 64 && params.K != 128) return "`q` has a head dimension other than 64 and 128";
  if (params.V != 64 && params.V != 128) return "`v` has a head dimension other than 64 and 128";
  if (params.HV > kMostInGrid) return "`v` has too many heads";
  if (params.N > kMostInGrid) return "`q` has too many sequences";
  return nullptr;
}

cudaError_t recurrent(const RecurrentParams& given, cudaStream_t stream) {
  RecurrentParams params = given;
  params.tokens_at_a_time = std::clamp(params.T, 1, kMostTokensAtATime);
  switch (params.dtype) {
    case DType::kBF16: return launch_recurrent<__nv_bfloat16>(params, stream);
    case DType::kFP16: return launch_recurrent<__half>(params, stream);
    default: return launch_recurrent<float>(params, stream);
  }
}

}  // namespace kda

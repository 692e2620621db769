// Which recurrence a call gets.
#include "recurrent.cuh"

#include <algorithm>

namespace kda {

namespace {

constexpr int64_t kMostItems = int64_t{1} << 30;

int64_t items_of(const RecurrentParams& params, int width) {
  return static_cast<int64_t>(params.N) * params.HV * (params.V / width);
}

template <class Element, int K, int kWidth, bool kValuesFirst, class State, Calls kCalls>
cudaError_t launch_recurrent(const RecurrentParams& params, cudaStream_t stream) {
  using Smem = RecurrentSmem<Element, K, kWidth, kValuesFirst, State, kCalls>;
  static_assert(kRecurrentCtas<kCalls, kWidth> * (Smem::bytes(1) + kSmemOfSystem) <= kSmemOfSm);
  return launch<recurrent<Element, K, kWidth, kValuesFirst, State, kCalls>, Smem::bytes(kMostTokensAtATime)>(
      dim3(items_of(params, kWidth)), 1, kRecurrentThreads, Smem::bytes(params.tokens_at_a_time), true, stream, params);
}

template <class Element, int K, int kWidth, bool kValuesFirst, class State>
cudaError_t launch_recurrent(const RecurrentParams& params, cudaStream_t stream) {
  const bool few = params.cu_seqlens == nullptr && params.T <= kMostTokensAtATime && params.states == nullptr;
  return few ? launch_recurrent<Element, K, kWidth, kValuesFirst, State, Calls::kFew>(params, stream)
             : launch_recurrent<Element, K, kWidth, kValuesFirst, State, Calls::kAny>(params, stream);
}

// Few value channels a CTA where that gives each SM work, and where one token leaves little to do for a CTA, so that many small
// ones copy best; more where they are at once all that there are, or where all of them would make the same tokens.
template <class Element, int K, bool kValuesFirst, class State>
cudaError_t launch_recurrent(const RecurrentParams& params, cudaStream_t stream) {
  const int64_t items = items_of(params, 64);
  const bool many = params.tokens_at_a_time == 1 && items > kRecurrentCtas<Calls::kFew, 64> * params.num_sms;
  if constexpr (sizeof(State) == 2) {
    const bool one = params.cu_seqlens == nullptr && params.T == 1 && params.states == nullptr;
    if (many && one && params.initial_state != nullptr)
      return launch_recurrent<Element, K, 64, kValuesFirst, State, Calls::kOne>(params, stream);
  }
  return many || items <= 2 * params.num_sms ? launch_recurrent<Element, K, 32, kValuesFirst, State>(params, stream)
                                             : launch_recurrent<Element, K, 64, kValuesFirst, State>(params, stream);
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
  if (items_of(params, 32) > kMostItems) return "`q` has too many sequences for one launch";
  return nullptr;
}

cudaError_t recurrent(const RecurrentParams& given, cudaStream_t stream) {
  RecurrentParams params = given;
  // As many as a sequence has, on average.
  const int sequences = params.cu_seqlens == nullptr ? 1 : params.N;
  params.tokens_at_a_time = std::clamp((params.T + sequences - 1) / sequences, 1, kMostTokensAtATime);
  switch (params.dtype) {
    case DType::kBF16: return launch_recurrent<__nv_bfloat16>(params, stream);
    case DType::kFP16: return launch_recurrent<__half>(params, stream);
    default: return launch_recurrent<float>(params, stream);
  }
}

}  // namespace kda

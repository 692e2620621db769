// Launches the two prefill kernels for one element type.
#pragma once

#include "common/launch.cuh"
#include "prepare.cuh"
#include "recurrence.cuh"

namespace kda {

template <class Element, int K, Gate kGate, bool kFloatGate>
cudaError_t launch_prepare(PrefillParams& params, const PrepareMaps& maps, cudaStream_t stream) {
  const PrepareConstants constants = prepare_constants<kGate>(params);
  params.prepare_ctas = prepare_ctas<Element, K, kFloatGate>() * params.num_sms;
  const auto run = [&](auto beside, int64_t ctas) {
    return launch<prepare<Element, K, kGate, kFloatGate, decltype(beside)::value>>(
        dim3(static_cast<unsigned>(ctas)), 1, kPrepareThreads, PrepareSmem<K, kFloatGate>::kBytes,
        !decltype(beside)::value, stream, params, maps, constants);
  };
  if constexpr (K == 128)  // see `side_by_side`
    if (params.ready != nullptr) return run(std::true_type{}, params.prepare_ctas);
  return run(std::false_type{}, places(params));
}

template <class Element, int K, Gate kGate>
cudaError_t launch_prepare(PrefillParams& params, cudaStream_t stream) {
  PrepareMaps maps;
  if (cudaError_t error = make_maps(params, maps); error != cudaSuccess) return error;
  return params.g_dtype == DType::kFP32 ? launch_prepare<Element, K, kGate, true>(params, maps, stream)
                                        : launch_prepare<Element, K, kGate, false>(params, maps, stream);
}

template <class Element, int K>
cudaError_t launch_prefill(PrefillParams& params, cudaStream_t stream) {
  cudaError_t error = params.gate == Gate::kSafe       ? launch_prepare<Element, K, Gate::kSafe>(params, stream)
                      : params.gate == Gate::kSoftplus ? launch_prepare<Element, K, Gate::kSoftplus>(params, stream)
                                                       : launch_prepare<Element, K, Gate::kNone>(params, stream);
  if (error != cudaSuccess) return error;
  const int parts = params.V / 64 / params.halves;
  const int64_t ctas = static_cast<int64_t>(params.sequences) * params.HV * parts * params.segments + params.scouts;
  const auto run_with = [&](auto halves, auto compose, auto states) {
    constexpr int kHalves = decltype(halves)::value;
    constexpr bool kCompose = decltype(compose)::value;
    return launch<recurrence<Element, K, kHalves, kCompose, decltype(states)::value>>(
        dim3(static_cast<unsigned>(ctas)), params.sharers, kRecurrenceThreads<kHalves, kCompose>,
        RecurrenceSmem<K, kHalves>::kBytes, true, stream, params);
  };
  const auto run = [&](auto halves, auto compose) {
    return params.states == nullptr ? run_with(halves, compose, std::false_type{})
                                    : run_with(halves, compose, std::true_type{});
  };
  using One = std::integral_constant<int, 1>;
  if (params.halves == 2) return run(std::integral_constant<int, 2>{}, std::false_type{});
  return params.composed_chunks > 0 ? run(One{}, std::true_type{}) : run(One{}, std::false_type{});
}

}  // namespace kda

// Launches the two prefill kernels for one element type.
#pragma once

#include <atomic>

#include "prepare.cuh"
#include "recurrence.cuh"

namespace kda {

// Allows `Kernel` its dynamic shared memory, once a device.
template <auto Kernel>
cudaError_t allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> allowed{0};  // a bit a device
  int device;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  cudaError_t error = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < 64) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// With `overlap`, the kernel may start while the one before it is still running (programmatic dependent launch). `cluster` CTAs
// make a cluster.
template <auto Kernel, class... Arguments>
cudaError_t launch(int64_t ctas, int cluster, int threads, int smem_bytes, bool overlap, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (cudaError_t error = allow_shared_memory<Kernel>(smem_bytes); error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = overlap ? 2 : 1;
  return cudaLaunchKernelEx(&config, Kernel, arguments...);
}

template <class Element, int K, Gate kGate, bool kFloatGate>
cudaError_t launch_prepare(PrefillParams& params, const PrepareMaps& maps, cudaStream_t stream) {
  params.prepare_ctas = prepare_ctas<Element, K, kGate, kFloatGate>() * params.num_sms;
  const auto run = [&](auto stays, int64_t ctas) {
    return launch<prepare<Element, K, kGate, kFloatGate, decltype(stays)::value>>(
        ctas, 1, kPrepareThreads, PrepareSmem<K, kFloatGate>::kBytes, !decltype(stays)::value, stream, params, maps);
  };
  return params.ready == nullptr ? run(std::false_type{}, places(params)) : run(std::true_type{}, params.prepare_ctas);
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
        ctas, params.sharers, kRecurrenceThreads<kHalves, kCompose>, RecurrenceSmem<K, kHalves>::kBytes, true, stream,
        params);
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

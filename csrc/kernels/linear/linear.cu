// Which kernel a product gets.
#include "linear.cuh"

#include <algorithm>

#include "batched.h"

namespace kda {

namespace {

template <class Element, int kWarpsK, int kSlots>
cudaError_t launch_linear(const LinearParams& params, cudaStream_t stream) {
  using Shape = LinearShape<kWarpsK, kSlots>;
  constexpr int kBytes = sizeof(typename Shape::Smem), kMostBytes = kBytes + 2 * kMostNormed;
  static_assert(kLinearCtas * (kBytes + 2 * 2048 + kSmemOfSystem) <= kSmemOfSm);
  const int tile = (params.swiglu ? 8 : 16) * Shape::kRowTiles, rounds = (params.N + tile - 1) / tile;
  return launch<linear<Element, kWarpsK, kSlots>, kMostBytes>(
      dim3(std::min(rounds, kLinearCtas * params.num_sms)), 1, kLinearThreads,
      kBytes + (params.norm_weight == nullptr ? 0 : 2 * params.K), true, stream, params);
}

// All warps share the columns where there are many; with few, more of them have rows for themselves.
template <class Element>
cudaError_t launch_linear(const LinearParams& params, cudaStream_t stream) {
  return params.K > 256 ? launch_linear<Element, 8, 6>(params, stream) : launch_linear<Element, 2, 2>(params, stream);
}

// Beyond what the first kernel has registers for, and in what it does not do.
bool is_batched(const LinearParams& params) {
  return params.M > kMostTokens || params.groups > 1 || params.squares != nullptr || params.next_norm_weight != nullptr;
}

}  // namespace

const char* linear_refusal(const LinearParams& params) {
  if (params.dtype == DType::kFP32) return "`x` is float32; the kernel takes bfloat16 and float16";
  if (params.K % 8 != 0) return "`weight` has a number of columns that is no multiple of 8";
  if (is_batched(params)) return batched_linear_refusal(params);
  if (params.norm_weight != nullptr && params.K > kMostNormed) return "`x` has more columns than 16384";
  return nullptr;
}

cudaError_t linear(const LinearParams& params, cudaStream_t stream) {
  if (is_batched(params)) return batched_linear(params, stream);
  return params.dtype == DType::kBF16 ? launch_linear<__nv_bfloat16>(params, stream)
                                      : launch_linear<__half>(params, stream);
}

}  // namespace kda

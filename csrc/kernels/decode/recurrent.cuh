// The recurrence over a few tokens: one CTA for 32 value channels of a head and a sequence.
//
// Data flow: the state goes from global memory into registers and back, once, however many tokens there are (`Slice`).
// Warps take turns with the tokens and make of each what all of them need of it, in shared memory (`Token`); its loads
// are on their way before those of the state. The state waits for nothing but its place.
#pragma once

#include "api/decode.h"
#include "common/launch.cuh"
#include "slice.cuh"

namespace kda {

constexpr int kMostTokensAtATime = 16;

template <int K>
struct RecurrentSmem {
  // Bytes for so many tokens: exchange, values [tokens][32], Token [tokens].
  static constexpr int kExchangeBytes = 2 * 4 * 2 * kSliceWidth * 4;
  __host__ __device__ static constexpr int values(bool values_first) { return values_first ? 0 : kExchangeBytes; }
  __host__ __device__ static constexpr int tokens(bool values_first, int count) {
    return values(values_first) + count * kSliceWidth * 4;
  }
  __host__ __device__ static constexpr int bytes(bool values_first, int count) {
    return tokens(values_first, count) + count * static_cast<int>(sizeof(Token<K>));
  }
};

__device__ __forceinline__ int64_t integer_at(const void* base, bool is_int64, int i) {
  return is_int64 ? static_cast<const int64_t*>(base)[i] : static_cast<const int32_t*>(base)[i];
}

// A bound of sequences in [0, T], whatever the caller's tensor says.
__device__ __forceinline__ int bound_of(const KdaParams& p, int n) {
  const int64_t value = integer_at(p.cu_seqlens, p.cu_seqlens_is_int64, n);
  return static_cast<int>(value < 0 ? 0 : value > p.T ? p.T : value);
}

template <class Element, int K>
__device__ __forceinline__ void load_token(const KdaParams& p, int batch, int token, int head, RawToken<K>& raw) {
  const int key_head = p.HV == p.H ? head : head / (p.HV / p.H), channel = (threadIdx.x & 31) * (K / 32);
  const auto row = [&](const int64_t (&strides)[3], int h) {
    return batch * strides[0] + token * strides[1] + h * strides[2];
  };
  load_neighbours<Element>(p.q, row(p.q_strides, key_head) + channel, raw.q);
  load_neighbours<Element>(p.k, row(p.k_strides, key_head) + channel, raw.k);
  load_neighbours_of<Element>(p.g, row(p.g_strides, head) + channel, p.g_dtype, raw.g);
  const int64_t beta = row(p.beta_strides, head);
  raw.beta = p.beta_dtype == DType::kFP32 ? load_float<float>(p.beta, beta) : load_float<Element>(p.beta, beta);
}

template <class Element, int K, bool kValuesFirst, class State>
__global__ void __launch_bounds__(kSliceThreads, 4) recurrent(const __grid_constant__ RecurrentParams p) {
  extern __shared__ __align__(16) char smem[];
  using Smem = RecurrentSmem<K>;
  float* const values = reinterpret_cast<float*>(smem + Smem::values(kValuesFirst));
  Token<K>* const tokens = reinterpret_cast<Token<K>*>(smem + Smem::tokens(kValuesFirst, p.tokens_at_a_time));

  const int first = blockIdx.x * kSliceWidth, head = blockIdx.y, n = blockIdx.z;
  const int warp = this_warp(), lane = threadIdx.x & 31;

  launch_dependents();
  wait_for_previous_kernel();
  const bool is_packed = p.cu_seqlens != nullptr;
  const int batch = is_packed ? 0 : n;
  const int start = is_packed ? bound_of(p, n) : 0, end = is_packed ? bound_of(p, n + 1) : p.T;
  const int64_t row = p.state_indices == nullptr ? n : integer_at(p.state_indices, p.state_indices_is_int64, n);
  const int64_t out = batch * p.out_strides[0] + head * p.out_strides[2] + first;
  const auto clear_outputs = [&](int from, int to) {
    for (int token = from + warp; token < to; token += 4)
      store_value<Element>(p.out, out + token * p.out_strides[1] + lane, 0.0f);
  };
  if (is_packed && n == p.N - 1) clear_outputs(end, p.T);  // tokens that no sequence has
  if (row < 0 || row >= p.rows) {
    clear_outputs(start, end);
    return;
  }
  const int64_t matrix = row * p.HV + head;

  RawToken<K> raw;
  if (start + warp < end) load_token<Element>(p, batch, start + warp, head, raw);
  Slice<K, kValuesFirst, State> state(reinterpret_cast<float*>(smem), p.V, first);
  if (p.initial_state == nullptr) {
    state.set_to_zero();
  } else {
    state.load(p.initial_state, matrix);
  }
#pragma unroll 1
  for (int block = start; block < end; block += p.tokens_at_a_time) {
    const int count = min(end - block, p.tokens_at_a_time);
    if (block > start) __syncthreads();  // the places of the tokens before are free
#pragma unroll 1
    for (int i = warp; i < count; i += 4) {
      const int token = block + i;
      if (token >= start + 4) load_token<Element>(p, batch, token, head, raw);
      values[i * kSliceWidth + lane] = load_float<Element>(
          p.v, batch * p.v_strides[0] + token * p.v_strides[1] + head * p.v_strides[2] + first + lane);
      activate(p, head, raw, tokens[i]);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      state.step(tokens[i], values + i * kSliceWidth, i, [&](int channel, float o) {
        store_value<Element>(p.out, out + (block + i) * p.out_strides[1] + channel, o);
      });
      if (p.states != nullptr) state.store(p.states, (static_cast<int64_t>(batch) * p.T + block + i) * p.HV + head);
    }
  }
  if (p.final_state != nullptr) state.store(p.final_state, matrix);
}

}  // namespace kda

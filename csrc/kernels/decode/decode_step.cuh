// One token through a KDA layer: one CTA for a head of q and k and a sequence, 128 threads for each 32 value channels.
//
// Data flow
//   1. Each thread is a channel or two of q, k and v: the last inputs from the convolution's state, the new one, their sum,
//      SiLU, into shared memory; and the state one input further back where it was. No other CTA has these channels, so
//      that nobody reads what has been written.
//   2. The first warp makes `Token` of q, k and g, while the recurrent state is on its way into registers (`Slice`).
//   3. The recurrence, the state back to memory, and the norm of the output over all threads.
// 1. for v, 2. and 3. once for each value head that shares the head of q and k.
#pragma once

#include "api/decode.h"
#include "common/launch.cuh"
#include "recurrent.cuh"
#include "slice.cuh"

namespace kda {

constexpr int kWidestConv = 4;

// The convolution's output for channel `channel` of q, k or v, whose weights these are: the `at`-th of all channels.
template <class Element>
__device__ __forceinline__ float convolve(const DecodeStepParams& p, int64_t row, const void* weights_of, int channel,
                                          int at, float x) {
  const auto load = [&](const void* base, DType dtype, int64_t index) {
    return dtype == DType::kFP32 ? load_float<float>(base, index) : load_float<Element>(base, index);
  };
  const int width = p.conv_width;
  const int64_t state = (row * (2 * p.H * p.K + p.HV * p.V) + at) * width;
  const int64_t weight = static_cast<int64_t>(channel) * width;
  float inputs[kWidestConv], weights[kWidestConv];  // newest first
#pragma unroll
  for (int i = 0; i < kWidestConv; ++i) {
    // The oldest input of the state is out of this token's reach.
    inputs[i] = i == 0 ? x : i < width ? load(p.conv_state, p.conv_state_dtype, state + width - i) : 0.0f;
    weights[i] = i < width ? load(weights_of, p.weight_dtype, weight + width - 1 - i) : 0.0f;
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = kWidestConv - 1; i >= 0; --i) {
    if (i >= width) continue;
    sum = fmaf(inputs[i], weights[i], sum);
    const int64_t to = state + width - 1 - i;
    p.conv_state_dtype == DType::kFP32 ? store_value<float>(p.conv_state, to, inputs[i])
                                       : store_value<Element>(p.conv_state, to, inputs[i]);
  }
  return rounded<Element>(sum * sigmoid(sum));
}

template <class Element, int K, int V, bool kValuesFirst, class State>
__global__ void __launch_bounds__(V / kSliceWidth * kSliceThreads, 128 / V)
    decode_step(const __grid_constant__ DecodeStepParams p) {
  constexpr int kThreads = V / kSliceWidth * kSliceThreads;
  using OwnSlice = Slice<K, kValuesFirst, State>;
  __shared__ __align__(16) float exchange[V / kSliceWidth * OwnSlice::kExchange + 4];
  __shared__ Token<K> token;
  __shared__ float queries[K], keys[K], values[V], outputs[V];

  const int key_head = blockIdx.x, n = blockIdx.y, group = p.HV / p.H;
  const int slice = this_warp() / 4, warp = this_warp(), lane = threadIdx.x & 31;

  launch_dependents();
  wait_for_previous_kernel();
  const int64_t row = p.state_indices == nullptr ? n : integer_at(p.state_indices, p.state_indices_is_int64, n);
  if (row < 0 || row >= p.rows) {
    for (int i = threadIdx.x; i < group * V; i += kThreads)
      store_value<Element>(p.out, n * p.out_strides[0] + (key_head * group + i / V) * p.out_strides[2] + i % V, 0.0f);
    return;
  }
  for (int i = threadIdx.x; i < 2 * K; i += kThreads) {
    const bool is_key = i >= K;
    const int channel = i % K;
    const int64_t q = n * p.q_strides[0] + key_head * p.q_strides[2] + channel;
    const int64_t k = n * p.k_strides[0] + key_head * p.k_strides[2] + channel;
    const float x = is_key ? load_float<Element>(p.k, k) : load_float<Element>(p.q, q);
    const int own = key_head * K + channel;
    (is_key ? keys : queries)[channel] =
        convolve<Element>(p, row, is_key ? p.k_conv_weight : p.q_conv_weight, own, (is_key ? p.H * K : 0) + own, x);
  }

#pragma unroll 1
  for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
    const int64_t matrix = row * p.HV + head;
    OwnSlice state(exchange + slice * OwnSlice::kExchange, V, slice * kSliceWidth);
    RawToken<K> raw;
    if (warp == 0) {
      load_neighbours_of<Element>(p.g, n * p.g_strides[0] + head * p.g_strides[2] + lane * (K / 32), p.g_dtype, raw.g);
      const int64_t beta = n * p.beta_strides[0] + head * p.beta_strides[2];
      raw.beta = p.beta_dtype == DType::kFP32 ? load_float<float>(p.beta, beta) : load_float<Element>(p.beta, beta);
    }
    state.load(p.initial_state, matrix);
    // The last warps are the last to have something to do.
    if (const int i = static_cast<int>(threadIdx.x) - (kThreads - V); i >= 0) {
      const float x = load_float<Element>(p.v, n * p.v_strides[0] + head * p.v_strides[2] + i);
      values[i] = convolve<Element>(p, row, p.v_conv_weight, head * V + i, 2 * p.H * K + head * V + i, x);
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < K / 32; ++i) {
        raw.q[i] = queries[lane * (K / 32) + i];
        raw.k[i] = keys[lane * (K / 32) + i];
      }
      activate(p, head, raw, token);
    }
    __syncthreads();
    state.step(token, values + slice * kSliceWidth, 0,
               [&](int channel, float o) { outputs[slice * kSliceWidth + channel] = rounded<Element>(o); });
    state.store(p.final_state, matrix);
    __syncthreads();
    if (threadIdx.x < V) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < V / 32; ++i) squares = fmaf(outputs[32 * i + lane], outputs[32 * i + lane], squares);
      const float scale = rsqrtf(warp_sum(squares) * (1.0f / V) + p.norm_eps);
      const int i = threadIdx.x;
      const int64_t at = n * p.output_gate_strides[0] + head * p.output_gate_strides[2] + i;
      const float weight =
          p.weight_dtype == DType::kFP32 ? load_float<float>(p.norm_weight, i) : load_float<Element>(p.norm_weight, i);
      const float open = sigmoid(load_float<Element>(p.output_gate, at));
      store_value<Element>(p.out, n * p.out_strides[0] + head * p.out_strides[2] + i,
                           outputs[i] * scale * weight * open);
    }
    if (head + 1 < (key_head + 1) * group) __syncthreads();  // shared memory is free for the next value head
  }
}

}  // namespace kda

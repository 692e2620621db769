// One token through a KDA layer: one CTA for a head of q and k and a sequence, 128 threads for each 32 value channels.
//
// Data flow
//   1. Each thread has a channel of q, k or v: the last inputs from the convolution's state, the new one, their sum, SiLU,
//      into shared memory; and the state one input further back where it was. Or one of g, whose decay it makes. No other
//      CTA has these channels, so that nobody reads what has been written. The recurrent state is on its way into registers.
//   2. The first warp finds the norms of q and k.
//   3. The recurrence (`Slice`), the norm of the output over all threads, and the state back to memory.
// For each value head that shares the head of q and k; q and k are made for the first one. As in `recurrent`, a CTA brings into L2
// what the one that follows it begins with.
#pragma once

#include "api/decode.h"
#include "common/launch.cuh"
#include "slice.cuh"

namespace kda {

constexpr int kWidestConv = 4;

template <int V>
constexpr int kStepThreads = V / kSliceWidth * kSliceThreads;

// An SM. Where some threads have two channels for the convolution, registers do for one.
template <int K, int V>
constexpr int kStepCtas = kStepThreads<V> < 2 * K + V ? 1 : 128 / V;

// A channel of q, k or v for the convolution, as it lies in memory.
struct RawConv {
  Number x, inputs[kWidestConv], weights[kWidestConv];  // oldest first

  // `at` is its number among all channels of the state, `channel` that among those of the weights.
  __device__ __forceinline__ void load(const DecodeStepParams& p, Number now, const void* weights_of, int channel,
                                       int64_t at) {
    x = now;
#pragma unroll
    for (int i = 0; i < kWidestConv; ++i) {
      if (i >= p.conv_width) continue;
      if (i > 0) inputs[i] = load_number(p.conv_state, at * p.conv_width + i, p.conv_state_dtype);
      weights[i] = load_number(weights_of, static_cast<int64_t>(channel) * p.conv_width + i, p.weight_dtype);
    }
  }

  // Its output. The state with x, and without its oldest input, goes to memory.
  template <class Element>
  __device__ __forceinline__ float run(const DecodeStepParams& p, DType dtype, int64_t at) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWidestConv; ++i) {
      if (i >= p.conv_width) continue;
      const bool is_new = i == p.conv_width - 1;
      const float input =
          is_new ? x.as<Element>(dtype) : inputs[min(i + 1, kWidestConv - 1)].as<Element>(p.conv_state_dtype);
      sum = fmaf(input, weights[i].as<Element>(p.weight_dtype), sum);
      const int64_t to = at * p.conv_width + i;
      p.conv_state_dtype == DType::kFP32 ? store_value<float>(p.conv_state, to, input)
                                         : store_value<Element>(p.conv_state, to, input);
    }
    return rounded<Element>(sum * sigmoid(sum));
  }
};

// Brings a sequence's share of a head of q and k into L2. `row` is that of its states.
template <class Element, int K, int V, bool kValuesFirst, class State>
__device__ __forceinline__ void hint_at_step(const DecodeStepParams& p, int n, int key_head, int row) {
  const int group = p.HV / p.H, head = key_head * group, width = p.conv_width;
  hint_at_state<K, kValuesFirst, State>(p, row, head, 0, V);
  const int64_t keys = static_cast<int64_t>(p.H) * K, channels = row * (2 * keys + p.HV * V);
  const auto rows = [&](const void* base, int64_t at, int count, int size) {
    hint(static_cast<const char*>(base) + at * size, count * size);
  };
  const int state = width * size_of(p.conv_state_dtype), weight = width * size_of(p.weight_dtype);
  const auto row_of = [&](const int64_t (&strides)[3], int h) { return n * strides[0] + h * strides[2]; };
  switch (kStepThreads<V> - 1 - static_cast<int>(threadIdx.x)) {
    case 0: return rows(p.conv_state, channels + key_head * K, K, state);
    case 1: return rows(p.conv_state, channels + keys + key_head * K, K, state);
    case 2: return rows(p.conv_state, channels + 2 * keys + head * V, group * V, state);
    case 3: return rows(p.q_conv_weight, key_head * K, K, weight);
    case 4: return rows(p.k_conv_weight, key_head * K, K, weight);
    case 5: return rows(p.v_conv_weight, head * V, group * V, weight);
    case 6: return rows(p.q, row_of(p.q_strides, key_head), K, sizeof(Element));
    case 7: return rows(p.k, row_of(p.k_strides, key_head), K, sizeof(Element));
    case 8: return rows(p.v, row_of(p.v_strides, head), V, sizeof(Element));
    case 9: return rows(p.g, row_of(p.g_strides, head), K, size_of(p.g_dtype));
    case 10: return rows(p.output_gate, row_of(p.output_gate_strides, head), V, sizeof(Element));
  }
}

template <class Element, int K, int V, bool kValuesFirst, class State>
__global__ void __launch_bounds__(kStepThreads<V>, kStepCtas<K, V>)
    decode_step(const __grid_constant__ DecodeStepParams p) {
  constexpr int kThreads = kStepThreads<V>;
  constexpr DType kDType = kDTypeOf<Element>;
  using OwnSlice = Slice<K, kValuesFirst, State>;
  extern __shared__ __align__(16) char places[];  // of V / 32 slices
  __shared__ __align__(16) float exchange[V / kSliceWidth][OwnSlice::kExchange + 4];
  __shared__ Token<K> token;
  __shared__ float values[V], outputs[V], scales[V];
  const int warp = this_warp(), lane = threadIdx.x & 31, slice = warp / 4, first = slice * kSliceWidth;

  const int n = blockIdx.x / p.H, key_head = blockIdx.x - n * p.H, group = p.HV / p.H;
  launch_dependents();
  if (const int row = row_for_hint(p, n); row >= 0)
    hint_at_step<Element, K, V, kValuesFirst, State>(p, n, key_head, row);
  wait_for_previous_kernel();

  // Of the CTA that comes next here.
  const bool has_later = blockIdx.x + p.resident_ctas < gridDim.x;
  const int later = blockIdx.x + (has_later ? p.resident_ctas : 0), later_n = later / p.H;
  const Integer row = load_row(p, n), later_row = load_row(p, later_n);
  const auto hint_at_later = [&]() {
    if (has_later && later_row.is_below(p.rows, p.state_indices_is_int64))
      hint_at_step<Element, K, V, kValuesFirst, State>(p, later_n, later - later_n * p.H, later_row.low);
  };
  if (!row.is_below(p.rows, p.state_indices_is_int64)) {
    hint_at_later();
#pragma unroll 1
    for (int i = threadIdx.x; i < group * V; i += kThreads)
      store_value<Element>(p.out, n * p.out_strides[0] + (key_head * group + i / V) * p.out_strides[2] + i % V, 0.0f);
    return;
  }
  const int64_t keys = static_cast<int64_t>(p.H) * K, channels = row.low * (2 * keys + p.HV * V);

#pragma unroll 1
  for (int member = 0; member < group; ++member) {
    const int head = key_head * group + member;
    const int64_t matrix = static_cast<int64_t>(row.low) * p.HV + head;
    // The work on channels: q, k, v and g, which only the first value head has all of.
    const auto load_conv = [&](int i) {
      RawConv raw;
      const bool is_value = i >= 2 * K, is_key = i >= K && !is_value;
      const int channel = is_value ? head * V + i - 2 * K : key_head * K + i % K;
      const int64_t x = is_value ? n * p.v_strides[0] + head * p.v_strides[2] + i - 2 * K
                        : is_key ? n * p.k_strides[0] + key_head * p.k_strides[2] + i % K
                                 : n * p.q_strides[0] + key_head * p.q_strides[2] + i % K;
      raw.load(p,
               load_number(is_value ? p.v
                           : is_key ? p.k
                                    : p.q,
                           x, kDType),
               is_value ? p.v_conv_weight
               : is_key ? p.k_conv_weight
                        : p.q_conv_weight,
               channel,
               channels +
                   (is_value ? 2 * keys
                    : is_key ? keys
                             : 0) +
                   channel);
      return raw;
    };
    const auto run_conv = [&](const RawConv& raw, int i) {
      const bool is_value = i >= 2 * K, is_key = i >= K && !is_value;
      const int channel = is_value ? head * V + i - 2 * K : key_head * K + i % K;
      const float y = raw.run<Element>(p, kDType, channels + (is_value ? 2 * keys : is_key ? keys : 0) + channel);
      (is_value ? values + (i - 2 * K) : is_key ? token.key + i % K : token.query + i % K)[0] = y;
    };
    const int from = member == 0 ? 0 : 2 * K, to = 2 * K + V;  // channels of the convolution
    const int own = from + static_cast<int>(threadIdx.x);
    RawConv conv;
    RawDecay decay;
    Number beta = {0}, weight = {0}, gate = {0};
    if (own < to) conv = load_conv(own);
    // From the last thread on backwards, since the first ones have convolutions.
    const int channel = kThreads - 1 - static_cast<int>(threadIdx.x);
    if (channel < K) decay.load(p, n * p.g_strides[0] + head * p.g_strides[2], head, channel);
    if (warp == 0) beta = load_number(p.beta, n * p.beta_strides[0] + head * p.beta_strides[2], p.beta_dtype);
    if (threadIdx.x < V) {
      weight = load_number(p.norm_weight, threadIdx.x, p.weight_dtype);
      gate = load_number(p.output_gate, n * p.output_gate_strides[0] + head * p.output_gate_strides[2] + threadIdx.x,
                         kDType);
    }
    OwnSlice state(exchange[slice], V);
    state.copy(p.initial_state, matrix, first, places + slice * OwnSlice::kPlaceBytes);

    if (own < to) run_conv(conv, own);
    if constexpr (kThreads < 2 * K + V)
#pragma unroll 1
      for (int i = own + kThreads; i < to; i += kThreads) run_conv(load_conv(i), i);
    if (channel < K) token.decay[channel] = decay.get<Element>(p);
    if (threadIdx.x < V) scales[threadIdx.x] = weight.as<Element>(p.weight_dtype) * sigmoid(gate.as(kDType));
    if (member + 1 < group) {
      hint_at_state<K, kValuesFirst, State>(p, row.low, head + 1, 0, V);
    } else {
      hint_at_later();
    }
    __syncthreads();
    if (warp == 0) {
      Neighbours<float, K / 32> query, key;
      query.load(token.query, lane * (K / 32)), key.load(token.key, lane * (K / 32));
      sum_up(p, query, key, beta.as<Element>(p.beta_dtype), token);
    }
    state.take(places + slice * OwnSlice::kPlaceBytes);
    __syncthreads();
    state.step(token, values + first, 0, [&](int channel, float o) { outputs[first + channel] = rounded<Element>(o); });
    __syncthreads();
    if (threadIdx.x < V) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < V / 32; ++i) squares = fmaf(outputs[32 * i + lane], outputs[32 * i + lane], squares);
      const float scale = rsqrtf(warp_sum(squares) * (1.0f / V) + p.norm_eps);
      store_value<Element>(p.out, n * p.out_strides[0] + head * p.out_strides[2] + threadIdx.x,
                           outputs[threadIdx.x] * scale * scales[threadIdx.x]);
    }
    state.store(p.final_state, matrix, first);
    if (member + 1 < group) __syncthreads();  // shared memory is free for the next value head
  }
}

}  // namespace kda

// One token through a KDA layer: items of a value head and a sequence, in CTAs of 128 threads for each 32 value channels.
//
// Data flow
//   1. Each thread has a channel of q, k or v: the last inputs from the convolution's state, the new one, their sum, SiLU,
//      into shared memory; and the state one input further back where it was. Or one of g, whose decay it makes.
//   2. The first warp finds the norms of q and k.
//   3. The recurrent state into registers (`Slice`), the recurrence, the norm of the output over all threads, and the state
//      back to memory.
// Value heads that share a head of q and k are items of one CTA, one after the other, and q and k are made for the first one:
// no other CTA has their channels, so that nobody reads a state of the convolution that has been written. Everything that an
// item needs is on its way to shared memory while the CTA is at work on the one before, the small things first, as in
// `recurrent`.
#pragma once

#include "api/decode.h"
#include "common/launch.cuh"
#include "slice.cuh"

namespace kda {

constexpr int kWidestConv = 4;

template <int V>
constexpr int kStepThreads = V / kSliceWidth * kSliceThreads;

template <int V>
constexpr int kStepCtas = 128 / V;  // an SM

// What an item brings with it, as it lies in memory.
template <class Element, int K, int V, class State>
struct alignas(16) StepPlace {
  char state[V * K * sizeof(State)];
  char conv_state[(2 * K + V) * kWidestConv * 4], conv_weight[(2 * K + V) * kWidestConv * 4];  // of q, k and v, or less
  Element q[K], k[K], v[V], output_gate[V];
  float g[K], dt_bias[K];  // or narrower
};

template <class Element, int K, int V, bool kValuesFirst, class State>
struct StepSmem {
  using OwnSlice = Slice<K, V / kSliceWidth, kValuesFirst, State>;
  StepPlace<Element, K, V, State> places[2];  // of this item and the next one
  Token<K> token;
  float values[V], outputs[V], norm_weight[V];
  float exchange[V / kSliceWidth * OwnSlice::kExchange + 4];
};

struct StepItem {
  int n, key_head, head, member;  // of the value heads that share a head of q and k
  Integer row;

  __device__ __forceinline__ bool has_row(const DecodeStepParams& p) const {
    return row.is_below(p.rows, p.state_indices_is_int64);
  }
  __device__ __forceinline__ int64_t matrix(const DecodeStepParams& p) const {
    return static_cast<int64_t>(row.low) * p.HV + head;
  }
};

// What a warp copies for each item: rows of one kind. In bytes.
struct StepSource {
  const char* base;
  int64_t sequence,
      head;       // strides, that of the row of the states where `by_row`, and of q's and k's heads where `of_keys`
  int bytes, to;  // how many, and where they go in StepPlace
  bool by_row, of_keys;

  __device__ __forceinline__ void set(const void* from, int64_t sequence_stride, int64_t head_stride, int count,
                                      int size, int at, bool keys) {
    base = static_cast<const char*>(from);
    sequence = sequence_stride * size, head = head_stride * size, bytes = count * size, to = at, of_keys = keys;
  }

  __device__ __forceinline__ const char* at(const StepItem& item, int row) const {
    return base + (by_row ? row : item.n) * sequence + (of_keys ? item.key_head : item.head) * head;
  }
};

constexpr int kStepKinds = 12;

template <class Element, int K, int V, class State>
__device__ __forceinline__ StepSource step_source(const DecodeStepParams& p, int kind) {
  using Place = StepPlace<Element, K, V, State>;
  constexpr int kElement = sizeof(Element);
  const int state_size = size_of(p.conv_state_dtype) * p.conv_width,
            weight_size = size_of(p.weight_dtype) * p.conv_width;
  const int64_t keys = static_cast<int64_t>(p.H) * K, channels = 2 * keys + static_cast<int64_t>(p.HV) * V;
  const auto states = [&](int at) { return static_cast<int>(offsetof(Place, conv_state)) + at * state_size; };
  const auto weights = [&](int at) { return static_cast<int>(offsetof(Place, conv_weight)) + at * weight_size; };
  const char* const conv = static_cast<const char*>(p.conv_state);
  StepSource s;
  s.bytes = 0, s.by_row = kind < 3, s.of_keys = false;
  switch (kind) {
    case 0: s.set(conv, channels, K, K, state_size, states(0), true); break;
    case 1: s.set(conv + keys * state_size, channels, K, K, state_size, states(K), true); break;
    case 2: s.set(conv + 2 * keys * state_size, channels, V, V, state_size, states(2 * K), false); break;
    case 3: s.set(p.q_conv_weight, 0, K, K, weight_size, weights(0), true); break;
    case 4: s.set(p.k_conv_weight, 0, K, K, weight_size, weights(K), true); break;
    case 5: s.set(p.v_conv_weight, 0, V, V, weight_size, weights(2 * K), false); break;
    case 6: s.set(p.q, p.q_strides[0], p.q_strides[2], K, kElement, offsetof(Place, q), true); break;
    case 7: s.set(p.k, p.k_strides[0], p.k_strides[2], K, kElement, offsetof(Place, k), true); break;
    case 8: s.set(p.v, p.v_strides[0], p.v_strides[2], V, kElement, offsetof(Place, v), false); break;
    case 9:
      s.set(p.output_gate, p.output_gate_strides[0], p.output_gate_strides[2], V, kElement,
            offsetof(Place, output_gate), false);
      break;
    case 10: s.set(p.g, p.g_strides[0], p.g_strides[2], K, size_of(p.g_dtype), offsetof(Place, g), false); break;
    case 11:
      if (p.dt_bias != nullptr) s.set(p.dt_bias, 0, K, K, size_of(p.parameter_dtype), offsetof(Place, dt_bias), false);
  }
  return s;
}

// The convolution's output for channel `at` of an item's, in the order of q, k and v, whose input is x; `channel` is its number
// among all channels. The state with x, and without its oldest input, goes to memory.
template <class Element, class Place>
__device__ __forceinline__ float convolve(const DecodeStepParams& p, const Place& place, int at, float x, int row,
                                          int64_t channel) {
  const int width = p.conv_width;
  float inputs[kWidestConv];  // oldest first, as the weights; the last ones where there are less
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kWidestConv; ++i) {
    const int own = i - (kWidestConv - width);
    if (own < 0) continue;
    inputs[i] =
        i == kWidestConv - 1 ? x : load_float_of<Element>(place.conv_state, at * width + own + 1, p.conv_state_dtype);
    sum = fmaf(inputs[i], load_float_of<Element>(place.conv_weight, at * width + own, p.weight_dtype), sum);
  }
  const int64_t to = (row * (2 * static_cast<int64_t>(p.H) * p.K + p.HV * p.V) + channel) * width;
  if (width == kWidestConv) {
    p.conv_state_dtype == DType::kFP32 ? store_neighbours<float>(p.conv_state, to, inputs)
                                       : store_neighbours<Element>(p.conv_state, to, inputs);
  } else {
#pragma unroll
    for (int i = 1; i < kWidestConv; ++i) {
      const int64_t own = i - (kWidestConv - width);
      if (own < 0) continue;
      p.conv_state_dtype == DType::kFP32 ? store_value<float>(p.conv_state, to + own, inputs[i])
                                         : store_value<Element>(p.conv_state, to + own, inputs[i]);
    }
  }
  return rounded<Element>(sum * sigmoid(sum));
}

template <class Element, int K, int V, bool kValuesFirst, class State>
__global__ void __launch_bounds__(kStepThreads<V>, kStepCtas<V>)
    decode_step(const __grid_constant__ DecodeStepParams p) {
  constexpr int kThreads = kStepThreads<V>, kWarps = kThreads / 32, kSources = (kStepKinds + kWarps - 1) / kWarps;
  using OwnSlice = Slice<K, V / kSliceWidth, kValuesFirst, State>;
  extern __shared__ __align__(16) char smem_bytes[];
  auto& smem = *reinterpret_cast<StepSmem<Element, K, V, kValuesFirst, State>*>(smem_bytes);
  const int slice = this_warp() / 4, warp = this_warp(), lane = threadIdx.x & 31, first = slice * kSliceWidth;
  OwnSlice state(smem.exchange + slice * OwnSlice::kExchange, V, slice);

  int index = blockIdx.x;  // of heads of q and k
  const int group = p.HV / p.H, step_n = gridDim.x / p.H, step_head = gridDim.x % p.H;
  StepItem item;
  item.n = index / p.H, item.key_head = index % p.H, item.head = item.key_head * group, item.member = 0;
  // The item after this one, if this CTA has one.
  const auto advance = [&](StepItem& it) {
    ++it.head;
    if (++it.member < group) return true;
    index += gridDim.x;
    it.n += step_n, it.key_head += step_head;
    if (it.key_head >= p.H) ++it.n, it.key_head -= p.H;
    it.head = it.key_head * group, it.member = 0;
    if (index >= p.N * p.H) return false;
    it.row = load_row(p, it.n);
    return true;
  };
  StepSource sources[kSources];
#pragma unroll
  for (int i = 0; i < kSources; ++i) sources[i] = step_source<Element, K, V, State>(p, warp + i * kWarps);

  Number A_log, beta, next_A_log = {0}, next_beta = {0};
  const auto begin = [&](const StepItem& it, int place) {
    const bool has_row = it.has_row(p);
    char* const to = reinterpret_cast<char*>(&smem.places[place]);
    if (has_row) {
#pragma unroll
      for (const StepSource& source : sources)
        if (it.member == 0 || !source.of_keys)
          copy_async(to + source.to, source.at(it, it.row.low), source.bytes, lane, 32);
      next_beta = load_number(p.beta, it.n * p.beta_strides[0] + it.head * p.beta_strides[2], p.beta_dtype);
      if (p.A_log != nullptr) next_A_log = load_number(p.A_log, it.head, p.parameter_dtype);
    }
    commit_copies();
    if (has_row) state.copy(p.initial_state, it.matrix(p), 0, smem.places[place].state);
    commit_copies();
  };

  launch_dependents();
  if (const int row = row_for_hint(p, item.n); row >= 0) {
#pragma unroll
    for (const StepSource& source : sources)
      for (int at = 128 * lane; at < source.bytes; at += 128 * 32) hint(source.at(item, row) + at);
    state.hint_at(p.initial_state, static_cast<int64_t>(row) * p.HV + item.head, 0);
  }
  wait_for_previous_kernel();

  item.row = load_row(p, item.n);
  begin(item, 0);
  if (threadIdx.x < V)
    smem.norm_weight[threadIdx.x] = load_float_of<Element>(p.norm_weight, threadIdx.x, p.weight_dtype);
  StepItem next = item;
  bool has_next = advance(next);
#pragma unroll 1
  for (int at = 0;; at ^= 1) {
    A_log = next_A_log, beta = next_beta;
    wait_for_copies<1>();
    __syncthreads();  // small things are there, and nobody needs the place of the item before
    if (has_next) {
      begin(next, at ^ 1);
    } else {
      commit_copies();
      commit_copies();
    }

    const auto& place = smem.places[at];
    const int64_t out = item.n * p.out_strides[0] + item.head * p.out_strides[2];
    if (item.has_row(p)) {
#pragma unroll 1
      for (int i = threadIdx.x; i < 3 * K + V; i += kThreads) {
        if (i >= 2 * K + V) {
          const int channel = i - (2 * K + V);
          smem.token.decay[channel] = decay_of<Element>(p, place.g, place.dt_bias, channel, A_log);
        } else if (i >= 2 * K) {
          const int channel = i - 2 * K;
          smem.values[channel] = convolve<Element>(p, place, i, load_float<Element>(place.v, channel), item.row.low,
                                                   2 * p.H * K + item.head * V + channel);
        } else if (item.member == 0) {
          const int channel = i % K, own = item.key_head * K + channel;
          if (i < K) {
            smem.token.query[channel] =
                convolve<Element>(p, place, i, load_float<Element>(place.q, channel), item.row.low, own);
          } else {
            smem.token.key[channel] =
                convolve<Element>(p, place, i, load_float<Element>(place.k, channel), item.row.low, p.H * K + own);
          }
        }
      }
      __syncthreads();
      if (warp == 0) sum_up(p, smem.token.query, smem.token.key, beta.as(p.beta_dtype), smem.token);
      wait_for_copies<2>();
      __syncthreads();
      state.take(place.state);
      state.step(smem.token, smem.values + first, 0,
                 [&](int channel, float o) { smem.outputs[first + channel] = rounded<Element>(o); });
      __syncthreads();
      if (threadIdx.x < V) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < V / 32; ++i)
          squares = fmaf(smem.outputs[32 * i + lane], smem.outputs[32 * i + lane], squares);
        const float scale = rsqrtf(warp_sum(squares) * (1.0f / V) + p.norm_eps);
        const float gate = sigmoid(load_float<Element>(place.output_gate, threadIdx.x));
        store_value<Element>(p.out, out + threadIdx.x,
                             smem.outputs[threadIdx.x] * scale * smem.norm_weight[threadIdx.x] * gate);
      }
      state.store(p.final_state, item.matrix(p), 0);
    } else {
      for (int i = threadIdx.x; i < V; i += kThreads) store_value<Element>(p.out, out + i, 0.0f);
    }
    if (!has_next) break;
    item = next;
    has_next = advance(next);
  }
}

}  // namespace kda

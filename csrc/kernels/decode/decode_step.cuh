// One token through a KDA layer: items of a value head and a sequence, in CTAs of 128 threads for each 32 value channels.
//
// Data flow
//   1. Each thread has a channel of q, k or v: the last inputs from the convolution's state, the new one, their sum, SiLU,
//      into shared memory; and the state one input further back where it was.
//   2. The first warp makes `Token` of q, k and g, while the others take the recurrent state into registers (`Slice`).
//   3. The recurrence, the state back to memory, and the norm of the output over all threads.
// Value heads that share a head of q and k are items of one CTA, one after the other, and q and k are made for the first one:
// no other CTA has their channels, so that nobody reads a state of the convolution that has been written. Everything that an
// item needs is on its way to shared memory while the CTA is at work on the one before.
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
  using OwnSlice = Slice<K, kValuesFirst, State>;
  StepPlace<Element, K, V, State> places[2];  // of this item and the next one
  Token<K> token;
  float queries[K], keys[K], values[V], outputs[V], norm_weight[V];
  float exchange[V / kSliceWidth * OwnSlice::kExchange + 4];
};

struct StepItem {
  int n, head;
  Integer row;
  bool is_first;  // of those that share a head of q and k

  // The item after this one, where a CTA has one: the next head of the group, or the first one of a group `stride` further.
  __device__ __forceinline__ bool advance(const DecodeStepParams& p, int& group, int stride) {
    const int size = p.HV / p.H;
    is_first = ++head % size == 0;
    if (!is_first) return true;
    group += stride;
    n = group / p.H, head = (group - n * p.H) * size;
    return group < p.N * p.H;
  }

  __device__ __forceinline__ bool has_row(const DecodeStepParams& p) const {
    return row.is_below(p.rows, p.state_indices_is_int64);
  }
  __device__ __forceinline__ int64_t matrix(const DecodeStepParams& p) const {
    return static_cast<int64_t>(row.low) * p.HV + head;
  }
};

// Calls `take` for all that lies in rows: with a place for it, where it is, and its bytes. Each warp has some of it. `row` is that
// of the states.
template <class Element, int K, int V, class State, class Take>
__device__ __forceinline__ void for_rows(const DecodeStepParams& p, StepPlace<Element, K, V, State>& place, int row,
                                         const StepItem& item, const Take& take) {
  constexpr int kWarps = kStepThreads<V> / 32, kElement = sizeof(Element);
  const int key_head = item.head / (p.HV / p.H), n = item.n, width = p.conv_width;
  const int64_t channels = 2 * p.H * K + p.HV * V;
  const auto rows = [&](void* to, const void* base, const int64_t (&strides)[3], int head, int bytes, int size) {
    take(to, static_cast<const char*>(base) + (n * strides[0] + head * strides[2]) * size, bytes);
  };
  const auto conv = [&](char* to, const void* base, int64_t channel, int at, int count, int size) {
    size *= width;
    take(to + at * size, static_cast<const char*>(base) + channel * size, count * size);
  };
  const int state_size = size_of(p.conv_state_dtype), weight_size = size_of(p.weight_dtype);
#pragma unroll 1
  for (int kind = this_warp(); kind < 12; kind += kWarps) {
    if (!item.is_first && (kind % 3 < 2) && kind < 9) continue;  // q and k are there
    switch (kind) {
      case 0: conv(place.conv_state, p.conv_state, row * channels + key_head * K, 0, K, state_size); break;
      case 1: conv(place.conv_state, p.conv_state, row * channels + (p.H + key_head) * K, K, K, state_size); break;
      case 2:
        conv(place.conv_state, p.conv_state, row * channels + 2 * p.H * K + item.head * V, 2 * K, V, state_size);
        break;
      case 3: conv(place.conv_weight, p.q_conv_weight, key_head * K, 0, K, weight_size); break;
      case 4: conv(place.conv_weight, p.k_conv_weight, key_head * K, K, K, weight_size); break;
      case 5: conv(place.conv_weight, p.v_conv_weight, item.head * V, 2 * K, V, weight_size); break;
      case 6: rows(place.q, p.q, p.q_strides, key_head, K * kElement, kElement); break;
      case 7: rows(place.k, p.k, p.k_strides, key_head, K * kElement, kElement); break;
      case 8: rows(place.v, p.v, p.v_strides, item.head, V * kElement, kElement); break;
      case 9: rows(place.output_gate, p.output_gate, p.output_gate_strides, item.head, V * kElement, kElement); break;
      case 10: rows(place.g, p.g, p.g_strides, item.head, K * size_of(p.g_dtype), size_of(p.g_dtype)); break;
      case 11:
        if (p.dt_bias != nullptr) {
          const int bytes = K * size_of(p.parameter_dtype);
          take(place.dt_bias, static_cast<const char*>(p.dt_bias) + static_cast<int64_t>(item.head) * bytes, bytes);
        }
    }
  }
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
  const int64_t to = (static_cast<int64_t>(row) * (2 * p.H * p.K + p.HV * p.V) + channel) * width;
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
  constexpr int kThreads = kStepThreads<V>;
  using OwnSlice = Slice<K, kValuesFirst, State>;
  extern __shared__ __align__(16) char smem_bytes[];
  auto& smem = *reinterpret_cast<StepSmem<Element, K, V, kValuesFirst, State>*>(smem_bytes);
  const int slice = this_warp() / 4, warp = this_warp(), lane = threadIdx.x & 31, first = slice * kSliceWidth;
  OwnSlice state(smem.exchange + slice * OwnSlice::kExchange, V);

  Number A_log = {0}, beta = {0}, next_A_log = {0}, next_beta = {0};
  const auto begin = [&](const StepItem& item, int to) {
    auto& place = smem.places[to];
    if (item.has_row(p)) {
      for_rows(p, place, item.row.low, item, [&](void* to, const void* from, int bytes) {
        copy_async_shared(static_cast<char*>(to), from, bytes, lane, 32);
      });
      if (warp == 0) {
        next_beta = load_number(p.beta, item.n * p.beta_strides[0] + item.head * p.beta_strides[2], p.beta_dtype);
        if (p.A_log != nullptr) next_A_log = load_number(p.A_log, item.head, p.parameter_dtype);
      }
    }
    commit_copies();
    if (item.has_row(p))
      state.copy(p.initial_state, item.matrix(p), first, place.state + slice * OwnSlice::kPlaceBytes);
    commit_copies();
  };

  int group = blockIdx.x;
  const int n = group / p.H;
  StepItem item{n, (group - n * p.H) * (p.HV / p.H), {0, 0}, true};
  launch_dependents();
  if (const int row = row_for_hint(p, n); row >= 0) {
    for_rows(p, smem.places[0], row, item, [&](void*, const void* from, int bytes) {
      for (int at = 128 * lane; at < bytes; at += 128 * 32) hint(static_cast<const char*>(from) + at);
    });
    state.hint_at(p.initial_state, static_cast<int64_t>(row) * p.HV + item.head, first);
  }
  wait_for_previous_kernel();

  item.row = load_row(p, n);
  begin(item, 0);
  if (threadIdx.x < V)
    smem.norm_weight[threadIdx.x] = load_float_of<Element>(p.norm_weight, threadIdx.x, p.weight_dtype);
  StepItem next = item;
  bool has_next = next.advance(p, group, gridDim.x);
  if (has_next) next.row = load_row(p, next.n);
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
      for (int i = threadIdx.x; i < 2 * K + V; i += kThreads) {
        const int key_head = item.head / (p.HV / p.H);
        if (i >= 2 * K) {
          const float x = load_float<Element>(place.v, i - 2 * K);
          smem.values[i - 2 * K] =
              convolve<Element>(p, place, i, x, item.row.low, 2 * p.H * K + item.head * V + i - 2 * K);
        } else if (item.is_first) {
          const bool is_key = i >= K;
          const float x = load_float<Element>(is_key ? place.k : place.q, i % K);
          const float y = convolve<Element>(p, place, i, x, item.row.low,
                                            ((is_key ? p.H : 0) + key_head) * static_cast<int64_t>(K) + i % K);
          (is_key ? smem.keys : smem.queries)[i % K] = y;
        }
      }
      __syncthreads();
      if (warp == 0) {
        RawToken<K> raw;
        load_neighbours<float>(smem.queries, lane * (K / 32), raw.q);
        load_neighbours<float>(smem.keys, lane * (K / 32), raw.k);
        load_gate<Element>(p, place.g, place.dt_bias, raw);
        raw.beta = beta.as(p.beta_dtype), raw.A_log = A_log.as(p.parameter_dtype);
        activate(p, raw, smem.token);
      }
      wait_for_copies<2>();
      state.take(place.state + slice * OwnSlice::kPlaceBytes);
      __syncthreads();
      state.step(smem.token, smem.values + first, 0,
                 [&](int channel, float o) { smem.outputs[first + channel] = rounded<Element>(o); });
      state.store(p.final_state, item.matrix(p), first);
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
    } else {
      for (int i = threadIdx.x; i < V; i += kThreads) store_value<Element>(p.out, out + i, 0.0f);
    }
    if (!has_next) break;
    item = next;
    has_next = next.advance(p, group, gridDim.x);
    if (has_next) next.row = load_row(p, next.n);
  }
}

}  // namespace kda

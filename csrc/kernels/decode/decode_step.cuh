// One token through a KDA layer: a CTA has a head of q and k of a sequence.
//
// Data flow
//   1. Each thread has a channel of q, k or v: the last inputs from the convolution's state, the new one, their sum, SiLU,
//      into shared memory; and the state one input further back where it was. Or one of g, whose decay it makes. The recurrent
//      state is on its way to shared memory meanwhile (`Slice`).
//   2. The last warp finds the norms of q and k, beside the recurrence's first half, which does without them.
//   3. The recurrent state back to memory, and the norm of the output over all threads.
// Value heads that share a head of q and k come one after the other, and q and k are made for the first one: no other CTA has
// their channels, so that nobody reads a state of the convolution that has been written.
#pragma once

#include "api/decode.h"
#include "common/launch.cuh"
#include "slice.cuh"

namespace kda {

constexpr int kWidestConv = 4;

constexpr int kStepThreads = 256;

constexpr int kStepCtas = 2;  // an SM, which shared memory and 128 registers a thread leave room for

// A CTA brings what a later one will need into L2: one for this many SMs further. That is soon, since L2 also has to hold what
// all CTAs of the moment read and write.
constexpr int kHintedPart = 2;

template <class Element, int K, int V, bool kValuesFirst, class State>
struct StepSmem {
  alignas(128) char state[K * V * sizeof(State)];
  int64_t matrix, out;  // of the state and the first output
  Token<K> token;
  float values[V], outputs[V];
  alignas(16) Element output_gate[V];
  alignas(16) float norm_weight[V];  // or narrower
  typename Slice<K, V, kStepThreads, kValuesFirst, State, false>::Exchange exchange;
};

// Of a channel, the last inputs or the weights of the convolution as they lie in memory, oldest first and at the end.
struct Taps {
  uint32_t words[kWidestConv];

  __device__ __forceinline__ void load(const void* base, int64_t channel, int width, DType dtype) {
    if (width == kWidestConv) {
      if (dtype == DType::kFP32) {
        const uint4 all = static_cast<const uint4*>(base)[channel];
        words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
      } else {
        const uint2 all = static_cast<const uint2*>(base)[channel];
        words[0] = all.x, words[2] = all.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidestConv; ++i)
        if (const int own = i - (kWidestConv - width); own >= 0)
          words[i] = load_number(base, channel * width + own, dtype).bits;
    }
  }

  __device__ __forceinline__ float at(int i, int width, DType dtype) const {
    if (width != kWidestConv || dtype == DType::kFP32) return Number{words[i]}.as(dtype);
    const uint32_t pair = words[i / 2 * 2];
    return Number{i % 2 == 0 ? pair & 0xffffu : pair >> 16}.as(dtype);
  }
};

// What a thread brings together for a channel of q, k, v or g: number `at` of these together.
template <int K, int V>
struct StepChannel {
  Number x;
  Taps inputs, weight;  // of g, the first words are dt_bias and A_log
  const void *x_from, *weight_from;
  int64_t x_at, to;  // `to` in the convolution's state, of the channels of all rows
  int weight_at;

  // Where all of it is, but for the row of the states.
  __device__ __forceinline__ void find(const DecodeStepParams& p, int at, int n, int key_head, int head) {
    if (at >= 2 * K + V) {
      const int channel = at - (2 * K + V);
      x_from = p.g, x_at = n * p.g_strides[0] + head * p.g_strides[2] + channel;
      weight_from = p.dt_bias, weight_at = head * K + channel;
      return;
    }
    const int kind = at < K ? 0 : at < 2 * K ? 1 : 2, channel = at - kind * K, own_head = kind == 2 ? head : key_head;
    const int64_t batch_stride = kind == 0 ? p.q_strides[0] : kind == 1 ? p.k_strides[0] : p.v_strides[0];
    const int64_t head_stride = kind == 0 ? p.q_strides[2] : kind == 1 ? p.k_strides[2] : p.v_strides[2];
    x_from = kind == 0 ? p.q : kind == 1 ? p.k : p.v;
    x_at = n * batch_stride + own_head * head_stride + channel;
    weight_from = kind == 0 ? p.q_conv_weight : kind == 1 ? p.k_conv_weight : p.v_conv_weight;
    weight_at = own_head * (kind == 2 ? V : K) + channel;
    to = static_cast<int64_t>(kind * p.H) * K + weight_at;
  }

  // Before `load` may begin, by channels 8 apart: 64 bytes of a convolution's state, or 128. Its weights are the same for all
  // sequences.
  __device__ __forceinline__ void hint_at(const DecodeStepParams& p, int at, int64_t row, bool with_weights) const {
    const bool is_g = at >= 2 * K + V;
    if (at % 32 == 0) hint(static_cast<const char*>(x_from) + x_at * size_of(is_g ? p.g_dtype : p.dtype));
    if (is_g) {
      if (with_weights && p.dt_bias != nullptr)
        hint(static_cast<const char*>(weight_from) + weight_at * size_of(p.parameter_dtype));
    } else {
      if (with_weights)
        hint(static_cast<const char*>(weight_from) + weight_at * p.conv_width * size_of(p.weight_dtype));
      if (row >= 0)
        hint(static_cast<const char*>(p.conv_state) + (row + to) * p.conv_width * size_of(p.conv_state_dtype));
    }
  }

  __device__ __forceinline__ void load(const DecodeStepParams& p, int at, int head, int64_t row) {
    if (at >= 2 * K + V) {
      x = load_number(x_from, x_at, p.g_dtype);
      if (p.dt_bias != nullptr) inputs.words[0] = load_number(weight_from, weight_at, p.parameter_dtype).bits;
      if (p.A_log != nullptr) inputs.words[1] = load_number(p.A_log, head, p.parameter_dtype).bits;
      return;
    }
    x = load_number(x_from, x_at, p.dtype);
    weight.load(weight_from, weight_at, p.conv_width, p.weight_dtype);
    to += row;
    inputs.load(p.conv_state, to, p.conv_width, p.conv_state_dtype);
  }

  // The convolution's output. Its state with x, and without its oldest input, goes to memory.
  template <class Element>
  __device__ __forceinline__ float convolve(const DecodeStepParams& p) const {
    const int width = p.conv_width;
    float last[kWidestConv], sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kWidestConv; ++j) {
      if (j < kWidestConv - width) continue;
      last[j] = j == kWidestConv - 1 ? x.as(p.dtype) : inputs.at(j + 1, width, p.conv_state_dtype);
      sum = fmaf(last[j], weight.at(j, width, p.weight_dtype), sum);
    }
    if (width == kWidestConv) {
      p.conv_state_dtype == DType::kFP32 ? store_neighbours<float>(p.conv_state, to * width, last)
                                         : store_neighbours<Element>(p.conv_state, to * width, last);
    } else {
#pragma unroll
      for (int j = 1; j < kWidestConv; ++j) {
        const int own = j - (kWidestConv - width);
        if (own < 0) continue;
        p.conv_state_dtype == DType::kFP32 ? store_value<float>(p.conv_state, to * width + own, last[j])
                                           : store_value<Element>(p.conv_state, to * width + own, last[j]);
      }
    }
    return rounded<Element>(sum * sigmoid(sum));
  }
};

template <class Element, int K, int V, bool kValuesFirst, class State>
__global__ void __launch_bounds__(kStepThreads, kStepCtas) decode_step(const __grid_constant__ DecodeStepParams p) {
  constexpr int kThreads = kStepThreads, kWarps = kThreads / 32, kAll = 3 * K + V;
  constexpr int kOwn = (kAll + kThreads - 1) / kThreads;  // channels of a thread
  extern __shared__ __align__(128) char smem_bytes[];
  auto& smem = *reinterpret_cast<StepSmem<Element, K, V, kValuesFirst, State>*>(smem_bytes);
  using OwnSlice = Slice<K, V, kStepThreads, kValuesFirst, State, false>;

  const int64_t channels = static_cast<int64_t>(2 * p.H) * K + p.HV * V;  // of the convolution
  const int group = p.HV / p.H;

  // Brings what value head `member` of item `index` needs into L2, with row `row` of the states, -1 for none.
  const auto hint_item = [&](int index, int member, int row, bool with_weights) {
    const int n = index / p.H, key_head = index % p.H, head = key_head * group + member;
    if (row >= 0) OwnSlice::hint_at(p.initial_state, static_cast<int64_t>(row) * p.HV + head, V, 0);
    if (threadIdx.x / 32 != 2) return;  // warps before it and the last one have more to do
#pragma unroll 1
    for (int at = 8 * (threadIdx.x & 31) + (member > 0 ? 2 * K : 0); at < kAll; at += 8 * 32) {
      StepChannel<K, V> own;
      own.find(p, at, n, key_head, head);
      own.hint_at(p, at, row * channels, with_weights);
    }
  };

  launch_dependents();
  const int resident = kStepCtas * p.num_sms;
  if (blockIdx.x < resident)  // others come when the kernel before this one has ended, with hints from earlier CTAs
    hint_item(blockIdx.x, 0, row_for_hint(p, blockIdx.x / p.H), true);

#pragma unroll 1
  for (int member = 0; member < group; ++member) {
    if (member > 0) __syncthreads();  // nobody needs what is in shared memory
    // Unknown to the compiler: it would keep what follows from them for the next member, in registers that there are not.
    int thread = threadIdx.x, index = blockIdx.x;
    asm volatile("" : "+r"(thread), "+r"(index));
    const int n = index / p.H, key_head = index % p.H;
    const int head = key_head * group + member;
    const int warp = thread / 32, lane = thread & 31;
    OwnSlice state(smem.exchange, V, 0, thread);
    StepChannel<K, V> own[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own[i].find(p, i * kThreads + thread, n, key_head, head);
    const int64_t out = n * p.out_strides[0] + head * p.out_strides[2];

    // What does not need memory came before, where it costs nothing.
    if (member == 0) wait_for_previous_kernel();
    const Integer own_row = load_row(p, n);
    const int64_t row = own_row.low, matrix = row * p.HV + head;
    if (!own_row.is_below(p.rows, p.state_indices_is_int64)) {
      if (thread < V) store_value<Element>(p.out, out + thread, 0.0f);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (const int at = i * kThreads + thread; at < kAll && (member == 0 || at >= 2 * K))
        own[i].load(p, at, head, row * channels);
    }
    Number beta = {0};
    if (warp == kWarps - 1) beta = load_number(p.beta, n * p.beta_strides[0] + head * p.beta_strides[2], p.beta_dtype);
    state.copy(p.initial_state, matrix, smem.state);
    if (warp == 0)
      copy_async(
          reinterpret_cast<char*>(smem.output_gate),
          static_cast<const Element*>(p.output_gate) + n * p.output_gate_strides[0] + head * p.output_gate_strides[2],
          V * static_cast<int>(sizeof(Element)), lane, 32);
    if (warp == 1)
      copy_async(reinterpret_cast<char*>(smem.norm_weight), p.norm_weight, V * size_of(p.weight_dtype), lane, 32);
    if (thread == 0) smem.matrix = matrix, smem.out = out;
    commit_copies();
    if (const int next = index + p.num_sms / kHintedPart; member + 1 == group && next >= resident && next < p.N * p.H) {
      const Integer its_row = load_row(p, next / p.H);
      hint_item(next, 0, its_row.is_below(p.rows, p.state_indices_is_int64) ? its_row.low : -1, false);
    }

#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = i * kThreads + thread;
      if (at >= kAll || (member > 0 && at < 2 * K)) continue;
      const StepChannel<K, V>& mine = own[i];
      if (at >= 2 * K + V) {
        smem.token.decay[at - (2 * K + V)] = decay_of(p, mine.x, {mine.inputs.words[0]}, {mine.inputs.words[1]});
        continue;
      }
      (at < K       ? smem.token.query[at]
       : at < 2 * K ? smem.token.key[at - K]
                    : smem.values[at - 2 * K]) = mine.template convolve<Element>(p);
    }
    __syncthreads();
    if (warp == kWarps - 1) sum_up(p, smem.token.query, smem.token.key, beta.as(p.beta_dtype), smem.token);
    if (kValuesFirst) __syncthreads();  // else `step` has a barrier before it needs the norms
    wait_for_copies<0>();
    if (!OwnSlice::kOwnCopies) __syncthreads();
    if (member + 1 < group) hint_item(index, member + 1, own_row.low, false);
    const auto output = [&](int channel, float o) { smem.outputs[channel] = rounded<Element>(o); };
    state.step_once(smem.token, smem.values, smem.state, p.final_state, smem.matrix, output);
    __syncthreads();
    if (thread < V) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < V / 32; ++i)
        squares = fmaf(smem.outputs[32 * i + lane], smem.outputs[32 * i + lane], squares);
      const float scale = rsqrtf(warp_sum(squares) * (1.0f / V) + p.norm_eps);
      store_value<Element>(p.out, smem.out + thread,
                           smem.outputs[thread] * scale *
                               load_number(smem.norm_weight, thread, p.weight_dtype).as(p.weight_dtype) *
                               sigmoid(load_float<Element>(smem.output_gate, thread)));
    }
  }
}

}  // namespace kda

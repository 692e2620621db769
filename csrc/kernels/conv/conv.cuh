// Causal depthwise convolution over tokens: one warp for a run of tokens of 32 vectors of 16 bytes of channels.
//
// Data flow: a thread slides over its tokens with the last W inputs in registers, and always has the next 8 rows on
// their way from memory. Nothing is shared but what the caches keep: the W - 1 rows before a run, and weights.
//
// Who does what, so that no run has to know about a state:
//   "heads", the first CTAs, a warp for each sequence: outputs of its first W - 1 tokens, which are those that need the
//      initial state, and its final state.
//   "bodies", a warp for each run of tokens: all other outputs, and zeros for tokens that no sequence has. Which tokens
//      are among the first of a sequence, a warp finds out by 32 searches in cu_seqlens at a time, a lane a token,
//      while the first rows are on their way.
//
// In place (final_state is initial_state): an element of the initial state is read by one thread only, which writes the
// same element of the final state after that.
#pragma once

#include <type_traits>

#include "api/conv.h"
#include "common/launch.cuh"
#include "common/vector.cuh"

namespace kda {

constexpr int kConvWarps = 4;
constexpr int kConvThreads = 32 * kConvWarps;
constexpr int kConvAhead = 8;             // rows of a thread that are on their way
constexpr int kMostTokensOfConvRun = 32;  // a lane each, for the search
constexpr int kFewestTokensOfConvRun = 8;

// CTAs next to each other have channels next to each other.
__host__ __device__ __forceinline__ int conv_channel_tiles(const ConvParams& p) {
  const int tile = 32 * 16 / (p.dtype == DType::kFP32 ? 4 : 2);
  return (p.D + tile - 1) / tile;
}

__host__ __device__ __forceinline__ int conv_head_groups(const ConvParams& p) {
  return (p.N + kConvWarps - 1) / kConvWarps;
}

__host__ __device__ __forceinline__ int conv_runs(const ConvParams& p, int tokens_at_a_time) {
  return (p.T - 1) / tokens_at_a_time + 1;
}

// A bound of sequences in [0, T], whatever the caller's tensor says.
__device__ __forceinline__ int bound_of(const ConvParams& p, int n) {
  const int64_t value = p.cu_seqlens_is_int64 ? static_cast<const int64_t*>(p.cu_seqlens)[n]
                                              : static_cast<const int32_t*>(p.cu_seqlens)[n];
  return static_cast<int>(value < 0 ? 0 : value > p.T ? p.T : value);
}

// Whether a sequence begins at `token` or at one of the W - 2 before it. An empty sequence begins where the next one
// does; for those at the end the answer is wrong, but no sequence has the tokens there.
template <int W>
__device__ __forceinline__ bool is_near_beginning(const ConvParams& p, int token) {
  const int earliest = token - (W - 2);
  if (p.cu_seqlens == nullptr) return earliest <= 0;
  int low = 0, high = p.N;  // the first bound from `earliest` on is in [low, high]
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (bound_of(p, middle) < earliest) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < p.N && bound_of(p, low) <= token;
}

// What a thread's channels go through.
template <class Element, int W>
class ConvFilter {
 public:
  static constexpr int kChannels = 16 / sizeof(Element);

  __device__ __forceinline__ void load_weights(const ConvParams& p, int channel) {
    float weights[kChannels * W];
    const int64_t index = static_cast<int64_t>(channel) * W;
    p.weight_dtype == DType::kFP32 ? load_neighbours<float>(p.weight, index, weights)
                                   : load_neighbours<Element>(p.weight, index, weights);
#pragma unroll
    for (int i = 0; i < kChannels * W; ++i) weights_[i % W][i / W] = weights[i];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) bias_[i] = 0.0f;
    if (p.bias == nullptr) return;
    p.bias_dtype == DType::kFP32 ? load_neighbours<float>(p.bias, channel, bias_)
                                 : load_neighbours<Element>(p.bias, channel, bias_);
  }

  // Zeros in place of a state.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kChannels * W; ++i) inputs_[i % W][i / W] = 0.0f;
  }

  template <class State>
  __device__ __forceinline__ void load_state(const void* states, int64_t index) {
    float inputs[kChannels * W];
    load_neighbours<State>(states, index, inputs);
#pragma unroll
    for (int i = 0; i < kChannels * W; ++i) inputs_[i % W][i / W] = inputs[i];
  }

  template <class State>
  __device__ __forceinline__ void store_state(void* states, int64_t index) const {
    float inputs[kChannels * W];
#pragma unroll
    for (int i = 0; i < kChannels * W; ++i) inputs[i] = inputs_[i % W][i / W];
    store_neighbours<State>(states, index, inputs);
  }

  // Takes the next token in, and lets the oldest go.
  __device__ __forceinline__ void push(uint4 row) {
#pragma unroll
    for (int i = 0; i + 1 < W; ++i)
#pragma unroll
      for (int j = 0; j < kChannels; ++j) inputs_[i][j] = inputs_[i + 1][j];
    const uint32_t words[4] = {row.x, row.y, row.z, row.w};
    expand<Element>(words, inputs_[W - 1]);
    // The compiler would expand a row again for each tap, and move rows about in place of numbers.
#pragma unroll
    for (int j = 0; j < kChannels; ++j) asm volatile("" : "+f"(inputs_[W - 1][j]));
  }

  // Of the newest token.
  __device__ __forceinline__ uint4 output(bool silu) const {
    float y[kChannels];
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      y[j] = bias_[j];
#pragma unroll
      for (int i = 0; i < W; ++i) y[j] = fmaf(inputs_[i][j], weights_[i][j], y[j]);
    }
    if (silu) {
#pragma unroll
      for (int j = 0; j < kChannels; ++j) y[j] *= reciprocal_approx(1.0f + exp2_approx(-kLog2E * y[j]));
    }
    uint32_t words[4];
    compress<Element>(y, words);
    return {words[0], words[1], words[2], words[3]};
  }

 private:
  float inputs_[W][kChannels];  // of the last W tokens, oldest first
  float weights_[W][kChannels], bias_[kChannels];
};

// First tokens and final state of sequence n.
template <class Element, int W>
__device__ __forceinline__ void convolve_head(const ConvParams& p, int n, int channel) {
  const bool is_packed = p.cu_seqlens != nullptr;
  const int64_t batch = is_packed ? 0 : n, state = (static_cast<int64_t>(n) * p.D + channel) * W;
  const Element* x = static_cast<const Element*>(p.x) + batch * p.x_strides[0] + channel;
  Element* const y = static_cast<Element*>(p.y) + batch * p.y_strides[0] + channel;

  const int start = is_packed ? bound_of(p, n) : 0;
  const int length = is_packed ? max(bound_of(p, n + 1) - start, 0) : p.T;
  ConvFilter<Element, W> filter;
  filter.load_weights(p, channel);
  uint4 first[W - 1];
#pragma unroll
  for (int i = 0; i < W - 1; ++i)
    if (i < length) first[i] = *reinterpret_cast<const uint4*>(x + (start + i) * p.x_strides[1]);
  if (p.initial_state == nullptr) {
    filter.clear();
  } else {
    switch (p.state_dtype) {
      case DType::kBF16: filter.template load_state<__nv_bfloat16>(p.initial_state, state); break;
      case DType::kFP16: filter.template load_state<__half>(p.initial_state, state); break;
      default: filter.template load_state<float>(p.initial_state, state);
    }
  }

#pragma unroll
  for (int i = 0; i < W - 1; ++i) {
    if (i >= length) break;
    filter.push(first[i]);  // before the output: the oldest input of a state is out of the first token's reach
    *reinterpret_cast<uint4*>(y + (start + i) * p.y_strides[1]) = filter.output(p.silu);
  }
  if (p.final_state == nullptr) return;
  if (length >= W) {
    x += (start + length - W) * p.x_strides[1];
#pragma unroll
    for (int i = 0; i < W; ++i) filter.push(*reinterpret_cast<const uint4*>(x + i * p.x_strides[1]));
  }
  switch (p.state_dtype) {
    case DType::kBF16: filter.template store_state<__nv_bfloat16>(p.final_state, state); break;
    case DType::kFP16: filter.template store_state<__half>(p.final_state, state); break;
    default: filter.template store_state<float>(p.final_state, state);
  }
}

// All that is not of a head, of the tokens from `start` on.
template <class Element, int W>
__device__ __forceinline__ void convolve_run(const ConvParams& p, int batch, int start, int channel) {
  constexpr int kChannels = ConvFilter<Element, W>::kChannels;
  const int lane = threadIdx.x & 31, count = min(p.tokens_at_a_time, p.T - start);
  // Lanes without channels of their own still search.
  const bool has_channels = channel < p.D;
  channel = min(channel, p.D - kChannels);
  const Element* x = static_cast<const Element*>(p.x) + batch * p.x_strides[0] + start * p.x_strides[1] + channel;
  Element* y = static_cast<Element*>(p.y) + batch * p.y_strides[0] + start * p.y_strides[1] + channel;

  // Rows before the first one are part of no output, but for those of heads, which nobody stores.
  uint4 before[W - 1], rows[kConvAhead];
#pragma unroll
  for (int i = 0; i < W - 1; ++i) {
    const int back = W - 1 - i;
    before[i] = {};
    if (start >= back) before[i] = *reinterpret_cast<const uint4*>(x - back * p.x_strides[1]);
  }
#pragma unroll
  for (int i = 0; i < kConvAhead; ++i) {
    if (i < count) rows[i] = *reinterpret_cast<const uint4*>(x);
    x += p.x_strides[1];
  }
  ConvFilter<Element, W> filter;
  filter.load_weights(p, channel);

  // A bit a token.
  const int token = start + lane, covered = p.cu_seqlens == nullptr ? p.T : bound_of(p, p.N);
  const bool is_covered = token < covered;
  const uint32_t zeros = __ballot_sync(0xffffffffu, !is_covered);
  const uint32_t skipped = __ballot_sync(0xffffffffu, is_covered && is_near_beginning<W>(p, token));
  if (!has_channels) return;

  filter.clear();
#pragma unroll
  for (int i = 0; i < W - 1; ++i) filter.push(before[i]);
#pragma unroll 1
  for (int block = 0; block < count; block += kConvAhead) {
#pragma unroll
    for (int i = 0; i < kConvAhead; ++i) {
      if (block + i >= count) return;
      filter.push(rows[i]);
      if (block + i + kConvAhead < count) rows[i] = *reinterpret_cast<const uint4*>(x);
      x += p.x_strides[1];
      if ((skipped >> (block + i) & 1) == 0)
        *reinterpret_cast<uint4*>(y) = zeros >> (block + i) & 1 ? uint4{} : filter.output(p.silu);
      y += p.y_strides[1];
    }
  }
}

// Four CTAs on an SM have 512 threads with 8 rows on their way each: 64 KB.
template <class Element, int W>
__global__ void __launch_bounds__(kConvThreads, 4) causal_conv1d_kernel(const __grid_constant__ ConvParams p) {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
  const int tiles = conv_channel_tiles(p), heads = conv_head_groups(p);
  const int group = blockIdx.x / tiles;  // of heads, then of runs
  const int channel = ((blockIdx.x - group * tiles) * 32 + lane) * ConvFilter<Element, W>::kChannels;

  launch_dependents();
  wait_for_previous_kernel();
  if (group < heads) {
    const int n = group * kConvWarps + warp;
    if (n < p.N && channel < p.D) convolve_head<Element, W>(p, n, channel);
  } else {
    const int run = (group - heads) * kConvWarps + warp, runs = conv_runs(p, p.tokens_at_a_time);
    const int batch = run / runs;
    if (batch < p.B) convolve_run<Element, W>(p, batch, (run - batch * runs) * p.tokens_at_a_time, channel);
  }
}

}  // namespace kda

// The recurrence over a few tokens: one CTA for 32 or 64 value channels of a head and a sequence, 128 threads for each 32.
//
// Data flow: the state goes from global memory into registers and back, once, however many tokens there are (`Slice`). All
// threads make of the tokens what they need of them, in shared memory (`Token`), whose loads are before those of the state.
// Each CTA brings into L2 what the one that follows it on the SM begins with, so that memory is busy while CTAs are not asking.
// CTAs that stay and take one item after the other are slower: they drift apart, and DRAM likes neighbours.
#pragma once

#include "api/decode.h"
#include "common/launch.cuh"
#include "slice.cuh"

namespace kda {

constexpr int kMostTokensAtATime = 16;

template <int kSlices>
constexpr int kRecurrentCtas = kSlices == 1 ? 4 : 2;  // an SM

// Shared memory for so many tokens at a time.
template <int K, int kSlices, bool kValuesFirst, class State>
struct RecurrentSmem {
  using OwnSlice = Slice<K, kValuesFirst, State>;
  char places[kSlices][OwnSlice::kPlaceBytes];
  float exchange[kSlices][OwnSlice::kExchange + 4];
  // Behind it Token [tokens], values [tokens][32 kSlices].
  static __host__ __device__ constexpr int values(int tokens) {
    return sizeof(RecurrentSmem) + tokens * static_cast<int>(sizeof(Token<K>));
  }
  static __host__ __device__ constexpr int bytes(int tokens) {
    return values(tokens) + tokens * kSlices * kSliceWidth * 4;
  }
};

// `count` value channels from `first` on of a head and a sequence.
struct RecurrentItem {
  int first, head, n;

  __device__ __forceinline__ RecurrentItem(const RecurrentParams& p, int index, int count) {
    const int parts = p.V / count, heads = index / parts;
    first = (index - heads * parts) * count;
    n = heads / p.HV;
    head = heads - n * p.HV;
  }
};

// Brings an item into L2: its state, and the first tokens of dense sequences.
template <class Element, int K, bool kValuesFirst, class State>
__device__ __forceinline__ void hint_at_item(const RecurrentParams& p, const RecurrentItem& item, int row, int count) {
  if (row >= 0) hint_at_state<K, kValuesFirst, State>(p, row, item.head, item.first, count);
  const int token = threadIdx.x / 4;
  if (p.cu_seqlens != nullptr || token >= p.T) return;
  const auto rows = [&](const void* base, const int64_t (&strides)[3], int head, int at, int width, int size) {
    hint(static_cast<const char*>(base) + (item.n * strides[0] + token * strides[1] + head * strides[2] + at) * size,
         width * size);
  };
  const int key_head = p.HV == p.H ? item.head : item.head / (p.HV / p.H);
  switch (threadIdx.x % 4) {
    case 0: return rows(p.q, p.q_strides, key_head, 0, K, sizeof(Element));
    case 1: return rows(p.k, p.k_strides, key_head, 0, K, sizeof(Element));
    case 2: return rows(p.g, p.g_strides, item.head, 0, K, p.g_dtype == DType::kFP32 ? 4 : sizeof(Element));
    default: return rows(p.v, p.v_strides, item.head, item.first, count, sizeof(Element));
  }
}

// Makes what the recurrence needs of tokens of one sequence and head: a thread has a channel of a token, and a warp its sums.
template <class Element, int K, int kSlices>
class TokenMaker {
 public:
  __device__ __forceinline__ TokenMaker(const RecurrentParams& p, int batch, int head, int first, Token<K>* tokens,
                                        float* values)
      : p_(p),
        batch_(batch),
        head_(head),
        key_head_(p.HV == p.H ? head : head / (p.HV / p.H)),
        first_(first),
        tokens_(tokens),
        values_(values) {}

  // Begins the loads of the first round for `count` tokens from `block` on.
  __device__ __forceinline__ void begin(int block, int count) {
    const int i = threadIdx.x;
    if (i < count * K) channel_ = load_channel(block + i / K, i % K);
    if (own_sums() < count) sums_ = load_sums(block + own_sums());
    if (i < count * kChannels) value_ = load_value(block + i / kChannels, i % kChannels);
  }

  __device__ __forceinline__ void make(int block, int count) {
    if (own_sums() < count) {
      keep(sums_, own_sums());
#pragma unroll 1
      for (int i = own_sums() + kWarps; i < count; i += kWarps) keep(load_sums(block + i), i);
    }
    if (threadIdx.x < count * kChannels) {
      values_[threadIdx.x] = value_.as(kDTypeOf<Element>);
#pragma unroll 1
      for (int i = threadIdx.x + kThreads; i < count * kChannels; i += kThreads)
        values_[i] = load_value(block + i / kChannels, i % kChannels).as(kDTypeOf<Element>);
    }
    if (threadIdx.x < count * K) {
      keep(channel_, threadIdx.x);
#pragma unroll 1
      for (int i = threadIdx.x + kThreads; i < count * K; i += kThreads) keep(load_channel(block + i / K, i % K), i);
    }
  }

 private:
  static constexpr int kThreads = kSlices * kSliceThreads, kWarps = kThreads / 32, kChannels = kSlices * kSliceWidth;
  struct Channel {
    RawDecay decay;
    Number key, query;
  };
  struct Sums {
    Neighbours<Element, K / 32> q, k;
    Number beta;
  };

  // The last warps are the first to have sums.
  __device__ __forceinline__ static int own_sums() { return kWarps - 1 - this_warp(); }

  __device__ __forceinline__ int64_t row(const int64_t (&strides)[3], int token, int head) const {
    return batch_ * strides[0] + token * strides[1] + head * strides[2];
  }
  __device__ __forceinline__ Channel load_channel(int token, int channel) const {
    Channel raw;
    raw.decay.load(p_, row(p_.g_strides, token, head_), head_, channel);
    raw.key = load_number(p_.k, row(p_.k_strides, token, key_head_) + channel, kDTypeOf<Element>);
    raw.query = load_number(p_.q, row(p_.q_strides, token, key_head_) + channel, kDTypeOf<Element>);
    return raw;
  }
  __device__ __forceinline__ Sums load_sums(int token) const {
    const int channel = (threadIdx.x & 31) * (K / 32);
    Sums raw;
    raw.q.load(p_.q, row(p_.q_strides, token, key_head_) + channel);
    raw.k.load(p_.k, row(p_.k_strides, token, key_head_) + channel);
    raw.beta = load_number(p_.beta, row(p_.beta_strides, token, head_), p_.beta_dtype);
    return raw;
  }
  __device__ __forceinline__ Number load_value(int token, int channel) const {
    return load_number(p_.v, row(p_.v_strides, token, head_) + first_ + channel, kDTypeOf<Element>);
  }
  __device__ __forceinline__ void keep(const Channel& raw, int i) const {
    Token<K>& token = tokens_[i / K];
    token.decay[i % K] = raw.decay.template get<Element>(p_);
    token.key[i % K] = raw.key.as(kDTypeOf<Element>);
    token.query[i % K] = raw.query.as(kDTypeOf<Element>);
  }
  __device__ __forceinline__ void keep(const Sums& raw, int token) const {
    sum_up(p_, raw.q, raw.k, raw.beta.template as<Element>(p_.beta_dtype), tokens_[token]);
  }

  const RecurrentParams& p_;
  const int batch_, head_, key_head_, first_;
  Token<K>* const tokens_;
  float* const values_;
  Channel channel_;
  Sums sums_;
  Number value_;
};

// Apart from the kernel, whose registers would not do for both.
template <class Element, int K, int kSlices>
__device__ __noinline__ void make_more_tokens(const RecurrentParams& p, int batch, int head, int first,
                                              Token<K>* tokens, float* values, int block, int count) {
  TokenMaker<Element, K, kSlices> maker(p, batch, head, first, tokens, values);
  maker.begin(block, count);
  maker.make(block, count);
}

template <class Element, int K, int kSlices, bool kValuesFirst, class State>
__global__ void __launch_bounds__(kSlices* kSliceThreads, kRecurrentCtas<kSlices>)
    recurrent(const __grid_constant__ RecurrentParams p) {
  constexpr int kChannels = kSlices * kSliceWidth;
  using Smem = RecurrentSmem<K, kSlices, kValuesFirst, State>;
  extern __shared__ __align__(16) char smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  Token<K>* const tokens = reinterpret_cast<Token<K>*>(smem_bytes + sizeof(Smem));
  float* const values = reinterpret_cast<float*>(smem_bytes + Smem::values(p.tokens_at_a_time));
  const int warp = this_warp(), lane = threadIdx.x & 31, slice = warp / 4;

  const RecurrentItem item(p, blockIdx.x, kChannels);
  const bool is_packed = p.cu_seqlens != nullptr;
  const int head = item.head, n = item.n, batch = is_packed ? 0 : n, first = item.first + slice * kSliceWidth;
  launch_dependents();
  hint_at_item<Element, K, kValuesFirst, State>(p, item, row_for_hint(p, n), kChannels);
  wait_for_previous_kernel();

  // Of the CTA that comes next here.
  const bool has_later = blockIdx.x + p.resident_ctas < gridDim.x;
  const RecurrentItem later(p, has_later ? blockIdx.x + p.resident_ctas : blockIdx.x, kChannels);
  const Integer row = load_row(p, n), later_row = load_row(p, later.n);
  int start = 0, end = p.T;  // in [0, T], whatever the caller's tensor says
  if (is_packed) {
    const Integer from = load_integer(p.cu_seqlens, p.cu_seqlens_is_int64, n);
    const Integer to = load_integer(p.cu_seqlens, p.cu_seqlens_is_int64, n + 1);
    start = from.clamped(p.T, p.cu_seqlens_is_int64), end = to.clamped(p.T, p.cu_seqlens_is_int64);
  }
  const int64_t out = batch * p.out_strides[0] + head * p.out_strides[2] + first;
  const auto clear_outputs = [&](int from, int to) {
#pragma unroll 1
    for (int token = from + warp % 4; token < to; token += 4)
      store_value<Element>(p.out, out + token * p.out_strides[1] + lane, 0.0f);
  };
  if (is_packed && n == p.N - 1) clear_outputs(end, p.T);  // tokens that no sequence has
  const auto hint_at_later = [&]() {
    if (!has_later) return;
    const bool has_state = p.initial_state != nullptr && later_row.is_below(p.rows, p.state_indices_is_int64);
    hint_at_item<Element, K, kValuesFirst, State>(p, later, has_state ? later_row.low : -1, kChannels);
  };
  if (!row.is_below(p.rows, p.state_indices_is_int64)) {
    hint_at_later();
    clear_outputs(start, end);
    return;
  }
  const int64_t matrix = static_cast<int64_t>(row.low) * p.HV + head;

  TokenMaker<Element, K, kSlices> maker(p, batch, head, item.first, tokens, values);
  Slice<K, kValuesFirst, State> state(smem.exchange[slice], p.V);
  const int first_count = min(end - start, p.tokens_at_a_time);
  maker.begin(start, first_count);
  if (p.initial_state != nullptr) state.copy(p.initial_state, matrix, first, smem.places[slice]);
  maker.make(start, first_count);
  hint_at_later();
  p.initial_state == nullptr ? state.set_to_zero() : state.take(smem.places[slice]);
#pragma unroll 1
  for (int block = start; block < end; block += p.tokens_at_a_time) {
    const int count = min(end - block, p.tokens_at_a_time);
    if (block > start) {  // a sequence that is longer than most
      state.put(smem.places[slice]);
      __syncthreads();  // the places of the tokens before are free
      make_more_tokens<Element, K, kSlices>(p, batch, head, item.first, tokens, values, block, count);
      state.take_back(smem.places[slice]);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      state.step(tokens[i], values + i * kChannels + slice * kSliceWidth, i, [&](int channel, float o) {
        store_value<Element>(p.out, out + (block + i) * p.out_strides[1] + channel, o);
      });
      if (p.states != nullptr)
        state.store(p.states, (static_cast<int64_t>(batch) * p.T + block + i) * p.HV + head, first);
    }
  }
  if (p.final_state != nullptr) state.store(p.final_state, matrix, first);
}

}  // namespace kda

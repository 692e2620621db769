// The recurrence over a few tokens: items of 32 or 64 value channels of a head and a sequence, 128 threads for each 32, which
// CTAs take in turn.
//
// Data flow: the state goes from global memory through shared memory into registers and back, once, however many tokens there
// are (`Slice`). All threads make of the tokens what they need of them, in shared memory (`Token`). While a CTA is at work on
// an item, everything that its next one needs is on its way to shared memory or registers, the small things first: what is
// asked for later waits behind all that is on its way, which takes longer than an item does.
#pragma once

#include "api/decode.h"
#include "common/launch.cuh"
#include "slice.cuh"

namespace kda {

constexpr int kMostTokensAtATime = 16;

// An SM, at most.
template <int kSlices>
constexpr int kRecurrentCtas = 4 / kSlices;

// What a token brings with it, as it lies in memory.
template <class Element, int K, int kSlices>
struct alignas(16) TokenRows {
  Element q[K], k[K], v[kSlices * kSliceWidth];
  float g[K];  // or narrower
};

// Shared memory for so many tokens at a time.
template <class Element, int K, int kSlices, bool kValuesFirst, class State>
struct RecurrentSmem {
  using OwnSlice = Slice<K, kSlices, kValuesFirst, State>;
  using Rows = TokenRows<Element, K, kSlices>;
  float exchange[kSlices][OwnSlice::kExchange + 4];
  char states[2][OwnSlice::kPlaceBytes];  // of this item and the next one
  float dt_bias[2][K];                    // or narrower
  // Behind it Rows [2][tokens], Token [tokens], values [tokens][32 kSlices].
  static __host__ __device__ constexpr int rows(int tokens, int place) {
    return sizeof(RecurrentSmem) + place * tokens * static_cast<int>(sizeof(Rows));
  }
  static __host__ __device__ constexpr int tokens(int tokens) { return rows(tokens, 2); }
  static __host__ __device__ constexpr int values(int tokens) {
    return rows(tokens, 2) + tokens * static_cast<int>(sizeof(Token<K>));
  }
  static __host__ __device__ constexpr int bytes(int tokens) {
    return values(tokens) + tokens * kSlices * kSliceWidth * 4;
  }
};

// A head and a sequence: whose value channels a CTA has is always the same.
struct RecurrentItem {
  int head, n;
  Integer row, from, to;  // of the states, and the bounds of a packed sequence

  __device__ __forceinline__ void load(const RecurrentParams& p) {
    const int own = min(n, p.N - 1);  // CTAs look one item ahead, also of the last one
    row = load_row(p, own);
    if (p.cu_seqlens != nullptr) {
      from = load_integer(p.cu_seqlens, p.cu_seqlens_is_int64, own);
      to = load_integer(p.cu_seqlens, p.cu_seqlens_is_int64, own + 1);
    }
  }

  __device__ __forceinline__ bool has_row(const RecurrentParams& p) const {
    return row.is_below(p.rows, p.state_indices_is_int64);
  }
  __device__ __forceinline__ int64_t matrix(const RecurrentParams& p) const {
    return static_cast<int64_t>(row.low) * p.HV + head;
  }
  // Tokens, in [0, T] whatever the caller's tensor says.
  __device__ __forceinline__ int start(const RecurrentParams& p) const {
    return p.cu_seqlens == nullptr ? 0 : from.clamped(p.T, p.cu_seqlens_is_int64);
  }
  __device__ __forceinline__ int end(const RecurrentParams& p) const {
    return p.cu_seqlens == nullptr ? p.T : to.clamped(p.T, p.cu_seqlens_is_int64);
  }
};

// Rows of tokens that one of four warps copies: those of q, k, v or g. In bytes.
struct RowSource {
  const char* base;
  int64_t batch, token, head;  // strides
  int bytes, to;               // of a row, and where it goes in TokenRows

  __device__ __forceinline__ void set(const void* from, const int64_t (&strides)[3], int element, int width, int at) {
    base = static_cast<const char*>(from);
    batch = strides[0] * element, token = strides[1] * element, head = strides[2] * element;
    bytes = width * element, to = at;
  }
};

template <class Element, int K, int kSlices>
__device__ __forceinline__ RowSource row_source(const RecurrentParams& p, int warp, int first) {
  using Rows = TokenRows<Element, K, kSlices>;
  constexpr int kElement = sizeof(Element);
  RowSource source;
  switch (warp) {
    case 0: source.set(p.q, p.q_strides, kElement, K, offsetof(Rows, q)); break;
    case 1: source.set(p.k, p.k_strides, kElement, K, offsetof(Rows, k)); break;
    case 2: source.set(p.g, p.g_strides, size_of(p.g_dtype), K, offsetof(Rows, g)); break;
    default:
      source.set(p.v, p.v_strides, kElement, kSlices * kSliceWidth, offsetof(Rows, v));
      source.base += first * kElement;
  }
  return source;
}

template <class Element, int K, int kSlices, bool kValuesFirst, class State>
__global__ void __launch_bounds__(kSlices* kSliceThreads, kRecurrentCtas<kSlices>)
    recurrent(const __grid_constant__ RecurrentParams p) {
  using Smem = RecurrentSmem<Element, K, kSlices, kValuesFirst, State>;
  using Rows = typename Smem::Rows;
  constexpr int kThreads = kSlices * kSliceThreads, kWarps = kThreads / 32, kChannels = kSlices * kSliceWidth;
  extern __shared__ __align__(16) char smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  Token<K>* const tokens = reinterpret_cast<Token<K>*>(smem_bytes + Smem::tokens(p.tokens_at_a_time));
  float* const values = reinterpret_cast<float*>(smem_bytes + Smem::values(p.tokens_at_a_time));
  const auto rows_of = [&](int place) {
    return reinterpret_cast<Rows*>(smem_bytes + Smem::rows(p.tokens_at_a_time, place));
  };
  const int warp = this_warp(), lane = threadIdx.x & 31, slice = warp / 4;
  const int parts = p.V / kChannels;
  typename Smem::OwnSlice state(smem.exchange[slice], p.V, slice);

  // This CTA's items have the same channels, since the grid has as many CTAs for each part of them.
  const int index = blockIdx.x;
  RecurrentItem item;
  item.n = index / parts / p.HV, item.head = index / parts % p.HV;
  const int step_n = gridDim.x / parts / p.HV, step_head = gridDim.x / parts % p.HV;
  const int first_of_all = index % parts * kChannels, first = first_of_all + slice * kSliceWidth;
  const auto advance = [&](RecurrentItem& it) {
    it.n += step_n, it.head += step_head;
    if (it.head >= p.HV) ++it.n, it.head -= p.HV;
    it.load(p);
  };
  const RowSource source = row_source<Element, K, kSlices>(p, warp % 4, first_of_all);
  const auto row_at = [&](const RecurrentItem& it, int token) {
    const int head = warp % 4 >= 2 || p.HV == p.H ? it.head : it.head / (p.HV / p.H);
    return source.base + (p.cu_seqlens == nullptr ? it.n : 0) * source.batch + token * source.token +
           head * source.head;
  };
  const auto copy_rows = [&](const RecurrentItem& it, int token, int end, int place) {
    const int count = min(end - token, p.tokens_at_a_time);
#pragma unroll 1
    for (int i = slice; i < count; i += kSlices)
      copy_async(reinterpret_cast<char*>(rows_of(place) + i) + source.to, row_at(it, token + i), source.bytes, lane,
                 32);
  };
  const auto load_beta = [&](const RecurrentItem& it, int token) {
    return load_number(p.beta,
                       (p.cu_seqlens == nullptr ? it.n : 0) * p.beta_strides[0] + token * p.beta_strides[1] +
                           it.head * p.beta_strides[2],
                       p.beta_dtype);
  };

  Number A_log, beta, next_A_log = {0}, next_beta = {0};  // β of token `lane`
  const auto begin = [&](const RecurrentItem& it, int place) {
    const bool has_row = it.has_row(p);
    const int start = it.start(p), end = it.end(p);
    if (has_row && start < end) {
      copy_rows(it, start, end, place);
      if (warp == kWarps - 1 && p.dt_bias != nullptr) {
        const int bytes = K * size_of(p.parameter_dtype);
        copy_async(reinterpret_cast<char*>(smem.dt_bias[place]),
                   static_cast<const char*>(p.dt_bias) + static_cast<int64_t>(it.head) * bytes, bytes, lane, 32);
      }
      if (lane < min(end - start, p.tokens_at_a_time)) next_beta = load_beta(it, start + lane);
      if (p.A_log != nullptr) next_A_log = load_number(p.A_log, it.head, p.parameter_dtype);
    }
    commit_copies();
    if (has_row && p.initial_state != nullptr)
      state.copy(p.initial_state, it.matrix(p), first_of_all, smem.states[place]);
    commit_copies();
  };
  // Makes what is needed of tokens whose rows are there.
  const auto make_tokens = [&](int count, int place) {
    const Rows* const rows = rows_of(place);
    // Of one token, half of four warps have two channels a thread, so that the last one need not have channels and sums.
    const int channel_threads = kSlices == 1 && count == 1 ? kThreads / 2 : kThreads;
    if (threadIdx.x < channel_threads) {
#pragma unroll(kSlices == 1 ? 2 : 1)
      for (int i = threadIdx.x; i < count * K; i += channel_threads) {
        const int token = i / K, channel = i % K;
        tokens[token].decay[channel] = decay_of<Element>(p, rows[token].g, smem.dt_bias[place], channel, A_log);
        tokens[token].key[channel] = load_float<Element>(rows[token].k, channel);
        tokens[token].query[channel] = load_float<Element>(rows[token].q, channel);
      }
    }
#pragma unroll 1
    for (int token = kWarps - 1 - warp; token < count; token += kWarps) {  // the last warps are the first to have sums
      const Number own = {__shfl_sync(0xffffffffu, beta.bits, token)};
#pragma unroll
      for (int i = lane; i < kChannels; i += 32) values[token * kChannels + i] = load_float<Element>(rows[token].v, i);
      sum_up(p, rows[token].q, rows[token].k, own.as(p.beta_dtype), tokens[token]);
    }
  };

  launch_dependents();
  if (const int row = row_for_hint(p, item.n); row >= 0)
    state.hint_at(p.initial_state, static_cast<int64_t>(row) * p.HV + item.head, first_of_all);
  if (p.cu_seqlens == nullptr && p.T > 0 && 128 * lane < source.bytes) hint(row_at(item, 0) + 128 * lane);
  wait_for_previous_kernel();

  item.load(p);
  begin(item, 0);
  RecurrentItem next = item;
  advance(next);
#pragma unroll 1
  for (int place = 0;; place ^= 1) {
    A_log = next_A_log, beta = next_beta;
    wait_for_copies<1>();
    __syncthreads();  // the rows are there, and nobody needs the place of the item before
    const bool is_last = next.n >= p.N;
    if (!is_last) {
      begin(next, place ^ 1);
    } else {
      commit_copies();
      commit_copies();
    }

    const int start = item.start(p), end = item.end(p), batch = p.cu_seqlens == nullptr ? item.n : 0;
    const int64_t out = batch * p.out_strides[0] + item.head * p.out_strides[2] + first;
    const auto clear_outputs = [&](int from, int to) {
#pragma unroll 1
      for (int token = from + warp % 4; token < to; token += 4)
        store_value<Element>(p.out, out + token * p.out_strides[1] + lane, 0.0f);
    };
    if (p.cu_seqlens != nullptr && item.n == p.N - 1) clear_outputs(end, p.T);  // tokens that no sequence has
    if (item.has_row(p)) {
      make_tokens(min(end - start, p.tokens_at_a_time), place);
      wait_for_copies<2>();
      __syncthreads();
      p.initial_state == nullptr ? state.set_to_zero() : state.take(smem.states[place]);
#pragma unroll 1
      for (int block = start; block < end; block += p.tokens_at_a_time) {
        const int count = min(end - block, p.tokens_at_a_time);
        if (block > start) {  // a sequence that is longer than most
          __syncthreads();    // the places of the tokens before are free
          copy_rows(item, block, end, place);
          commit_copies();
          if (lane < count) beta = load_beta(item, block + lane);
          wait_for_copies<0>();
          __syncthreads();
          make_tokens(count, place);
          __syncthreads();
        }
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          state.step(tokens[i], values + i * kChannels + slice * kSliceWidth, i, [&](int channel, float o) {
            store_value<Element>(p.out, out + (block + i) * p.out_strides[1] + channel, o);
          });
          if (p.states != nullptr)
            state.store(p.states, (static_cast<int64_t>(batch) * p.T + block + i) * p.HV + item.head, first_of_all);
        }
      }
      if (p.final_state != nullptr) state.store(p.final_state, item.matrix(p), first_of_all);
    } else {
      clear_outputs(start, end);
    }
    if (is_last) break;
    item = next;
    advance(next);
  }
}

}  // namespace kda

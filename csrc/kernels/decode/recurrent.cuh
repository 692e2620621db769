// The recurrence over a few tokens: a CTA, an item, has 32 or 64 value channels of a head and a sequence.
//
// Data flow: the state goes from global memory through shared memory into registers and back, once, however many tokens there
// are (`Slice`). While it is on its way, all threads make of the tokens what they need of them, in shared memory (`Token`).
// What hides a CTA's latency is the CTAs beside it, and that CTAs before it have brought what it reads into L2.
#pragma once

#include "api/decode.h"
#include "common/launch.cuh"
#include "slice.cuh"

namespace kda {

constexpr int kMostTokensAtATime = 16;

constexpr int kRecurrentThreads = 128;

enum class Calls {
  kAny,
  kFew,  // dense, with at most kMostTokensAtATime tokens, and no states between them
  kOne,  // one such token, and a state before it, which stays in shared memory
};

// An SM, if shared memory allows: so that no register is spilled.
template <Calls kCalls, int kWidth>
constexpr int kRecurrentCtas = kCalls == Calls::kOne   ? 6
                               : kCalls == Calls::kFew ? (kWidth == 32 ? 6 : 4)
                                                       : (kWidth == 32 ? 4 : 3);

// A CTA brings what a later one will need into L2: this many a SM further. That is soon, since L2 also has to hold what all
// CTAs of the moment read and write.
constexpr int kHintedAhead = 3;

struct RecurrentItem {
  int n, head, first;  // value channel
};

template <int kWidth>
__device__ __forceinline__ RecurrentItem item_of(const RecurrentParams& p, int index) {
  const int parts = p.V / kWidth;
  return {index / parts / p.HV, index / parts % p.HV, index % parts * kWidth};
}

// What a token brings with it, as it lies in memory.
template <class Element, int K, int kWidth>
struct alignas(16) TokenRows {
  Element q[K], k[K], v[kWidth];
  float g[K];  // or narrower
};

// Shared memory for so many tokens at a time.
template <class Element, int K, int kWidth, bool kValuesFirst, class State, Calls kCalls>
struct RecurrentSmem {
  using Rows = TokenRows<Element, K, kWidth>;
  using OwnSlice = Slice<K, kWidth, kRecurrentThreads, kValuesFirst, State, kCalls != Calls::kOne>;
  typename OwnSlice::Exchange exchange;
  int64_t matrix, out;           // of the states and the first output: registers are for the state
  alignas(16) float dt_bias[K];  // or narrower
  alignas(128) char state[OwnSlice::kPlaceBytes];
  // Behind it Rows [tokens], Token [tokens], values [tokens][kWidth].
  static __host__ __device__ constexpr int rows() { return sizeof(RecurrentSmem); }
  static __host__ __device__ constexpr int tokens(int tokens) {
    return rows() + tokens * static_cast<int>(sizeof(Rows));
  }
  static __host__ __device__ constexpr int values(int tokens) {
    return RecurrentSmem::tokens(tokens) + tokens * static_cast<int>(sizeof(Token<K>));
  }
  static __host__ __device__ constexpr int bytes(int tokens) { return values(tokens) + tokens * kWidth * 4; }
};

// Rows of a sequence's tokens that one of four warps copies: those of q, k, v or g.
struct RowSource {
  const char* base;  // of token 0
  int64_t token;     // stride in bytes
  int bytes, to;     // of a row, and where it goes in TokenRows

  __device__ __forceinline__ void set(const void* from, const int64_t (&strides)[3], int batch, int head, int first,
                                      int width, int element, int at) {
    base = static_cast<const char*>(from) + (batch * strides[0] + head * strides[2] + first) * element;
    token = strides[1] * element, bytes = width * element, to = at;
  }

  // At the first token's row, with a warp.
  __device__ __forceinline__ void hint_at(int lane) const {
    if (128 * lane < bytes) hint(base + 128 * lane);
  }
};

template <class Element, int K, int kWidth>
__device__ __forceinline__ RowSource row_source(const RecurrentParams& p, int warp, int batch, int head, int first) {
  using Rows = TokenRows<Element, K, kWidth>;
  constexpr int kElement = sizeof(Element);
  const int key_head = p.HV == p.H ? head : head / (p.HV / p.H);
  RowSource source;
  switch (warp) {
    case 0: source.set(p.q, p.q_strides, batch, key_head, 0, K, kElement, offsetof(Rows, q)); break;
    case 1: source.set(p.k, p.k_strides, batch, key_head, 0, K, kElement, offsetof(Rows, k)); break;
    case 2: source.set(p.g, p.g_strides, batch, head, 0, K, size_of(p.g_dtype), offsetof(Rows, g)); break;
    default: source.set(p.v, p.v_strides, batch, head, first, kWidth, kElement, offsetof(Rows, v));
  }
  return source;
}

template <class Element, int K, int kWidth, bool kValuesFirst, class State, Calls kCalls>
__global__ void __launch_bounds__(kRecurrentThreads, (kRecurrentCtas<kCalls, kWidth>))
    recurrent(const __grid_constant__ RecurrentParams p) {
  using Smem = RecurrentSmem<Element, K, kWidth, kValuesFirst, State, kCalls>;
  using Rows = typename Smem::Rows;
  using OwnSlice = typename Smem::OwnSlice;
  constexpr bool kFew = kCalls != Calls::kAny;
  constexpr int kThreads = kRecurrentThreads, kWarps = kThreads / 32;
  static_assert(kWarps == 4);  // which copy rows of four kinds
  extern __shared__ __align__(128) char smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  Rows* const rows = reinterpret_cast<Rows*>(smem_bytes + Smem::rows());
  Token<K>* const tokens = reinterpret_cast<Token<K>*>(smem_bytes + Smem::tokens(p.tokens_at_a_time));
  float* const values = reinterpret_cast<float*>(smem_bytes + Smem::values(p.tokens_at_a_time));
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x & 31;

  // What does not need memory comes before the wait, where it costs nothing.
  const bool is_dense = kFew || p.cu_seqlens == nullptr;
  const auto [n, head, first] = item_of<kWidth>(p, blockIdx.x);
  const int batch = is_dense ? n : 0;
  OwnSlice state(smem.exchange, p.V, first, threadIdx.x);
  RowSource source = row_source<Element, K, kWidth>(p, warp, batch, head, first);
  const bool copies_rows = 16 * lane < source.bytes;
  const int64_t beta_at = batch * p.beta_strides[0] + lane * p.beta_strides[1] + head * p.beta_strides[2];
  const int64_t out = batch * p.out_strides[0] + head * p.out_strides[2] + first;

  launch_dependents();
  const int resident = kRecurrentCtas<kCalls, kWidth> * p.num_sms;
  int guess = -1;
  if (blockIdx.x < resident) {  // others come when the kernel before this one has ended, with hints from earlier CTAs
    guess = row_for_hint(p, n);
    if (guess >= 0) OwnSlice::hint_at(p.initial_state, static_cast<int64_t>(guess) * p.HV + head, p.V, first / kWidth);
    if (is_dense) {
      source.hint_at(lane);
      if (warp == 0 && lane < p.T) hint(static_cast<const char*>(p.beta) + beta_at * size_of(p.beta_dtype));
    }
    const int bias_at = (head * K + static_cast<int>(threadIdx.x)) * size_of(p.parameter_dtype);
    if (p.dt_bias != nullptr && threadIdx.x < K && threadIdx.x % 8 == 0)
      hint(static_cast<const char*>(p.dt_bias) + bias_at);
    if (p.A_log != nullptr && threadIdx.x == 0)
      hint(static_cast<const char*>(p.A_log) + head * size_of(p.parameter_dtype));
  }
  wait_for_previous_kernel();

  // Tokens, in [0, T] whatever the caller's tensor says.
  int start = 0, end = p.T;
  if (!kFew && p.cu_seqlens != nullptr) {
    start = load_integer(p.cu_seqlens, p.cu_seqlens_is_int64, n).clamped(p.T, p.cu_seqlens_is_int64);
    end = load_integer(p.cu_seqlens, p.cu_seqlens_is_int64, n + 1).clamped(p.T, p.cu_seqlens_is_int64);
  }
  // The first CTAs copy from the row that their hint was for, and look only then whether it still is that one.
  const bool guesses = kFew && p.state_indices != nullptr && guess >= 0;
  Integer row = load_row(p, n);
  int64_t matrix = static_cast<int64_t>(guesses ? guess : row.low) * p.HV + head;
  const auto clear_outputs = [&](int from, int to) {
#pragma unroll 1
    for (int i = from * kWidth + static_cast<int>(threadIdx.x); i < to * kWidth; i += kThreads)
      store_value<Element>(p.out, out + i / kWidth * p.out_strides[1] + i % kWidth, 0.0f);
  };

  if (!kFew && p.cu_seqlens != nullptr && n == p.N - 1) clear_outputs(end, p.T);  // tokens that no sequence has
  if (!guesses && !row.is_below(p.rows, p.state_indices_is_int64)) {
    clear_outputs(start, end);
    return;
  }

  Number A_log = {0}, beta = {0};  // β of token `lane`
  const auto begin_tokens = [&](int token, int count) {
    if (copies_rows) {
#pragma unroll 1
      for (int i = 0; i < count; ++i)
        copy_async(reinterpret_cast<char*>(rows + i) + source.to + 16 * lane,
                   source.base + (token + i) * source.token + 16 * lane);
    }
    if (lane < count) beta = load_number(p.beta, beta_at + token * p.beta_strides[1], p.beta_dtype);
  };
  const auto make_tokens = [&](int count) {
    wait_for_copies<1>();
    __syncthreads();
    // Of one token, half of the warps have two channels a thread, so that the last one need not have channels and sums.
    const int channel_threads = count == 1 ? kThreads / 2 : kThreads;
    if (threadIdx.x < channel_threads) {
#pragma unroll 2
      for (int i = threadIdx.x; i < count * K; i += channel_threads) {
        const int token = i / K, channel = i % K;
        const Number bias = p.dt_bias == nullptr ? Number{0} : load_number(smem.dt_bias, channel, p.parameter_dtype);
        tokens[token].decay[channel] = decay_of(p, load_number(rows[token].g, channel, p.g_dtype), bias, A_log);
        tokens[token].key[channel] = load_float<Element>(rows[token].k, channel);
        tokens[token].query[channel] = load_float<Element>(rows[token].q, channel);
      }
    }
#pragma unroll 1
    for (int token = kWarps - 1 - warp; token < count; token += kWarps) {  // the last warps are the first to have sums
      const Number own = {__shfl_sync(0xffffffffu, beta.bits, token)};
#pragma unroll
      for (int i = lane; i < kWidth; i += 32) values[token * kWidth + i] = load_float<Element>(rows[token].v, i);
      sum_up(p, rows[token].q, rows[token].k, own.as(p.beta_dtype), tokens[token]);
    }
    __syncthreads();
  };

  int count = kFew ? p.T : min(end - start, p.tokens_at_a_time);
  if (count > 0) {  // small things first: they would wait behind a state
    begin_tokens(start, count);
    if (const int bytes = K * size_of(p.parameter_dtype); p.dt_bias != nullptr && warp == 3 && 16 * lane < bytes)
      copy_async(reinterpret_cast<char*>(smem.dt_bias) + 16 * lane,
                 static_cast<const char*>(p.dt_bias) + head * bytes + 16 * lane);
    if (p.A_log != nullptr) A_log = load_number(p.A_log, head, p.parameter_dtype);
  }
  const bool has_state = p.initial_state != nullptr;
  commit_copies();
  if (has_state) state.copy(p.initial_state, matrix, smem.state);
  commit_copies();
  if (guesses) {
    row = waited_for(row);
    if (!row.is_below(p.rows, p.state_indices_is_int64)) {
      wait_for_copies<0>();
      clear_outputs(start, end);
      return;
    }
    if (row.low != guess) {
      matrix = static_cast<int64_t>(row.low) * p.HV + head;
      wait_for_copies<0>();  // they go to the same places
      state.copy(p.initial_state, matrix, smem.state);
      commit_copies();
    }
  }
  if (const int index = blockIdx.x + kHintedAhead * p.num_sms; has_state && index >= resident) {
    const auto next = item_of<kWidth>(p, index);
    const Integer its_row = next.n < p.N ? load_row(p, next.n) : Integer{-1, -1};
    if (its_row.is_below(p.rows, p.state_indices_is_int64)) {
      OwnSlice::hint_at(p.initial_state, static_cast<int64_t>(its_row.low) * p.HV + next.head, p.V,
                        next.first / kWidth);
      if (is_dense) row_source<Element, K, kWidth>(p, warp, next.n, next.head, next.first).hint_at(lane);
    }
  }
  if (threadIdx.x == 0) smem.matrix = matrix, smem.out = out;
  if (count > 0) {
    make_tokens(count);
  } else {
    __syncthreads();
  }
  wait_for_copies<0>();
  if (!OwnSlice::kOwnCopies) __syncthreads();
  if constexpr (kCalls == Calls::kOne) {
    state.step_once(tokens[0], values, smem.state, p.final_state, smem.matrix,
                    [&](int channel, float o) { store_value<Element>(p.out, smem.out + channel, o); });
    return;
  } else {
    has_state ? state.take(smem.state) : state.set_to_zero();
#pragma unroll 1
    for (int block = start; kFew || block < end; block += p.tokens_at_a_time) {
      if (!kFew && block > start) {  // a sequence that is longer than most
        count = min(end - block, p.tokens_at_a_time);
        __syncthreads();  // the places of the tokens before are free
        begin_tokens(block, count);
        commit_copies();
        commit_copies();
        make_tokens(count);
      }
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        state.step(tokens[i], values + i * kWidth, [&](int channel, float o) {
          store_value<Element>(p.out, smem.out + (block + i) * p.out_strides[1] + channel, o);
        });
        if (!kFew && p.states != nullptr)
          state.store(p.states, (static_cast<int64_t>(batch) * p.T + block + i) * p.HV + head);
      }
      if (kFew) break;
    }
    if (p.final_state != nullptr) state.store(p.final_state, smem.matrix);
  }
}

}  // namespace kda

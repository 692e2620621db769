// The recurrence over a few tokens: items of 32 value channels of a head and a sequence, which CTAs take in turn.
//
// Data flow: the state goes from global memory through shared memory into registers and back, once, however many tokens there
// are (`Slice`). Each of the four warps has a token, and makes of it what all of them need, in shared memory (`Token`); more
// than four go in blocks. While a CTA is at work on an item, everything that its next one needs is on its way to shared memory
// or registers, the small things first: what is asked for later waits behind all that is on its way, which takes longer than
// an item does.
#pragma once

#include "api/decode.h"
#include "common/launch.cuh"
#include "slice.cuh"

namespace kda {

constexpr int kWarps = kSliceThreads / 32;  // and tokens at a time
constexpr int kRecurrentCtas = 4;           // an SM

// What a token brings with it, as it lies in memory.
template <class Element, int K>
struct alignas(16) TokenRows {
  Element q[K], k[K];
  float g[K], dt_bias[K];  // or narrower
  Element v[kSliceWidth];
};

template <class Element, int K, bool kValuesFirst, class State>
struct RecurrentSmem {
  using OwnSlice = Slice<K, kValuesFirst, State>;
  struct Place {
    char state[OwnSlice::kPlaceBytes];
    TokenRows<Element, K> rows[kWarps];
  } places[2];  // of this item and the next one
  Token<K> tokens[kWarps];
  float values[kWarps][kSliceWidth];
  float exchange[OwnSlice::kExchange + 4];
};

// 32 value channels from `first` on of a head and a sequence.
struct RecurrentItem {
  int first, head, n;
  Integer row, from, to;  // of the states, and the bounds of a packed sequence

  __device__ __forceinline__ RecurrentItem(const RecurrentParams& p, int index) {
    const int shift = p.V == 128 ? 2 : 1;
    first = (index & ((1 << shift) - 1)) * kSliceWidth;
    n = (index >> shift) / p.HV;
    head = (index >> shift) - n * p.HV;
  }

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

// Where the rows of a token of `item` are in global memory.
template <class Element>
struct RowPointers {
  const Element *q, *k, *v;
  const char *g, *dt_bias;
  int64_t beta;  // an index

  __device__ __forceinline__ RowPointers(const RecurrentParams& p, const RecurrentItem& item, int token) {
    const int key_head = p.HV == p.H ? item.head : item.head / (p.HV / p.H),
              batch = p.cu_seqlens == nullptr ? item.n : 0;
    const auto row = [&](const int64_t (&strides)[3], int head) {
      return batch * strides[0] + token * strides[1] + head * strides[2];
    };
    q = static_cast<const Element*>(p.q) + row(p.q_strides, key_head);
    k = static_cast<const Element*>(p.k) + row(p.k_strides, key_head);
    v = static_cast<const Element*>(p.v) + row(p.v_strides, item.head) + item.first;
    g = static_cast<const char*>(p.g) + row(p.g_strides, item.head) * size_of(p.g_dtype);
    dt_bias = static_cast<const char*>(p.dt_bias) + item.head * p.K * size_of(p.parameter_dtype);
    beta = row(p.beta_strides, item.head);
  }
};

// A warp's token, from such rows.
template <class Element, int K>
__device__ __forceinline__ float read_token(const RecurrentParams& p, const Element* q, const Element* k, const void* g,
                                            const void* dt_bias, const Element* v, RawToken<K>& raw) {
  const int lane = threadIdx.x & 31, channel = lane * (K / 32);
  load_neighbours<Element>(q, channel, raw.q);
  load_neighbours<Element>(k, channel, raw.k);
  load_gate<Element>(p, g, dt_bias, raw);
  return load_float<Element>(v, lane);
}

template <class Element, int K, bool kValuesFirst, class State>
__global__ void __launch_bounds__(kSliceThreads, kRecurrentCtas) recurrent(const __grid_constant__ RecurrentParams p) {
  extern __shared__ __align__(16) char smem_bytes[];
  auto& smem = *reinterpret_cast<RecurrentSmem<Element, K, kValuesFirst, State>*>(smem_bytes);
  const int warp = this_warp(), lane = threadIdx.x & 31;
  const int items = p.N * p.HV * (p.V / kSliceWidth);
  Slice<K, kValuesFirst, State> state(smem.exchange, p.V);

  // Of a warp's first token, which is on its way with the item.
  Number A_log = {0}, beta = {0}, next_A_log = {0}, next_beta = {0};
  const auto begin = [&](const RecurrentItem& item, int place) {
    const bool has_row = item.has_row(p);
    if (const int token = item.start(p) + warp; has_row && token < item.end(p)) {
      TokenRows<Element, K>& rows = smem.places[place].rows[warp];
      const RowPointers<Element> from(p, item, token);
      constexpr int kElement = sizeof(Element);
      copy_async_shared(reinterpret_cast<char*>(rows.q), from.q, K * kElement, lane, 32);
      copy_async_shared(reinterpret_cast<char*>(rows.k), from.k, K * kElement, lane, 32);
      copy_async_shared(reinterpret_cast<char*>(rows.v), from.v, kSliceWidth * kElement, lane, 32);
      copy_async_shared(reinterpret_cast<char*>(rows.g), from.g, K * size_of(p.g_dtype), lane, 32);
      if (p.dt_bias != nullptr)
        copy_async_shared(reinterpret_cast<char*>(rows.dt_bias), from.dt_bias, K * size_of(p.parameter_dtype), lane,
                          32);
      next_beta = load_number(p.beta, from.beta, p.beta_dtype);
      if (p.A_log != nullptr) next_A_log = load_number(p.A_log, item.head, p.parameter_dtype);
    }
    commit_copies();
    if (has_row && p.initial_state != nullptr)
      state.copy(p.initial_state, item.matrix(p), item.first, smem.places[place].state);
    commit_copies();
  };

  int index = blockIdx.x;
  RecurrentItem item(p, index);
  launch_dependents();
  if (const int row = row_for_hint(p, item.n); row >= 0)
    state.hint_at(p.initial_state, static_cast<int64_t>(row) * p.HV + item.head, item.first);
  if (p.cu_seqlens == nullptr && warp < p.T) {
    const RowPointers<Element> rows(p, item, warp);
    constexpr int kLine = 128 / sizeof(Element);
    if (lane * kLine < K) hint(rows.q + lane * kLine), hint(rows.k + lane * kLine);
    if (lane * 128 < K * size_of(p.g_dtype)) hint(rows.g + lane * 128);
    if (lane == 0) hint(rows.v);
  }
  wait_for_previous_kernel();

  item.load(p);
  begin(item, 0);
  RecurrentItem next(p, index + gridDim.x);
  next.load(p);
#pragma unroll 1
  for (int place = 0;; place ^= 1) {
    A_log = next_A_log, beta = next_beta;
    index += gridDim.x;
    const bool is_last = index >= items;
    if (!is_last) {
      begin(next, place ^ 1);
    } else {
      commit_copies();
      commit_copies();
    }

    const int start = item.start(p), end = item.end(p), batch = p.cu_seqlens == nullptr ? item.n : 0;
    const int64_t out = batch * p.out_strides[0] + item.head * p.out_strides[2] + item.first;
    const auto clear_outputs = [&](int from, int to) {
      for (int token = from + warp; token < to; token += kWarps)
        store_value<Element>(p.out, out + token * p.out_strides[1] + lane, 0.0f);
    };
    if (p.cu_seqlens != nullptr && item.n == p.N - 1) clear_outputs(end, p.T);  // tokens that no sequence has
    if (item.has_row(p)) {
      RawToken<K> raw;
      wait_for_copies<3>();
      __syncwarp();
      if (start + warp < end) {
        const TokenRows<Element, K>& rows = smem.places[place].rows[warp];
        smem.values[warp][lane] = read_token(p, rows.q, rows.k, rows.g, rows.dt_bias, rows.v, raw);
        raw.beta = beta.as(p.beta_dtype), raw.A_log = A_log.as(p.parameter_dtype);
        activate(p, raw, smem.tokens[warp]);
      }
      wait_for_copies<2>();
      p.initial_state == nullptr ? state.set_to_zero() : state.take(smem.places[place].state);
#pragma unroll 1
      for (int block = start; block < end; block += kWarps) {
        if (block > start) {
          __syncthreads();  // the places of the tokens before are free
          if (block + warp < end) {
            const RowPointers<Element> rows(p, item, block + warp);
            raw.beta = load_number(p.beta, rows.beta, p.beta_dtype).as(p.beta_dtype);
            smem.values[warp][lane] = read_token(p, rows.q, rows.k, rows.g, rows.dt_bias, rows.v, raw);
            activate(p, raw, smem.tokens[warp]);
          }
        }
        __syncthreads();
        const int count = min(end - block, kWarps);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          state.step(smem.tokens[i], smem.values[i], i, [&](int channel, float o) {
            store_value<Element>(p.out, out + (block + i) * p.out_strides[1] + channel, o);
          });
          if (p.states != nullptr)
            state.store(p.states, (static_cast<int64_t>(batch) * p.T + block + i) * p.HV + item.head, item.first);
        }
      }
      if (p.final_state != nullptr) state.store(p.final_state, item.matrix(p), item.first);
    } else {
      clear_outputs(start, end);
    }
    if (is_last) break;
    __syncthreads();
    item = next;
    next = RecurrentItem(p, index + gridDim.x);
    next.load(p);
  }
}

}  // namespace kda

// The token recurrence of some value channels, by the threads of a CTA, whose registers or shared memory hold the state.
//
// With d = e^g - 1, and factors n that norm q and k and have q's scale, a token does this to each value channel v, a row of the
// state:
//
//   s ← s + s ∘ d      a = n_k (s · k)      b = n_q (s · q)      u = β (v - a)      o = b + u (n_k n_q k · q)      s ← s + u n_k k
//
// so that both sums over the key channels are taken at the same time, and the factors are found beside them. d rather than e^g,
// since a gate near 1 would lose what matters in fp32: a state that is a thousand tokens old has gone through e^g a
// thousand times.
//
// Who holds what (`Slice`): a thread has 4 neighbours of the state's last dimension at a time, and 4 to 16 rows of them.
//   values first, [V, K]: K / 4 lanes have a row, whose sums are taken over lanes.
//   keys first, [K, V]: a row has 4 value channels of each lane, and the warps' sums meet in shared memory.
// The rows of a thread follow each other.
#pragma once

#include <type_traits>

#include "api/decode.h"
#include "common/prefetch.cuh"
#include "common/vector.cuh"

namespace kda {

// What the recurrence needs of a token, in shared memory.
template <int K>
struct alignas(16) Token {
  float decay[K], key[K], query[K];                 // e^g - 1, k and q
  float key_factor, query_factor, key_query, beta;  // the second one has the scale, the third one both
};

__device__ __forceinline__ int size_of(DType dtype) { return dtype == DType::kFP32 ? 4 : 2; }

__device__ __forceinline__ float sigmoid(float x) { return reciprocal_approx(1.0f + expf(-x)); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

// A number as it lies in memory: nobody waits for its load before it is asked for.
struct Number {
  uint32_t bits;

  __device__ __forceinline__ float as(DType dtype) const {
    return dtype == DType::kFP32   ? __uint_as_float(bits)
           : dtype == DType::kBF16 ? __uint_as_float(bits << 16)
                                   : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
};

__device__ __forceinline__ Number load_number(const void* base, int64_t index, DType dtype) {
  return {dtype == DType::kFP32 ? static_cast<const uint32_t*>(base)[index]
                                : static_cast<const unsigned short*>(base)[index]};
}

// The log-decay of a channel from what the caller gave.
template <class Params>
__device__ __forceinline__ float log_decay(const Params& p, float x, float rate, float bias) {
  if (p.gate == Gate::kNone) return x;
  const float z = x + bias;
  if (p.gate == Gate::kSafe) return p.lower_bound * sigmoid(rate * z);
  return -rate * (fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z))));
}

template <class Params>
__device__ __forceinline__ float beta_of(const Params& p, float x) {
  if (!p.use_beta_sigmoid) return x;
  return (p.allow_neg_eigval ? 2.0f : 1.0f) * sigmoid(x);
}

// e^g - 1 of a channel, from what lies in memory.
__device__ __forceinline__ float decay_of(const RecurrentParams& p, Number g, Number dt_bias, Number A_log) {
  const float bias = p.dt_bias == nullptr ? 0.0f : dt_bias.as(p.parameter_dtype);
  const float rate = p.A_log == nullptr ? 1.0f : expf(A_log.as(p.parameter_dtype));
  return expm1f(log_decay(p, g.as(p.g_dtype), rate, bias));
}

// The factors of a token, and its β, with one warp.
template <class Element, int K, class Params>
__device__ __forceinline__ void sum_up(const Params& p, const Element* q, const Element* k, float beta,
                                       Token<K>& token) {
  const int lane = threadIdx.x & 31;
  float qs[K / 32], ks[K / 32], qq = 0.0f, kk = 0.0f, kq = 0.0f;
  load_neighbours<Element>(q, lane * (K / 32), qs);
  load_neighbours<Element>(k, lane * (K / 32), ks);
#pragma unroll
  for (int i = 0; i < K / 32; ++i) {
    qq = fmaf(qs[i], qs[i], qq);
    kk = fmaf(ks[i], ks[i], kk);
    kq = fmaf(ks[i], qs[i], kq);
  }
  kq = warp_sum(kq);
  float key_factor = 1.0f, query_factor = p.scale;
  if (p.use_qk_norm) {
    key_factor = rsqrtf(warp_sum(kk) + 1e-6f);
    query_factor *= rsqrtf(warp_sum(qq) + 1e-6f);
  }
  if (lane == 0) {
    token.key_factor = key_factor, token.query_factor = query_factor;
    token.key_query = kq * key_factor * query_factor;
    token.beta = beta_of(p, beta);
  }
}

// An integer of a tensor on the device, as it lies there: nobody waits for its load before it is asked for.
struct Integer {
  int low, high;

  // Whether it is in [0, end).
  __device__ __forceinline__ bool is_below(int end, bool is_int64) const {
    return static_cast<unsigned>(low) < static_cast<unsigned>(end) && (!is_int64 || high == 0);
  }
  // The nearest in [0, end].
  __device__ __forceinline__ int clamped(int end, bool is_int64) const {
    if (!is_int64 || high == low >> 31) return min(max(low, 0), end);
    return high < 0 ? 0 : end;
  }
};

__device__ __forceinline__ Integer load_integer(const void* base, bool is_int64, int i) {
  const int* const words = static_cast<const int*>(base) + (is_int64 ? 2 * static_cast<int64_t>(i) : i);
  return {words[0], words[is_int64]};
}

// The row of the states that sequence n has.
__device__ __forceinline__ Integer load_row(const RecurrentParams& p, int n) {
  return p.state_indices == nullptr ? Integer{n, 0} : load_integer(p.state_indices, p.state_indices_is_int64, n);
}

// The same for a hint or a guess, before the kernel waits for the one that may still write it: -1 for none.
__device__ __forceinline__ int row_for_hint(const RecurrentParams& p, int n) {
  if (p.initial_state == nullptr) return -1;
  if (p.state_indices == nullptr) return n;
  const int64_t word = p.state_indices_is_int64 ? 2 * static_cast<int64_t>(n) : n;
  const int row = load_for_hint(static_cast<const int*>(p.state_indices) + word);
  return row < p.rows ? row : -1;
}

// The same number, waited for here and not before: the compiler moves what uses a load ahead of copies that do not, but not a
// shuffle. With a whole warp, all of which has it.
__device__ __forceinline__ Integer waited_for(Integer x) {
  return {__shfl_sync(0xffffffffu, x.low, 0), __shfl_sync(0xffffffffu, x.high, 0)};
}

struct Nothing {
  __device__ __forceinline__ void operator()() const {}
};

// kWidth value channels of a state and kThreads threads. kHeld: in registers, for any number of tokens. Else it stays in shared
// memory, where it is read twice, for one token: that leaves registers for more CTAs.
template <int K, int kWidth, int kThreads, bool kValuesFirst, class State, bool kHeld = true>
class Slice {
 public:
  static constexpr int kWarps = kThreads / 32;
  // Each thread copies what it needs itself, so that none waits for others: not of bf16, where that would be 8 bytes at a time.
  static constexpr bool kOwnCopies = sizeof(State) == 4;
  static constexpr int kPlaceBytes = K * kWidth * sizeof(State);  // in shared memory, at a multiple of 128 bytes

  // In shared memory, where warps add up.
  struct Exchange {
    // a and b of each channel, 16 banks apart, and the updates: of keys first.
    alignas(16) float sums[kValuesFirst ? 1 : kWarps][2][kValuesFirst ? 4 : kWidth + 16];
    alignas(16) float updates[kValuesFirst ? 4 : kWidth];
  };

  // `first`: of the value channels.
  __device__ __forceinline__ Slice(Exchange& exchange, int V, int first, int thread)
      : exchange_(exchange),
        V_(V),
        first_(kValuesFirst ? first * K : first),
        warp_(thread / 32),
        lane_(thread % 32),
        own_(first_ + first_row() * pitch() + column()) {}

  __device__ __forceinline__ void set_to_zero() {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) s_[i][j] = 0.0f;
  }

  // Begins to copy a matrix of states to `place`, row by row, 16 bytes at a time.
  __device__ __forceinline__ void copy(const void* states, int64_t matrix, char* place) const {
    if constexpr (kOwnCopies) {
      const State* const from = static_cast<const State*>(states) + matrix * K * V_ + own_;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) copy_async(place + own_at(i), from + i * pitch());
    } else {
      constexpr int kPieces = kRowBytes / 16, kRowsAtATime = kThreads / kPieces;
      const int row = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
      const State* const from =
          static_cast<const State*>(states) + matrix * K * V_ + first_ + row * pitch() + piece * 8;
#pragma unroll
      for (int i = 0; i < kPlaceBytes / 16 / kThreads; ++i)
        copy_async(place + 16 * (i * kThreads + static_cast<int>(threadIdx.x)), from + i * kRowsAtATime * pitch());
    }
  }

  // After the copies, of this thread if kOwnCopies, else of all.
  __device__ __forceinline__ void take(const char* place) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) load_neighbours<State>(place + own_at(i), 0, s_[i]);
  }

  // Before the copies of a matrix may begin, by the CTA that has part number `part` of it: its share of the bytes, which lie
  // next to each other.
  __device__ __forceinline__ static void hint_at(const void* states, int64_t matrix, int V, int part) {
    const char* const from =
        static_cast<const char*>(states) + matrix * K * V * static_cast<int>(sizeof(State)) + part * kPlaceBytes;
#pragma unroll
    for (int at = 0; at < kPlaceBytes; at += 128 * kThreads)
      if (const int own = at + 128 * static_cast<int>(threadIdx.x); own < kPlaceBytes) hint(from + own);
  }

  __device__ __forceinline__ void store(void* states, int64_t matrix) const {
    State* const to = static_cast<State*>(states) + matrix * K * V_ + own_;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) store_whole<State>(to + i * pitch(), s_[i]);
  }

  // One token, whose `values` of these channels lie in shared memory. All threads of the CTA come here together. `out` is
  // called once for each channel, with the channel and its output.
  template <class Output>
  __device__ __forceinline__ void step(const Token<K>& token, const float* values, const Output& out) {
    static_assert(kHeld);
    if constexpr (kValuesFirst) {
      step_values_first(token, values, nullptr, nullptr, out);
    } else {
      step_keys_first(token, values, nullptr, nullptr, out, Nothing{});
    }
  }

  // The same for the only token of a state that is not held: from `place`, and to matrix number `matrix` of `states`, or nowhere.
  // Keys first, `then` is called by all threads when `out` has been called for all channels and what it wrote to shared memory
  // can be read.
  template <class Output, class Then = Nothing>
  __device__ __forceinline__ void step_once(const Token<K>& token, const float* values, const char* place, void* states,
                                            int64_t matrix, const Output& out, const Then& then = {}) {
    static_assert(!kHeld);
    State* const to = states == nullptr ? nullptr : static_cast<State*>(states) + matrix * K * V_ + own_;
    if constexpr (kValuesFirst) {
      static_assert(std::is_same_v<Then, Nothing>);
      step_values_first(token, values, place, to, out);
    } else {
      step_keys_first(token, values, place, to, out, then);
    }
  }

 private:
  static constexpr int kSteps = K * kWidth / (4 * kThreads);                     // rows that a thread has
  static constexpr int kLanes = kValuesFirst ? K / 4 : kWidth / 4;               // of a row
  static constexpr int kRows = 32 / kLanes;                                      // that a warp has at a time
  static constexpr int kRowBytes = (kValuesFirst ? K : kWidth) * sizeof(State);  // in shared memory

  __device__ __forceinline__ int first_row() const { return (warp_ * kRows + lane_ / kLanes) * kSteps; }
  __device__ __forceinline__ int column() const { return lane_ % kLanes * 4; }
  __device__ __forceinline__ int pitch() const { return kValuesFirst ? K : V_; }  // of rows in memory
  // Where a thread has its row number i in shared memory.
  __device__ __forceinline__ int own_at(int i) const {
    return (first_row() + i) * kRowBytes + column() * static_cast<int>(sizeof(State));
  }

  // Four numbers of the state, from where they are.
  __device__ __forceinline__ void get(const char* place, int i, float (&s)[4]) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[j] = s_[i][j];
    } else {
      load_neighbours<State>(place + own_at(i), 0, s);
    }
  }
  __device__ __forceinline__ void keep(int i, const float (&s)[4]) {
    if constexpr (kHeld) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s_[i][j] = s[j];
    }
  }

  // Of a value channel, whose value and sums with k and q these are.
  __device__ __forceinline__ static float update_of(const Token<K>& token, float value, float a) {
    return token.beta * fmaf(-token.key_factor, a, value);
  }
  __device__ __forceinline__ static float output_of(const Token<K>& token, float u, float b) {
    return fmaf(token.query_factor, b, u * token.key_query);
  }

  // Of 2 n sums this lane keeps half, and adds those of the lane `other` further, down to one.
  template <int n>
  __device__ __forceinline__ void halve(float (&sums)[2 * kSteps], int other) const {
    const bool upper = (lane_ & other) != 0;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float kept = upper ? sums[j + n] : sums[j], given = upper ? sums[j] : sums[j + n];
      sums[j] = kept + __shfl_xor_sync(0xffffffffu, given, other);
    }
    if constexpr (n > 1) halve<n / 2>(sums, other / 2);
  }

  template <class Output>
  __device__ __forceinline__ void step_values_first(const Token<K>& token, const float* values, const char* place,
                                                    State* to, const Output& out) {
    float k[4], d[4];
    load_neighbours<float>(token.key, column(), k);
    load_neighbours<float>(token.decay, column(), d);
    float sums[2 * kSteps];  // a and b of each row
    {
      float q[4];
      load_neighbours<float>(token.query, column(), q);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        float s[4];
        get(place, i, s);
#pragma unroll
        for (int j = 0; j < 4; ++j) s[j] = fmaf(s[j], d[j], s[j]);
        keep(i, s);
        sums[2 * i] = fmaf(s[0], k[0], s[1] * k[1]) + fmaf(s[2], k[2], s[3] * k[3]);
        sums[2 * i + 1] = fmaf(s[0], q[0], s[1] * q[1]) + fmaf(s[2], q[2], s[3] * q[3]);
      }
    }
    // Summed over a row's lanes, each of which keeps half of the sums it has left: in the end, those with
    // lane / (2 kKind) = i have a of row i, or b where bit kKind is set.
    constexpr int kKind = kLanes / (2 * kSteps);
    static_assert(kKind > 0);
    halve<kSteps>(sums, kLanes / 2);
    float own = sums[0];
#pragma unroll
    for (int other = kKind / 2; other > 0; other /= 2) own += __shfl_xor_sync(0xffffffffu, own, other);
    const float partner = __shfl_xor_sync(0xffffffffu, own, kKind);
    const float a = lane_ & kKind ? partner : own, b = lane_ & kKind ? own : partner;
    const int channel = first_row() + lane_ % kLanes / (2 * kKind);
    const float u = update_of(token, values[channel], a);
    if (lane_ % (2 * kKind) == 0) out(channel, output_of(token, u, b));
    if (!kHeld && to == nullptr) return;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const float ui = __shfl_sync(0xffffffffu, u * token.key_factor, lane_ / kLanes * kLanes + 2 * kKind * i);
      float s[4];
      get(place, i, s);
#pragma unroll
      for (int j = 0; j < 4; ++j) s[j] = fmaf(ui, k[j], kHeld ? s[j] : fmaf(s[j], d[j], s[j]));
      kHeld ? keep(i, s) : store_whole<State>(to + i * pitch(), s);
    }
  }

  template <class Output, class Then>
  __device__ __forceinline__ void step_keys_first(const Token<K>& token, const float* values, const char* place,
                                                  State* to, const Output& out, const Then& then) {
    const int row = first_row();
    float sums[8] = {};  // a of four channels, then b
#pragma unroll
    for (int i = 0; i < kSteps; i += 4) {
      float d[4], k[4], q[4];
      load_neighbours<float>(token.decay, row + i, d);
      load_neighbours<float>(token.key, row + i, k);
      load_neighbours<float>(token.query, row + i, q);
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        float s[4];
        get(place, i + at, s);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[j] = fmaf(s[j], d[at], s[j]);
          sums[j] = fmaf(s[j], k[at], sums[j]);
          sums[4 + j] = fmaf(s[j], q[at], sums[4 + j]);
        }
        keep(i + at, s);
      }
    }
    // Over the rows of the warp: bit 4 of a lane then tells whether it has a or b, bit 3 which two channels.
#pragma unroll
    for (int n = 4, other = 16; other >= kLanes; n /= 2, other /= 2) {
      const bool upper = (lane_ & other) != 0;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float kept = upper ? sums[j + n] : sums[j], given = upper ? sums[j] : sums[j + n];
        sums[j] = kept + __shfl_xor_sync(0xffffffffu, given, other);
      }
    }
    if constexpr (kRows == 1) {
      *reinterpret_cast<float4*>(&exchange_.sums[warp_][0][column()]) = {sums[0], sums[1], sums[2], sums[3]};
      *reinterpret_cast<float4*>(&exchange_.sums[warp_][1][column()]) = {sums[4], sums[5], sums[6], sums[7]};
    } else if constexpr (kRows == 2) {
      *reinterpret_cast<float4*>(&exchange_.sums[warp_][lane_ >> 4][column()]) = {sums[0], sums[1], sums[2], sums[3]};
    } else {
      *reinterpret_cast<float2*>(&exchange_.sums[warp_][lane_ >> 4][column() + (lane_ >> 3 & 1) * 2]) = {sums[0],
                                                                                                         sums[1]};
    }
    __syncthreads();
    // Over the warps: half of a warp adds up a of 16 channels, the other half b.
    if (warp_ < kWidth / 16) {
      const int channel = warp_ * 16 + (lane_ & 15);
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += exchange_.sums[w][lane_ >> 4][channel];
      const float b = __shfl_down_sync(0xffffffffu, sum, 16);
      if (lane_ < 16) {
        const float u = update_of(token, values[channel], sum);
        exchange_.updates[channel] = u * token.key_factor;
        out(channel, output_of(token, u, b));
      }
    }
    __syncthreads();
    then();
    if (!kHeld && to == nullptr) return;
    float u[4];
    load_neighbours<float>(exchange_.updates, column(), u);
#pragma unroll
    for (int i = 0; i < kSteps; i += 4) {
      float k[4], d[4];
      load_neighbours<float>(token.key, row + i, k);
      if (!kHeld) load_neighbours<float>(token.decay, row + i, d);
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        float s[4];
        get(place, i + at, s);
#pragma unroll
        for (int j = 0; j < 4; ++j) s[j] = fmaf(u[j], k[at], kHeld ? s[j] : fmaf(s[j], d[at], s[j]));
        kHeld ? keep(i + at, s) : store_whole<State>(to + (i + at) * pitch(), s);
      }
    }
  }

  Exchange& exchange_;
  const int V_, first_, warp_, lane_;  // first_: elements from a matrix's first to the first of these channels
  const int own_;                      // to the first of this thread
  float s_[kHeld ? kSteps : 1][4];
};

}  // namespace kda

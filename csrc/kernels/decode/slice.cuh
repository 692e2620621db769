// The token recurrence of 32 value channels, carried by 128 threads that hold the state in registers.
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
// Who holds what (`Slice`): a thread has 4 neighbours of the state's last dimension at a time, K / 16 times.
//   values first, [V, K]: a warp has 8 rows, K / 4 lanes a row, and sums over lanes.
//   keys first, [K, V]: a warp has 4 of every 16 rows, 8 lanes a row, and the four warps' sums meet in shared memory.
#pragma once

#include <type_traits>

#include "api/decode.h"
#include "common/prefetch.cuh"
#include "common/vector.cuh"

namespace kda {

constexpr int kSliceWidth = 32;     // value channels
constexpr int kSliceThreads = 128;  // 4 warps

// What the recurrence needs of a token, in shared memory.
template <int K>
struct alignas(16) Token {
  float decay[K];  // e^g - 1
  float key[K], query[K];
  float key_factor, query_factor, key_query, beta;  // the second one has the scale, the third one both
};

// A number of fp32 or Element, as is known when the call comes.
template <class Element>
__device__ __forceinline__ float load_float_of(const void* base, int64_t index, DType dtype) {
  return dtype == DType::kFP32 ? load_float<float>(base, index) : load_float<Element>(base, index);
}

__device__ __forceinline__ int size_of(DType dtype) { return dtype == DType::kFP32 ? 4 : 2; }

template <class T>
__device__ __forceinline__ float rounded(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(__float2bfloat16(x));
  if constexpr (std::is_same_v<T, __half>) return __half2float(__float2half(x));
  return x;
}

template <class T>
__device__ __forceinline__ void store_value(void* base, int64_t index, float x) {
  if constexpr (std::is_same_v<T, float>) {
    static_cast<float*>(base)[index] = x;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16(x);
  } else {
    static_cast<__half*>(base)[index] = __float2half(x);
  }
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal_approx(1.0f + expf(-x)); }

// The same for all lanes, and the compiler knows.
__device__ __forceinline__ int this_warp() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

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
__device__ __forceinline__ float log_decay(const RecurrentParams& p, float x, float rate, float bias) {
  if (p.gate == Gate::kNone) return x;
  const float z = x + bias;
  if (p.gate == Gate::kSafe) return p.lower_bound * sigmoid(rate * z);
  return -rate * (fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z))));
}

__device__ __forceinline__ float beta_of(const KdaParams& p, float x) {
  if (!p.use_beta_sigmoid) return x;
  return (p.allow_neg_eigval ? 2.0f : 1.0f) * sigmoid(x);
}

// e^g - 1 of a channel, from g and dt_bias as they lie there.
template <class Element>
__device__ __forceinline__ float decay_of(const RecurrentParams& p, const void* g, const void* dt_bias, int channel,
                                          Number A_log) {
  const float bias =
      p.dt_bias == nullptr ? 0.0f : load_number(dt_bias, channel, p.parameter_dtype).as(p.parameter_dtype);
  const float rate = p.A_log == nullptr ? 1.0f : expf(A_log.as(p.parameter_dtype));
  return expm1f(log_decay(p, load_float_of<Element>(g, channel, p.g_dtype), rate, bias));
}

// The factors of a token, and its β, with one warp.
template <class Element, int K>
__device__ __forceinline__ void sum_up(const RecurrentParams& p, const Element* q, const Element* k, float beta,
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

// The same for a hint, before the kernel waits for the one that may still write it: -1 for none.
__device__ __forceinline__ int row_for_hint(const RecurrentParams& p, int n) {
  if (p.initial_state == nullptr) return -1;
  if (p.state_indices == nullptr) return n;
  const int64_t word = p.state_indices_is_int64 ? 2 * static_cast<int64_t>(n) : n;
  const int row = load_for_hint(static_cast<const int*>(p.state_indices) + word);
  return row < p.rows ? row : -1;
}

// One of kSlices slices side by side, of a CTA.
template <int K, int kSlices, bool kValuesFirst, class State>
class Slice {
 public:
  // Floats in shared memory that the warps of a slice share.
  static constexpr int kExchange = kValuesFirst ? 0 : 2 * 4 * 2 * kSliceWidth;
  // Bytes in shared memory for the states of all slices, before they are taken into registers.
  static constexpr int kPlaceBytes = K * kSlices * kSliceWidth * static_cast<int>(sizeof(State));

  // `exchange` is this slice's own.
  __device__ __forceinline__ Slice(float* exchange, int V, int slice)
      : exchange_(exchange), V_(V), slice_(slice), warp_(this_warp() % 4), lane_(threadIdx.x & 31) {}

  __device__ __forceinline__ void set_to_zero() {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) s_[i][j] = 0.0f;
  }

  // Begins to copy the states of all slices, value channels from `first` on, to `place`. Neighbours in memory have
  // neighbours' copies: DRAM gives more of rows of 256 bytes than of twice 128.
  __device__ __forceinline__ void copy(const void* states, int64_t matrix, int first, char* place) const {
    for_chunks(states, matrix, first, [&](int at, const char* from) { copy_async(place + at, from); });
  }

  // After the copies of all threads.
  __device__ __forceinline__ void take(const char* place) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      load_neighbours<State>(place, offset(i, slice_ * kSliceWidth, kSlices * kSliceWidth), s_[i]);
  }

  // Before the copy may begin.
  __device__ __forceinline__ void hint_at(const void* states, int64_t matrix, int first) const {
    for_chunks(states, matrix, first, [](int, const char* from) { hint(from); });
  }

  __device__ __forceinline__ void store(void* states, int64_t matrix, int first) const {
    State* const to = static_cast<State*>(states) + matrix * K * V_;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) store_neighbours<State>(to, offset(i, first + slice_ * kSliceWidth, V_), s_[i]);
  }

  // One token, whose `values` of these channels lie in shared memory. All threads of the CTA come here together. `out` is
  // called once for each channel of the slice, with the channel and its output. `count` is that of tokens before.
  template <class Output>
  __device__ __forceinline__ void step(const Token<K>& token, const float* values, int count, const Output& out) {
    if constexpr (kValuesFirst) {
      step_values_first(token, values, out);
    } else {
      step_keys_first(token, values, count, out);
    }
  }

 private:
  static constexpr int kSteps = K / 16;
  static constexpr int kLanes = kValuesFirst ? K / 4 : kSliceWidth / 4;  // of a row
  static constexpr int kRows = 32 / kLanes;                              // that a warp has at a time

  // Elements from a matrix's first to this thread's four of step i. `first`: of the value channels of this slice, of `width`.
  __device__ __forceinline__ int offset(int i, int first, int width) const {
    const int row = lane_ / kLanes, column = lane_ % kLanes * 4;
    return kValuesFirst ? (first + warp_ * 8 + i * kRows + row) * K + column
                        : (i * 16 + warp_ * 4 + row) * width + first + column;
  }

  // Calls `f` for this thread's share of all slices' states, 16 bytes at a time: with the bytes before them, and where they are.
  template <class Function>
  __device__ __forceinline__ void for_chunks(const void* states, int64_t matrix, int first, const Function& f) const {
    constexpr int kState = sizeof(State), kThreads = kSlices * kSliceThreads;
    constexpr int kRow = (kValuesFirst ? K : kSlices * kSliceWidth) * kState / 16;  // chunks
    static_assert(kThreads % kRow == 0 && kPlaceBytes % (16 * kThreads) == 0);
    const int row = static_cast<int>(threadIdx.x) / kRow, pitch = (kValuesFirst ? K : V_) * kState;
    const char* from = static_cast<const char*>(states) +
                       (matrix * K * V_ + (kValuesFirst ? first * K : first)) * kState + row * pitch +
                       static_cast<int>(threadIdx.x) % kRow * 16;
#pragma unroll
    for (int i = 0; i < kPlaceBytes / (16 * kThreads); ++i, from += kThreads / kRow * pitch)
      f(16 * (i * kThreads + static_cast<int>(threadIdx.x)), from);
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
  __device__ __forceinline__ void step_values_first(const Token<K>& token, const float* values, const Output& out) {
    const int column = lane_ % kLanes * 4;
    const float4 d = *reinterpret_cast<const float4*>(token.decay + column);
    const float4 k = *reinterpret_cast<const float4*>(token.key + column);
    const float4 q = *reinterpret_cast<const float4*>(token.query + column);
    float sums[2 * kSteps];  // a and b of each row
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      float (&s)[4] = s_[i];
      s[0] = fmaf(s[0], d.x, s[0]), s[1] = fmaf(s[1], d.y, s[1]);
      s[2] = fmaf(s[2], d.z, s[2]), s[3] = fmaf(s[3], d.w, s[3]);
      sums[2 * i] = fmaf(s[0], k.x, s[1] * k.y) + fmaf(s[2], k.z, s[3] * k.w);
      sums[2 * i + 1] = fmaf(s[0], q.x, s[1] * q.y) + fmaf(s[2], q.z, s[3] * q.w);
    }
    // Summed over a row's lanes, each of which keeps half of the sums it has left: in the end, those with lane / 4 = i
    // have a of step i, or b where bit 1 is set.
    halve<kSteps>(sums, kLanes / 2);
    const float own = sums[0] + __shfl_xor_sync(0xffffffffu, sums[0], 1);
    const float partner = __shfl_xor_sync(0xffffffffu, own, 2);
    const float a = lane_ & 2 ? partner : own, b = lane_ & 2 ? own : partner;
    const int channel = warp_ * 8 + lane_ % kLanes / 4 * kRows + lane_ / kLanes;
    const float u = update_of(token, values[channel], a);
    if ((lane_ & 3) == 0) out(channel, output_of(token, u, b));
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const float ui = __shfl_sync(0xffffffffu, u * token.key_factor, lane_ / kLanes * kLanes + 4 * i);
      s_[i][0] = fmaf(ui, k.x, s_[i][0]), s_[i][1] = fmaf(ui, k.y, s_[i][1]);
      s_[i][2] = fmaf(ui, k.z, s_[i][2]), s_[i][3] = fmaf(ui, k.w, s_[i][3]);
    }
  }

  template <class Output>
  __device__ __forceinline__ void step_keys_first(const Token<K>& token, const float* values, int count,
                                                  const Output& out) {
    const int row = warp_ * 4 + lane_ / kLanes, column = lane_ % kLanes * 4;
    float sums[8] = {};  // a of four channels, then b
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const float d = token.decay[16 * i + row], k = token.key[16 * i + row], q = token.query[16 * i + row];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s_[i][j] = fmaf(s_[i][j], d, s_[i][j]);
        sums[j] = fmaf(s_[i][j], k, sums[j]);
        sums[4 + j] = fmaf(s_[i][j], q, sums[4 + j]);
      }
    }
    // Over the warp's four rows: bit 4 of a lane then tells whether it has a or b, bit 3 which two channels.
#pragma unroll
    for (int level = 0; level < 2; ++level) {
      const int n = 4 >> level, other = 16 >> level;
      const bool upper = (lane_ & other) != 0;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float kept = upper ? sums[j + n] : sums[j], given = upper ? sums[j] : sums[j + n];
        sums[j] = kept + __shfl_xor_sync(0xffffffffu, given, other);
      }
    }
    // Two places in turn: who is late with a token still reads the one while others write the other.
    float* const place = exchange_ + count % 2 * (4 * 2 * kSliceWidth);
    float* const mine = place + (warp_ * 2 + (lane_ >> 4)) * kSliceWidth + column + (lane_ >> 3 & 1) * 2;
    mine[0] = sums[0];
    mine[1] = sums[1];
    __syncthreads();
    const auto sum_of = [&](int kind, int channel) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < 4; ++w) sum += place[(w * 2 + kind) * kSliceWidth + channel];
      return sum;
    };
    if (warp_ == count % 4) {
      out(lane_, output_of(token, update_of(token, values[lane_], sum_of(0, lane_)), sum_of(1, lane_)));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float u = update_of(token, values[column + j], sum_of(0, column + j)) * token.key_factor;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) s_[i][j] = fmaf(u, token.key[16 * i + row], s_[i][j]);
    }
  }

  float* const exchange_;
  const int V_, slice_, warp_, lane_;
  float s_[kSteps][4];
};

}  // namespace kda

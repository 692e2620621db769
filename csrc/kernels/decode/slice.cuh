// The token recurrence of 32 value channels, carried by 128 threads that hold the state in registers.
//
// With d = e^g - 1, k^ and q^ normalised, q^ times the scale, a token does this to each value channel v, a row of the state:
//
//   s ← s + s ∘ d      a = s · k^      b = s · q^      u = β (v - a)      o = b + u (k^ · q^)      s ← s + u k^
//
// so that both sums over the key channels are taken at the same time. d rather than e^g, since a gate near 1 would lose
// what matters in fp32: a state that is a thousand tokens old has gone through e^g a thousand times.
//
// Who holds what (`Slice`): a thread has 4 neighbours of the state's last dimension at a time, K / 16 times.
//   values first, [V, K]: a warp has 8 rows, K / 4 lanes a row, and sums over lanes.
//   keys first, [K, V]: a warp has 4 of every 16 rows, 8 lanes a row, and the four warps' sums meet in shared memory.
#pragma once

#include <type_traits>

#include "api/decode.h"
#include "common/vector.cuh"

namespace kda {

constexpr int kSliceWidth = 32;     // value channels
constexpr int kSliceThreads = 128;  // 4 warps

// What the recurrence needs of a token, in shared memory.
template <int K>
struct alignas(16) Token {
  float decay[K];  // e^g - 1
  float key[K];
  float query[K];  // times the scale
  float key_query, beta;
};

// N neighbours of fp32 or Element, as is known when the call comes.
template <class Element, int N>
__device__ __forceinline__ void load_neighbours_of(const void* base, int64_t index, DType dtype, float (&x)[N]) {
  dtype == DType::kFP32 ? load_neighbours<float>(base, index, x) : load_neighbours<Element>(base, index, x);
}

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

// Of A_log or dt_bias.
__device__ __forceinline__ float load_parameter(const RecurrentParams& p, const void* base, int i) {
  return p.parameter_dtype == DType::kFP32   ? load_float<float>(base, i)
         : p.parameter_dtype == DType::kBF16 ? load_float<__nv_bfloat16>(base, i)
                                             : load_float<__half>(base, i);
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

// A token's inputs as they come, for one head: K / 32 neighbouring channels a lane of one warp.
template <int K>
struct RawToken {
  float q[K / 32], k[K / 32], g[K / 32], beta;
};

// Makes `token` of it, with one warp.
template <int K>
__device__ __forceinline__ void activate(const RecurrentParams& p, int head, const RawToken<K>& raw, Token<K>& token) {
  constexpr int kOwn = K / 32;
  const int lane = threadIdx.x & 31, channel = lane * kOwn;
  const float rate = p.A_log == nullptr ? 1.0f : expf(load_parameter(p, p.A_log, head));
  float qq = 0.0f, kk = 0.0f, kq = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    qq = fmaf(raw.q[i], raw.q[i], qq);
    kk = fmaf(raw.k[i], raw.k[i], kk);
    kq = fmaf(raw.k[i], raw.q[i], kq);
  }
  qq = warp_sum(qq), kk = warp_sum(kk), kq = warp_sum(kq);
  const float k_norm = p.use_qk_norm ? rsqrtf(kk + 1e-6f) : 1.0f;
  const float q_norm = p.use_qk_norm ? p.scale * rsqrtf(qq + 1e-6f) : p.scale;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const float bias = p.dt_bias == nullptr ? 0.0f : load_parameter(p, p.dt_bias, head * K + channel + i);
    token.decay[channel + i] = expm1f(log_decay(p, raw.g[i], rate, bias));
    token.key[channel + i] = raw.k[i] * k_norm;
    token.query[channel + i] = raw.q[i] * q_norm;
  }
  if (lane == 0) {
    token.key_query = kq * k_norm * q_norm;
    token.beta = beta_of(p, raw.beta);
  }
}

template <int K, bool kValuesFirst, class State>
class Slice {
 public:
  // Floats in shared memory that the warps of a slice share.
  static constexpr int kExchange = kValuesFirst ? 0 : 2 * 4 * 2 * kSliceWidth;

  // `exchange` is this slice's own, and `first` its first value channel.
  __device__ __forceinline__ Slice(float* exchange, int V, int first)
      : exchange_(exchange), V_(V), first_(first), warp_(this_warp() % 4), lane_(threadIdx.x & 31) {}

  __device__ __forceinline__ void set_to_zero() {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) s_[i][j] = 0.0f;
  }

  __device__ __forceinline__ void load(const void* states, int64_t matrix) {
    const State* const from = static_cast<const State*>(states) + matrix * K * V_;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) load_neighbours<State>(from, offset(i), s_[i]);
  }

  __device__ __forceinline__ void store(void* states, int64_t matrix) const {
    State* const to = static_cast<State*>(states) + matrix * K * V_;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) store_neighbours<State>(to, offset(i), s_[i]);
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

  // Elements from the matrix's first to this thread's four of step i.
  __device__ __forceinline__ int offset(int i) const {
    const int row = lane_ / kLanes, column = lane_ % kLanes * 4;
    return kValuesFirst ? (first_ + warp_ * 8 + i * kRows + row) * K + column
                        : (i * 16 + warp_ * 4 + row) * V_ + first_ + column;
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
#pragma unroll
    for (int n = kSteps, other = kLanes / 2; n > 0; n /= 2, other /= 2) {
      const bool upper = (lane_ & other) != 0;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float kept = upper ? sums[j + n] : sums[j], given = upper ? sums[j] : sums[j + n];
        sums[j] = kept + __shfl_xor_sync(0xffffffffu, given, other);
      }
    }
    const float own = sums[0] + __shfl_xor_sync(0xffffffffu, sums[0], 1);
    const float partner = __shfl_xor_sync(0xffffffffu, own, 2);
    const float a = lane_ & 2 ? partner : own, b = lane_ & 2 ? own : partner;
    const int channel = warp_ * 8 + lane_ % kLanes / 4 * kRows + lane_ / kLanes;
    const float u = token.beta * (values[channel] - a);
    if ((lane_ & 3) == 0) out(channel, fmaf(u, token.key_query, b));
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const float ui = __shfl_sync(0xffffffffu, u, lane_ / kLanes * kLanes + 4 * i);
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
    for (int n = 4, other = 16; n > 1; n /= 2, other /= 2) {
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
      const float u = token.beta * (values[lane_] - sum_of(0, lane_));
      out(lane_, fmaf(u, token.key_query, sum_of(1, lane_)));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float u = token.beta * (values[column + j] - sum_of(0, column + j));
#pragma unroll
      for (int i = 0; i < kSteps; ++i) s_[i][j] = fmaf(u, token.key[16 * i + row], s_[i][j]);
    }
  }

  float* const exchange_;
  const int V_, first_, warp_, lane_;
  float s_[kSteps][4];
};

}  // namespace kda

// All that a chunk needs besides the state: one CTA of eight warps makes the record of one chunk and value head.
//
// Data flow
//   1. A pair of warps takes a block of 16 tokens, half of the channels each, and 16 channels at a time: gate → log-decay
//      (base 2) → sums over tokens by a product with a 0/±1 matrix → decays by ex2. q^ and k^ decayed from the start of
//      the block, and k^ decayed to its end, replace the q, k and g tiles as fp16: all factors are ≤ 1.
//      The diagonal 16 × 16 blocks of A and P are multiplied in tf32 with the middle of the block as reference, where
//      factors reach 2^60; a block whose decays leave that range is done again by `exact_diagonal`, for which no gate is
//      too steep.
//   2. The first warp of a pair (warps 0-3) multiplies the block's rows of q, the second (warps 4-7) those of k, with the
//      blocks of columns before it, nearest first; between two of them the rows take on the decay of the block in
//      between. What is left at the end is Q and K^+, relative to the chunk's start.
//   3. (I + A)^-1 by warps 0-3: the diagonal blocks by substitution in fp32, one column a lane; then a block column a
//      warp, in tf32. Warps 4-7 make Kr and fetch v.
//   4. W and Uᵀ by WGMMA, half of the columns a warpgroup. U multiplies v itself (bf16 or fp16) with X in two parts of v's
//      type, so that it keeps fp32's range and 16 bits.
//
// Shared memory (K = 128): four regions of 16 KB
//   query    q → q^ decayed from the block's start → Q → X of U, low part
//   key      k → k^ decayed from the block's start → K^+ → W
//   gate     g → k^ decayed to the block's end → Kr → X of W | X of U, high part
//   value    A and its inverse, fp32 → v
#pragma once

#include "record.cuh"

namespace kda {

constexpr int kPrepareThreads = 256;
// CTAs that an SM holds at a time: as many as its shared memory lets it, and its registers without spilling.
template <class Element, int K, Gate kGate, bool kFloatGate>
constexpr int prepare_ctas() {
  constexpr bool kFewRegisters = kGate == Gate::kSafe || std::is_same_v<Element, __nv_bfloat16>;
  return K == 128 && !kFloatGate && kFewRegisters ? 3 : 2;
}
constexpr float kMaxFactored = 60.0f;    // |log2| of a factor in a diagonal block; the safe gate stays under 58
constexpr float kLowestDecay = -192.0f;  // log2; its power is 0 in fp32, and so is that of anything below

template <int K, bool kFloatGate>
struct PrepareSmem {
  static constexpr int kTile = kChunk * K * 2;
  static constexpr int kQuery = 0;
  static constexpr int kKey = kQuery + kTile;
  static constexpr int kGate = kKey + kTile;
  static constexpr int kValue = kGate + kTile;
  static constexpr int kXTile = kChunk * kChunk * 2;
  static constexpr int kXOfW = kGate;
  static constexpr int kXHigh = K == 128 ? kGate + kXTile : kQuery;
  static constexpr int kXLow = K == 128 ? kQuery : kValue + 16384;
  static constexpr int kFloatGateTile = kValue + 16384 + (K == 128 ? 0 : kXTile);
  static constexpr int kBlockDecay = kFloatGateTile + (kFloatGate ? kChunk * K * 4 : 0);  // float [4][K]
  static constexpr int kBlockDecayHalf = kBlockDecay + 4 * K * 4;                         // half [4][K]
  static constexpr int kRestDecayHalf = kBlockDecayHalf + 4 * K * 2;                      // half [3][K]
  static constexpr int kBias = kRestDecayHalf + 3 * K * 2;                                // float [K]: of the gate
  static constexpr int kBetaW = kBias + K * 4;                                            // float [64]: β n²
  static constexpr int kBetaU = kBetaW + kChunk * 4;                                      // float [64]: β n
  static constexpr int kOutOfRange = kBetaU + kChunk * 4;  // int [2][4]: whether a warp saw decays beyond kMaxFactored
  static constexpr int kBytes = kOutOfRange + 32;
};

// Log-decay in base 2 from what the caller gave, for one channel. `bias` has gone through `prepare_bias`.
template <Gate kGate>
struct GateFunction {
  float rate;         // exp(A_log)
  float lower_bound;  // in base 2

  __device__ __forceinline__ float prepare_bias(float bias) const {
    return kGate == Gate::kSafe ? bias * (-rate * kLog2E) : bias;
  }

  __device__ __forceinline__ float operator()(float x, float bias) const {
    if constexpr (kGate == Gate::kSafe) {
      return lower_bound * reciprocal_approx(1.0f + exp2_approx(fmaf(x, -rate * kLog2E, bias)));
    } else {
      float y;
      if constexpr (kGate == Gate::kNone) {
        y = x * kLog2E;
      } else {
        float z = x + bias;
        float e = exp2_approx(-fabsf(z) * kLog2E);
        // log1p(e): the rounding of 1 + e would lose the small e of a mild gate.
        float series = e * (1.0f - e * (0.5f - e * (0.33333333f - 0.25f * e))) * kLog2E;
        float log1p = e < 0.015625f ? series : log2_approx(1.0f + e);
        y = -rate * (fmaxf(z, 0.0f) * kLog2E + log1p);
      }
      return y < kLowestDecay ? kLowestDecay : y;  // keeps a NaN
    }
  }
};

// Sums of log-decays over the tokens of a block, from the middle of the block outwards: products with matrices of 0 and
// ±1 in tf32. Rounding a log-decay to tf32 changes the decay by 2^-12 of its logarithm, the same in all that follows.
class DecaySum {
 public:
  __device__ __forceinline__ DecaySum() {
    int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    constexpr uint32_t kOne = 0x3f800000, kMinusOne = 0xbf800000;
    matrices[0][0] = 2 * t > g ? kMinusOne : 0;
    matrices[0][2] = 2 * t + 1 > g ? kMinusOne : 0;
    matrices[1][1] = 2 * t <= g ? kOne : 0;
    matrices[1][3] = 2 * t + 1 <= g ? kOne : 0;
    matrices[2][0] = matrices[2][2] = matrices[3][1] = matrices[3][3] = kOne;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(matrices[m][i]));  // else made anew at every use
  }

  // `decay` holds tokens 2t, 2t+1, 2t+8, 2t+9 of channel g. On return, in the order of an accumulator (token g or g + 8,
  // channels 2t and 2t+1): `from_middle` is Σ over 8..i for token i ≥ 8 and -Σ over i+1..7 for i < 8; halves[0..1] is
  // the sum over tokens 0..7 and halves[2..3] that over tokens 8..15.
  __device__ __forceinline__ void operator()(const float (&decay)[4], float (&from_middle)[4],
                                             float (&halves)[4]) const {
    const uint32_t d[4] = {to_tf32(decay[0]), to_tf32(decay[1]), to_tf32(decay[2]), to_tf32(decay[3])};
#pragma unroll
    for (int i = 0; i < 4; ++i) from_middle[i] = halves[i] = 0.0f;
    mma_tf32(from_middle, matrices[0], d[0], d[1]);
    mma_tf32(halves, matrices[2], d[0], d[1]);
    mma_tf32(from_middle, matrices[1], d[2], d[3]);
    mma_tf32(halves, matrices[3], d[2], d[3]);
  }

 private:
  // As A operands: -1 for the tokens after one of 0..7; 1 for those of 8..15 up to one of these; all of 0..7 for each of
  // them; all of 8..15.
  uint32_t matrices[4][4] = {};
};

// The diagonal block of A / β or (`of_p`) of P without factors above 1, for decays of any size: entry (i, j) belongs to the level at
// which i and j part, i in the later and j in the earlier half of a run of 2, 4, 8 or 16 tokens, and there both decay
// towards the boundary between the halves. Reads the inputs again: it is rare, and the tiles are already overwritten.
template <class Element, int K, Gate kGate, bool kFloatGate>
__device__ __noinline__ void exact_diagonal(const PrefillParams& p, const GateFunction<kGate>& gate, const Element* q,
                                            const Element* k, const char* g_rows, const float* bias, int valid,
                                            const float (&q_norm)[2], const float (&k_norm)[2], bool of_p,
                                            float (&result)[2][4]) {
  using GateElement = std::conditional_t<kFloatGate, float, Element>;
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const DecaySum sum_decays;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) result[n][i] = 0.0f;

#pragma unroll 1
  for (int level = -1; level < 4; ++level) {  // -1: the diagonal itself
    float sum[2][4] = {};
#pragma unroll 1
    for (int channel = 0; channel < K; channel += 8) {
      float decay[4], from_middle[4], halves[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int token = 2 * t + (i & 1) + (i >> 1) * 8;
        decay[i] = token < valid
                       ? gate(load_float<GateElement>(g_rows, token * p.g_strides[1] + channel + g), bias[channel + g])
                       : 0.0f;
      }
      sum_decays(decay, from_middle, halves);
      uint32_t rows[4], columns[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // tokens g and g + 8
        int token = g + 8 * half;
        bool later = level == 3 ? half == 1 : level >= 0 && (g >> level & 1) == 1;
        int reference = level < 0 || level == 3 ? 0 : (g & -(2 << level)) + (1 << level) - 1;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float own = from_middle[2 * half + e];
          float other = __shfl_sync(0xffffffffu, own, reference * 4 + t);
          float distance = level == 3 ? own : own - other;
          float factor = level < 0 ? 1.0f : exp2_approx(later ? distance : -distance);
          int64_t at = channel + 2 * t + e;
          float kv = token < valid ? load_float<Element>(k, token * p.k_strides[1] + at) * k_norm[half] : 0.0f;
          float rv = kv;
          if (of_p) rv = token < valid ? load_float<Element>(q, token * p.q_strides[1] + at) * q_norm[half] : 0.0f;
          bool is_row = level < 0 || later, is_column = level < 0 || !later;
          rows[half + 2 * e] = to_tf32(is_row ? rv * factor : 0.0f);
          columns[half + 2 * e] = to_tf32(is_column ? kv * factor : 0.0f);
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) mma_tf32(sum[n], rows, columns[n], columns[n + 2]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int row = g + (i >> 1) * 8, column = 8 * n + 2 * t + (i & 1);
        bool mine = level < 0 ? row == column
                              : (row >> (level + 1)) == (column >> (level + 1)) && (row >> level & 1) == 1 &&
                                    (column >> level & 1) == 0;
        if (mine) result[n][i] = sum[n][i];
      }
  }
}

// Byte offset of element (row, column), column even, in the fp32 matrix A: 16-byte chunks swizzled against conflicts.
__device__ __forceinline__ int matrix_offset(int row, int column) {
  return row * kChunk * 4 + (((column >> 2) ^ (row & 15)) << 4) + (column & 3) * 4;
}

// Inverts the unit lower triangular block I + A in place; `matrix` is its warp's diagonal block. Lane c solves for
// column c (lanes 16.. repeat lanes 0..), four rows of the result at a time.
__device__ __forceinline__ void invert_diagonal(char* matrix, int first) {
  int column = threadIdx.x & 15;
  float x[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
  for (int m = 0; m < kBlock; m += 4) {
#pragma unroll
    for (int i = m + 1; i < kBlock; ++i) {
      float4 a = *reinterpret_cast<const float4*>(matrix + matrix_offset(first + i, first + m));
      x[i] -= a.x * x[m];
      if (i > m + 1) x[i] -= a.y * x[m + 1];
      if (i > m + 2) x[i] -= a.z * x[m + 2];
      if (i > m + 3) x[i] -= a.w * x[m + 3];
    }
  }
  __syncwarp();
  if ((threadIdx.x & 31) < 16) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i)
      *reinterpret_cast<float*>(matrix + matrix_offset(first + i, first + (column & ~3)) + (column & 3) * 4) = x[i];
  }
  __syncwarp();
}

// c (16 × 16, two accumulators) += a · (block of `matrix`)ᵀ, where a is itself a pair of accumulators.
__device__ __forceinline__ void multiply_by_block_transposed(float (&c)[2][4], const float (&a)[2][4],
                                                             const char* matrix, int row, int column) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    // Slots t and t + 4 of the product's inner index are columns 2t and 2t + 1, as an accumulator has them.
    const uint32_t rows[4] = {to_tf32(a[k][0]), to_tf32(a[k][2]), to_tf32(a[k][1]), to_tf32(a[k][3])};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float2 b = *reinterpret_cast<const float2*>(matrix + matrix_offset(row + 8 * n + g, column + 8 * k + 2 * t));
      mma_tf32(c[n], rows, to_tf32(b.x), to_tf32(b.y));
    }
  }
}

template <class Element, int K, Gate kGate, bool kFloatGate>
__global__ void __launch_bounds__(kPrepareThreads, prepare_ctas<Element, K, kGate, kFloatGate>())
    prepare(const __grid_constant__ PrefillParams p) {
  using Smem = PrepareSmem<K, kFloatGate>;
  using Out = Record<K>;
  extern __shared__ __align__(1024) char smem[];
  char *query = smem + Smem::kQuery, *key = smem + Smem::kKey, *gate_tile = smem + Smem::kGate;
  char *value = smem + Smem::kValue, *float_gate = smem + Smem::kFloatGateTile;
  float* block_decay = reinterpret_cast<float*>(smem + Smem::kBlockDecay);
  __half* block_decay_half = reinterpret_cast<__half*>(smem + Smem::kBlockDecayHalf);
  __half* rest_decay_half = reinterpret_cast<__half*>(smem + Smem::kRestDecayHalf);
  float* gate_bias = reinterpret_cast<float*>(smem + Smem::kBias);
  float* beta_w = reinterpret_cast<float*>(smem + Smem::kBetaW);
  float* beta_u = reinterpret_cast<float*>(smem + Smem::kBetaU);

  launch_dependents();
  const int thread = threadIdx.x, side = cutlass::canonical_warp_group_idx();
  const int warp = cutlass::canonical_warp_idx_sync() % 4;  // which block of tokens
  const int lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int head = blockIdx.x % p.HV, slot = blockIdx.x / p.HV;
  const BlockAddress block_address;

  // Tokens after the last sequence: their output is zero.
  if (p.cu_seqlens != nullptr && p.first_sequence + p.sequences == p.N) {
    const int covered = bound(p, p.N);
    for (int row = thread; row < kChunk; row += kPrepareThreads) {
      const int64_t token = static_cast<int64_t>(slot) * kChunk + row;
      if (token < covered || token >= p.T) continue;
      char* out = static_cast<char*>(p.out) + (token * p.out_strides[1] + head * p.out_strides[2]) * 2;
      for (int b = 0; b < p.V * 2; b += 16) *reinterpret_cast<uint4*>(out + b) = uint4{};
    }
  }

  const int n = sequence_of_slot(p, slot);
  const Sequence seq = sequence(p, n);
  const int first = (slot - seq.first_slot) * kChunk;
  const int valid = min(seq.length - first, kChunk);  // tokens in this chunk
  if (first < 0 || valid <= 0) return;
  const int64_t token = seq.start + first;
  const int key_head = head / (p.HV / p.H);

  const auto rows_of = [&](const void* base, const int64_t (&strides)[3], int h, int bytes) {
    return static_cast<const char*>(base) + (seq.batch * strides[0] + token * strides[1] + h * strides[2]) * bytes;
  };
  const char* q_rows = rows_of(p.q, p.q_strides, key_head, 2);
  const char* k_rows = rows_of(p.k, p.k_strides, key_head, 2);
  const char* v_rows = rows_of(p.v, p.v_strides, head, 2);
  const char* g_rows = rows_of(p.g, p.g_strides, head, kFloatGate ? 4 : 2);

  // Copies a tile of 16-bit elements; rows past the end are zeros. A thread's rows are a multiple of 8 apart, so that its
  // place within the swizzle stays.
  const auto load_tile = [&](char* tile, const char* rows, int64_t row_stride, int columns, int thread, int threads) {
    const int chunks_per_row = columns / 8, row_step = threads / chunks_per_row;
    int row = thread / chunks_per_row, chunk = thread % chunks_per_row;
    char* to = tile + tile_offset(row, chunk);
    const char* from = rows + row * row_stride * 2 + chunk * 16;
#pragma unroll 4
    for (; row < kChunk; row += row_step, to += row_step * kRowBytes, from += row_step * row_stride * 2)
      copy_async_16(to, row < valid ? from : rows, row < valid);
  };
  load_tile(query, q_rows, p.q_strides[1], K, thread, kPrepareThreads);
  load_tile(key, k_rows, p.k_strides[1], K, thread, kPrepareThreads);
  if constexpr (!kFloatGate) {
    load_tile(gate_tile, g_rows, p.g_strides[1], K, thread, kPrepareThreads);
  } else {
#pragma unroll 4
    for (int i = thread; i < kChunk * K / 4; i += kPrepareThreads) {
      int row = i / (K / 4), chunk = i % (K / 4);
      // Swizzled so that the four token pairs that a warp reads together lie in different banks.
      int at = row * K * 4 + ((chunk ^ ((row >> 1 & 3) << 1)) << 4);
      bool is_token = row < valid;
      copy_async_16(float_gate + at, is_token ? g_rows + row * p.g_strides[1] * 4 + chunk * 16 : g_rows, is_token);
    }
  }

  // β of the rows g and g + 8 of this warp
  float beta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = kBlock * warp + g + 8 * half;
    float b = 0.0f;
    if (row < valid) {
      int64_t at = seq.batch * p.beta_strides[0] + (token + row) * p.beta_strides[1] + head * p.beta_strides[2];
      b = p.beta_dtype == DType::kFP32 ? load_float<float>(p.beta, at) : load_float<Element>(p.beta, at);
      if (p.use_beta_sigmoid) b = (p.allow_neg_eigval ? 2.0f : 1.0f) / (1.0f + __expf(-b));
    }
    beta[half] = b;
  }
  const GateFunction<kGate> gate{p.A_log == nullptr ? 1.0f : expf(p.A_log[head]), p.lower_bound * kLog2E};
  if (thread < K)
    gate_bias[thread] =
        p.dt_bias == nullptr || kGate == Gate::kNone ? 0.0f : gate.prepare_bias(p.dt_bias[head * K + thread]);

  copy_async_wait();
  __syncthreads();
  // v comes last; have it on its way to L2 meanwhile.
  if (thread / 2 < valid && thread % 2 * 128 < p.V * 2)
    prefetch_l2(v_rows + thread / 2 * p.v_strides[1] * 2 + thread % 2 * 128);

  // ---- 1. lengths of q and k: the diagonals of q qᵀ and k kᵀ
  const int block = kBlock * warp;  // first row of this warp
  float q_norm[2], k_norm[2];
  {
    float qq[2][4] = {}, kk[2][4] = {};
#pragma unroll 2
    for (int c = 0; c < K / 16; ++c) {
      uint32_t qf[4], kf[4];
      load_matrices(qf, query + block_address(warp, c));
      load_matrices(kf, key + block_address(warp, c));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma<Element>(qq[m], qf, qf[m], qf[m + 2]);
        mma<Element>(kk[m], kf, kf[m], kf[m + 2]);
      }
    }
    const int owner = (lane & 28) | (g >> 1);  // of the diagonal elements of rows g and g + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float squares_q = __shfl_sync(0xffffffffu, g & 1 ? qq[half][2 * half + 1] : qq[half][2 * half], owner);
      const float squares_k = __shfl_sync(0xffffffffu, g & 1 ? kk[half][2 * half + 1] : kk[half][2 * half], owner);
      float q_length = 1.0f, k_length = 1.0f;
      if (p.use_qk_norm) {
        q_norm[half] = rsqrtf(squares_q + 1e-6f);
        k_norm[half] = rsqrtf(squares_k + 1e-6f);
      } else {  // k = n k^ all the same, so that everything but U is bounded
        q_norm[half] = squares_q > 0.0f ? rsqrtf(squares_q) : 0.0f;
        k_norm[half] = squares_k > 0.0f ? rsqrtf(squares_k) : 0.0f;
        q_length = squares_q * q_norm[half];
        k_length = squares_k * k_norm[half];
      }
      if (side == 0 && t == 0) {
        int row = block + g + 8 * half;
        beta_w[row] = beta[half] * k_length * k_length;
        beta_u[row] = beta[half] * k_length;
        reinterpret_cast<float*>(record<K>(p, slot, head) + Out::kScale)[row] = p.scale * q_length;
      }
    }
  }

  // ---- 1. gate, decays, the diagonal blocks
  float diagonal_a[2][4] = {}, diagonal_p[2][4] = {};
  float largest = 0.0f;
  const DecaySum sum_decays;
#pragma unroll(kGate == Gate::kSafe ? 2 : 1)
  for (int c = side * (K / 32); c < (side + 1) * (K / 32); ++c) {
    float raw[2][4];
    if constexpr (kFloatGate) {
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int row = block + 2 * t + (i & 1) + (i >> 1) * 8, channel = 16 * c + 8 * u + g;
          raw[u][i] = *reinterpret_cast<const float*>(
              float_gate + row * K * 4 + (((channel >> 2) ^ ((row >> 1 & 3) << 1)) << 4) + (channel & 3) * 4);
        }
    } else {
      uint32_t r[4];
      load_matrices_transposed(r, gate_tile + block_address(warp, c));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 x = unpack<Element>(r[i]);
        raw[i >> 1][2 * (i & 1)] = x.x;
        raw[i >> 1][2 * (i & 1) + 1] = x.y;
      }
    }
    float from_middle[2][4], halves[2][4];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const float b = kGate == Gate::kNone ? 0.0f : gate_bias[16 * c + 8 * u + g];
      float decay[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) decay[i] = gate(raw[u][i], b);
      if (valid < kChunk) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (block + 2 * t + (i & 1) + (i >> 1) * 8 >= valid) decay[i] = 0.0f;
      }
      sum_decays(decay, from_middle[u], halves[u]);
    }

    uint32_t qf[4], kf[4], cf[4];
    load_matrices(qf, query + block_address(warp, c));
    load_matrices(kf, key + block_address(warp, c));
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      // To the middle of the block from its start and from its end, above 1.
      if constexpr (kGate != Gate::kSafe) {  // what `undo_first` and `undo_second` are to undo, and every sum between
        largest = fmaxf(largest, fmaxf(fabsf(halves[u][0]), fabsf(halves[u][1])));
        largest = fmaxf(largest, fmaxf(fabsf(halves[u][2]), fabsf(halves[u][3])));
      }
      float undo_first[2] = {exp2_approx(-halves[u][0]), exp2_approx(-halves[u][1])};
      float undo_second[2] = {exp2_approx(-halves[u][2]), exp2_approx(-halves[u][3])};
      uint32_t rows_q[4], rows_k[4], columns[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 x = unpack<Element>(qf[2 * u + half]), y = unpack<Element>(kf[2 * u + half]);
        const float qv[2] = {x.x * q_norm[half], x.y * q_norm[half]};
        const float kv[2] = {y.x * k_norm[half], y.y * k_norm[half]};
        float q_start[2], k_start[2], k_end[2], from_start[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float middle = from_middle[u][2 * half + e];
          from_start[e] = exp2_approx(middle + halves[u][e]);
          float to_end = exp2_approx(halves[u][2 + e] - middle);
          q_start[e] = qv[e] * from_start[e];
          k_start[e] = kv[e] * from_start[e];
          k_end[e] = kv[e] * to_end;
          rows_q[half + 2 * e] = to_tf32_without_nan(q_start[e] * undo_first[e]);
          rows_k[half + 2 * e] = to_tf32_without_nan(k_start[e] * undo_first[e]);
          columns[half + 2 * e] = to_tf32_without_nan(k_end[e] * undo_second[e]);
        }
        qf[2 * u + half] = pack<__half>(q_start[0], q_start[1]);
        kf[2 * u + half] = pack<__half>(k_start[0], k_start[1]);
        cf[2 * u + half] = pack<__half>(k_end[0], k_end[1]);
        if (half == 1 && g == 7) {  // token 15: the decay of the whole block
          int at = warp * K + 16 * c + 8 * u + 2 * t;
          *reinterpret_cast<float2*>(block_decay + at) = {from_start[0], from_start[1]};
          *reinterpret_cast<__half2*>(block_decay_half + at) = __floats2half2_rn(from_start[0], from_start[1]);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_tf32(diagonal_p[m], rows_q, columns[m], columns[m + 2]);
        mma_tf32(diagonal_a[m], rows_k, columns[m], columns[m + 2]);
      }
    }
    store_matrices(query + block_address(warp, c), qf[0], qf[1], qf[2], qf[3]);
    store_matrices(key + block_address(warp, c), kf[0], kf[1], kf[2], kf[3]);
    store_matrices(gate_tile + block_address(warp, c), cf[0], cf[1], cf[2], cf[3]);
  }
  // The other warp of the pair has the other half of the sums over channels: hand it what it is to go on with. Blocks lie
  // where the pair will put its rows of A.
  float4* const exchange = reinterpret_cast<float4*>(value + block * kChunk * 4) + lane;
  int* const out_of_range = reinterpret_cast<int*>(smem + Smem::kOutOfRange);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    float4 d;
    d.x = side == 0 ? diagonal_a[m][0] : diagonal_p[m][0];
    d.y = side == 0 ? diagonal_a[m][1] : diagonal_p[m][1];
    d.z = side == 0 ? diagonal_a[m][2] : diagonal_p[m][2];
    d.w = side == 0 ? diagonal_a[m][3] : diagonal_p[m][3];
    exchange[(2 * side + m) * 32] = d;
  }
  if constexpr (kGate != Gate::kSafe) {  // a bound of -5 keeps the safe gate in range
    const bool exceeds = __any_sync(0xffffffffu, largest > kMaxFactored);
    if (lane == 0) out_of_range[4 * side + warp] = exceeds;
  }
  __syncthreads();
  float diagonal[2][4];  // of P for warps 0-3, of A for warps 4-7
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const float4 other = exchange[(2 * (1 - side) + m) * 32];
    diagonal[m][0] = (side == 0 ? diagonal_p[m][0] : diagonal_a[m][0]) + other.x;
    diagonal[m][1] = (side == 0 ? diagonal_p[m][1] : diagonal_a[m][1]) + other.y;
    diagonal[m][2] = (side == 0 ? diagonal_p[m][2] : diagonal_a[m][2]) + other.z;
    diagonal[m][3] = (side == 0 ? diagonal_p[m][3] : diagonal_a[m][3]) + other.w;
  }
  if constexpr (kGate != Gate::kSafe) {
    if (out_of_range[warp] || out_of_range[4 + warp]) {
      exact_diagonal<Element, K, kGate, kFloatGate>(p, gate,
                                                    reinterpret_cast<const Element*>(q_rows) + block * p.q_strides[1],
                                                    reinterpret_cast<const Element*>(k_rows) + block * p.k_strides[1],
                                                    g_rows + block * p.g_strides[1] * (kFloatGate ? 4 : 2), gate_bias,
                                                    valid - block, q_norm, k_norm, side == 0, diagonal);
    }
  }
  named_barrier(1 + warp, 64);  // the pair has read each other's sums

  // ---- 2. blocks below the diagonal; Q and K^+
  char* const out = record<K>(p, slot, head);
  if (thread < K) {  // decays from the end of blocks 0, 1 and 2 to the end of the chunk, and over all of it
    float d = block_decay[3 * K + thread];
#pragma unroll
    for (int j = 2; j >= 0; --j) {
      rest_decay_half[j * K + thread] = __float2half(d);
      d *= block_decay[j * K + thread];
    }
    reinterpret_cast<float*>(out + Out::kDecay)[decay_index(thread)] = d;
  }
  {
    float sum[3][2][4] = {};
    char* const rows = side == 0 ? query : key;
#pragma unroll 2
    for (int c = 0; c < K / 16; ++c) {
      uint32_t rf[4], cf[4];
      load_matrices(rf, rows + block_address(warp, c));
#pragma unroll
      for (int j = 2; j >= 0; --j) {
        if (j < warp) {
          load_matrices(cf, gate_tile + block_address(j, c));
#pragma unroll
          for (int m = 0; m < 2; ++m) mma_fp16(sum[j][m], rf, cf[m], cf[m + 2]);
          const uint32_t* decay = reinterpret_cast<const uint32_t*>(block_decay_half + j * K + 16 * c) + t;
          const uint32_t d[2] = {decay[0], decay[4]};
#pragma unroll
          for (int i = 0; i < 4; ++i) rf[i] = multiply_half2(rf[i], d[i >> 1]);
        }
      }
      if (warp > 0) store_matrices(rows + block_address(warp, c), rf[0], rf[1], rf[2], rf[3]);
    }
    // A into shared memory, P into the record. Zeros above the diagonal.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block + g + 8 * half;
      const float b = beta_w[row];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int column = kBlock * j + 8 * m + 2 * t;
          float2 x = {};
          if (j < warp) {
            x = {sum[j < 3 ? j : 0][m][2 * half], sum[j < 3 ? j : 0][m][2 * half + 1]};
          } else if (j == warp) {  // A is 0 on the diagonal, P is not
            x = {column + side <= row ? diagonal[m][2 * half] : 0.0f,
                 column + 1 + side <= row ? diagonal[m][2 * half + 1] : 0.0f};
          }
          if (side == 0) {
            *reinterpret_cast<uint32_t*>(out + Out::kP + tile_offset(row, column >> 3) + 4 * t) =
                pack<__half>(x.x, x.y);
          } else if (j <= warp) {
            *reinterpret_cast<float2*>(value + matrix_offset(row, column)) = {x.x * b, x.y * b};
          }
        }
    }
  }
  fence_async_proxy();
  __syncthreads();

  // ---- the inverse of the diagonal blocks; k^ decayed to the end of the chunk
  if (side == 0) {
    invert_diagonal(value, block);
  } else if (warp < 3) {
#pragma unroll 2
    for (int c = 0; c < K / 16; ++c) {
      uint32_t cf[4];
      load_matrices(cf, gate_tile + block_address(warp, c));
      const uint32_t* decay = reinterpret_cast<const uint32_t*>(rest_decay_half + warp * K + 16 * c) + t;
      const uint32_t d[2] = {decay[0], decay[4]};
#pragma unroll
      for (int i = 0; i < 4; ++i) cf[i] = multiply_half2(cf[i], d[i >> 1]);
      store_matrices(gate_tile + block_address(warp, c), cf[0], cf[1], cf[2], cf[3]);
    }
    fence_async_proxy();
  }
  __syncthreads();

  if (thread == 0) {
    bulk_store(out + Out::kKr, gate_tile, Out::kMatrixBytes);
    bulk_store(out + Out::kQ, query, Out::kMatrixBytes);
    bulk_store_commit();
  }

  // ---- 3. block column `warp` of X, transposed: x[i] is (rows of block i)ᵀ
  float x[4][2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][m][e] = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (side == 1) break;
    if (i == warp) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          int row = block + 8 * m + 2 * t + (e & 1), column = block + g + (e >> 1) * 8;
          x[i][m][e] = *reinterpret_cast<const float*>(value + matrix_offset(row, column & ~3) + (column & 3) * 4);
        }
    } else if (i > warp) {
      float sum[2][4] = {};
#pragma unroll
      for (int m = 0; m < i; ++m)
        if (m >= warp) multiply_by_block_transposed(sum, x[m], value, kBlock * i, kBlock * m);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][e] = -sum[m][e];
      multiply_by_block_transposed(x[i], sum, value, kBlock * i, kBlock * i);
    }
  }
  if (thread == 0) bulk_stores_have_read();
  __syncthreads();

  // ---- 4. v, and X in the types of the two products
  if (side == 1) {
    if (p.V == 128) {
      load_tile(value, v_rows, p.v_strides[1], 128, thread - 128, 128);
    } else {
      load_tile(value, v_rows, p.v_strides[1], 64, thread - 128, 128);
    }
  } else {
    const float bw[2] = {beta_w[block + g], beta_w[block + g + 8]}, bu[2] = {beta_u[block + g], beta_u[block + g + 8]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t w[4], high[4], low[4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x0 = x[i][m][2 * half], x1 = x[i][m][2 * half + 1];
          w[2 * m + half] = pack<__half>(x0 * bw[half], x1 * bw[half]);
          x0 *= bu[half];
          x1 *= bu[half];
          high[2 * m + half] = pack<Element>(x0, x1);
          float2 h = unpack<Element>(high[2 * m + half]);
          low[2 * m + half] = pack<Element>(x0 - h.x, x1 - h.y);
        }
      // Matrix 2m + half is rows 8m.. of block i and columns 8 half.. of this warp's block, transposed on the way.
      int at = tile_offset(kBlock * i + (lane >> 4) * 8 + (lane & 7), 2 * warp + (lane >> 3 & 1));
      store_matrices_transposed(smem + Smem::kXOfW + at, w[0], w[1], w[2], w[3]);
      store_matrices_transposed(smem + Smem::kXHigh + at, high[0], high[1], high[2], high[3]);
      store_matrices_transposed(smem + Smem::kXLow + at, low[0], low[1], low[2], low[3]);
    }
  }
  fence_async_proxy();
  __syncthreads();

  // ---- 4. W = X K^+, 64 columns a warpgroup
  float w[32];
  const bool has_w = K == 128 || side == 0;
  if (has_w) {
    fence_registers(w);
    cute::warpgroup_arrive();
    const uint64_t xd = descriptor_k_major(smem_address(smem + Smem::kXOfW));
    const uint64_t kd = descriptor_mn_major(smem_address(key + side * kHalfBytes));
#pragma unroll
    for (int j = 0; j < 4; ++j)
      wgmma_ss<__half, Major::K, Major::MN>(w, advance(xd, j * 32), advance(kd, j * 16 * kRowBytes), j > 0);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    fence_registers(w);
  }
  copy_async_wait();
  fence_async_proxy();
  __syncthreads();  // all have read K^+, and v is here
  if (has_w) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float* x8 = w + 8 * c;
      store_matrices(key + block_address(warp, 4 * side + c), pack<__half>(x8[0], x8[1]), pack<__half>(x8[2], x8[3]),
                     pack<__half>(x8[4], x8[5]), pack<__half>(x8[6], x8[7]));
    }
  }
  fence_async_proxy();
  __syncthreads();
  if (thread == 0) {
    bulk_store(out + Out::kW, key, Out::kMatrixBytes);
    bulk_store_commit();
  }

  // ---- 4. Uᵀ = Vᵀ Xᵀ, 64 value channels a warpgroup
  if (p.V == 128 || side == 1) {
    const int half = p.V == 128 ? side : 0;
    float u[32];
    fence_registers(u);
    cute::warpgroup_arrive();
    const uint64_t vd = descriptor_mn_major(smem_address(value + half * kHalfBytes));
    const uint64_t high = descriptor_k_major(smem_address(smem + Smem::kXHigh));
    const uint64_t low = descriptor_k_major(smem_address(smem + Smem::kXLow));
#pragma unroll
    for (int j = 0; j < 4; ++j)
      wgmma_ss<Element, Major::MN, Major::K>(u, advance(vd, j * 16 * kRowBytes), advance(low, j * 32), j > 0);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      wgmma_ss<Element, Major::MN, Major::K>(u, advance(vd, j * 16 * kRowBytes), advance(high, j * 32));
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    fence_registers(u);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) bits = max(bits, magnitude_bits(u[i]));
    const int exponent = max(exponent_of(warp_max(bits)), -100) - 14;  // the largest becomes at most 2^15
    const float factor = power_of_two(-exponent);
    if (lane == 0) reinterpret_cast<int*>(out + Out::kExponents)[4 * half + warp] = exponent;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* x8 = u + 8 * i;
      uint4 r = {pack<__half>(x8[0] * factor, x8[1] * factor), pack<__half>(x8[2] * factor, x8[3] * factor),
                 pack<__half>(x8[4] * factor, x8[5] * factor), pack<__half>(x8[6] * factor, x8[7] * factor)};
      reinterpret_cast<uint4*>(out + Out::kU + half * Out::kUHalfBytes)[i * 128 + thread % 128] = r;
    }
  }
  if (thread == 0) bulk_stores_have_read();
}

}  // namespace kda

// All that a chunk needs besides the state: one CTA of eight warps makes the record of one chunk and value head, or, where
// `recurrence` runs beside this kernel, of one after the other.
//
// Data flow
//   1. A pair of warps, one of each warpgroup, takes a block of 16 tokens, half of the channels each, 8 at a time: gate →
//      log-decay (base 2) → sums over tokens by a product with a triangle, in fp16 → decays by ex2. q^ and k^ decayed from the
//      start of the block, and k^ decayed to its end, replace the q, k and g tiles as fp16: all factors are ≤ 1.
//      The diagonal 16 × 16 blocks of A and P are multiplied in tf32 relative to one point for all tokens, where factors
//      reach 2^116; a block whose decays leave that range is done again by `exact_diagonal`, for which no gate is too
//      steep.
//   2. The blocks below the diagonal, those of P by the first warpgroup and of A by the second: (1, 0) and (3, 2) as they
//      are, (2..3, 0..1) relative to the middle of the chunk.
//   3. The first warpgroup makes X = (I + A)^-1: the diagonal blocks by substitution in fp32, one column a lane; then a
//      block column a warp, in tf32. The second decays q and k to Q and K^+, relative to the chunk's start, and Kr.
//   4. W and Uᵀ by WGMMA, half of the columns a warpgroup. U multiplies v itself (bf16 or fp16) with X in two parts of v's
//      type, so that it keeps fp32's range and 16 bits.
//
// The tensor cores cut fp32 numbers off after tf32's 10 bits. In the diagonal blocks of 1. nothing is rounded before: on
// average that takes 0.72 · 2^-11 off, which constants give back (kTruncation); what is left is as large as an error of
// rounding. In 3. it is rounded, since where keys are alike the same number comes again and again.
//
// Shared memory (K = 128): four regions of 16 KB
//   query    q → q^ decayed from the block's start → Q → v
//   key      k → k^ decayed from the block's start → K^+ → W
//   gate     g → k^ decayed to the block's end → Kr → X of W | X of U, high part
//   value    sums that warps exchange → A and its inverse, fp32 → X of U, low part
#pragma once

#include <cutlass/fast_math.h>

#include <algorithm>

#include "maps.h"
#include "record.cuh"

namespace kda {

constexpr int kPrepareThreads = 256;
// CTAs that an SM holds at a time: as many as its shared memory lets it, and its registers without spilling.
template <class Element, int K, bool kFloatGate>
constexpr int prepare_ctas() {
  return kFloatGate && (K == 128 || std::is_same_v<Element, __nv_bfloat16>) ? 2 : 3;
}
constexpr int kStagger = 6000;            // cycles between the loads of the first CTAs of an SM
constexpr int kPair = 1, kWarpgroup = 5;  // named barriers: four and two
constexpr float kMaxFactored = 232.0f;    // |log2| of what a block decays by; the safe gate stays under 116
constexpr float kLowestDecay = -192.0f;   // log2; its power is 0 in fp32, and so is that of anything below
constexpr float kTruncation = 1.0f + 0.7213f / 2048.0f;
constexpr float kTwoTruncations = kTruncation * kTruncation;  // of a product
// Log-decays are summed in fp16, times this: the largest are then near the end of its range, so that all of 2^-26 and more
// have 11 bits (those of the safe gate are above -7.3).
template <Gate kGate>
constexpr float kDecayScale = kGate == Gate::kSafe ? 4096.0f : 256.0f;

// The chunk and head at work, in shared memory: registers are scarce.
struct Place {
  char* out;  // the record
  int slot, batch, token, head;
  int valid;       // tokens; 0: there is no more to do
  uint32_t phase;  // of the barriers
  int turn;        // in which to load: 0 for at once
};

// The 16 × 16 block of halves at `p` times d: two channels for the first 8 columns, two for the others, as the fragments have
// them.
__device__ __forceinline__ void scale_block(char* p, const uint32_t (&d)[2]) {
  uint32_t r[4];
  load_matrices(r, p);
#pragma unroll
  for (int i = 0; i < 4; ++i) r[i] = multiply_half2(r[i], d[i >> 1]);
  store_matrices(p, r[0], r[1], r[2], r[3]);
}

// Zeros in rows first..63 of a tile of `columns` columns.
__device__ __forceinline__ void clear_rows(char* tile, int columns, int first, int thread, int threads) {
#pragma unroll 1
  for (int i = first * 8 + thread; i < 64 * 8; i += threads)
    for (int half = 0; half < columns / 64; ++half)
      *reinterpret_cast<uint4*>(tile + half * kHalfBytes + i * 16) = uint4{};
}

template <int K, bool kFloatGate>
struct PrepareSmem {
  static constexpr int kTile = kChunk * K * 2;
  static constexpr int kRegion = 16384;
  static constexpr int kXTile = kChunk * kChunk * 2;
  static constexpr int kQuery = 0;
  static constexpr int kKey = kQuery + kRegion;
  static constexpr int kGate = kKey + kTile;
  static constexpr int kValue = kGate + kRegion;
  static constexpr int kXOfW = kGate;
  static constexpr int kXHigh = kGate + kXTile;
  static constexpr int kXLow = kValue;
  static constexpr int kFloatGateTile = kValue + kRegion;
  static constexpr int kBlockDecay = kFloatGateTile + (kFloatGate ? kChunk * K * 4 : 0);  // float [4][K]
  static constexpr int kBlockDecayHalf = kBlockDecay + 4 * K * 4;  // half [3][K]: ones, blocks 1, 2
  static constexpr int kFromStart = kBlockDecayHalf + 3 * K * 2;   // half [3][K]: to the start of blocks 1, 2, 3
  static constexpr int kToEnd = kFromStart + 3 * K * 2;            // half [3][K]: from the end of blocks 0, 1, 2
  static constexpr int kBias = kToEnd + 3 * K * 2;                 // float [K]: of the gate
  static constexpr int kBeta = kBias + K * 4;                      // float [64]
  static constexpr int kScale = kBeta + kChunk * 4;                // float [64]: scale m
  static constexpr int kBetaW = kScale + kChunk * 4;               // float [64]: β n²
  static constexpr int kBetaU = kBetaW + kChunk * 4;               // float [64]: β n
  static constexpr int kNorms = kBetaU + kChunk * 4;               // float [q, k][64]
  static constexpr int kSquares = kNorms + kChunk * 8;             // float [2 halves of the channels][q, k][64]
  static constexpr int kSlowest = kSquares + kChunk * 16;          // half [2][64]: a token's slowest log-decay
  static constexpr int kOutOfRange = kSlowest + kChunk * 4;  // int [2][4]: whether a warp saw more than kMaxFactored
  static constexpr int kRetention = kOutOfRange + 32;        // float [2]: see record.cuh
  static constexpr int kBarriers = kRetention + 8;           // of q, k and g; of v
  static constexpr int kPlace = kBarriers + 16;              // Place [2]: of this chunk and of the next
  static constexpr int kBytes = kPlace + 2 * sizeof(Place);
};

// Whether this SM is one of those that `recurrence` is to have for itself.
__device__ __forceinline__ bool is_reserved(const PrefillParams& p) { return this_sm() + p.reserved_sms >= all_sms(); }

// Which of the CTAs that this SM has at a time this one is, by the places of its warps.
__device__ __forceinline__ int place_on_sm() { return this_warp_of_sm() / (kPrepareThreads / 32); }

__device__ __forceinline__ void sleep_for(uint32_t cycles) {
  const uint32_t start = clock();
  while (static_cast<uint32_t>(clock()) - start < cycles) __nanosleep(100);
}

__device__ __forceinline__ int this_warpgroup() { return __shfl_sync(0xffffffffu, this_thread() >> 7, 0); }

// Log-decay in base 2 from what the caller gave, times kDecayScale, for one channel. `bias` has gone through `prepare_bias`.
template <Gate kGate>
struct GateFunction {
  static constexpr float kScale = kDecayScale<kGate>;
  float minus_rate;  // -exp(A_log), times log2(e) for the safe gate and kScale for softplus
  float of_bound;    // 1 / (lower_bound in base 2, times kScale); of a bound of 0, as if it were just below

  __device__ __forceinline__ float prepare_bias(float bias) const {
    return bias * (kGate == Gate::kSafe ? minus_rate : kLog2E);
  }

  __device__ __forceinline__ float operator()(float x, float bias) const {
    if constexpr (kGate == Gate::kSafe) {
      return reciprocal_approx(fmaf(exp2_approx(fmaf(x, minus_rate, bias)), of_bound, of_bound));
    } else if constexpr (kGate == Gate::kNone) {
      return max_or_nan(x * (kLog2E * kScale), kLowestDecay * kScale);
    } else {
      const float z = fmaf(x, kLog2E, bias);
      const float e = exp2_approx(-fabsf(z));
      // log2(1 + e): the rounding of 1 + e would lose the small e of a mild gate.
      const float series = e * (kLog2E - e * (0.5f * kLog2E - e * (kLog2E / 3.0f)));
      const float log1p = e < 0.0078125f ? series : log2_approx(1.0f + e);
      return max_or_nan(minus_rate * (fmaxf(z, 0.0f) + log1p), kLowestDecay * kScale);
    }
  }
};

// Sums of log-decays over the tokens of a block: a product with a triangle of numbers 1 / kDecayScale, in fp16. Rounding a
// log-decay there changes the decay by 2^-11 of its logarithm at most, the same in all that follows.
template <Gate kGate>
class DecaySum {
 public:
  __device__ __forceinline__ DecaySum() {
    const int lane = this_thread() & 31, g = lane >> 2, t = lane & 3;
    constexpr float kOne = 1.0f / kDecayScale<kGate>;
    const uint32_t up_to = pack<__half>(2 * t <= g ? kOne : 0.0f, 2 * t + 1 <= g ? kOne : 0.0f);
    const uint32_t parts[4] = {up_to, pack<__half>(kOne, kOne), 0, up_to};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      triangle[i] = parts[i];
      asm volatile("" : "+r"(triangle[i]));  // else made anew at every use
    }
  }

  // `decay` holds tokens 2t, 2t+1 and 2t+8, 2t+9 of channel g, in fp16. On return, in the order of an accumulator (token g or
  // g + 8, channels 2t and 2t+1): the sums up to the token.
  __device__ __forceinline__ void operator()(const uint32_t (&decay)[2], float (&up_to)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) up_to[i] = 0.0f;
    mma_fp16(up_to, triangle, decay[0], decay[1]);
  }

 private:
  uint32_t triangle[4];  // as A operand
};

// The diagonal block of A / β or (`of_p`) of P without factors above 1, for decays of any size: entry (i, j) belongs to
// the level at which i and j part, i in the later and j in the earlier half of a run of 2, 4, 8 or 16 tokens, and there
// both decay towards the boundary between the halves. Reads the inputs again: it is rare, and the tiles are overwritten.
template <class Element, int K, Gate kGate, bool kFloatGate>
__device__ __forceinline__ void exact_diagonal(const PrefillParams& p, const GateFunction<kGate>& gate,
                                               const Place& place, int block, bool of_p, const float* bias,
                                               const float* norms, float4* sums) {
  using GateElement = std::conditional_t<kFloatGate, float, Element>;
  const int key_head = place.head / (p.HV / p.H), valid = place.valid - block;
  const auto rows_of = [&](const void* base, const int64_t (&strides)[3], int h, int bytes) {
    const int64_t first = place.token + block;
    return static_cast<const char*>(base) + (place.batch * strides[0] + first * strides[1] + h * strides[2]) * bytes;
  };
  const char* const q = rows_of(p.q, p.q_strides, key_head, 2);
  const char* const k = rows_of(p.k, p.k_strides, key_head, 2);
  const char* const g_rows = rows_of(p.g, p.g_strides, place.head, sizeof(GateElement));
  const int lane = this_thread() & 31, g = lane >> 2, t = lane & 3;
  const float q_norm[2] = {norms[block + g], norms[block + g + 8]};
  const float k_norm[2] = {norms[kChunk + block + g], norms[kChunk + block + g + 8]};
  float result[2][4];
  const DecaySum<kGate> sum_decays;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) result[n][i] = 0.0f;

#pragma unroll 1
  for (int level = -1; level < 4; ++level) {  // -1: the diagonal itself
    float sum[2][4] = {};
#pragma unroll 1
    for (int channel = 0; channel < K; channel += 8) {
      float decay[4], up_to[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int token = 2 * t + (i & 1) + (i >> 1) * 8;
        decay[i] = token < valid
                       ? gate(load_float<GateElement>(g_rows, token * p.g_strides[1] + channel + g), bias[channel + g])
                       : 0.0f;
      }
      sum_decays({pack<__half>(decay[0], decay[1]), pack<__half>(decay[2], decay[3])}, up_to);
      uint32_t rows[4], columns[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // tokens g and g + 8
        int token = g + 8 * half;
        bool later = level == 3 ? half == 1 : level >= 0 && (g >> level & 1) == 1;
        int reference = level < 0 ? 0 : level == 3 ? 7 : (g & -(2 << level)) + (1 << level) - 1;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float own = up_to[2 * half + e];
          float other = __shfl_sync(0xffffffffu, level == 3 ? up_to[e] : own, reference * 4 + t);
          float factor = level < 0 ? 1.0f : exp2_approx(later ? own - other : other - own);
          int64_t at = channel + 2 * t + e;
          float kv = token < valid ? load_float<Element>(k, token * p.k_strides[1] + at) * k_norm[half] : 0.0f;
          float rv = kv;
          if (of_p) rv = token < valid ? load_float<Element>(q, token * p.q_strides[1] + at) * q_norm[half] : 0.0f;
          bool is_row = level < 0 || later, is_column = level < 0 || !later;
          rows[half + 2 * e] = __float_as_uint(is_row ? rv * factor : 0.0f);
          columns[half + 2 * e] = __float_as_uint(is_column ? kv * factor : 0.0f);
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
#pragma unroll
  for (int n = 0; n < 2; ++n) sums[32 * n] = {result[n][0], result[n][1], result[n][2], result[n][3]};
}

// Byte offsets in the fp32 matrix A: row r has 16 chunks of 4 columns, and chunk c is at place c ^ (r & 15), against
// conflicts. What the compiler knows is kept apart from what only a lane knows: one XOR a place is left, often none.
constexpr int kMatrixRow = kChunk * 4;

// As an accumulator has them: of 8 rows and columns, row g and columns 2t, 2t + 1.
class AccumulatorAddress {
 public:
  __device__ __forceinline__ explicit AccumulatorAddress(int lane) {
    const int g = lane >> 2, t = lane & 3;
    base = g * kMatrixRow + ((g ^ t >> 1) << 4) + (t & 1) * 8;
  }
  // Rows 8 * rows.. and columns 8 * columns.. of the matrix.
  __device__ __forceinline__ int operator()(int rows, int columns) const {
    return (base ^ (2 * columns ^ 8 * (rows & 1)) << 4) + rows * 8 * kMatrixRow;
  }

 private:
  int base;
};

// The same of the matrix transposed: rows 2t, 2t + 1, and column g.
class TransposedAddress {
 public:
  __device__ __forceinline__ explicit TransposedAddress(int lane) {
    const int g = lane >> 2, t = lane & 3;
    base = 2 * t * kMatrixRow + ((g >> 2 ^ 2 * t) << 4) + (g & 3) * 4;
  }
  // Row 2t + `odd` of rows 8 * rows.., and columns 8 * columns...
  __device__ __forceinline__ int operator()(int rows, int columns, int odd) const {
    return (base ^ (2 * columns ^ 8 * (rows & 1) ^ odd) << 4) + (rows * 8 + odd) * kMatrixRow;
  }

 private:
  int base;
};

// Inverts the unit lower triangular diagonal block `block` of I + A in place. Lane c solves for column c (lanes 16.. repeat
// lanes 0..), four rows of the result at a time.
template <bool kBeside>
__device__ __forceinline__ void invert_diagonal(char* matrix, int block) {
  const int column = threadIdx.x & 15;
  char* const rows = matrix + block * kBlock * kMatrixRow;
  // Chunk c of the block's columns is the matrix's chunk 4 * block + c.
  const auto place = [&](int row, int chunk) { return (4 * block << 4 ^ (chunk ^ row) << 4) + row * kMatrixRow; };
  float x[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
  for (int m = 0; m < kBlock; m += 4) {
#pragma unroll
    for (int i = m + 1; i < kBlock; ++i) {
      float4 a = *reinterpret_cast<const float4*>(rows + place(i, m / 4));
      x[i] -= a.x * x[m];
      if (i > m + 1) x[i] -= a.y * x[m + 1];
      if (i > m + 2) x[i] -= a.z * x[m + 2];
      if (i > m + 3) x[i] -= a.w * x[m + 3];
    }
    if constexpr (kBeside) __syncwarp();  // registers are scarcer: no loads of later columns before this
  }
  __syncwarp();
  if ((threadIdx.x & 31) < 16) {
    char* const own = rows + (column & 3) * 4;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) *reinterpret_cast<float*>(own + place(i, column >> 2)) = x[i];
  }
  __syncwarp();
}

// c (16 × 16, two accumulators) += a · (block (row, column) of `matrix`)ᵀ, where a is itself a pair of accumulators.
__device__ __forceinline__ void multiply_by_block_transposed(float (&c)[2][4], const float (&a)[2][4],
                                                             const char* matrix, const AccumulatorAddress& address,
                                                             int row, int column) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    // Slots t and t + 4 of the product's inner index are columns 2t and 2t + 1, as an accumulator has them.
    const uint32_t rows[4] = {to_tf32(a[k][0]), to_tf32(a[k][2]), to_tf32(a[k][1]), to_tf32(a[k][3])};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float2 b = *reinterpret_cast<const float2*>(matrix + address(2 * row + n, 2 * column + k));
      mma_tf32(c[n], rows, to_tf32(b.x), to_tf32(b.y));
    }
  }
}

// Places for chunks and heads, some of them of no chunk.
inline int64_t places(const PrefillParams& p) { return static_cast<int64_t>(p.run_slots) * p.runs * p.HV; }

// What the host works out for all CTAs.
struct PrepareConstants {
  cutlass::FastDivmod heads, runs;
  cutlass::FastDivmod chunks;  // of a sequence, where all are as long
  float of_bound;              // see GateFunction
};

template <Gate kGate>
PrepareConstants prepare_constants(const PrefillParams& p) {
  const int chunks = std::max(static_cast<int>(slots_for(p, 1)), 1);
  return {p.HV, p.runs, chunks, 1.0f / (std::min(p.lower_bound, -1e-30f) * kLog2E * kDecayScale<kGate>)};
}

// The sequence that slot `slot` belongs to, if any does. For a whole warp, which looks at 32 of them at a time.
__device__ __forceinline__ int sequence_of_slot(const PrefillParams& p, const PrepareConstants& by, int slot) {
  if (p.sequences == 1) return p.first_sequence;
  if (p.cu_seqlens == nullptr) return p.first_sequence + by.chunks.div(slot);
  int lo = p.first_sequence, hi = lo + p.sequences;  // the first slot of lo is ≤ slot, that of hi is not
  while (hi - lo > 1) {
    const int step = (hi - lo + 31) / 32, n = lo + static_cast<int>(threadIdx.x & 31) * step;
    const uint32_t before = __ballot_sync(0xffffffffu, n < hi && first_slot(p, n) <= slot);
    lo += max(__popc(before) - 1, 0) * step;
    hi = min(hi, lo + step);
  }
  return lo;
}

// For a whole warp: the chunk and head of place `work`; valid is 0 where there is none. One kernel after the other, the first
// chunks of the runs come last, so that `recurrence` finds them in L2. Side by side, the order is that of `recurrence`:
// sequence by sequence, and p.group_heads heads at a time.
template <int K, bool kBeside>
__device__ __forceinline__ Place place_of(const PrefillParams& p, const PrepareConstants& by, int work) {
  int slot, head;
  by.heads(slot, head, work);
  if (!kBeside) {
    int run, before;
    by.runs(before, run, slot);
    slot = (run + 1) * p.run_slots - 1 - before;
    if (slot >= p.slots) return {};
  }
  const int n = sequence_of_slot(p, by, slot);
  const Sequence seq = sequence(p, n);
  if (kBeside && p.group_heads < p.HV) {
    const int slots = (n + 1 < p.first_sequence + p.sequences ? first_slot(p, n + 1) : p.slots) - seq.first_slot;
    const int rest = work - seq.first_slot * p.HV;
    if (slots > 0 && rest >= 0 && rest < slots * p.HV) {  // always, if cu_seqlens is what it should be
      const int group = rest / (slots * p.group_heads), first_head = group * p.group_heads;
      const int within = rest - first_head * slots, heads = min(p.group_heads, p.HV - first_head);
      slot = seq.first_slot + within / heads;
      head = first_head + within % heads;
    }
  }
  const int first = (slot - seq.first_slot) * kChunk, valid = min(seq.length - first, kChunk);
  return {record<K>(p, slot, head), slot, seq.batch, seq.start + first, head, first < 0 ? 0 : max(valid, 0), 0, 0};
}

// The same of the next place that there is work at, side by side: whoever is free takes it. CTAs then wait for `recurrence` no
// longer than for each other.
template <int K>
__device__ __forceinline__ Place next_place(const PrefillParams& p, const PrepareConstants& by) {
  Place place;
  do {
    int work = 0;
    if ((threadIdx.x & 31) == 0) work = atomicAdd(&p.progress->taken, 1);
    work = __shfl_sync(0xffffffffu, work, 0);
    if (work >= p.slots * p.HV) return {};
    place = place_of<K, true>(p, by, work);
  } while (place.valid == 0);
  return place;
}

// kBeside: whether `recurrence` runs beside this kernel. CTAs then stay and take one chunk and head after the other. The code
// for that is in the way of other calls, whose instructions come from DRAM, and to stay is no faster there.
template <class Element, int K, Gate kGate, bool kFloatGate, bool kBeside>
__global__ void __launch_bounds__(kPrepareThreads, prepare_ctas<Element, K, kFloatGate>())
    prepare(const __grid_constant__ PrefillParams p, const __grid_constant__ PrepareMaps maps,
            const __grid_constant__ PrepareConstants by) {
  using Smem = PrepareSmem<K, kFloatGate>;
  using Out = Record<K>;
  extern __shared__ __align__(1024) char smem[];
  char *query = smem + Smem::kQuery, *key = smem + Smem::kKey, *gate_tile = smem + Smem::kGate;
  char *value = smem + Smem::kValue, *float_gate = smem + Smem::kFloatGateTile;
  float* block_decay = reinterpret_cast<float*>(smem + Smem::kBlockDecay);
  __half* block_decay_half = reinterpret_cast<__half*>(smem + Smem::kBlockDecayHalf);
  float* gate_bias = reinterpret_cast<float*>(smem + Smem::kBias);
  float* norms = reinterpret_cast<float*>(smem + Smem::kNorms);
  float* scale_of = reinterpret_cast<float*>(smem + Smem::kScale);
  float* beta_of = reinterpret_cast<float*>(smem + Smem::kBeta);
  float* beta_w = reinterpret_cast<float*>(smem + Smem::kBetaW);
  float* beta_u = reinterpret_cast<float*>(smem + Smem::kBetaU);
  float* squares = reinterpret_cast<float*>(smem + Smem::kSquares);
  __half* slowest = reinterpret_cast<__half*>(smem + Smem::kSlowest);
  float* chunk_retention = reinterpret_cast<float*>(smem + Smem::kRetention);
  Place* const place = reinterpret_cast<Place*>(smem + Smem::kPlace);
  uint64_t* const inputs_here = reinterpret_cast<uint64_t*>(smem + Smem::kBarriers);
  uint64_t* const value_here = inputs_here + 1;

  constexpr int kCtas = prepare_ctas<Element, K, kFloatGate>();

  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) {
      TransactionBarrier::init(inputs_here, 1);
      TransactionBarrier::init(value_here, 1);
      cutlass::arch::fence_barrier_init();
      for (const CUtensorMap* map : {&maps.g, &maps.k, &maps.q, &maps.v}) prefetch_map(map);
    }
    if (kBeside || p.cu_seqlens != nullptr) wait_for_previous_kernel();
    // Some SMs are left to `recurrence`, unless the CTAs that were to stay away from them have done so already.
    int left = 0;
    if (kBeside && threadIdx.x == 0 && is_reserved(p)) left = atomicAdd(&p.progress->left, 1) < p.reserved_sms * kCtas;
    Place own = {};
    if constexpr (kBeside) {
      if (!__shfl_sync(0xffffffffu, left, 0)) own = next_place<K>(p, by);
    } else {
      own = place_of<K, false>(p, by, blockIdx.x);
    }
    // The first CTAs of all would all wait for their loads at the same time, and then all compute. In turn, the first
    // ones of each SM compute while the others load.
    if (own.valid > 0 && blockIdx.x < kCtas * p.num_sms && gridDim.x > p.num_sms) own.turn = place_on_sm();
    if (threadIdx.x == 0) *place = own;
  }
  __syncthreads();
  // This kernel may have started while the one before it is still running. Neither its inputs nor the workspace are touched
  // before the end of that, and `recurrence`, which reads initial states without waiting, starts later.
  wait_for_previous_kernel();
  launch_dependents();

  // Loads q, k and g of `place`, for one thread. Whole tiles come, zeros after the last token of all; tokens of the next
  // sequence are taken care of later.
  const auto load_inputs = [&]() {
    if (place->valid == 0) return;
    const int head = place->head, token = place->token, batch = place->batch;
    const int key_head = p.HV == p.H ? head : head / (p.HV / p.H);
    TransactionBarrier::arrive_and_expect_tx(inputs_here, (kFloatGate ? 4 : 3) * Smem::kTile);
    load_tile(&maps.g, inputs_here, kFloatGate ? float_gate : gate_tile, head, token, batch);
    load_tile(&maps.k, inputs_here, key, key_head, token, batch);
    load_tile(&maps.q, inputs_here, query, key_head, token, batch);
  };
  // v comes last; have it on its way to L2 meanwhile, but not before what the first CTAs of all wait for.
  const auto prefetch_value = [&]() {
    if (this_thread() != kPrepareThreads - 1) return;
    prefetch_tile(&maps.v, place->head, place->token, place->batch);
  };
  const auto load_first_inputs = [&]() {
    if (place->turn > 0) sleep_for(place->turn * kStagger);
    load_inputs();
  };
  if (kBeside && threadIdx.x == 0) load_first_inputs();
  while (place->valid > 0) {
    const int thread = this_thread(), side = this_warpgroup();
    const int warp = __shfl_sync(0xffffffffu, thread >> 5 & 3, 0);  // which block of tokens
    const int lane = thread & 31, g = lane >> 2, t = lane & 3;
    const BlockAddress block_address(lane);
    const int head = place->head, token = place->token, valid = place->valid, batch = place->batch;

    // All small loads first, so that they wait together, and before the large ones of all CTAs are in their way.
    constexpr int kBetaThreads =
        kPrepareThreads - kChunk;  // from here on they look after β, the first K after the bias
    const float log_rate = p.A_log == nullptr ? 0.0f : __ldg(p.A_log + head);
    float raw_bias = 0.0f, raw_beta = 0.0f;
    if (kGate != Gate::kNone && p.dt_bias != nullptr && thread < K) raw_bias = __ldg(p.dt_bias + head * K + thread);
    if (thread >= kBetaThreads && thread - kBetaThreads < valid) {
      const int64_t at = batch * p.beta_strides[0] +
                         static_cast<int64_t>(token + thread - kBetaThreads) * p.beta_strides[1] +
                         head * p.beta_strides[2];
      raw_beta = p.beta_dtype == DType::kFP32 ? load_float<float>(p.beta, at) : load_float<Element>(p.beta, at);
    }
    if (!kBeside && thread == 0) load_first_inputs();
    const float rate = exp2_approx(log_rate * kLog2E);
    const GateFunction<kGate> gate{rate * (kGate == Gate::kSafe ? -kLog2E : -kDecayScale<kGate>), by.of_bound};
    if (thread < K) {
      gate_bias[thread] = gate.prepare_bias(raw_bias);
      block_decay_half[thread] = __float2half(1.0f);
    }
    if (thread >= kBetaThreads) {
      float b = raw_beta;
      if (p.use_beta_sigmoid)
        b = (p.allow_neg_eigval ? 2.0f : 1.0f) * reciprocal_approx(1.0f + exp2_approx(-b * kLog2E));
      beta_of[thread - kBetaThreads] = thread - kBetaThreads < valid ? b : 0.0f;
    }
    if constexpr (kBeside) prefetch_value();
    __syncthreads();
    Barrier::wait(inputs_here, place->phase);
    if (valid < kChunk) {
      // Nothing of the next sequence gets in, a NaN least of all. (g is cut off where it is read.)
      clear_rows(query, K, valid, thread, kPrepareThreads);
      clear_rows(key, K, valid, thread, kPrepareThreads);
      __syncthreads();
    }

    // ---- 1. lengths of q and k: the diagonals of q qᵀ and k kᵀ
    const int block = kBlock * warp;  // first row of this warp
    float q_norm[2], k_norm[2];
    {
      float qq[2][4] = {}, kk[2][4] = {};
      const int first_rows = block_address(warp, side * (K / 32));
      const int first_columns = ColumnAddress(lane)(warp, side * (K / 32));
#pragma unroll 2
      for (int c = 0; c < K / 32; ++c) {
        const int rows_at = first_rows ^ c << 5, columns_at = first_columns ^ c << 5;
        uint32_t rows[4], columns[4];
        load_matrices(rows, query + rows_at);
        load_matrices(columns, query + columns_at);
        mma<Element>(qq[0], rows, columns[0], columns[1]);
        mma<Element>(qq[1], rows, columns[2], columns[3]);
        load_matrices(rows, key + rows_at);
        load_matrices(columns, key + columns_at);
        mma<Element>(kk[0], rows, columns[0], columns[1]);
        mma<Element>(kk[1], rows, columns[2], columns[3]);
      }
      if (t == (g >> 1)) {  // this lane has the diagonal elements of rows g and g + 8
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = block + g + 8 * half;
          squares[(2 * side) * kChunk + row] = g & 1 ? qq[half][2 * half + 1] : qq[half][2 * half];
          squares[(2 * side + 1) * kChunk + row] = g & 1 ? kk[half][2 * half + 1] : kk[half][2 * half];
        }
      }
      named_barrier(kPair + warp, 64);  // and the pair has read all of its rows of q and k, which are about to change
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = block + g + 8 * half;
        const float squares_q = squares[row] + squares[2 * kChunk + row];
        const float squares_k = squares[kChunk + row] + squares[3 * kChunk + row];
        float q_length = 1.0f, k_length = 1.0f;
        if (p.use_qk_norm) {
          q_norm[half] = rsqrt_approx(squares_q + 1e-6f);
          k_norm[half] = rsqrt_approx(squares_k + 1e-6f);
        } else {  // k = n k^ all the same, so that everything but U is bounded
          q_norm[half] = squares_q > 0.0f ? rsqrtf(squares_q) : 0.0f;
          k_norm[half] = squares_k > 0.0f ? rsqrtf(squares_k) : 0.0f;
          q_length = squares_q * q_norm[half];
          k_length = squares_k * k_norm[half];
        }
        if (side == 0 && t == 0) {
          norms[row] = q_norm[half];
          norms[kChunk + row] = k_norm[half];
          const float beta = beta_of[row];
          beta_w[row] = beta * k_length * k_length;
          beta_u[row] = beta * k_length;
          scale_of[row] = p.scale * q_length;
        }
      }
    }

    // ---- 1. gate, decays, the diagonal blocks
    float diagonal_a[2][4] = {}, diagonal_p[2][4] = {};
    float largest = 0.0f;
    // Of tokens 2t, 2t + 1 and 2t + 8, 2t + 9, over the channels: -inf so far.
    uint32_t slowest_decays[2] = {0xfc00fc00u, 0xfc00fc00u};
    const DecaySum<kGate> sum_decays;
    const int first_stripe = StripeAddress(lane)(warp, side * (K / 16)), first_channel = side * (K / 2);
    // In shared memory, of the first of this warp's channels that are this lane's; kept, as registers are scarce.
    uint32_t bias_at = smem_address(gate_bias + first_channel + g);
    uint32_t decay_at = smem_address(block_decay + warp * K + first_channel + 2 * t);
    asm volatile("" : "+r"(bias_at), "+r"(decay_at));
#pragma unroll(kGate == Gate::kSafe ? 2 : 1)
    for (int c = 0; c < K; c += 16) {  // bytes of 8 channels
      const int at = first_stripe ^ c;
      float up_to[4];
      {
        float decay[4];
        const float b = kGate == Gate::kNone ? 0.0f : load_shared(bias_at);
        if constexpr (kFloatGate) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = block + 2 * t + (i & 1) + (i >> 1) * 8, channel = first_channel + c / 2 + g;
            decay[i] = gate(*reinterpret_cast<const float*>(float_gate + channel / 32 * kHalfBytes + row * kRowBytes +
                                                            ((channel % 32 / 4 ^ (row & 7)) << 4) + channel % 4 * 4),
                            b);
          }
        } else {
          uint32_t r[2];
          load_matrices_transposed(r, gate_tile + at);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float2 x = unpack<Element>(r[i]);
            decay[2 * i] = gate(x.x, b);
            decay[2 * i + 1] = gate(x.y, b);
          }
        }
        if (valid < kChunk) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (block + 2 * t + (i & 1) + (i >> 1) * 8 >= valid) decay[i] = 0.0f;
        }
        const uint32_t pairs[2] = {pack<__half>(decay[0], decay[1]), pack<__half>(decay[2], decay[3])};
#pragma unroll
        for (int i = 0; i < 2; ++i) slowest_decays[i] = max_half2_or_nan(slowest_decays[i], pairs[i]);
        sum_decays(pairs, up_to);
      }

      uint32_t qf[2], kf[2], cf[2];
      load_matrices(qf, query + at);
      load_matrices(kf, key + at);
      // The diagonal block's reference: the start, or for gates without a bound a point halfway, which doubles the range.
      float from_start[4], whole[2], middle[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) from_start[i] = exp2_approx(up_to[i]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if constexpr (kGate == Gate::kSafe) {
          whole[e] = from_last_row(from_start[2 + e]);
        } else {
          whole[e] = from_last_row(up_to[2 + e]);
          largest = fmaxf(largest, -whole[e]);
          middle[e] = 0.5f * whole[e];
        }
      }
      uint32_t rows_q[4], rows_k[4], columns[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 x = unpack<Element>(qf[half]), y = unpack<Element>(kf[half]);
        const float qv[2] = {x.x * q_norm[half], x.y * q_norm[half]};
        const float kv[2] = {y.x * k_norm[half], y.y * k_norm[half]};
        float q_start[2], k_start[2], k_end[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float sum = up_to[2 * half + e];
          q_start[e] = qv[e] * from_start[2 * half + e];
          k_start[e] = kv[e] * from_start[2 * half + e];
          if constexpr (kGate == Gate::kSafe) {
            const float column = kv[e] * exp2_approx(-sum);
            k_end[e] = column * whole[e];
            rows_q[half + 2 * e] = __float_as_uint(q_start[e]);
            rows_k[half + 2 * e] = __float_as_uint(k_start[e]);
            columns[half][e] = __float_as_uint(column);
          } else {
            k_end[e] = kv[e] * exp2_approx(whole[e] - sum);
            const float from_middle = sum - middle[e], row = exp2_approx(from_middle);
            rows_q[half + 2 * e] = __float_as_uint(qv[e] * row);
            rows_k[half + 2 * e] = __float_as_uint(kv[e] * row);
            columns[half][e] = __float_as_uint(kv[e] * exp2_approx(-from_middle));
          }
        }
        qf[half] = pack<__half>(q_start[0], q_start[1]);
        kf[half] = pack<__half>(k_start[0], k_start[1]);
        cf[half] = pack<__half>(k_end[0], k_end[1]);
      }
      if (g == 7) store_shared(decay_at, from_start[2], from_start[3]);  // token 15: the decay of the whole block
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_tf32(diagonal_p[m], rows_q, columns[m][0], columns[m][1]);
        mma_tf32(diagonal_a[m], rows_k, columns[m][0], columns[m][1]);
      }
      store_matrices(query + at, qf[0], qf[1]);
      store_matrices(key + at, kf[0], kf[1]);
      store_matrices(gate_tile + at, cf[0], cf[1]);
      bias_at += 32, decay_at += 32;
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
    if (p.retention != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t pair = slowest_decays[i];
#pragma unroll
        for (int other = 4; other < 32; other *= 2)
          pair = max_half2_or_nan(pair, __shfl_xor_sync(0xffffffffu, pair, other));
        if (g == 0) *reinterpret_cast<uint32_t*>(slowest + side * kChunk + block + 2 * t + 8 * i) = pair;
      }
    }
    __syncthreads();
    if constexpr (!kBeside) prefetch_value();
    const int group = this_warpgroup();                        // anew, as is done below: the compiler spills it else
    if (const int channel = 2 * this_thread(); channel < K) {  // decays over several blocks, and over all of the chunk
      const auto of_block = [&](int b) { return *reinterpret_cast<const float2*>(block_decay + b * K + channel); };
      const auto store = [&](__half* to, float2 x) {
        *reinterpret_cast<uint32_t*>(to + channel) = pack<__half>(x.x, x.y);
      };
      const auto product = [](float2 a, float2 b) { return float2{a.x * b.x, a.y * b.y}; };
      __half* const from_start = reinterpret_cast<__half*>(smem + Smem::kFromStart);
      __half* const to_end = reinterpret_cast<__half*>(smem + Smem::kToEnd);
      const float2 d0 = of_block(0), d1 = of_block(1), d2 = of_block(2), d3 = of_block(3);
      const float2 d01 = product(d0, d1), d012 = product(d01, d2), d23 = product(d2, d3);
      store(block_decay_half + K, d1);
      store(block_decay_half + 2 * K, d2);
      store(from_start, d0);
      store(from_start + K, d01);
      store(from_start + 2 * K, d012);
      store(to_end + 2 * K, d3);
      store(to_end + K, d23);
      store(to_end, product(d1, d23));
      *reinterpret_cast<float2*>(reinterpret_cast<float*>(place->out + Out::kDecay) + decay_index(channel)) =
          product(d012, d3);
      if (channel < kChunk)
        *reinterpret_cast<float2*>(reinterpret_cast<float*>(place->out + Out::kScale) + channel) =
            *reinterpret_cast<const float2*>(scale_of + channel);
    }
    float diagonal[2][4];  // of P for warps 0-3, of A for warps 4-7
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float4 other = exchange[(2 * (1 - group) + m) * 32];
      diagonal[m][0] = (group == 0 ? diagonal_p[m][0] : diagonal_a[m][0]) + other.x;
      diagonal[m][1] = (group == 0 ? diagonal_p[m][1] : diagonal_a[m][1]) + other.y;
      diagonal[m][2] = (group == 0 ? diagonal_p[m][2] : diagonal_a[m][2]) + other.z;
      diagonal[m][3] = (group == 0 ? diagonal_p[m][3] : diagonal_a[m][3]) + other.w;
    }
    if constexpr (kGate != Gate::kSafe) {
      if (out_of_range[warp] || out_of_range[4 + warp]) {
        float4* const sums = exchange + 2 * (1 - group) * 32;  // which were for this warp only, and have been read
        exact_diagonal<Element, K, kGate, kFloatGate>(p, gate, *place, block, group == 0, gate_bias, norms, sums);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const float4 d = sums[32 * m];
          diagonal[m][0] = d.x;
          diagonal[m][1] = d.y;
          diagonal[m][2] = d.z;
          diagonal[m][3] = d.w;
        }
      }
    }
    __syncthreads();  // A will lie where the sums did

    // ---- 2. blocks below the diagonal
    char* const out = place->out;
    if (p.retention != nullptr && this_thread() >= kPrepareThreads - 32) {
      float sum = 0.0f;
#pragma unroll
      for (int row = lane; row < kChunk; row += 32) {
        if (row >= valid) continue;
        const float decay = max_or_nan(__half2float(slowest[row]), __half2float(slowest[kChunk + row]));
        const float squares_k = squares[kChunk + row] + squares[3 * kChunk + row];
        // The last term is a NaN where k is not finite, and so is the one before where β is not.
        sum += decay / kDecayScale<kGate> + log2_approx(max_or_nan(fabsf(1.0f - beta_w[row]), 1.0f)) + 0.0f * squares_k;
      }
#pragma unroll
      for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
      if (lane < 2) chunk_retention[lane] = sum;
    }
    {
      const char* const rows = group == 0 ? query : key;
      const int anew = this_thread() & 31;
      const BlockAddress block_address(anew);
      const ColumnAddress column_address(anew);
      float middle[2][4] = {}, near[4] = {};
      const int i = 2 + (warp >> 1), j = warp & 1;
      {  // block (i, j): what lies between rows and columns is block 2 for i = 3, and block 1 for j = 0
        const uint32_t* decay_rows = reinterpret_cast<const uint32_t*>(block_decay_half + (i == 3   ? 2
                                                                                           : j == 0 ? 1
                                                                                                    : 0) *
                                                                                              K) +
                                     t;
        const uint32_t* decay_columns = reinterpret_cast<const uint32_t*>(block_decay_half + K) + t;
        const bool both = i == 3 && j == 0;
        const int first_row = block_address(i, 0), first_column = column_address(j, 0);
#pragma unroll 1
        for (int c = 0; c < 128; c += 32) {  // bytes of 16 channels, of each half
          const char *const rows_at = rows + (first_row ^ c), *const columns_at = gate_tile + (first_column ^ c);
#pragma unroll
          for (int half = 0; half < K / 64; ++half) {
            uint32_t rf[4], cf[4];
            load_matrices(rf, rows_at + half * kHalfBytes);
            load_matrices(cf, columns_at + half * kHalfBytes);
            uint32_t d[2] = {decay_rows[32 * half], decay_rows[32 * half + 4]};
            if (both) {
              d[0] = multiply_half2(d[0], decay_columns[32 * half]);
              d[1] = multiply_half2(d[1], decay_columns[32 * half + 4]);
            }
#pragma unroll
            for (int r = 0; r < 4; ++r) rf[r] = multiply_half2(rf[r], d[r >> 1]);
            mma_fp16(middle[0], rf, cf[0], cf[1]);
            mma_fp16(middle[1], rf, cf[2], cf[3]);
          }
          decay_rows += 8, decay_columns += 8;
        }
      }
      // Columns 8 (warp & 1).. of block (1, 0) or (3, 2)
      const int near_row = warp < 2 ? 1 : 3, near_column = kBlock * (near_row - 1) + 8 * (warp & 1);
      const int near_base = tile_offset(near_column + (lane & 7), lane >> 3);
      const int first_near_row = block_address(near_row, 0);
#pragma unroll 1
      for (int c = 0; c < 128; c += 64) {  // bytes of 32 channels, of each half
        const char* const columns_at = gate_tile + (near_base ^ c);
        const char *const rows_at = rows + (first_near_row ^ c), *const more_rows_at = rows + (first_near_row ^ c ^ 32);
#pragma unroll
        for (int half = 0; half < K / 64; ++half) {
          uint32_t rf[4], cf[4];
          load_matrices(cf, columns_at + half * kHalfBytes);
          load_matrices(rf, rows_at + half * kHalfBytes);
          mma_fp16(near, rf, cf[0], cf[1]);
          load_matrices(rf, more_rows_at + half * kHalfBytes);
          mma_fp16(near, rf, cf[2], cf[3]);
        }
      }
      if (group == 0) {  // P, into the record
        // Rows g and g + 8 and columns 2t, 2t + 1 of the two halves of a block's columns.
        char* const place_of_p[2] = {out + Out::kP + p_offset(g, 2 * t), out + Out::kP + p_offset(g, 8 + 2 * t)};
        const auto store = [&](int block_place, int half, int m, float x, float y) {
          *reinterpret_cast<uint32_t*>(place_of_p[m] + block_place + half * 8 * kNarrowRowBytes) = pack<__half>(x, y);
        };
        const int middle_place = p_block(i, j), diagonal_place = p_block(warp, warp);
        const int near_place = p_block(near_row, near_row - 1);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = g + 8 * half;
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const int column = 8 * m + 2 * t;
            store(middle_place, half, m, middle[m][2 * half], middle[m][2 * half + 1]);
            store(diagonal_place, half, m, column <= row ? diagonal[m][2 * half] * kTwoTruncations : 0.0f,
                  column + 1 <= row ? diagonal[m][2 * half + 1] * kTwoTruncations : 0.0f);
          }
          if (warp & 1) {
            store(near_place, half, 1, near[2 * half], near[2 * half + 1]);
          } else {
            store(near_place, half, 0, near[2 * half], near[2 * half + 1]);
          }
        }
      } else {
        // A, the rows times β n²
        const AccumulatorAddress address(lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = g + 8 * half;
          const float b = beta_w[kBlock * i + row], b_near = beta_w[kBlock * near_row + row];
          const float b_diagonal = beta_w[block + row] * kTwoTruncations;
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            *reinterpret_cast<float2*>(value + address(2 * i + half, 2 * j + m)) = {middle[m][2 * half] * b,
                                                                                    middle[m][2 * half + 1] * b};
            *reinterpret_cast<float2*>(value + address(2 * warp + half, 2 * warp + m)) = {
                diagonal[m][2 * half] * b_diagonal, diagonal[m][2 * half + 1] * b_diagonal};
          }
          *reinterpret_cast<float2*>(value + address(2 * near_row + half, near_column / 8)) = {
              near[2 * half] * b_near, near[2 * half + 1] * b_near};
        }
      }
    }
    __syncthreads();

    // ---- 3. the inverse of the diagonal blocks; Q, K^+ and Kr
    if (group == 0) {
      invert_diagonal<kBeside>(value, warp);
    } else {
      const uint32_t* const from_start = reinterpret_cast<const uint32_t*>(smem + Smem::kFromStart) + t;
      const uint32_t* const to_end = reinterpret_cast<const uint32_t*>(smem + Smem::kToEnd) + t;
#pragma unroll 1
      for (int half = 0; half < K / 64; ++half) {
        const int block_at = block_address(0, warp) + half * kHalfBytes;
#pragma unroll
        for (int b = 0; b < 3; ++b) {
          const int at = b * (K / 2) + 32 * half + 8 * warp, next = block_at + (b + 1) * kBlock * kRowBytes;
          const uint32_t start[2] = {from_start[at], from_start[at + 4]}, end[2] = {to_end[at], to_end[at + 4]};
          scale_block(query + next, start);
          scale_block(key + next, start);
          scale_block(gate_tile + block_at + b * kBlock * kRowBytes, end);
        }
      }
    }
    fence_async_proxy();
    __syncthreads();

    if (this_thread() == 128) {
      bulk_store(place->out + Out::kQ, query, Smem::kTile);
      bulk_store_commit();
      bulk_store(place->out + Out::kKr, gate_tile, Smem::kTile);
      bulk_store_commit();
      cute::tma_store_wait<1>();  // Q has been read: v takes its place
      TransactionBarrier::arrive_and_expect_tx(value_here, kChunk * p.V * 2);
      load_tile(&maps.v, value_here, query, place->head, place->token, place->batch);
      bulk_stores_have_read();
    }

    // ---- 3. block column `warp` of X, transposed: x[i] is (rows of block i)ᵀ
    const AccumulatorAddress address(lane);
    float x[4][2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[i][m][e] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (group == 1) {  // which has nothing else to do here
        if constexpr (kBeside)
          if (i == 0 && warp == 3) {
            const Place next = next_place<K>(p, by);
            if (this_thread() == kPrepareThreads - 1) place[1] = next;
          }
        break;
      }
      if (i == warp) {
        const TransposedAddress transposed(this_thread() & 31);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int at = transposed(2 * warp + m, 2 * warp + (e >> 1), e & 1);
            x[i][m][e] = *reinterpret_cast<const float*>(value + at);
          }
      } else if (i > warp) {
        float sum[2][4] = {};
#pragma unroll
        for (int m = 0; m < i; ++m)
          if (m >= warp) multiply_by_block_transposed(sum, x[m], value, address, i, m);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[m][e] = -sum[m][e];
        multiply_by_block_transposed(x[i], sum, value, address, i, i);
      }
    }
    __syncthreads();  // A has been read, and Q and Kr are on their way

    // ---- 4. X in the types of the two products
    if (group == 0) {
      const int own = this_thread(), own_lane = own & 31, own_row = own / 32 * kBlock + own_lane / 4;  // anew, too
      const float bw[2] = {beta_w[own_row], beta_w[own_row + 8]}, bu[2] = {beta_u[own_row], beta_u[own_row + 8]};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fence_registers(x[i][0]);  // one after the other: there are no registers for all at once
        fence_registers(x[i][1]);
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
        int at = tile_offset(kBlock * i + (own_lane >> 4) * 8 + (own_lane & 7), own / 32 * 2 + (own_lane >> 3 & 1));
        store_matrices_transposed(smem + Smem::kXOfW + at, w[0], w[1], w[2], w[3]);
        store_matrices_transposed(smem + Smem::kXHigh + at, high[0], high[1], high[2], high[3]);
        store_matrices_transposed(smem + Smem::kXLow + at, low[0], low[1], low[2], low[3]);
      }
    }
    fence_async_proxy();
    Barrier::wait(value_here, place->phase);
    if (place->valid < kChunk) {
      clear_rows(query, p.V, place->valid, this_thread(), kPrepareThreads);
      fence_async_proxy();
    }
    __syncthreads();

    // Who this is, anew.
    const int half_of_columns = this_warpgroup(), quarter = this_thread() / 32 % 4;
    const int this_lane = this_thread() % 32;

    // ---- 4. W = X K^+, 64 columns a warpgroup, which take the place of those of K^+
    if (K == 128 || half_of_columns == 0) {
      float w[32];
      fence_registers(w);
      cute::warpgroup_arrive();
      const uint64_t xd = descriptor_k_major(smem_address(smem + Smem::kXOfW));
      const uint64_t kd = descriptor_mn_major(smem_address(key + half_of_columns * kHalfBytes));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        wgmma_ss<__half, Major::K, Major::MN>(w, advance(xd, j * 32), advance(kd, j * 16 * kRowBytes), j > 0);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      fence_registers(w);
      named_barrier(kWarpgroup + half_of_columns, 128);  // all four warps' products are done
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float* x8 = w + 8 * c;
        store_matrices(key + block_address(quarter, 4 * half_of_columns + c), pack<__half>(x8[0], x8[1]),
                       pack<__half>(x8[2], x8[3]), pack<__half>(x8[4], x8[5]), pack<__half>(x8[6], x8[7]));
      }
      fence_async_proxy();
      named_barrier(kWarpgroup + half_of_columns, 128);
      if (this_thread() % 128 == 0) {
        bulk_store(place->out + Out::kW + half_of_columns * kHalfBytes, key + half_of_columns * kHalfBytes, kHalfBytes);
        bulk_store_commit();
      }
    }

    // ---- 4. Uᵀ = Vᵀ Xᵀ, 64 value channels a warpgroup
    if (p.V == 128 || half_of_columns == 1) {
      const int half = p.V == 128 ? half_of_columns : 0;
      float u[32];
      fence_registers(u);
      cute::warpgroup_arrive();
      const uint64_t vd = descriptor_mn_major(smem_address(query + half * kHalfBytes));
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
      float largest_u = 0.0f;
#pragma unroll
      for (int i = 0; i < 32; ++i) largest_u = max_or_nan(largest_u, fabsf(u[i]));
      const uint32_t bits = warp_max(__float_as_uint(largest_u));
      const int exponent = max(exponent_of(bits), -100) - 14;  // the largest becomes at most 2^15
      const float factor = power_of_two(-exponent);
      char* const out = place->out;
      if (this_lane == 0) reinterpret_cast<int*>(out + Out::kExponents)[4 * half + quarter] = exponent;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x8 = u + 8 * i;
        uint4 r = {pack<__half>(x8[0] * factor, x8[1] * factor), pack<__half>(x8[2] * factor, x8[3] * factor),
                   pack<__half>(x8[4] * factor, x8[5] * factor), pack<__half>(x8[6] * factor, x8[7] * factor)};
        reinterpret_cast<uint4*>(out + Out::kU + half * Out::kUHalfBytes)[i * 128 + this_thread() % 128] = r;
      }
      if (p.retention != nullptr) {
        if (this_lane == 0 && exponent_of(bits) == 128) chunk_retention[half] = __int_as_float(0x7fffffff);
        named_barrier(kWarpgroup + half_of_columns, 128);
        if (this_thread() % 128 == 0) retention(p, half, place->head)[place->slot] = chunk_retention[half];
      }
    }
    if constexpr (!kBeside) break;

    // The record is whole once the copy engine has written its part as well.
    if (this_thread() % 128 == 0) bulk_stores_are_done();
    fence_async_proxy();
    __syncthreads();
    if (this_thread() == 0) {
      set_flag(p.ready + place->slot * p.HV + place->head);
      place[1].phase = place->phase ^ 1;
      place[0] = place[1];
      load_inputs();
    }
    __syncthreads();
  }
  // Nobody has published a composition yet.
  if (p.flags != nullptr && blockIdx.x < p.HV)
#pragma unroll 1
    for (int i = threadIdx.x; i < p.sequences * p.segments * (p.V / 64); i += kPrepareThreads)
      flags(p, blockIdx.x, 0)[i] = 0;

  // Tokens after the last sequence: their output is zero.
  if (p.cu_seqlens != nullptr && p.first_sequence + p.sequences == p.N) {
    const int covered = bound(p, p.N);
#pragma unroll 1
    for (int i = blockIdx.x; covered < p.T && i < p.slots * p.HV; i += gridDim.x) {
      const int64_t token = static_cast<int64_t>(i / p.HV) * kChunk + threadIdx.x;
      if (threadIdx.x >= kChunk || token < covered || token >= p.T) continue;
      char* out = static_cast<char*>(p.out) + (token * p.out_strides[1] + i % p.HV * p.out_strides[2]) * 2;
#pragma unroll 1
      for (int b = 0; b < p.V * 2; b += 16) *reinterpret_cast<uint4*>(out + b) = uint4{};
    }
  }

  if (this_thread() % 128 == 0) bulk_stores_have_read();
  if (kBeside && this_thread() == 0) {
    __threadfence();
    atomicAdd(&p.progress->finished, 1);
  }
}

}  // namespace kda

// What `prepare` hands to `recurrence`: one record for each chunk of 64 tokens and value head, in global memory.
#pragma once

#include "api/prefill.h"
#include "common/tile.cuh"

namespace kda {

constexpr int kChunk = 64;  // tokens
constexpr int kBlock = 16;  // tokens of a diagonal block, one warp's rows

// Tile j of the matrix P below: columns 16 j..16 j + 15 of rows 16 j..63, as WGMMA's 32-byte mode wants them. The rows
// above are zero, and no record has them.
constexpr int kPTileBytes = kChunk * kNarrowRowBytes;  // with all rows

// Where in P the tile begins.
__host__ __device__ constexpr int p_tile(int j) { return j * kPTileBytes - j * (j - 1) / 2 * kBlock * kNarrowRowBytes; }

// Where block (i, j) of 16 rows and columns begins, on or below the diagonal.
__device__ __forceinline__ int p_block(int i, int j) { return p_tile(j) + (i - j) * kBlock * kNarrowRowBytes; }

// Byte offset in P of element (row, column), column even, of a block on or below the diagonal.
__device__ __forceinline__ int p_offset(int row, int column) {
  const int j = column / kBlock, chunk = column / 8 % 2;
  return p_tile(j) + (row - kBlock * j) * kNarrowRowBytes + ((chunk ^ (row >> 2 & 1)) << 4) + column % 8 * 2;
}

// With G the log-decay summed from the start of the chunk, and k^, q^ of unit length (k = n k^, q = m q^):
//
//   A_ij = β_i n_i² Σ_d k^_id k^_jd e^(G_id - G_jd)  (j < i)         X = (I + A)^-1
//   W = X diag(β n²) (k^ ∘ e^G)     U = X diag(β n) V     Kr = k^ ∘ e^(G_last - G)
//   Q = q^ ∘ e^G                    P_ij = Σ_d q^_id k^_jd e^(G_id - G_jd)  (j ≤ i)
//
// and the recurrence, for a state S [V, K], is
//
//   Ũ = U - W Sᵀ       O = diag(scale m) (Q Sᵀ + P Ũ)       S ← S ∘ e^(G_last) + Ũᵀ Kr
//
// All but U is at most about 1 in magnitude whatever the inputs are, so that fp16 holds it with 11 bits. U is as large
// as v: it is stored in fp16 with an exponent for each 16 rows of Uᵀ.
//
// W, Kr and Q, with tokens as rows, are WGMMA tiles (common/tile.cuh); P is in tiles of its own (`p_offset`). Uᵀ is in
// the order of the accumulators of a 64 × 64 product: for each 64 value channels, [4][128 threads][8 halves].
template <int K>
struct Record {
  static constexpr int kMatrixBytes = kChunk * K * 2;
  static constexpr int kUHalfBytes = 64 * kChunk * 2;

  // Read by the warpgroup that carries the state.
  static constexpr int kW = 0;
  static constexpr int kKr = kW + kMatrixBytes;
  static constexpr int kDecay = kKr + kMatrixBytes;  // float [K]: e^(G_last), in the order of `decay_index`
  static constexpr int kExponents = kDecay + K * 4;  // int [2][4]: of 16 rows of Uᵀ
  static constexpr int kU = kDecay + 1024;

  // Read by the warpgroup that makes the output.
  static constexpr int kQ = kU + 2 * kUHalfBytes;
  static constexpr int kP = kQ + kMatrixBytes;
  static constexpr int kScale = kP + p_tile(kChunk / kBlock);  // float [64]: scale m

  static constexpr int kBytes = kScale + 1024;
};

// Channel 8 i + 2 t + e belongs to lane t of a quad. The quads' loads of 16 bytes are to be contiguous.
__device__ __forceinline__ int decay_index(int channel) {
  int own = channel / 8 * 2 + (channel & 1), t = channel / 2 % 4;
  return own / 4 * 16 + t * 4 + own % 4;
}

// Where a sequence lies: its tokens, and its first record.
struct Sequence {
  int batch, start, length, first_slot;
};

__device__ __forceinline__ int chunks_of(int tokens) { return (tokens + kChunk - 1) / kChunk; }

__device__ __forceinline__ int bound(const PrefillParams& p, int n) {
  int64_t value = p.cu_seqlens_is_int64 ? static_cast<const int64_t*>(p.cu_seqlens)[n]
                                        : static_cast<const int32_t*>(p.cu_seqlens)[n];
  return static_cast<int>(min(max(value, int64_t{0}), static_cast<int64_t>(p.T)));
}

// The i-th sequence of a launch begins at slot start / 64 + i, with `start` counted from the launch's first token: without
// a look at the other sequences, no two of them share a slot, and T / 64 slots and one a sequence are enough.
__device__ __forceinline__ int first_slot(const PrefillParams& p, int n) {
  const int i = n - p.first_sequence;
  if (p.cu_seqlens == nullptr) return i * chunks_of(p.T);
  return max(bound(p, n) - bound(p, p.first_sequence), 0) / kChunk + i;
}

__device__ __forceinline__ Sequence sequence(const PrefillParams& p, int n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.T, first_slot(p, n)};
  int start = bound(p, n), end = bound(p, n + 1);
  return {0, start, max(end - start, 0), first_slot(p, n)};
}

// Slots of a launch for this many sequences.
inline int64_t slots_for(const PrefillParams& p, int64_t sequences) {
  return p.cu_seqlens == nullptr ? sequences * ((p.T + kChunk - 1) / kChunk) : p.T / kChunk + sequences;
}

// What a chunk's tokens leave of a state at most, log2 of a factor of its norm: for each of its two halves of 64 value
// channels and each head, one number a slot. A token multiplies a state by Diag(α) and I - β k kᵀ, whose norms are max α and
// max(1, |1 - β kᵀk|). It is a NaN where the chunk may bring a NaN or an infinity into that half of the state.
__device__ __forceinline__ float* retention(const PrefillParams& p, int half, int head) {
  return p.retention + (static_cast<int64_t>(half) * p.HV + head) * p.slots;
}

// What a segment of a chain does to the state: S at its end is S at its begin times M, plus N. In global memory.
template <int K>
struct Composition {
  // M / 2^exponent in fp16: rows 0..63 of it as Kr in a record, then rows 64..127.
  static constexpr int kMatrixBytes = K * K * 2;
  static constexpr int kMatrix = 0;
  static constexpr int kExponents = kMatrix + kMatrixBytes;  // int [K / 16]: of 16 rows of M
  // N in fp32, as the accumulators of 64 value channels have it: [V / 64][K / 8][128 threads][4].
  static constexpr int kRowsBytes = 64 * K * 4;
  static constexpr int kRows = kExponents + K / 16 * 4;

  __host__ __device__ static constexpr int bytes(int V) { return kRows + V / 64 * kRowsBytes; }
};

constexpr int kLeastComposed = 3;  // segments; the second of two has nothing to gain
// For each of them: to join one takes a chunk. Compositions come between the first record and the second.
constexpr int kLeastComposedChunks = 4;

// Compositions of a head, at most: a chain of n chunks has up to n / composed_chunks.
__host__ __device__ inline int64_t compositions_for(int64_t slots, int composed_chunks) {
  return (slots + composed_chunks - 1) / composed_chunks;
}

// That of the first segment of a sequence; that of the next is HV * Composition<K>::bytes(V) further on. No two sequences share
// one, since the slots between their first ones are as many as their chunks.
template <int K>
__device__ __forceinline__ char* composition(const PrefillParams& p, int first_slot, int head) {
  return p.compositions + (compositions_for(first_slot, p.composed_chunks) * p.HV + head) * Composition<K>::bytes(p.V);
}

// [segments][V / 64]
__device__ __forceinline__ int* flags(const PrefillParams& p, int head, int sequence) {
  return p.flags + (static_cast<int64_t>(head) * p.sequences + sequence) * p.segments * (p.V / 64);
}

// Chunks of a sequence whose chain is shared, at most: one warp of each CTA looks at all of them.
constexpr int kMaxPlannedChunks = 16384;

template <int K>
__device__ __forceinline__ char* record(const PrefillParams& p, int slot, int head) {
  return static_cast<char*>(p.workspace) + (static_cast<int64_t>(slot) * p.HV + head) * Record<K>::kBytes;
}

}  // namespace kda

// The serial part: one CTA carries the state of one sequence and value head, 64 value channels a warpgroup, through all
// its chunks.
//
//   Ũ = U - W Sᵀ       O = diag(scale m) (Q Sᵀ + P Ũ)       S ← S ∘ e^(G_last) + Ũᵀ Kr
//
// Roles
//   warpgroups 0..kHalves-1   S [64 v, K] stays in fp32 accumulators; packed to fp16 it is the A operand of
//                             Ũᵀ = Uᵀ - S Wᵀ and of Oᵀ = S Qᵀ, and Ũᵀ packed is that of S += Ũᵀ Kr and Oᵀ += Ũᵀ Pᵀ.
//   warpgroup kHalves         warp 0 copies records into a ring; warps 1 and 2 copy the output, which they find in a tile
//                             of shared memory for each of the other warpgroups, to `out`.
//
// The order in which a warpgroup feeds the tensor cores leaves them no gap (cycles at full rate, K = 128):
//
//   Ũ -= S W (256)   O = S Q (256)      S += Ũ Kr (256)   O += Ũ P (128)
//   meanwhile: decay S     pack Ũ               the output of the chunk before, the next U
//
// The compiler keeps products in flight only where it sees that nobody touches their registers: hence nothing is in
// flight from one turn of the loop to the next, and the output leaves packed.
//
// Each warp holds its 16 rows of S as S / 2^E, with E such that fp16 holds them: U / 2^E stays under 2^3, and E follows
// the size of S every few chunks. Rows never mix, so no two warps need agree on E.
//
// Shared memory (K = 128): a ring of 3 records with one half of Uᵀ (66 KB each), or of 2 whole ones (74 KB), and for each
// warpgroup a tile of 9 KB through which the output goes, 128 bytes a token and 16 to keep rows off each other's banks.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include "record.cuh"

namespace kda {

constexpr int kHeadroom = 3;         // log2 of the bound on U / 2^E
constexpr int kRescaleInterval = 8;  // chunks between two looks at the size of S

template <int K, int kHalves>
struct RecurrenceSmem {
  // A record as it is, but for the half of Uᵀ that this CTA does not need.
  static constexpr int kSkipped = (2 - kHalves) * Record<K>::kUHalfBytes;
  static constexpr int kQ = Record<K>::kQ - kSkipped;
  static constexpr int kP = Record<K>::kP - kSkipped;
  static constexpr int kScale = Record<K>::kScale - kSkipped;
  static constexpr int kCopiedBytes = kScale + kChunk * 4;
  static constexpr int kStage = (kCopiedBytes + 1023) / 1024 * 1024;
  static constexpr int kStages = kHalves == 1 ? 3 : 2;
  static constexpr int kStoreWarps = 2 / kHalves;  // for a tile
  static constexpr int kTileRow = 64 * 2 + 16;
  static constexpr int kTileBytes = kChunk * kTileRow;
  static constexpr int kTiles = kStages * kStage;
  static constexpr int kBarriers = kTiles + kHalves * kTileBytes;
  static constexpr int kBytes = kBarriers + 8 * 2 * (kStages + kHalves);
};

// A place in a ring and the parity of its barriers' phase.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

using Barrier = cutlass::arch::ClusterBarrier;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;

template <class Element, int K>
__device__ __forceinline__ float load_state(const PrefillParams& p, int64_t matrix, int v, int k) {
  int64_t at = matrix + (p.state_v_first ? static_cast<int64_t>(v) * K + k : static_cast<int64_t>(k) * p.V + v);
  return load_float<Element>(p.initial_state, at);
}

// Writes this warp's rows of S, 2^E times what the accumulators hold.
template <int K>
__device__ __forceinline__ void store_state(const PrefillParams& p, void* states, int64_t matrix, int first_row,
                                            const float (&s)[K / 2], int exponent) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  // In two steps, since 2^E may be out of the range of a float where S is zero or tiny.
  const float factor = power_of_two(exponent - exponent / 2), factor2 = power_of_two(exponent / 2);
#pragma unroll
  for (int i = 0; i < K / 2; i += 2) {
    int v = first_row + g + (i >> 1 & 1) * 8, k = (i >> 2) * 8 + 2 * t;
    float x = s[i] * factor * factor2, y = s[i + 1] * factor * factor2;
    if (p.state_v_first) {
      int64_t at = matrix + static_cast<int64_t>(v) * K + k;
      if (p.state_dtype == DType::kFP32) {
        *reinterpret_cast<float2*>(static_cast<float*>(states) + at) = {x, y};
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(states) + at) = pack<__nv_bfloat16>(x, y);
      }
    } else {
      int64_t at = matrix + static_cast<int64_t>(k) * p.V + v;
      if (p.state_dtype == DType::kFP32) {
        static_cast<float*>(states)[at] = x;
        static_cast<float*>(states)[at + p.V] = y;
      } else {
        static_cast<__nv_bfloat16*>(states)[at] = __float2bfloat16(x);
        static_cast<__nv_bfloat16*>(states)[at + p.V] = __float2bfloat16(y);
      }
    }
  }
}

template <size_t N>
__device__ __forceinline__ uint32_t largest_magnitude(const float (&x)[N]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) bits = max(bits, magnitude_bits(x[i]));
  return warp_max(bits);
}

// s *= 2^by
template <size_t N>
__device__ __forceinline__ void scale_by_power(float (&s)[N], int by) {
  const float factor = power_of_two(by - by / 2), factor2 = power_of_two(by / 2);
#pragma unroll
  for (int i = 0; i < N; ++i) s[i] = s[i] * factor * factor2;
}

// Warp `warp` of those that take the output of 64 value channels from its tile to global memory, chunk after chunk.
template <int K, int kHalves>
__device__ __forceinline__ void store_outputs(const PrefillParams& p, const Sequence& seq, int head, int half,
                                              int index, int warp, char* smem) {
  using Smem = RecurrenceSmem<K, kHalves>;
  constexpr int kRows = 4 * Smem::kStoreWarps;  // that the warps store at a time, 8 lanes a row
  uint64_t* const tile_full = reinterpret_cast<uint64_t*>(smem + Smem::kBarriers) + 2 * Smem::kStages + index;
  uint64_t* const tile_empty = tile_full + kHalves;
  const int lane = threadIdx.x & 31, chunks = chunks_of(seq.length), first = 4 * warp + lane / 8;
  const char* const tile = smem + Smem::kTiles + index * Smem::kTileBytes + first * Smem::kTileRow + lane % 8 * 16;
  char* out = static_cast<char*>(p.out) + (seq.batch * p.out_strides[0] + (seq.start + first) * p.out_strides[1] +
                                           head * p.out_strides[2] + 64 * half + lane % 8 * 8) *
                                              2;
  const int64_t step = kRows * p.out_strides[1] * 2;
  if (chunks == 0) return;
  Barrier::wait(tile_full, 0);  // the first tile is none
  if (lane == 0) Barrier::arrive(tile_empty);
  for (int c = 0; c < chunks; ++c) {
    Barrier::wait(tile_full, (c + 1) & 1);
    const int valid = seq.length - c * kChunk - first;
#pragma unroll
    for (int i = 0; i < kChunk / kRows; i += 4) {
      uint4 r[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) r[j] = *reinterpret_cast<const uint4*>(tile + (i + j) * kRows * Smem::kTileRow);
#pragma unroll
      for (int j = 0; j < 4; ++j, out += step)
        if ((i + j) * kRows < valid) *reinterpret_cast<uint4*>(out) = r[j];
    }
    __syncwarp();
    if (lane == 0) Barrier::arrive(tile_empty);
  }
}

template <class Element, int K, int kHalves>
__global__ void __launch_bounds__(128 * (kHalves + 1), 1) recurrence(const __grid_constant__ PrefillParams p) {
  using Smem = RecurrenceSmem<K, kHalves>;
  using In = Record<K>;
  extern __shared__ __align__(1024) char smem[];
  uint64_t* const full = reinterpret_cast<uint64_t*>(smem + Smem::kBarriers);
  uint64_t* const empty = full + Smem::kStages;
  uint64_t* const tile_full = empty + Smem::kStages;
  uint64_t* const tile_empty = tile_full + kHalves;

  const int warpgroup = cutlass::canonical_warp_group_idx();
  const int ctas = p.V / 64 / kHalves;  // for a sequence and head
  const int part = blockIdx.x % ctas, head = blockIdx.x / ctas % p.HV, n = p.first_sequence + blockIdx.x / ctas / p.HV;
  const Sequence seq = sequence(p, n);
  const int chunks = chunks_of(seq.length);

  if (threadIdx.x == 0) {
    for (int i = 0; i < Smem::kStages; ++i) {
      Barrier::init(full + i, 1);
      Barrier::init(empty + i, 128 * kHalves);
    }
    for (int i = 0; i < kHalves; ++i) {
      Barrier::init(tile_full + i, 128);
      Barrier::init(tile_empty + i, Smem::kStoreWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == kHalves) {  // ---------------------------------------------------------------------------- copies
    cutlass::arch::warpgroup_reg_dealloc<40>();
    const int warp = cutlass::canonical_warp_idx_sync() - 4 * kHalves, lane = threadIdx.x & 31;
    if (warp > 0) {
      const int index = (warp - 1) / Smem::kStoreWarps;
      if (warp < 3)
        store_outputs<K, kHalves>(p, seq, head, part * kHalves + index, index, (warp - 1) % Smem::kStoreWarps, smem);
      return;
    }
    if (lane != 0) return;
    wait_for_previous_kernel();
    RingPosition<Smem::kStages> ring;
    for (int c = 0; c < chunks; ++c) {
      const char* in = record<K>(p, seq.first_slot + c, head);
      char* to = smem + ring.stage * Smem::kStage;
      uint64_t* barrier = full + ring.stage;
      Barrier::wait(empty + ring.stage, ring.phase ^ 1);
      TransactionBarrier::arrive_and_expect_tx(barrier, Smem::kCopiedBytes);
      if constexpr (kHalves == 2) {
        cute::SM90_BULK_COPY_G2S::copy(in, barrier, to, Smem::kCopiedBytes);
      } else {
        cute::SM90_BULK_COPY_G2S::copy(in, barrier, to, In::kU);
        cute::SM90_BULK_COPY_G2S::copy(in + In::kU + part * In::kUHalfBytes, barrier, to + In::kU, In::kUHalfBytes);
        cute::SM90_BULK_COPY_G2S::copy(in + In::kQ, barrier, to + Smem::kQ, Smem::kCopiedBytes - Smem::kQ);
      }
      ring.next();
    }
    return;
  }

  // ------------------------------------------------------------------------------------------------------------ state
  cutlass::arch::warpgroup_reg_alloc<kHalves == 1 ? 240 : 232>();
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int half = part * kHalves + warpgroup;  // which 64 value channels
  const int first_row = 64 * half + 16 * warp;
  const int64_t matrix_size = static_cast<int64_t>(K) * p.V;
  const int64_t matrix = (static_cast<int64_t>(n) * p.HV + head) * matrix_size;
  char* const tile = smem + Smem::kTiles + warpgroup * Smem::kTileBytes;

  float s[K / 2];
  int exponent = -200;  // S is 2^exponent times what the registers hold
  if (p.initial_state != nullptr) {
#pragma unroll
    for (int i = 0; i < K / 2; ++i) {
      int v = first_row + g + (i >> 1 & 1) * 8, k = (i >> 2) * 8 + 2 * t + (i & 1);
      s[i] = p.state_dtype == DType::kFP32 ? load_state<float, K>(p, matrix, v, k)
                                           : load_state<__nv_bfloat16, K>(p, matrix, v, k);
    }
    uint32_t bits = largest_magnitude(s);
    if (bits != 0) {
      exponent = exponent_of(bits) - kHeadroom;
      scale_by_power(s, -exponent);
    }
  } else {
#pragma unroll
    for (int i = 0; i < K / 2; ++i) s[i] = 0.0f;
  }

  int64_t states_at = 0;  // where the intermediate states of this sequence go
  if (p.states != nullptr) {
    int before = 0;
    if (p.cu_seqlens != nullptr)
      for (int m = lane; m < n; m += 32) before += chunks_of(sequence(p, m).length);
    before = __reduce_add_sync(0xffffffffu, before);
    if (p.cu_seqlens == nullptr) before = n * chunks;
    states_at = (static_cast<int64_t>(before) * p.HV + head) * matrix_size;
  }

  float u[32], o[32];
  int next_exponent = exponent;  // for the chunk that `u` belongs to

  // Uᵀ of a chunk as accumulators, and the exponent that it asks for.
  const auto load_u = [&](const char* stage, uint32_t state_bits) {
    const int u_exponent = reinterpret_cast<const int*>(stage + In::kExponents)[4 * half + warp];
    int wanted = u_exponent + 15 - kHeadroom;  // U is 2^(15 + u_exponent) at most
    next_exponent = exponent;
    if (state_bits != 0) {
      int size = exponent + exponent_of(state_bits) - kHeadroom;
      // Not at every small change: a little off either way is within fp16's range.
      if (size >= exponent + 7 || (size <= exponent - 8 && wanted <= exponent - 8)) next_exponent = size;
    }
    next_exponent = max(next_exponent, wanted);
    const float factor = power_of_two(u_exponent - next_exponent);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint4 r = reinterpret_cast<const uint4*>(stage + In::kU + warpgroup * In::kUHalfBytes)[i * 128 + thread];
      const uint32_t pairs[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float2 x = unpack<__half>(pairs[j]);
        u[8 * i + 2 * j] = x.x * factor;
        u[8 * i + 2 * j + 1] = x.y * factor;
      }
    }
  };

  // The output of the chunk before, transposed into the tile. The first tile of all is no output, and is thrown away.
  uint32_t o_packed[16] = {};
  uint32_t tile_phase = 0;
  const auto hand_over_output = [&]() {
    Barrier::wait(tile_empty + warpgroup, tile_phase ^ 1);
    tile_phase ^= 1;
#pragma unroll
    for (int i = 0; i < 4; ++i)  // tokens 16 i .. 16 i + 15
      store_matrices_transposed(
          tile + (16 * i + (lane >> 4) * 8 + (lane & 7)) * Smem::kTileRow + (2 * warp + (lane >> 3 & 1)) * 16,
          o_packed[4 * i], o_packed[4 * i + 1], o_packed[4 * i + 2], o_packed[4 * i + 3]);
    Barrier::arrive(tile_full + warpgroup);
  };

  // The decays of this thread's columns of S over a chunk. Loaded while the tensor cores, which have the first say in
  // shared memory, are idle.
  float decay[K / 4];
  const auto load_decay = [&](const char* stage) {
#pragma unroll
    for (int i = 0; i < K / 16; ++i) {
      float4 d = reinterpret_cast<const float4*>(stage + In::kDecay)[4 * i + t];
      decay[4 * i] = d.x;
      decay[4 * i + 1] = d.y;
      decay[4 * i + 2] = d.z;
      decay[4 * i + 3] = d.w;
    }
  };

  // S as operand, in the units of the chunk to come.
  uint32_t s_packed[K / 4];
  const auto pack_state = [&]() {
    if (next_exponent != exponent) {
      scale_by_power(s, exponent - next_exponent);
      exponent = next_exponent;
    }
#pragma unroll
    for (int i = 0; i < K / 4; ++i) s_packed[i] = pack<__half>(s[2 * i], s[2 * i + 1]);
  };

  RingPosition<Smem::kStages> ring;
  if (chunks > 0) {
    Barrier::wait(full, 0);
    load_u(smem, 0);
    load_decay(smem);
    pack_state();
  }
  for (int c = 0; c < chunks; ++c) {
    const char* stage = smem + ring.stage * Smem::kStage;
    if (p.states != nullptr) store_state<K>(p, p.states, states_at + c * p.HV * matrix_size, first_row, s, exponent);
    const uint64_t w = descriptor_k_major(smem_address(stage + In::kW));
    fence_registers(u);
    fence_registers(s_packed);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < K / 16; ++k)
      wgmma_rs<64, Major::K, ScaleIn::Neg>(u, s_packed + 4 * k, advance(w, k / 4 * kHalfBytes + k % 4 * 32));
    cute::warpgroup_commit_batch();

    uint32_t state_bits = 0;
    if (c % kRescaleInterval == kRescaleInterval - 1) state_bits = largest_magnitude(s);
#pragma unroll
    for (int i = 0; i < K / 8; ++i) {
      s[4 * i] *= decay[2 * i];
      s[4 * i + 1] *= decay[2 * i + 1];
      s[4 * i + 2] *= decay[2 * i];
      s[4 * i + 3] *= decay[2 * i + 1];
    }
    fence_registers(s);

    const uint64_t q = descriptor_k_major(smem_address(stage + Smem::kQ));
    fence_registers(o);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < K / 16; ++k)
      wgmma_rs<64, Major::K>(o, s_packed + 4 * k, advance(q, k / 4 * kHalfBytes + k % 4 * 32), k > 0);
    cute::warpgroup_commit_batch();

    cute::warpgroup_wait<1>();
    fence_registers(u);
    uint32_t u_packed[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) u_packed[i] = pack<__half>(u[2 * i], u[2 * i + 1]);
    const uint64_t kr = descriptor_mn_major(smem_address(stage + In::kKr));
    const uint64_t pd = descriptor_k_major(smem_address(stage + Smem::kP));
    fence_registers(s);
    fence_registers(u_packed);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_rs<K, Major::MN>(s, u_packed + 4 * k, advance(kr, k * 16 * kRowBytes));
    cute::warpgroup_commit_batch();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_rs<64, Major::K>(o, u_packed + 4 * k, advance(pd, k * 32));
    cute::warpgroup_commit_batch();

    hand_over_output();
    // After the last chunk once more its own: loads under a condition would keep the old values alive all along.
    const char* next = stage;
    const int stage_in_use = ring.stage;
    ring.next();
    if (c + 1 < chunks) {
      next = smem + ring.stage * Smem::kStage;
      Barrier::wait(full + ring.stage, ring.phase);
    }
    load_u(next, state_bits);
    const float unit = power_of_two(exponent);
    cute::warpgroup_wait<1>();
    fence_registers(s);
    pack_state();
    cute::warpgroup_wait<0>();
    fence_registers(o);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float2 f = reinterpret_cast<const float2*>(stage + Smem::kScale)[4 * i + t];
      f = {f.x * unit, f.y * unit};
      o_packed[2 * i] = pack<Element>(o[4 * i] * f.x, o[4 * i + 1] * f.y);
      o_packed[2 * i + 1] = pack<Element>(o[4 * i + 2] * f.x, o[4 * i + 3] * f.y);
    }
    Barrier::arrive(empty + stage_in_use);
    fence_registers(o_packed);  // `o` and `decay` are never both alive: there is no room
    load_decay(next);
  }
  if (chunks > 0) hand_over_output();
  if (p.final_state != nullptr) store_state<K>(p, p.final_state, matrix, first_row, s, exponent);
}

}  // namespace kda

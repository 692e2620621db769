// The serial part: one CTA carries the state of one sequence and value head, 64 value channels a warpgroup, through all
// its chunks.
//
//   Ũ = U - W Sᵀ       O = diag(scale m) (Q Sᵀ + P Ũ)       S ← S ∘ e^(G_last) + Ũᵀ Kr
//
// Roles
//   warpgroups 0..kHalves-1   S [64 v, K] stays in fp32 accumulators; packed to fp16 it is the A operand of
//                             Ũᵀ = Uᵀ - S Wᵀ and of Oᵀ = S Qᵀ, and Ũᵀ packed is that of S += Ũᵀ Kr and Oᵀ += Ũᵀ Pᵀ.
//   warpgroup 1 (kCompose)    helps to compose states (below), and then is done.
//   the last warpgroup        warp 0 copies records into a ring; warps 1 and 2 copy the output, which they find in a tile
//                             of shared memory for each warpgroup with a state, to `out`.
//
// The order in which a warpgroup feeds the tensor cores (cycles at full rate, K = 128; docs/prefill_kernel.md has what
// they take):
//
//   Ũ -= S W (256)   O = S Q (256)      S += Ũ Kr (256)   O += Ũ P (128)
//   meanwhile: decay S     pack Ũ               the output of the chunk before, the next U
//
// The compiler keeps products in flight only where it sees that nobody touches their registers: hence nothing is in
// flight from one turn of the loop to the next, and the output leaves packed.
//
// Where SMs are left over, several CTAs share a chain (kHalves 1): each has a segment of the chunks, and begins so many
// before it, eight at most, that what came still earlier is gone, by what `prepare` says of the decays (`plan_segment`). Where
// more would be needed, a CTA finds out what its chunks do to a state before it knows that state: S M + N. Two warpgroups do
// that at the same time, from the same records (`carry_state`): N comes from zeros and with U, M from rows of the identity and
// without. From the M and N of all segments before comes the CTA's first state (`compose_state`), and it goes over its chunks
// again for the output. The first segment knows its state, and makes N alone from it: what its chunks leave. Where states
// can't be composed, a second CTA goes through the chunks of the first, without output, and then its own.
//
// The first two CTAs are scouts where SMs are left for them: they begin while `prepare` is still at work, and only go through
// the code, so that the others find their instructions in L2.
//
// With many records, the CTAs of both halves of the value channels are a cluster: each copies a part of what both need into
// the shared memory of both, and a stage is empty when both are done with it (`sharers`).
//
// With very many chunks and heads, `prepare` runs on other SMs meanwhile, and each record has a flag that says it is there.
//
// Each warp holds its 16 rows of S as S / 2^E, with E such that fp16 holds them: U / 2^E stays under 2^3, and E follows
// the size of S every few chunks. Rows never mix, so no two warps need agree on E.
//
// P comes without what is 0 above its diagonal blocks; those rows of its tiles are cleared once and stay, since no copy
// comes there but compositions, after which they are cleared again. Products that leave them out would have another shape than
// Q Sᵀ on the same accumulators, and the compiler waits between shapes.
//
// Shared memory (K = 128): a ring of 3 records with one half of Uᵀ (66 KB each), or of 2 whole ones (74 KB), and for each
// warpgroup a tile of 9 KB through which the output goes, 128 bytes a token and 16 to keep rows off each other's banks.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include "record.cuh"

namespace kda {

// Two warpgroups with a state, or one where 64 value channels are all and M is never made, and one that copies.
template <int kHalves, bool kCompose>
constexpr int kRecurrenceThreads = kHalves == 2 || kCompose ? 384 : 256;
constexpr int kHeadroom = 3;         // log2 of the bound on U / 2^E
constexpr int kNoState = -200;       // exponent of rows that are zero
constexpr int kRescaleInterval = 8;  // chunks between two looks at the size of S

template <int K, int kHalves>
struct RecurrenceSmem {
  // A record as it is, but for the half of Uᵀ that this CTA does not need, and all rows of P's tiles.
  static constexpr int kSkipped = (2 - kHalves) * Record<K>::kUHalfBytes;
  static constexpr int kQ = Record<K>::kQ - kSkipped;
  static constexpr int kP = Record<K>::kP - kSkipped;
  static constexpr int kScale = kP + kChunk / kBlock * kPTileBytes;
  static constexpr int kStage = (kScale + kChunk * 4 + 1023) / 1024 * 1024;
  static constexpr int kCopiedBytes = Record<K>::kScale + kChunk * 4 - kSkipped;  // into a stage
  static constexpr int kStages = kHalves == 1 ? 3 : 2;
  static constexpr int kStoreWarps = 2 / kHalves;  // for a tile
  static constexpr int kTileRow = 64 * 2 + 16;
  static constexpr int kTileBytes = kChunk * kTileRow;
  static constexpr int kTiles = kStages * kStage;
  static constexpr int kBarriers = kTiles + kHalves * kTileBytes;
  // full, empty [kStages]; tile_full, tile_empty [kHalves]; while M and N are made full, empty [kStages]; two more
  static constexpr int kComposingBarriers = kBarriers + 8 * 2 * (kStages + kHalves);
  static constexpr int kPlan = kComposingBarriers + 8 * (4 * kStages + 2);  // Segment
  static constexpr int kIsFinite = kPlan + 32;                              // int [4]: a warp's state
  static constexpr int kBytes = kIsFinite + 16;
};

// Chunks of one CTA: it begins at chunk `start`, and makes the output of chunks first..end-1.
struct Segment {
  int start, first, end;
  int composed;  // CTAs that compose the states of the chain, or 0
  bool is_last;  // whether its last state is that of the chain
};

constexpr int kJoiningStages = 2;  // of the ring, for compositions

constexpr int kPlanning = 1, kPublishing = 2, kClearing = 3;  // named barriers
constexpr int kLargestHalf = 14;       // log2 of what M and the state it multiplies are scaled to
constexpr int kLowestExponent = -400;  // of rows of M: what is less matters to no state
// log2 of what may be left of a state that is taken for forgotten: 72 bits below the last one of fp32.
constexpr float kForgotten = -96.0f;
constexpr int kComposingCost = 25;  // fifths of a chunk, whatever the number of segments
constexpr int kLookBack = 8;        // chunks in which a state is to be forgotten, else it is composed

// What CTA `index` of the p.segments that share a chain is to do, the same for both halves of the value channels; for a whole
// warp.
//
// Where each segment begins, a few chunks are enough to forget what came before, if the norms of what multiplies the state
// in them have a product of 2^kForgotten or less: the segment begins that much earlier, with zeros. Or states are
// composed. Where a NaN or an infinity has come up in the sequence, or there are too few CTAs or chunks, two CTAs share
// the chain, and the second goes through all of the first's chunks.
//
// Kept short: it runs once, and its instructions come from DRAM.
template <bool kCompose>
__device__ __forceinline__ Segment plan_segment(const PrefillParams& p, const Sequence& seq, int head, int index,
                                                bool rehearses) {
  const int lane = threadIdx.x & 31, chunks = chunks_of(seq.length), readable = rehearses ? 0 : chunks;
  // These differ only where one of them is a NaN.
  const float* const a = retention(p, 0, head) + seq.first_slot;
  const float* const b = retention(p, p.V / 64 - 1, head) + seq.first_slot;
  const int length = (chunks + p.segments - 1) / p.segments;
  constexpr int kLoads = 2;  // at a time
  float x[kLoads], y[kLoads];
  const auto load = [&](int c) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      x[i] = c + 32 * i < readable ? __ldcg(a + c + 32 * i) : 0.0f;
      y[i] = c + 32 * i < readable ? __ldcg(b + c + 32 * i) : 0.0f;
    }
  };
  load(lane);                 // before the others, so that they wait together
  int farthest = 0, own = 0;  // chunks to go back
  for (int i = 1 + lane; i * length < chunks; i += 32) {
    const int first = i * length;
    float left[kLookBack];
#pragma unroll
    for (int j = 0; j < kLookBack; ++j)
      left[j] = first - 1 - j >= 0 && first < readable ? __ldcg(a + first - 1 - j) : 0.0f;
#pragma unroll
    for (int j = 1; j < kLookBack; ++j) left[j] += left[j - 1];
    int back = kLookBack + 1;
#pragma unroll
    for (int j = kLookBack - 1; j >= 0; --j)
      if (left[j] <= kForgotten) back = j + 1;
    back = min(back, first);  // where the initial state is
    farthest = max(farthest, back);
    if (i == index) own = back;
  }
  farthest = __reduce_max_sync(0xffffffffu, static_cast<unsigned>(farthest));
  float sum = 0.0f;
#pragma unroll 1
  for (int c = lane; c - lane < chunks; load(c += 32 * kLoads))
#pragma unroll
    for (int i = 0; i < kLoads; ++i) sum += x[i] + y[i];
  const bool are_finite = __all_sync(0xffffffffu, magnitude_bits(sum) < 0x7f800000u);

  // The time of the slowest CTA, in fifths of a chunk with output, and which way it is: 0 for two that share the chain, 1
  // for segments that forget, or as many as compose. A chunk without output takes 4, with rows of M beside it 5. Joining
  // takes a chunk for each segment before. Of two that share the chain, the first one makes most of the output, and the
  // second one all the rest.
  const int most_of_it = (7 * chunks + 7) / 8;
  unsigned least = static_cast<unsigned>(5 * most_of_it) << 10;
  if (are_finite && farthest <= kLookBack)
    least = min(least, static_cast<unsigned>(4 * farthest + 5 * length) << 10 | 1);
  if (kCompose && are_finite) {
    const int most = min(min(p.segments, chunks / p.composed_chunks), 1023);
    for (int n = kLeastComposed + lane; n <= most; n += 32) {
      const int longest = (chunks + n - 1) / n;
      least = min(least, static_cast<unsigned>(10 * longest + 5 * n + kComposingCost) << 10 | static_cast<unsigned>(n));
    }
    least = __reduce_min_sync(0xffffffffu, least);
  }
  own = __reduce_max_sync(0xffffffffu, static_cast<unsigned>(own));
  if (const int n = least & 1023; kCompose && n > 1) {
    const int first = chunks * min(index, n) / n;
    return {first, first, chunks * min(index + 1, n) / n, n, index == n - 1};
  }
  const bool forgets = (least & 1023) == 1;
  const int run = forgets ? length : most_of_it, first = min(index * run, chunks), end = min(first + run, chunks);
  return {first == end ? end
          : forgets    ? first - own
                       : 0,
          first, end, 0, first < chunks ? end == chunks : chunks == 0 && index == 0};
}

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

// Calls `function` with a pointer to element (v, k) of the state at `states` + `matrix` elements, typed, and whether the keys of
// a value channel are contiguous there: for the first row and column of this thread in a warp's rows from `first_row` on.
template <int K, class Function>
__device__ __forceinline__ void with_state(const PrefillParams& p, const void* states, int64_t matrix, int first_row,
                                           const Function& function) {
  const int lane = threadIdx.x & 31, v = first_row + (lane >> 2), k = 2 * (lane & 3);
  const int64_t at = matrix + (p.state_v_first ? static_cast<int64_t>(v) * K + k : static_cast<int64_t>(k) * p.V + v);
  if (p.state_dtype == DType::kFP32) {
    float* const first = static_cast<float*>(const_cast<void*>(states)) + at;
    p.state_v_first ? function(first, std::true_type{}) : function(first, std::false_type{});
  } else {
    __nv_bfloat16* const first = static_cast<__nv_bfloat16*>(const_cast<void*>(states)) + at;
    p.state_v_first ? function(first, std::true_type{}) : function(first, std::false_type{});
  }
}

// Reads this warp's rows of a state.
template <int K>
__device__ __forceinline__ void load_state(const PrefillParams& p, const void* states, int64_t matrix, int first_row,
                                           float (&s)[K / 2]) {
  with_state<K>(p, states, matrix, first_row, [&](const auto* first, auto v_first) {
    using T = std::decay_t<decltype(*first)>;
    int V = p.V;
    asm volatile("" : "+r"(V));  // else its multiples take registers all along
#pragma unroll
    for (int i = 0; i < K / 8; ++i)  // channels 8 i + 2 t and the next
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 x;
        if constexpr (decltype(v_first)::value) {
          const T* at = first + 8 * half * K + 8 * i;
          if constexpr (std::is_same_v<T, float>) {
            x = *reinterpret_cast<const float2*>(at);
          } else {
            x = unpack<T>(*reinterpret_cast<const uint32_t*>(at));
          }
        } else {
          const T* at = first + 8 * i * V + 8 * half;
          x = {static_cast<float>(at[0]), static_cast<float>(at[V])};
        }
        s[4 * i + 2 * half] = x.x;
        s[4 * i + 2 * half + 1] = x.y;
      }
  });
}

// Writes this warp's rows of S, 2^E times what the accumulators hold.
template <int K>
__device__ __forceinline__ void store_state(const PrefillParams& p, void* states, int64_t matrix, int first_row,
                                            const float (&s)[K / 2], int exponent) {
  // In two steps, since 2^E may be out of the range of a float where S is zero or tiny.
  const float factor = power_of_two(exponent - exponent / 2), factor2 = power_of_two(exponent / 2);
  with_state<K>(p, states, matrix, first_row, [&](auto* first, auto v_first) {
    using T = std::decay_t<decltype(*first)>;
    int V = p.V;
    asm volatile("" : "+r"(V));  // else its multiples take registers all along
#pragma unroll
    for (int i = 0; i < K / 8; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = s[4 * i + 2 * half] * factor * factor2, y = s[4 * i + 2 * half + 1] * factor * factor2;
        if constexpr (decltype(v_first)::value) {
          T* at = first + 8 * half * K + 8 * i;
          if constexpr (std::is_same_v<T, float>) {
            *reinterpret_cast<float2*>(at) = {x, y};
          } else {
            *reinterpret_cast<uint32_t*>(at) = pack<T>(x, y);
          }
        } else {
          T* at = first + 8 * i * V + 8 * half;
          at[0] = static_cast<T>(x);
          at[V] = static_cast<T>(y);
        }
      }
  });
}

template <size_t N>
__device__ __forceinline__ void set_to_zero(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = 0.0f;
}

template <size_t N>
__device__ __forceinline__ uint32_t largest_magnitude(const float (&x)[N]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) largest = max_or_nan(largest, fabsf(x[i]));
  return warp_max(__float_as_uint(largest));
}

// Pairs of accumulators as fp16 operand.
template <size_t N>
__device__ __forceinline__ void pack_pairs(const float (&x)[2 * N], uint32_t (&packed)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) packed[i] = pack<__half>(x[2 * i], x[2 * i + 1]);
}

// s *= 2^by, for `by` of at most 127. Zeros below -126.
template <size_t N>
__device__ __forceinline__ void scale_by_power(float (&s)[N], int by) {
  const float factor = power_of_two(by);
#pragma unroll
  for (int i = 0; i < N; ++i) s[i] *= factor;
}

// Scales this warp's rows of a state for fp16 and returns their exponent.
template <size_t N>
__device__ __forceinline__ int set_exponent(float (&s)[N]) {
  const uint32_t bits = largest_magnitude(s);
  if (bits == 0) return kNoState;
  const int exponent = max(exponent_of(bits) - kHeadroom, -127);
  scale_by_power(s, -exponent);
  return exponent;
}

// Writes this warp's rows of the 64 from 64 * `group` on of M, 2^exponent times `s`, which is overwritten.
template <int K>
__device__ __forceinline__ void store_matrix(char* composition, int group, float (&s)[K / 2], int exponent) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x & 31;
  const int by = max(exponent_of(largest_magnitude(s)) - kLargestHalf, -127);
  scale_by_power(s, -by);
  char* const tile = composition + Composition<K>::kMatrix + group * kChunk * K * 2;
#pragma unroll
  for (int i = 0; i < K / 8; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<uint32_t*>(tile + tile_offset(16 * warp + (lane >> 2) + 8 * half, i) + 4 * (lane & 3)) =
          pack<__half>(s[4 * i + 2 * half], s[4 * i + 2 * half + 1]);
  if (lane == 0) reinterpret_cast<int*>(composition + Composition<K>::kExponents)[4 * group + warp] = exponent + by;
}

// Writes rows of N of 64 value channels, 2^exponent times `s`, which is overwritten.
template <int K>
__device__ __forceinline__ void store_rows(char* composition, int half, float (&s)[K / 2], int exponent) {
  scale_by_power(s, exponent - exponent / 2);
  scale_by_power(s, exponent / 2);
  float4* const to =
      reinterpret_cast<float4*>(composition + Composition<K>::kRows + half * Composition<K>::kRowsBytes) +
      threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < K / 8; ++i) to[128 * i] = {s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]};
}

// The state at the end of the first `count` segments, whose compositions come one after the other into the stages of the
// ring but the first one. That of the first segment is without M: its N holds the initial state. For practice nobody brings
// them, and nobody waits.
template <int K>
__device__ __forceinline__ void compose_state(const char* ring_stages, uint64_t* full, uint64_t* empty, int count,
                                              bool practice, float (&s)[K / 2]) {
  using In = Composition<K>;
  RingPosition<kJoiningStages> ring;
  set_to_zero(s);
#pragma unroll 1
  for (int segment = 0; segment < count; ++segment) {
    const char* const stage = ring_stages + (ring.stage + 1) * RecurrenceSmem<K, 1>::kStage;
    if (!practice) Barrier::wait(full + ring.stage, ring.phase);
    int by = 0;  // the product is 2^by times what the accumulators hold
    if (segment > 0) {
      // 16 columns of S meet 16 rows of M, whose exponent goes to the columns. They all get the largest size that fp16 holds.
      const int* const exponents = reinterpret_cast<const int*>(stage + In::kExponents);
      int size = kLowestExponent;
#pragma unroll
      for (int i = 0; i < K / 16; ++i) {
        uint32_t bits = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) bits = max(bits, magnitude_bits(s[8 * i + j]));
        size = max(size, exponent_of(bits) + exponents[i]);
      }
      by = __reduce_max_sync(0xffffffffu, size) - kLargestHalf;
      uint32_t s_packed[K / 4];
#pragma unroll
      for (int i = 0; i < K / 16; ++i) {
        const float factor = power_of_two(exponents[i] - by);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          s_packed[4 * i + j] = pack<__half>(s[8 * i + 2 * j] * factor, s[8 * i + 2 * j + 1] * factor);
      }

      const uint64_t m = descriptor_mn_major(smem_address(stage + In::kMatrix));
      fence_registers(s);
      fence_registers(s_packed);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < K / 16; ++k)
        wgmma_rs<K, Major::MN>(s, s_packed + 4 * k, advance(m, k / 4 * (kChunk * K * 2) + k % 4 * 16 * kRowBytes),
                               k > 0);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      fence_registers(s);
    }
    const float factor = power_of_two(by - by / 2), factor2 = power_of_two(by / 2);
    const float4* const n = reinterpret_cast<const float4*>(stage + In::kRows) + threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < K / 8; ++i) {
      const float4 x = n[128 * i];
      s[4 * i] = fmaf(s[4 * i] * factor, factor2, x.x);
      s[4 * i + 1] = fmaf(s[4 * i + 1] * factor, factor2, x.y);
      s[4 * i + 2] = fmaf(s[4 * i + 2] * factor, factor2, x.z);
      s[4 * i + 3] = fmaf(s[4 * i + 3] * factor, factor2, x.w);
    }
    if (!practice) Barrier::arrive(empty + ring.stage);
    ring.next();
  }
}

// The exponent that rows of a state, 2^exponent times what registers of size `bits` hold, are to have: `wanted` at least, for
// what is added to them. `bits` is 0 where nobody has looked.
__device__ __forceinline__ int next_exponent_of(int exponent, uint32_t bits, int wanted) {
  int next = exponent;
  if (bits != 0) {
    const int size = exponent + max(exponent_of(bits), kHeadroom - 127) - kHeadroom;  // a step that one factor can do
    // Not at every small change: a little off either way is within fp16's range.
    if (size >= exponent + 7 || (size <= exponent - 8 && wanted <= exponent - 8)) next = size;
  }
  return max(next, wanted);
}

// What U / 2^u_exponent needs of the state's exponent: U is 2^(15 + u_exponent) at most.
__device__ __forceinline__ int wanted_exponent(int u_exponent) { return u_exponent + 15 - kHeadroom; }

// This thread's share of Uᵀ, times `factor`, in the order of accumulators.
__device__ __forceinline__ void load_u(const char* from, float factor, float (&u)[32]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 r = reinterpret_cast<const uint4*>(from)[i * 128 + threadIdx.x % 128];
    const uint32_t pairs[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 x = unpack<__half>(pairs[j]);
      u[8 * i + 2 * j] = x.x * factor;
      u[8 * i + 2 * j + 1] = x.y * factor;
    }
  }
}

// The decays of this thread's columns of a state over a chunk.
template <int K>
__device__ __forceinline__ void load_decay(const char* record, float (&decay)[K / 4]) {
#pragma unroll
  for (int i = 0; i < K / 16; ++i) {
    const float4 d = reinterpret_cast<const float4*>(record + Record<K>::kDecay)[4 * i + (threadIdx.x & 3)];
    decay[4 * i] = d.x;
    decay[4 * i + 1] = d.y;
    decay[4 * i + 2] = d.z;
    decay[4 * i + 3] = d.w;
  }
}

template <int K>
__device__ __forceinline__ void decay_state(const float (&decay)[K / 4], float (&s)[K / 2]) {
#pragma unroll
  for (int i = 0; i < K / 8; ++i) {
    s[4 * i] *= decay[2 * i];
    s[4 * i + 1] *= decay[2 * i + 1];
    s[4 * i + 2] *= decay[2 * i];
    s[4 * i + 3] *= decay[2 * i + 1];
  }
}

// Begins Uᵀ -= S Wᵀ.
template <int K>
__device__ __forceinline__ void subtract_known(const char* stage, const uint32_t (&s_packed)[K / 4], float (&u)[32]) {
  const uint64_t w = descriptor_k_major(smem_address(stage + Record<K>::kW));
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < K / 16; ++k)
    wgmma_rs<64, Major::K, ScaleIn::Neg>(u, s_packed + 4 * k, advance(w, k / 4 * kHalfBytes + k % 4 * 32));
  cute::warpgroup_commit_batch();
}

// Begins S += Ũᵀ Kr.
template <int K>
__device__ __forceinline__ void add_update(const char* stage, const uint32_t (&u_packed)[16], float (&s)[K / 2]) {
  const uint64_t kr = descriptor_mn_major(smem_address(stage + Record<K>::kKr));
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_rs<K, Major::MN>(s, u_packed + 4 * k, advance(kr, k * 16 * kRowBytes));
  cute::warpgroup_commit_batch();
}

// Zeros in the rows of P's tiles that no record brings; for a whole warpgroup.
__device__ __forceinline__ void clear_above_diagonal(char* p) {
#pragma unroll
  for (int j = 1; j < kChunk / kBlock; ++j)
    if (threadIdx.x % 128 < j * kBlock * kNarrowRowBytes / 16)
      reinterpret_cast<uint4*>(p + j * kPTileBytes)[threadIdx.x % 128] = uint4{};
}

// Arrivals at a barrier of those that share a ring: each thread at that of its own CTA, and, of a cluster of two, each warp
// at that of the other one.
__device__ __forceinline__ int arrivals(int threads, int ctas) { return threads + (ctas - 1) * threads / 32; }

__device__ __forceinline__ void arrive_at(uint64_t* barrier, int ctas) {
  Barrier::arrive(barrier);
  if (ctas == 2) {
    __syncwarp();
    Barrier::arrive(barrier, cute::block_rank_in_cluster() ^ 1, threadIdx.x % 32 == 0);
  }
}

// Carries 64 rows, 2^exponent times `s`, through the next `chunks` records of the ring, without output and with U
// (`has_u`), or 0 instead. Two warpgroups do this at the same time, one for N and one for M, so that this one's products
// can wait for its loads.
template <int K>
__device__ __forceinline__ void carry_state(const char* ring_stages, uint64_t* full, uint64_t* empty, int ctas,
                                            int chunks, bool has_u, int half,
                                            RingPosition<RecurrenceSmem<K, 1>::kStages>& ring, float (&s)[K / 2],
                                            int& exponent) {
  using In = Record<K>;
  const int warp = threadIdx.x / 32 % 4;
  uint32_t bits = 0;
#pragma unroll 1
  for (int c = 0; c < chunks; ++c) {
    const char* const stage = ring_stages + ring.stage * RecurrenceSmem<K, 1>::kStage;
    Barrier::wait(full + ring.stage, ring.phase);
    const int u_exponent = reinterpret_cast<const int*>(stage + In::kExponents)[4 * half + warp];
    const int next = next_exponent_of(exponent, bits, has_u ? wanted_exponent(u_exponent) : kLowestExponent);
    if (next != exponent) scale_by_power(s, exponent - next);
    exponent = next;
    float u[32];
    if (has_u) {
      load_u(stage + In::kU, power_of_two(u_exponent - next), u);
    } else {
      set_to_zero(u);
    }
    uint32_t s_packed[K / 4];
    pack_pairs(s, s_packed);
    float decay[K / 4];
    load_decay<K>(stage, decay);
    fence_registers(u);
    fence_registers(s_packed);
    subtract_known<K>(stage, s_packed, u);
    decay_state<K>(decay, s);
    fence_registers(s);
    cute::warpgroup_wait<0>();
    fence_registers(u);
    uint32_t u_packed[16];
    pack_pairs(u, u_packed);
    fence_registers(s);
    fence_registers(u_packed);
    add_update<K>(stage, u_packed, s);
    cute::warpgroup_wait<0>();
    fence_registers(s);
    arrive_at(empty + ring.stage, ctas);
    ring.next();
    bits = c % kRescaleInterval == kRescaleInterval - 1 ? largest_magnitude(s) : 0;
  }
}

// Warp `warp` of those that take the output of 64 value channels from its tile to global memory, chunk after chunk.
template <int K, int kHalves>
__device__ __forceinline__ void store_outputs(const PrefillParams& p, const Sequence& seq, const Segment& segment,
                                              int head, int half, int index, int warp, char* smem) {
  using Smem = RecurrenceSmem<K, kHalves>;
  constexpr int kRows = 4 * Smem::kStoreWarps;  // that the warps store at a time, 8 lanes a row
  uint64_t* const tile_full = reinterpret_cast<uint64_t*>(smem + Smem::kBarriers) + 2 * Smem::kStages + index;
  uint64_t* const tile_empty = tile_full + kHalves;
  const int lane = threadIdx.x & 31, first = 4 * warp + lane / 8;
  const char* const tile = smem + Smem::kTiles + index * Smem::kTileBytes + first * Smem::kTileRow + lane % 8 * 16;
  const int64_t token = seq.start + static_cast<int64_t>(segment.first) * kChunk + first;
  char* out = static_cast<char*>(p.out) + (seq.batch * p.out_strides[0] + token * p.out_strides[1] +
                                           head * p.out_strides[2] + 64 * half + lane % 8 * 8) *
                                              2;
  const int64_t step = kRows * p.out_strides[1] * 2;
  for (int c = segment.first; c < segment.end; ++c) {
    Barrier::wait(tile_full, (c - segment.first) & 1);
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

// Waits for the record of chunk c, where `prepare` runs beside this kernel. Returns up to which chunk records are ready. For
// a whole warp, which looks at 32 at a time: a look takes as long as a good part of a chunk.
__device__ __forceinline__ int wait_until_ready(const PrefillParams& p, int first_slot, int head, int c, int end) {
  const int lane = threadIdx.x & 31;
  const int* const flag = p.ready + static_cast<int64_t>(first_slot + min(c + lane, end - 1)) * p.HV + head;
  uint32_t missing;
  while ((missing = __ballot_sync(0xffffffffu, load_flag(flag) == 0)) & 1) {
    // Every record becomes ready, unless cu_seqlens is not what it should be: then the end of `prepare` ends the waiting.
    if (__any_sync(0xffffffffu, load_flag(&p.progress->finished) >= p.prepare_ctas)) {
      missing = 0;
      break;
    }
    __nanosleep(50);
  }
  __syncwarp();
  fence_global_proxy();
  return min(c + (missing == 0 ? 32 : __ffs(missing) - 1), end);
}

// kCompose: whether CTAs that share a chain may compose its states. kStates: whether the states between chunks are stored:
// calls without that get a kernel without those instructions, which come from DRAM, and would make the loop twice as long.
template <class Element, int K, int kHalves, bool kCompose, bool kStates>
__global__ void __launch_bounds__(kRecurrenceThreads<kHalves, kCompose>, 1)
    recurrence(const __grid_constant__ PrefillParams p) {
  static_assert(kHalves == 1 || !kCompose);
  using Smem = RecurrenceSmem<K, kHalves>;
  using In = Record<K>;
  constexpr int kThreads = kRecurrenceThreads<kHalves, kCompose>, kCopying = kThreads / 128 - 1;  // a warpgroup
  extern __shared__ __align__(1024) char smem[];
  uint64_t* const full = reinterpret_cast<uint64_t*>(smem + Smem::kBarriers);
  uint64_t* const empty = full + Smem::kStages;
  uint64_t* const tile_full = empty + Smem::kStages;
  uint64_t* const tile_empty = tile_full + kHalves;
  uint64_t* const composing_full = reinterpret_cast<uint64_t*>(smem + Smem::kComposingBarriers);
  uint64_t* const composing_empty = composing_full + Smem::kStages;
  uint64_t* const drained = composing_empty + Smem::kStages;  // M and N are made
  uint64_t* const composed = drained + 1;                     // the first state is there
  uint64_t* const joining_full = composed + 1;                // a composition is there
  uint64_t* const joining_empty = joining_full + Smem::kStages;

  const int warpgroup = cutlass::canonical_warp_group_idx();
  const int parts = p.V / 64 / kHalves, segments = kHalves == 1 ? p.segments : 1;
  // The first CTAs begin while `prepare` is still at work, and do only this: plan, carry a chunk and compose a state, of
  // whatever lies in shared memory. Then the instructions are in L2 when the others need them, and don't come from DRAM.
  const bool is_scout = blockIdx.x < p.scouts;
  const int block = is_scout ? 0 : blockIdx.x - p.scouts;
  const int part = block % parts, index = block / parts % segments;
  const int chain = block / parts / segments, head = chain % p.HV, n = p.first_sequence + chain / p.HV;
  const Sequence seq = sequence(p, n);
  const int chunks = chunks_of(seq.length);
  Segment* const plan = reinterpret_cast<Segment*>(smem + Smem::kPlan);
  int* const is_finite = reinterpret_cast<int*>(smem + Smem::kIsFinite);  // [4]
  Segment segment{0, 0, chunks, 0, true};
  // CTAs of a cluster that share their records, each of which copies a part of them for both: one for each half of the value
  // channels.
  const int sharers = kHalves == 1 && !is_scout ? p.sharers : 1;

  if (threadIdx.x == 0) {
    for (int i = 0; i < Smem::kStages; ++i) {
      Barrier::init(full + i, 1);
      Barrier::init(empty + i, arrivals(128 * kHalves, sharers));
      Barrier::init(composing_full + i, 1);
      Barrier::init(composing_empty + i, arrivals(256, sharers));
      Barrier::init(joining_full + i, 1);
      Barrier::init(joining_empty + i, 128);
    }
    for (int i = 0; i < kHalves; ++i) {
      Barrier::init(tile_full + i, 128);
      Barrier::init(tile_empty + i, Smem::kStoreWarps);
    }
    Barrier::init(drained, arrivals(256, sharers));
    Barrier::init(composed, arrivals(128, sharers));
    cutlass::arch::fence_barrier_init();
    *plan = segment;
    if (is_scout) {  // everything is there, as it were
      Barrier::arrive(full);
      Barrier::arrive(composing_full);
    }
  }
  sharers == 2 ? cute::cluster_sync() : __syncthreads();

  // How often the records of this segment are read to find out M and N, if they are: 64 rows of M at a time, shared out over
  // the halves of the value channels. For the first segment N alone, from the initial state.
  const auto composing_passes = [&]() {
    if (!kCompose || index + 1 >= segment.composed) return 0;
    return index == 0 ? 1 : (K / 64 + parts - 1) / parts;
  };

  // Whether this segment's first state is composed of those before it.
  const auto joins = [&]() { return kCompose && index > 0 && index < segment.composed; };

  if (warpgroup == kCopying) {  // ---------------------------------------------------------------------------- copies
    cutlass::arch::warpgroup_reg_dealloc<kThreads == 256 ? 72 : 40>();
    const int warp = cutlass::canonical_warp_idx_sync() - 4 * kCopying, lane = threadIdx.x & 31;
    if (warp == 0) {
      // Planned twice: the first time while `prepare` is still at work, for the instructions.
#pragma unroll 1
      for (bool rehearses = segments > 1 && 4 * blockIdx.x < 3 * gridDim.x;; rehearses = false) {
        if (!rehearses && !is_scout && p.ready == nullptr) wait_for_previous_kernel();
        if (segments > 1) segment = plan_segment<kCompose>(p, seq, head, index, rehearses);
        if (!rehearses || is_scout) break;
      }
    }
    if (is_scout) return;
    if (segments > 1) {
      __syncthreads();  // the initial states have been looked at
      if (sharers == 2) cute::cluster_sync();
      if (warp == 0) {
        // Where one is to start with zeros, but the initial state of either half is not finite, both start with that.
        int finite = 1;
        if (lane < 4 * sharers) finite = sharers == 2 ? load_from(is_finite + lane % 4, lane / 4) : is_finite[lane];
        if (!__all_sync(0xffffffffu, finite) && segment.composed == 0 && segment.first < segment.end) segment.start = 0;
        if (lane == 0) *plan = segment;
      }
      named_barrier(kPlanning, kThreads);
      segment = *plan;
    }
    if (warp > 0) {
      const int tile = (warp - 1) / Smem::kStoreWarps;
      if (warp < 3)
        store_outputs<K, kHalves>(p, seq, segment, head, part * kHalves + tile, tile, (warp - 1) % Smem::kStoreWarps,
                                  smem);
      return;
    }
    // Bytes of a record that this CTA copies for all that share it, W and Q or the rest: of what comes before U, and of Q with
    // P's first tile behind it. Each has its own half of U.
    const int state_from = sharers == 2 && part == 1 ? In::kKr : 0,
              state_to = sharers == 2 && part == 0 ? In::kKr : In::kU;
    const int output_from = sharers == 2 && part == 1 ? In::kP : In::kQ,
              output_to = sharers == 2 && part == 0 ? In::kP : In::kP + p_tile(1);
    const bool copies_p = sharers == 1 || part == 1;
    const auto copy_state_part = [&](const char* in, uint64_t* barrier, char* to) {
      bulk_load(in + state_from, barrier, to + state_from, state_to - state_from, sharers);
      bulk_load(in + In::kU + part * In::kUHalfBytes, barrier, to + In::kU, In::kUHalfBytes, 1);
    };
    if (const int passes = composing_passes(); passes > 0) {
      if (lane == 0) {
        RingPosition<Smem::kStages> ring;
#pragma unroll 1
        for (int pass = 0; pass < passes; ++pass)
#pragma unroll 1
          for (int c = segment.first; c < segment.end; ++c) {
            if (pass == 0 && c == segment.first + 2) Barrier::wait(composing_full, 0);
            Barrier::wait(composing_empty + ring.stage, ring.phase ^ 1);
            TransactionBarrier::arrive_and_expect_tx(composing_full + ring.stage, Smem::kQ);
            copy_state_part(record<K>(p, seq.first_slot + c, head), composing_full + ring.stage,
                            smem + ring.stage * Smem::kStage);
            ring.next();
          }
        Barrier::wait(drained, 0);
      }
      __syncwarp();
    }
    RingPosition<Smem::kStages> ring;
    int ready = p.ready == nullptr ? segment.end : segment.start;  // chunks before it are there
    for (int c = segment.start; c < segment.end; ++c) {
      if (c >= ready) ready = wait_until_ready(p, seq.first_slot, head, c, segment.end);
      if (lane != 0) continue;
      if (joins() && c == segment.first + 1) {
        // The first record is on its way to the first stage. The others are for the compositions of the segments before. CTAs
        // begin in the order of their numbers, and those that this one waits for have lower ones: nobody waits for one that
        // finds no place to run.
        const int* flag = flags(p, head, n - p.first_sequence);
        const char* from = composition<K>(p, seq.first_slot, head);
        RingPosition<kJoiningStages> place;
#pragma unroll 1
        for (int i = 0; i < index; ++i) {
          for (int j = 0; j < parts; ++j, ++flag)
            while (load_flag(flag) == 0) {
            }
          fence_global_proxy();
          uint64_t* const barrier = joining_full + place.stage;
          Barrier::wait(joining_empty + place.stage, place.phase ^ 1);
          char* const to = smem + (place.stage + 1) * Smem::kStage;
          const int matrix_bytes = i > 0 ? Composition<K>::kRows : 0;
          TransactionBarrier::arrive_and_expect_tx(barrier, matrix_bytes + Composition<K>::kRowsBytes);
          if (i > 0) bulk_load(from, barrier, to, matrix_bytes, 1);
          bulk_load(from + Composition<K>::kRows + part * Composition<K>::kRowsBytes, barrier,
                    to + Composition<K>::kRows, Composition<K>::kRowsBytes, 1);
          from += static_cast<int64_t>(p.HV) * Composition<K>::bytes(p.V);
          place.next();
        }
        Barrier::wait(composed, 0);
      }
      const bool has_output = c >= segment.first;
      const char* in = record<K>(p, seq.first_slot + c, head);
      char* to = smem + ring.stage * Smem::kStage;
      uint64_t* barrier = full + ring.stage;
      // Not all at once in the beginning, when all CTAs wait for their first one.
      if (Smem::kStages > 2 && c == segment.start + 2) Barrier::wait(full, 0);
      Barrier::wait(empty + ring.stage, ring.phase ^ 1);
      TransactionBarrier::arrive_and_expect_tx(barrier, has_output ? Smem::kCopiedBytes : Smem::kQ);
      if constexpr (kHalves == 2) {
        bulk_load(in, barrier, to, In::kP + p_tile(1), 1);
      } else {
        copy_state_part(in, barrier, to);
        if (has_output)
          bulk_load(in + output_from, barrier, to + output_from - Smem::kSkipped, output_to - output_from, sharers);
      }
      if (has_output && copies_p) {  // P's other tiles, the last one with what is behind it
#pragma unroll
        for (int j = 1; j < kChunk / kBlock; ++j) {
          const int tile = In::kP + p_tile(j), end = In::kP + p_tile(j + 1);
          bulk_load(in + tile, barrier, to + Smem::kP + j * (kPTileBytes + kBlock * kNarrowRowBytes),
                    (end < In::kScale ? end : In::kScale + kChunk * 4) - tile, sharers);
        }
      }
      ring.next();
    }
    // This kernel ends after `prepare`, for those who wait for this one.
    if (p.ready != nullptr && blockIdx.x == gridDim.x - 1) wait_for_previous_kernel();
    return;
  }

  // ------------------------------------------------------------------------------------------------------------ state
  cutlass::arch::warpgroup_reg_alloc<kThreads == 256 ? 248 : 232>();
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread & 31, t = lane & 3;
  float s[K / 2];
  int exponent;  // S is 2^exponent times what the registers hold

  const int half = part * kHalves + warpgroup;  // which 64 value channels
  const int first_row = 64 * half + 16 * warp;
  const int64_t matrix_size = static_cast<int64_t>(K) * p.V;
  const int64_t matrix = (static_cast<int64_t>(n) * p.state_heads + head) * matrix_size;
  char* const tile = smem + Smem::kTiles + warpgroup * Smem::kTileBytes;
  static_assert(!kCompose || Composition<K>::bytes(64) <= Smem::kStage);

  const bool carries_state = !kCompose || warpgroup == 0;  // else helps with M only
  const auto load_initial_state = [&]() {
    if (carries_state && p.initial_state != nullptr) {
      load_state<K>(p, p.initial_state, matrix, first_row, s);
    } else {
      set_to_zero(s);
    }
  };
  // What this segment's chunks do to any state: N by the first warpgroup, from zeros, and M by the second.
  const auto make_composition = [&](char* to) {
    RingPosition<RecurrenceSmem<K, 1>::kStages> ring;
    const int passes = is_scout ? 1 : composing_passes();
    for (int pass = 0; pass < passes; ++pass) {
      const int group = part + pass * parts, row = 64 * group + 16 * warp + (lane >> 2);
      const int count = segment.end - segment.first;
      const bool has_matrix = index > 0 || is_scout;
      if (!has_matrix && warpgroup == 1) {
        for (int c = 0; c < count; ++c, ring.next()) {
          Barrier::wait(composing_full + ring.stage, ring.phase);
          arrive_at(composing_empty + ring.stage, sharers);
        }
        break;
      }
      if (has_matrix) {
#pragma unroll
        for (int i = 0; i < K / 2; ++i)
          s[i] = warpgroup == 1 && row + (i >> 1 & 1) * 8 == 8 * (i >> 2) + 2 * t + (i & 1) ? 1 << kHeadroom : 0.0f;
        exponent = warpgroup == 1 ? -kHeadroom : kNoState;
      } else {
        exponent = set_exponent(s);
      }
      carry_state<K>(smem, composing_full, composing_empty, sharers, count, warpgroup == 0, part, ring, s, exponent);
      if (is_scout) return;
      if (warpgroup == 0) {
        store_rows<K>(to, part, s, exponent);  // in every pass the same
      } else if (group < K / 64) {
        store_matrix<K>(to, group, s, exponent);
      }
    }
    arrive_at(drained, sharers);
    // The first segment needs the initial state once more, before the last one, which waits for the first, may overwrite it.
    if (index == 0) load_initial_state();
    named_barrier(kPublishing, 256);
  };

  load_initial_state();
  if (carries_state && !is_scout) {  // while the state is on its way; no copy touches these rows, of whichever CTA
#pragma unroll
    for (int i = 0; i < Smem::kStages; ++i) clear_above_diagonal(smem + i * Smem::kStage + Smem::kP);
    fence_async_proxy();
  }
  int chunks_before = 0;  // of other sequences, where intermediate states are stored

  RingPosition<Smem::kStages> ring;
  if (is_scout) {  // a chunk without output, of a state of zeros
    segment = {0, 1, kCompose && !carries_state ? 2 : 1, kLeastComposed, false};
    set_to_zero(s);
  } else if (segments > 1) {
    const bool finite = exponent_of(largest_magnitude(s)) < 128;
    if (carries_state && lane == 0) is_finite[warp] = finite;
    __syncthreads();
    if (sharers == 2) cute::cluster_sync();
    named_barrier(kPlanning, kThreads);
    segment = *plan;
    if (segment.start > 0) set_to_zero(s);
  } else {
    named_barrier(kClearing, kThreads - 128);  // the zeros are there
  }
  if constexpr (kCompose) {
    char* const compositions = segment.composed > 0 ? composition<K>(p, seq.first_slot, head) : nullptr;
    const int64_t step = static_cast<int64_t>(p.HV) * Composition<K>::bytes(p.V);  // from a segment to the next
    const bool makes_composition = is_scout ? !carries_state : composing_passes() > 0;
    if (makes_composition) make_composition(compositions + index * step);
    if (makes_composition && thread == 0 && carries_state)
      set_flag(flags(p, head, n - p.first_sequence) + index * parts + part);
    if (is_scout ? !carries_state : joins() && carries_state) {
      compose_state<K>(smem, joining_full, joining_empty, is_scout ? 2 : index, is_scout, s);
      if (!is_scout) {
        named_barrier(kClearing, 128);  // all have read the last composition
#pragma unroll
        for (int i = 1; i < Smem::kStages; ++i) clear_above_diagonal(smem + i * Smem::kStage + Smem::kP);
        fence_async_proxy();
        arrive_at(composed, sharers);
      }
    }
    if (!carries_state) return;
  }
  if constexpr (kStates) {
    if (p.cu_seqlens != nullptr)
      for (int m = lane; m < n; m += 32) chunks_before += chunks_of(sequence(p, m).length);
    chunks_before = p.cu_seqlens == nullptr ? n * chunks : __reduce_add_sync(0xffffffffu, chunks_before);
  }

  float u[32], o[32], decay[K / 4];
  uint32_t s_packed[K / 4];
  int next_exponent;  // for the chunk that `u` belongs to

  // Uᵀ of a chunk as accumulators, and the exponent that it asks for.
  const auto load_next_u = [&](const char* stage, uint32_t state_bits) {
    const int u_exponent = reinterpret_cast<const int*>(stage + In::kExponents)[4 * half + warp];
    next_exponent = next_exponent_of(exponent, state_bits, wanted_exponent(u_exponent));
    load_u(stage + In::kU + (kHalves == 2 ? warpgroup * In::kUHalfBytes : 0), power_of_two(u_exponent - next_exponent),
           u);
  };

  // S as operand, in the units of the chunk to come.
  const auto pack_state = [&]() {
    if (next_exponent != exponent) {
      scale_by_power(s, exponent - next_exponent);
      exponent = next_exponent;
    }
    pack_pairs(s, s_packed);
  };

  // The output of the chunk before, transposed into the tile.
  uint32_t o_packed[16];
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

  // Where there is no state, these are right.
#pragma unroll
  for (int i = 0; i < K / 4; ++i) s_packed[i] = 0;
  const bool has_state =
      !is_scout && (segment.start == 0 || segment.composed > 0);  // else it is zero, and so is `s_packed`
  exponent = has_state ? set_exponent(s) : kNoState;
  next_exponent = exponent;
  if (segment.start < segment.end) {
    Barrier::wait(full + ring.stage, ring.phase);
    load_next_u(smem + ring.stage * Smem::kStage, 0);
    has_state ? pack_state() : void(exponent = next_exponent);
  }
  // Before `segment.first` the output is that of leftovers in shared memory, and nobody takes it: a loop of its own for these
  // chunks would make the compiler spill.
  for (int c = segment.start; c < segment.end; ++c) {
    const char* stage = smem + ring.stage * Smem::kStage;
    if (kStates && c >= segment.first)
      store_state<K>(p, p.states, (static_cast<int64_t>(chunks_before + c) * p.state_heads + head) * matrix_size,
                     first_row, s, exponent);
    load_decay<K>(stage, decay);  // while the tensor cores, which have the first say in shared memory, are idle
    fence_registers(u);
    fence_registers(s_packed);
    subtract_known<K>(stage, s_packed, u);

    uint32_t state_bits = 0;
    if (c % kRescaleInterval == kRescaleInterval - 1) state_bits = largest_magnitude(s);
    decay_state<K>(decay, s);
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
    pack_pairs(u, u_packed);
    fence_registers(s);
    fence_registers(u_packed);
    add_update<K>(stage, u_packed, s);
    const uint64_t pd = descriptor_k_major_narrow(smem_address(stage + Smem::kP));
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_rs<64, Major::K>(o, u_packed + 4 * k, advance(pd, k * kPTileBytes));
    cute::warpgroup_commit_batch();
    if (c > segment.first) hand_over_output();

    // After the last chunk once more its own: loads under a condition would keep the old values alive all along.
    const char* next = stage;
    const int stage_in_use = ring.stage;
    ring.next();
    if (c + 1 < segment.end) {
      next = smem + ring.stage * Smem::kStage;
      Barrier::wait(full + ring.stage, ring.phase);
    }
    load_next_u(next, state_bits);
    const float unit = power_of_two(exponent);
    cute::warpgroup_wait<1>();
    fence_registers(s);
    pack_state();
    cute::warpgroup_wait<0>();
    fence_registers(o);
    if (kHalves == 2 || c >= segment.first) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float2 f = reinterpret_cast<const float2*>(stage + Smem::kScale)[4 * i + t];
        f = {f.x * unit, f.y * unit};
        o_packed[2 * i] = pack<Element>(o[4 * i] * f.x, o[4 * i + 1] * f.y);
        o_packed[2 * i + 1] = pack<Element>(o[4 * i + 2] * f.x, o[4 * i + 3] * f.y);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) o_packed[i] = 0;  // so that the old ones need no registers
    }
    arrive_at(empty + stage_in_use, sharers);
    fence_registers(o_packed);  // `o` and `decay` are never both alive: there is no room
  }
  launch_dependents();  // not earlier: CTAs of the next kernel would crowd the SMs that are free first
  if (segment.first < segment.end) hand_over_output();
  if (is_scout) return;
  if (p.final_state != nullptr && plan->is_last) store_state<K>(p, p.final_state, matrix, first_row, s, exponent);
  if (sharers == 2) cute::cluster_sync();  // the other CTA may still have to tell this one's barriers that it is done
}

}  // namespace kda

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
// The order in which a warpgroup feeds the tensor cores (cycles at full rate, K = 128; docs/prefill_kernel.md has what
// they take):
//
//   Ũ -= S W (256)   O = S Q (256)      S += Ũ Kr (256)   O += Ũ P (128)
//   meanwhile: decay S     pack Ũ               the output of the chunk before, the next U
//
// The compiler keeps products in flight only where it sees that nobody touches their registers: hence nothing is in
// flight from one turn of the loop to the next, and the output leaves packed.
//
// Where SMs are left over, several CTAs share a chain: each has a segment of the chunks, and begins early enough before it
// that what came still earlier is gone, by what `prepare` says of the decays (`plan_segment`). Where that is too early, a
// CTA finds out what its chunks do to a state before it knows that state: S M + N, with M from the rows of the identity and
// without U, N from zeros and with U, in passes of their own. From the M and N of all segments before comes its first state.
//
// With very many chunks and heads, `prepare` runs on other SMs meanwhile, and each record has a flag that says it is there.
//
// Each warp holds its 16 rows of S as S / 2^E, with E such that fp16 holds them: U / 2^E stays under 2^3, and E follows
// the size of S every few chunks. Rows never mix, so no two warps need agree on E.
//
// P comes without what is 0 above its diagonal blocks; those rows of its tiles are cleared once and stay. Products that
// leave them out would have another shape than Q Sᵀ on the same accumulators, and the compiler waits between shapes.
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
  static constexpr int kPlan = kBarriers + 8 * 2 * (kStages + kHalves);  // Segment
  static constexpr int kIsFinite = kPlan + 32;                           // int [4]: a warp's state
  static constexpr int kComposed = kIsFinite + 16;                       // a barrier: the first state is there
  static constexpr int kBytes = kComposed + 16;
};

// Chunks of one CTA: it begins at chunk `start`, and makes the output of chunks first..end-1.
struct Segment {
  int start, first, end;
  int composed;       // CTAs that compose the states of the chain, or 0
  int matrix_passes;  // for as many times 64 rows of M
  int passes;         // in all: those, then one for N unless nobody needs it, then the one that makes the output
};

constexpr int kPlanning = 1, kComposing = 2, kClearing = 3;  // named barriers
constexpr int kLargestHalf = 14;                             // log2 of what M and the state it multiplies are scaled to
template <int K>
constexpr int kMatrixBuffer = Composition<K>::kMatrixBytes + 1024;  // bytes for M and its exponents in shared memory
constexpr int kLowestExponent = -400;                               // of rows of M: what is less matters to no state
// log2 of what may be left of a state that is taken for forgotten: 72 bits below the last one of fp32.
constexpr float kForgotten = -96.0f;

// What CTA `index` of the p.segments that share a chain is to do; for a whole warp. `prefix` has room for chunks + 1
// floats.
//
// Either a segment begins with zeros where the norms of what multiplies the state up to its first chunk have a product of
// 2^kForgotten or less; it begins at chunk 0 where the decays are not as steep, or where a NaN or an infinity has come up
// before (their sum is a NaN then). If that makes a CTA late, fewer share the chain: the rest of them find nothing to do.
//
// Or states are composed. The CTAs of both halves of the value channels need each other for that, so that what decides is
// the same for both: never `from_the_start`, which says whether this half's initial state is not finite.
template <bool kCompose>
__device__ __forceinline__ Segment plan_segment(const PrefillParams& p, const Sequence& seq, int head, int part,
                                                int index, bool from_the_start, float* prefix) {
  const int lane = threadIdx.x & 31, chunks = chunks_of(seq.length), parts = p.V / 64;
  // The sums for two halves, which differ only where one of them is a NaN. Returns that of all chunks.
  const auto add_up = [&](int half, int other_half) {
    const float* const a = retention(p, half, head) + seq.first_slot;
    const float* const b = retention(p, other_half, head) + seq.first_slot;
    float sum = 0.0f;
    constexpr int kLoads = kCompose ? 4 : 1;  // in flight: long chains
    for (int base = 0; base < chunks; base += 32 * kLoads) {
      float x[kLoads], y[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int at = base + 32 * i + lane;
        x[i] = at < chunks ? __ldcg(a + at) : 0.0f;
        y[i] = kCompose && at < chunks ? __ldcg(b + at) : x[i];
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int at = base + 32 * i + lane;
        if (base + 32 * i >= chunks) break;
        float scan = kCompose ? max_or_nan(x[i], y[i]) : x[i];
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const float other = __shfl_up_sync(0xffffffffu, scan, step);
          if (lane >= step) scan += other;
        }
        if (at < chunks) prefix[at + 1] = sum + scan;
        sum += __shfl_sync(0xffffffffu, scan, 31);
      }
    }
    if (lane == 0) prefix[0] = 0.0f;
    __syncwarp();
    return sum;
  };

  bool whole_history = false;
  const auto start_for = [&](int first) {
    if (whole_history || !(prefix[first] - prefix[0] <= kForgotten)) return 0;
    int lo = 0, hi = first;  // enough is forgotten from lo on, and not from hi on
    while (hi - lo > 1) {
      const int middle = (lo + hi) / 2;
      (prefix[first] - prefix[middle] <= kForgotten ? lo : hi) = middle;
    }
    return lo;
  };
  // The time of the slowest of `count` CTAs, in fifths of a chunk with output. Chunks without are faster unless many CTAs
  // read them, which L2 limits.
  const auto cost_of = [&](int count) {
    const int length = (chunks + count - 1) / count, before = count > 2 ? 5 : 4;
    int cost = 0;
    for (int i = lane; i < count; i += 32) {
      const int first = min(i * length, chunks), end = min(first + length, chunks);
      if (end > first) cost = max(cost, (first - start_for(first)) * before + (end - first) * 5);
    }
    return static_cast<int>(__reduce_max_sync(0xffffffffu, static_cast<unsigned>(cost)));
  };
  int count, best;
  const auto choose_count = [&]() {
    count = 1;
    best = 5 * chunks;
    for (int candidate : {2, p.segments}) {
      if (candidate > p.segments) continue;
      const int cost = cost_of(candidate);
      if (cost < best) {
        best = cost;
        count = candidate;
      }
    }
  };

  bool are_finite = false;
  if constexpr (kCompose) {
    are_finite = magnitude_bits(add_up(0, parts - 1)) < 0x7f800000u;
  } else {
    add_up(part, part);
  }
  if (kCompose && are_finite) {
    choose_count();
    // Composed, the first segment goes over its chunks twice, and those after it as often as M takes besides, in the CTA
    // that has the most rows of it: so the first is longer. (The last one has no M and N to make, but has to wait for those
    // of the others.) Joining them is a sixth part for each.
    const int groups = p.K / 64, passes = (groups + parts - 1) / parts;
    const int first_cost = 4 + 5, cost = 4 * (passes + 1) + 5;
    const auto first_length = [&](int count) { return chunks * cost / (first_cost * (count - 1) + cost); };
    const int most = p.composed_chunks > 0 ? min(min(p.segments, chunks / p.composed_chunks), 1023) : 0;
    unsigned least = static_cast<unsigned>(best) << 10;
    for (int n = kLeastComposed + lane; n <= most; n += 32) {
      const int first = first_length(n), others = (chunks - first + n - 2) / (n - 1);
      const int slowest = max(first * first_cost, others * cost) + 6 * (n - 2) + 6;
      least = min(least, static_cast<unsigned>(slowest) << 10 | static_cast<unsigned>(n));
    }
    least = __reduce_min_sync(0xffffffffu, least);
    if (const int n = least & 1023; n > 0) {
      const int length = first_length(n);
      const auto first_of = [&](int i) {
        return i == 0 ? 0 : i >= n ? chunks : length + (chunks - length) * (i - 1) / (n - 1);
      };
      const bool has_matrix = index > 0 && index < n - 1;
      const int matrix_passes = has_matrix ? (groups - part + parts - 1) / parts : 0;
      return {first_of(index),     first_of(index),
              first_of(index + 1), n,
              matrix_passes,       matrix_passes + (index < n - 1 ? 2 : 1)};
    }
  } else if (kCompose && parts > 1) {
    add_up(part, part);
  }
  if (!are_finite || from_the_start) {
    whole_history = from_the_start;
    choose_count();
  }
  const int length = max((chunks + count - 1) / count, 1);
  const int first = min(index * length, chunks), end = min(first + length, chunks);
  return {first < end ? start_for(first) : end, first, end, 0, 0, 1};
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

// Writes this warp's rows of the 64 from 64 * `group` on of M, 2^exponent times `s`, which is overwritten.
template <int K>
__device__ __forceinline__ void store_matrix(char* composition, int group, float (&s)[K / 2], int exponent) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x & 31;
  const int by = exponent_of(largest_magnitude(s)) - kLargestHalf;
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

// This thread's share of the rows of N of 64 value channels: every 128th float4.
template <int K>
__device__ __forceinline__ float4* rows_of(char* composition, int half) {
  return reinterpret_cast<float4*>(composition + Composition<K>::kRows + half * Composition<K>::kRowsBytes) +
         threadIdx.x % 128;
}

// Writes rows of N, 2^exponent times `s`, which is overwritten.
template <int K>
__device__ __forceinline__ void store_rows(char* composition, int half, float (&s)[K / 2], int exponent) {
  scale_by_power(s, exponent);
  float4* const to = rows_of<K>(composition, half);
#pragma unroll
  for (int i = 0; i < K / 8; ++i) to[128 * i] = {s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]};
}

// The state at the end of the first `count` segments, for a warpgroup. `first` is the composition of the first of them,
// whose N holds the initial state, and `step` the way to the next one. `buffers` has room for two M.
template <int K>
__device__ __forceinline__ void compose_state(char* first, int64_t step, int count, int half, char* buffers,
                                              float (&s)[K / 2]) {
  using In = Composition<K>;
  const int thread = threadIdx.x % 128;
  const auto buffer_of = [&](int segment) { return buffers + segment % 2 * kMatrixBuffer<K>; };
  // M and its exponents.
  const auto bring = [&](int segment) {
    const uint4* const from = reinterpret_cast<const uint4*>(first + segment * step + In::kMatrix);
    uint4* const to = reinterpret_cast<uint4*>(buffer_of(segment));
#pragma unroll
    for (int i = thread; i < In::kRows / 16; i += 128) cute::SM80_CP_ASYNC_CACHEGLOBAL<uint4>::copy(from[i], to[i]);
    cute::cp_async_fence();
  };

  if (count > 1) bring(1);
#pragma unroll
  for (int i = 0; i < K / 8; ++i) {
    const float4 x = __ldcg(rows_of<K>(first, half) + 128 * i);
    s[4 * i] = x.x;
    s[4 * i + 1] = x.y;
    s[4 * i + 2] = x.z;
    s[4 * i + 3] = x.w;
  }
#pragma unroll 1
  for (int segment = 1; segment < count; ++segment) {
    const char* const matrix = buffer_of(segment);
    cute::cp_async_wait<0>();
    fence_async_proxy();
    named_barrier(kComposing, 128);  // this M is there, and nobody needs the one before any more
    if (segment + 1 < count) bring(segment + 1);
    float4 n[K / 8];
#pragma unroll
    for (int i = 0; i < K / 8; ++i) n[i] = __ldcg(rows_of<K>(first + segment * step, half) + 128 * i);

    // 16 columns of S meet 16 rows of M: their exponent, relative to the largest, goes to the columns.
    const int* const exponents = reinterpret_cast<const int*>(matrix + In::kExponents);
    int largest = exponents[0];
#pragma unroll
    for (int i = 1; i < K / 16; ++i) largest = max(largest, exponents[i]);
#pragma unroll
    for (int i = 0; i < K / 16; ++i) {
      const float factor = power_of_two(exponents[i] - largest);
#pragma unroll
      for (int j = 0; j < 8; ++j) s[8 * i + j] *= factor;
    }
    const int by = exponent_of(largest_magnitude(s)) - kLargestHalf;
    scale_by_power(s, -by);
    uint32_t s_packed[K / 4];
#pragma unroll
    for (int i = 0; i < K / 4; ++i) s_packed[i] = pack<__half>(s[2 * i], s[2 * i + 1]);

    const uint64_t m = descriptor_mn_major(smem_address(matrix));
    fence_registers(s);
    fence_registers(s_packed);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < K / 16; ++k)
      wgmma_rs<K, Major::MN>(s, s_packed + 4 * k, advance(m, k / 4 * (kChunk * K * 2) + k % 4 * 16 * kRowBytes), k > 0);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    fence_registers(s);
    scale_by_power(s, largest + by);
#pragma unroll
    for (int i = 0; i < K / 8; ++i) {
      s[4 * i] += n[i].x;
      s[4 * i + 1] += n[i].y;
      s[4 * i + 2] += n[i].z;
      s[4 * i + 3] += n[i].w;
    }
  }
}

// Zeros in the rows of P's tiles that no record brings; for a whole warpgroup.
__device__ __forceinline__ void clear_above_diagonal(char* p) {
#pragma unroll
  for (int j = 1; j < kChunk / kBlock; ++j)
    if (threadIdx.x % 128 < j * kBlock * kNarrowRowBytes / 16)
      reinterpret_cast<uint4*>(p + j * kPTileBytes)[threadIdx.x % 128] = uint4{};
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

// kCompose: whether CTAs that share a chain may compose its states.
template <class Element, int K, int kHalves, bool kCompose>
__global__ void __launch_bounds__(128 * (kHalves + 1), 1) recurrence(const __grid_constant__ PrefillParams p) {
  using Smem = RecurrenceSmem<K, kHalves>;
  using In = Record<K>;
  constexpr int kThreads = 128 * (kHalves + 1);
  extern __shared__ __align__(1024) char smem[];
  uint64_t* const full = reinterpret_cast<uint64_t*>(smem + Smem::kBarriers);
  uint64_t* const empty = full + Smem::kStages;
  uint64_t* const tile_full = empty + Smem::kStages;
  uint64_t* const tile_empty = tile_full + kHalves;

  const int warpgroup = cutlass::canonical_warp_group_idx();
  const int parts = p.V / 64 / kHalves, segments = kHalves == 1 ? p.segments : 1;
  const int part = blockIdx.x % parts, index = blockIdx.x / parts % segments;
  const int chain = blockIdx.x / parts / segments, head = chain % p.HV, n = p.first_sequence + chain / p.HV;
  const Sequence seq = sequence(p, n);
  const int chunks = chunks_of(seq.length);
  Segment* const plan = reinterpret_cast<Segment*>(smem + Smem::kPlan);
  int* const is_finite = reinterpret_cast<int*>(smem + Smem::kIsFinite);  // [4]
  uint64_t* const composed = reinterpret_cast<uint64_t*>(smem + Smem::kComposed);
  Segment segment{0, 0, chunks, 0, 0, 1};

  if (threadIdx.x == 0) {
    for (int i = 0; i < Smem::kStages; ++i) {
      Barrier::init(full + i, 1);
      Barrier::init(empty + i, 128 * kHalves);
    }
    for (int i = 0; i < kHalves; ++i) {
      Barrier::init(tile_full + i, 128);
      Barrier::init(tile_empty + i, Smem::kStoreWarps);
    }
    Barrier::init(composed, 128);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == kHalves) {  // ---------------------------------------------------------------------------- copies
    cutlass::arch::warpgroup_reg_dealloc<40>();
    const int warp = cutlass::canonical_warp_idx_sync() - 4 * kHalves, lane = threadIdx.x & 31;
    if (warp == 0 && (kCompose || p.ready == nullptr)) wait_for_previous_kernel();
    if (segments > 1) {
      named_barrier(kPlanning, kThreads);  // the initial state has been looked at
      if (warp == 0) {
        const bool all_finite = is_finite[0] && is_finite[1] && is_finite[2] && is_finite[3];
        segment = plan_segment<kCompose>(p, seq, head, part, index, !all_finite, reinterpret_cast<float*>(smem));
        fence_async_proxy();  // the sums lie where records will be copied to
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
    if (kCompose && lane != 0) return;
    RingPosition<Smem::kStages> ring;
    int ready = p.ready == nullptr ? segment.end : segment.start;  // chunks before it are there
    for (int pass = 0; pass < (kCompose ? segment.passes : 1); ++pass) {
      const bool is_last_pass = !kCompose || pass == segment.passes - 1,
                 has_u = !kCompose || pass >= segment.matrix_passes;
      for (int c = segment.start; c < segment.end; ++c) {
        if constexpr (!kCompose) {
          if (c >= ready) ready = wait_until_ready(p, seq.first_slot, head, c, segment.end);
          if (lane != 0) continue;
        }
        const bool has_output = is_last_pass && c >= segment.first;
        const char* in = record<K>(p, seq.first_slot + c, head);
        char* to = smem + ring.stage * Smem::kStage;
        uint64_t* barrier = full + ring.stage;
        // The last stage of the ring that this pass comes to is where the first state is composed.
        if (kCompose && segment.composed > 0 && is_last_pass && index > 0 && c == segment.first + Smem::kStages - 1)
          Barrier::wait(composed, 0);
        Barrier::wait(empty + ring.stage, ring.phase ^ 1);
        TransactionBarrier::arrive_and_expect_tx(barrier, has_output ? Smem::kCopiedBytes : has_u ? Smem::kQ : In::kU);
        const auto copy = [&](int from, int at, int bytes) {
          cute::SM90_BULK_COPY_G2S::copy(in + from, barrier, to + at, bytes);
        };
        if constexpr (kHalves == 1) {
          copy(0, 0, In::kU);
          if (has_u) copy(In::kU + part * In::kUHalfBytes, In::kU, In::kUHalfBytes);
        }
        if (has_output) {  // P's first tile with what is before it, the last one with what is behind it
          constexpr int kBefore = kHalves == 1 ? In::kMatrixBytes : In::kP;
          copy(In::kP - kBefore, Smem::kP - kBefore, kBefore + p_tile(1));
#pragma unroll
          for (int j = 1; j < kChunk / kBlock; ++j) {
            const int from = In::kP + p_tile(j), end = In::kP + p_tile(j + 1);
            copy(from, Smem::kP + j * (kPTileBytes + kBlock * kNarrowRowBytes),
                 (end < In::kScale ? end : In::kScale + kChunk * 4) - from);
          }
        }
        ring.next();
      }
    }
    // This kernel ends after `prepare`, for those who wait for this one.
    if (!kCompose && p.ready != nullptr && blockIdx.x == gridDim.x - 1) wait_for_previous_kernel();
    return;
  }

  // ------------------------------------------------------------------------------------------------------------ state
  cutlass::arch::warpgroup_reg_alloc<kHalves == 1 ? 240 : 232>();
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread & 31, t = lane & 3;
  const int half = part * kHalves + warpgroup;  // which 64 value channels
  const int first_row = 64 * half + 16 * warp;
  const int64_t matrix_size = static_cast<int64_t>(K) * p.V;
  const int64_t matrix = (static_cast<int64_t>(n) * p.HV + head) * matrix_size;
  char* const tile = smem + Smem::kTiles + warpgroup * Smem::kTileBytes;
  const int64_t composition_step =
      static_cast<int64_t>(p.HV) * Composition<K>::bytes(p.V);  // from a segment to the next
  int* const chain_flags = flags(p, head, n - p.first_sequence);
  static_assert(kHalves == 2 || 2 * kMatrixBuffer<K> <= Smem::kStage);

  float s[K / 2];
  int exponent = -200;  // S is 2^exponent times what the registers hold
  const auto load_initial_state = [&]() {
    if (p.initial_state != nullptr) {
      load_state<K>(p, p.initial_state, matrix, first_row, s);
    } else {
      set_to_zero(s);
    }
  };
  load_initial_state();
  uint32_t bits = largest_magnitude(s);
  if (segments > 1) {
    if (lane == 0) is_finite[warp] = exponent_of(bits) < 128;
    named_barrier(kPlanning, kThreads);
    named_barrier(kPlanning, kThreads);
    segment = *plan;
  }
#pragma unroll
  for (int i = 0; i < Smem::kStages; ++i) clear_above_diagonal(smem + i * Smem::kStage + Smem::kP);
  fence_async_proxy();
  named_barrier(kClearing, 128 * kHalves);

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
  bool has_u = true;             // else `u` is zero

  // Uᵀ of a chunk as accumulators, and the exponent that it asks for.
  const auto load_u = [&](const char* stage, uint32_t state_bits) {
    const int u_exponent = reinterpret_cast<const int*>(stage + In::kExponents)[4 * half + warp];
    int wanted = has_u ? u_exponent + 15 - kHeadroom : kLowestExponent;  // U is 2^(15 + u_exponent) at most
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
  for (int pass = 0; pass < (kCompose ? segment.passes : 1); ++pass) {
    const bool is_last_pass = !kCompose || pass == segment.passes - 1;
    const int first_output = is_last_pass ? segment.first : segment.end;
    has_u = !kCompose || pass >= segment.matrix_passes;
    if constexpr (kHalves == 1) {
      if (kCompose && !has_u) {  // rows of the identity
        const int row = 64 * (part + pass * parts) + 16 * warp + (lane >> 2);
#pragma unroll
        for (int i = 0; i < K / 2; ++i) s[i] = row + (i >> 1 & 1) * 8 == 8 * (i >> 2) + 2 * t + (i & 1) ? 1.0f : 0.0f;
        // Nobody copies U, so that what each thread reads for it stays.
#pragma unroll
        for (int i = 0; i < 4 * Smem::kStages; ++i)
          reinterpret_cast<uint4*>(smem + i / 4 * Smem::kStage + In::kU)[i % 4 * 128 + thread] = uint4{};
        fence_async_proxy();
      } else if (segment.start > 0) {
        set_to_zero(s);
      } else if (pass > 0) {
        load_initial_state();
      }
      if (kCompose && is_last_pass && index < segment.composed) {
        if (pass > 0) {
          // The composition is complete. The first segment has read the initial state, which the last one may overwrite.
          __threadfence();
          named_barrier(kComposing, 128);
          if (thread == 0) set_flag(chain_flags + index * parts + part);
        }
        if (index > 0) {
          // CTAs begin in the order of their numbers, and those that this one waits for have lower ones: nobody waits for
          // one that finds no place to run.
          for (int i = thread; i < index * parts; i += 128)
            while (load_flag(chain_flags + i) == 0) {
            }
          named_barrier(kComposing, 128);
          char* const buffers = smem + (ring.stage + Smem::kStages - 1) % Smem::kStages * Smem::kStage;
          compose_state<K>(composition<K>(p, seq.first_slot, head), composition_step, index, half, buffers, s);
          if (index > 1) {  // M may lie where those zeros were
            named_barrier(kComposing, 128);
            clear_above_diagonal(buffers + Smem::kP);
            fence_async_proxy();
          }
          Barrier::arrive(composed);
        }
      }
      bits = largest_magnitude(s);
    }
    exponent = -200;
    if (bits != 0) {
      exponent = exponent_of(bits) - kHeadroom;
      scale_by_power(s, -exponent);
    }
    if (segment.start < segment.end) {
      Barrier::wait(full + ring.stage, ring.phase);
      load_u(smem + ring.stage * Smem::kStage, 0);
      pack_state();
    }
    // Before `first_output` the output is that of leftovers in shared memory, and nobody takes it: a loop of its own for these
    // chunks would make the compiler spill.
    for (int c = segment.start; c < segment.end; ++c) {
      const char* stage = smem + ring.stage * Smem::kStage;
      if (p.states != nullptr && c >= first_output)
        store_state<K>(p, p.states, states_at + c * p.HV * matrix_size, first_row, s, exponent);
      load_decay(stage);
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
      fence_registers(s);
      fence_registers(u_packed);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_rs<K, Major::MN>(s, u_packed + 4 * k, advance(kr, k * 16 * kRowBytes));
      cute::warpgroup_commit_batch();
      const uint64_t pd = descriptor_k_major_narrow(smem_address(stage + Smem::kP));
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_rs<64, Major::K>(o, u_packed + 4 * k, advance(pd, k * kPTileBytes));
      cute::warpgroup_commit_batch();
      if (c > first_output) hand_over_output();

      // After the last chunk once more its own: loads under a condition would keep the old values alive all along.
      const char* next = stage;
      const int stage_in_use = ring.stage;
      ring.next();
      if (c + 1 < segment.end) {
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
      if (kHalves == 2 || c >= first_output) {
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
      Barrier::arrive(empty + stage_in_use);
      fence_registers(o_packed);  // `o` and `decay` are never both alive: there is no room
    }
    if constexpr (kCompose) {
      if (!is_last_pass) {
        char* const to = composition<K>(p, seq.first_slot, head) + index * composition_step;
        if (has_u) {
          store_rows<K>(to, half, s, exponent);
        } else {
          store_matrix<K>(to, part + pass * parts, s, exponent);
        }
      }
    }
    if (first_output < segment.end) hand_over_output();
  }
  const bool is_last = segment.end == chunks && (segment.first < chunks || (chunks == 0 && index == 0));
  if (p.final_state != nullptr && is_last) store_state<K>(p, p.final_state, matrix, first_row, s, exponent);
}

}  // namespace kda

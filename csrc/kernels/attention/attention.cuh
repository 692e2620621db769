// One token through a softmax attention layer: a CTA has a chunk of the keys of a row and a head of the caches.
//
// Data flow
//   1. Keys and values of the chunk are on their way to shared memory, while norm and rotation make the queries of the
//      group. The CTA whose chunk the new token belongs to makes its key, too, and is the only one that writes the
//      caches: nobody reads these rows from there.
//   2. Scores[key, head] = K qᵀ: a warp has some of the keys. Their weights for the softmax go to shared memory,
//      rounded, and from there to all warps: O[channel, head] = Vᵀ P, where a warp has 16 channels of all keys, so that
//      no sums are left to add up.
//   3. Unless there is one chunk only, sums go to the workspace. Who is the last to bring them, of a group of 16
//      chunks, merges the group's; who is the last to do that merges the groups'. Chunks and groups have fixed numbers
//      of keys, and sums are taken in their order, so that no bit depends on who comes when, or on how long the caches
//      could be.
// Which chunks there are depends on the length, which only the device knows: there are CTAs for all that the caches
// have room for, those of the first chunks first; the others leave at once.
#pragma once

#include "api/attention.h"
#include "common/launch.cuh"
#include "common/prefetch.cuh"
#include "common/tile.cuh"

namespace kda {

constexpr int kChunkKeys = 128;
constexpr int kGroupChunks = 16;
constexpr int kMostGroupHeads = 32;  // heads of q for one of the caches

// Heads of q are a dimension of products, of 8 each.
__host__ __device__ constexpr int head_tiles(int heads) { return heads <= 8 ? 1 : heads <= 16 ? 2 : 4; }

// Where things are in the workspace. A unit is a row and head of the caches; it has a slot for each chunk, and behind
// them for each group.
struct AttentionWorkspace {
  int64_t units, chunks, heads, D;

  __host__ __device__ int64_t groups() const { return (chunks + kGroupChunks - 1) / kGroupChunks; }
  __host__ __device__ int64_t slots() const { return chunks + groups(); }

  // Counters of each unit: of the chunks in a group, for all groups, and of groups. Then for each slot and head, the
  // largest score and the sum of the weights; then the sums of weighted values.
  __host__ __device__ int64_t statistics_at() const {
    return (units * (groups() + 1) * static_cast<int64_t>(sizeof(unsigned)) + 127) / 128 * 128;
  }
  __host__ __device__ int64_t sums_at() const {
    return statistics_at() + units * slots() * heads * static_cast<int64_t>(sizeof(float2));
  }
  __host__ __device__ int64_t bytes() const {
    return sums_at() + units * slots() * heads * D * static_cast<int64_t>(sizeof(float));
  }
};

template <int D, int kTiles>
struct AttentionShape {
  static constexpr int kThreads = 2 * D, kWarps = kThreads / 32;  // a warp has 16 channels of the values
  static constexpr int kKeyTiles = kChunkKeys / 16 / kWarps;      // and so many times 16 keys
  static constexpr int kHeads = 8 * kTiles;
  static constexpr int kPitch = 2 * D;                          // bytes of a row of keys, values or queries
  static constexpr int kWeightPitch = 2 * kChunkKeys + 16;      // of a head's weights: 8 heads share no bank
  static constexpr int kMergedAtATime = kGroupChunks / kTiles;  // for which there is room where keys and values were

  // Rows are swizzled: of keys and queries, every other one has the halves of each 128 bytes swapped, so that two rows
  // of 64 bytes share no bank; of values, 8 rows of 16 bytes don't.
  struct Smem {
    alignas(128) char keys[kChunkKeys * kPitch];
    char values[kChunkKeys * kPitch];
    char queries[kHeads * kPitch];
    char new_key[kPitch], new_value[kPitch];
    char weights[kHeads * kWeightPitch];
    alignas(16) float2 statistics[kMergedAtATime][kHeads];  // of slots: the largest score and the sum of the weights
    alignas(16) float2 factors[kMergedAtATime][kHeads];     // of a slot's sums, and its sum of weights times that
    float2 largest[kWarps][kHeads / 2], sums[kWarps][kHeads / 2];  // of the scores and of the weights
    alignas(8) float largest_merged[kHeads];
    bool is_last;
  };

  // An SM has room for, with 80 registers a thread or more.
  static constexpr int kRoom = kSmemOfSm / (static_cast<int>(sizeof(Smem)) + kSmemOfSystem);
  static constexpr int kCtas = kRoom < 768 / kThreads ? kRoom : 768 / kThreads;
};

// As `hint`, for many bytes: a multiple of 16.
__device__ __forceinline__ void hint_bytes(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}

// Counts to `count`, and from 0 again. By a thread of each CTA, behind a barrier: the one that is told to be the last
// sees, behind another barrier, what all of them have written.
__device__ __forceinline__ bool is_last_of(int count, unsigned* counter) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(count - 1)
               : "memory");
  return before == count - 1;
}

template <class Element>
__device__ __forceinline__ uint32_t rounded_product(uint32_t x, uint32_t y) {
  const float2 a = unpack<Element>(x), b = unpack<Element>(y);
  return pack<Element>(a.x * b.x, a.y * b.y);
}

template <class Element>
__device__ __forceinline__ uint32_t rounded_sum(uint32_t x, uint32_t y) {
  const float2 a = unpack<Element>(x), b = unpack<Element>(y);
  return pack<Element>(a.x + b.x, a.y + b.y);
}

// The keys that a row has: start..length, of which the last one is new. `length` is -1 where there is no room for it.
struct KeyRange {
  int start, length;

  __device__ __forceinline__ bool operator==(const KeyRange& other) const {
    return start == other.start && length == other.length;
  }
  // Without any key, the chunk of the new one stands for all.
  __device__ __forceinline__ int first_chunk() const { return min(start, length) / kChunkKeys; }
  __device__ __forceinline__ int last_chunk() const { return length / kChunkKeys; }
  __device__ __forceinline__ bool has(int chunk) const {
    return length >= 0 && chunk >= first_chunk() && chunk <= last_chunk();
  }
};

// Two words each, for whose loads nobody waits before `range_of`.
struct RangeWords {
  int2 start, length;
};

// Before the kernel waits for those that may still write it: the lower words.
__device__ __forceinline__ RangeWords guess_range(const AttentionStepParams& p, int row) {
  RangeWords words{{0, 0}, {load_for_hint(reinterpret_cast<const int*>(p.length)), 0}};
  if (p.starts != nullptr)
    words.start.x = load_for_hint(static_cast<const int*>(p.starts) + (p.starts_are_int64 ? 2 * row : row));
  return words;
}

__device__ __forceinline__ RangeWords load_range(const AttentionStepParams& p, int row) {
  RangeWords words{{0, 0}, __ldcg(reinterpret_cast<const int2*>(p.length))};
  if (p.starts != nullptr && p.starts_are_int64) {
    words.start = __ldcg(static_cast<const int2*>(p.starts) + row);
  } else if (p.starts != nullptr) {
    words.start = {__ldcg(static_cast<const int*>(p.starts) + row), 0};
  }
  return words;
}

// The same numbers, waited for here and not before: the compiler moves what uses a load ahead of copies that do not,
// and drops a shuffle, which it knows to change nothing here. Where lanes have guessed differently, they agree on one.
__device__ __forceinline__ RangeWords waited_for(const RangeWords& words) {
  const auto wait = [](int2 x) { return int2{static_cast<int>(warp_max(x.x)), static_cast<int>(warp_max(x.y))}; };
  return {wait(words.start), wait(words.length)};
}

__device__ __forceinline__ KeyRange range_of(const AttentionStepParams& p, const RangeWords& words) {
  const int2 start = words.start, length = words.length;
  const bool has_room = length.y == 0 && static_cast<unsigned>(length.x) < static_cast<unsigned>(p.capacity);
  const int high = p.starts_are_int64 ? start.y : start.x >> 31;
  const int first = high == start.x >> 31 ? min(max(start.x, 0), p.capacity) : high < 0 ? 0 : p.capacity;
  return {first, has_room ? length.x : -1};
}

template <class Element, int D, int kTiles>
__global__ void __launch_bounds__((AttentionShape<D, kTiles>::kThreads), (AttentionShape<D, kTiles>::kCtas))
    attention_step(const __grid_constant__ AttentionStepParams p) {
  using Shape = AttentionShape<D, kTiles>;
  constexpr int kThreads = Shape::kThreads, kWarps = Shape::kWarps, kHeads = Shape::kHeads, kPitch = Shape::kPitch;
  constexpr int kKeyTiles = Shape::kKeyTiles;
  extern __shared__ __align__(128) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Shape::Smem*>(smem_bytes);
  const int thread = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;  // as in fragments
  const int kv_head = blockIdx.x, row = blockIdx.y, chunk = blockIdx.z, unit = row * p.KVH + kv_head;
  const int first = chunk * kChunkKeys;  // key
  const int group = p.group;             // heads

  // Items are the queries, the key and the value. 8 of them at a time are made by threads that have 4 neighbouring
  // channels each: the squares for the norm are added up in the order that torch has.
  constexpr int kLanes = D / 4, kRounds = kTiles + 1;
  const int quad = threadIdx.x % kLanes, own_item = threadIdx.x / kLanes, items = group + 2;

  launch_dependents();
  const RangeWords guess = guess_range(p, row);
  uint2 q_weight = {}, k_weight = {};
  if (p.q_norm_weight != nullptr) q_weight = static_cast<const uint2*>(p.q_norm_weight)[quad];
  if (p.k_norm_weight != nullptr) k_weight = static_cast<const uint2*>(p.k_norm_weight)[quad];
#pragma unroll 1
  for (int i = thread; i < (kHeads - group) * (kPitch / 16); i += kThreads)
    reinterpret_cast<uint4*>(smem.queries + group * kPitch)[i] = uint4{};

  // What is known beforehand is computed beforehand. Threads without an item load one that they need not have.
  const uint2* items_from[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int item = 8 * i + own_item, head = item < group ? kv_head * group + item : kv_head;
    const Element* const heads = item < group    ? static_cast<const Element*>(p.q) + row * p.q_stride
                                 : item == group ? static_cast<const Element*>(p.k) + row * p.k_stride
                                                 : static_cast<const Element*>(p.v) + row * p.v_stride;
    items_from[i] = reinterpret_cast<const uint2*>(heads + head * D) + quad;
    settle(items_from[i]);
  }
  const uint2 *cosines_from = items_from[0], *sines_from = items_from[0];
  if (p.cos != nullptr) {
    cosines_from = reinterpret_cast<const uint2*>(static_cast<const Element*>(p.cos) + row * p.rotary_stride) + quad;
    sines_from = reinterpret_cast<const uint2*>(static_cast<const Element*>(p.sin) + row * p.rotary_stride) + quad;
  }
  settle(cosines_from), settle(sines_from);

  const int64_t cached = (static_cast<int64_t>(unit) * p.capacity + first) * D;  // the chunk's first element
  const Element* const keys = static_cast<const Element*>(p.key_cache) + cached;
  const Element* const values = static_cast<const Element*>(p.value_cache) + cached;
  // 16 rows of a chunk are copied at a time.
  constexpr int kRows = 16, kPieces = D / 8;
  static_assert(kRows * kPieces == kThreads);
  const int piece = threadIdx.x % kPieces, own_row = threadIdx.x / kPieces;
  const Element *keys_from = keys + own_row * D + 8 * piece, *values_from = values + own_row * D + 8 * piece;
  settle(keys_from), settle(values_from);

  // CTAs that come later do so when there is nothing to wait for.
  const bool is_early = static_cast<int64_t>(chunk) * p.B * p.KVH + unit < Shape::kCtas * p.num_sms;
  if (thread == 0 && is_early) {
    const KeyRange range = range_of(p, guess);
    const int bytes = min(range.length - first, kChunkKeys) * kPitch;
    if (range.has(chunk) && bytes > 0) hint_bytes(keys, bytes), hint_bytes(values, bytes);
  }

  uint2 loaded[kRounds] = {}, cosines = {}, sines = {};
  const auto begin = [&](const KeyRange& range) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) loaded[i] = __ldcg(items_from[i]);
    cosines = __ldcg(cosines_from), sines = __ldcg(sines_from);
    // Other rows than those of earlier tokens become zeros: whatever lies there, a NaN would outlive a weight of 0.
    const int least = range.start - first - own_row, end = range.length - first - own_row;
    const auto copy = [&](char* to, const Element* from, int swizzle) {
      to += own_row * kPitch + 16 * (piece ^ swizzle);
#pragma unroll
      for (int i = 0; i < kChunkKeys; i += kRows) copy_async_if(i >= least && i < end, to + i * kPitch, from + i * D);
      commit_copies();
    };
    copy(smem.keys, keys_from, 4 * (own_row % 2));
    copy(smem.values, values_from, own_row % 8);
  };

  wait_for_previous_kernel();
  const RangeWords words = load_range(p, row);  // meanwhile copies begin by the guess, which is nearly always right
  KeyRange range = range_of(p, waited_for(guess));
#pragma unroll 1
  while (true) {
    if (range.has(chunk)) begin(range);
    const KeyRange known = range_of(p, waited_for(words));
    if (range == known) break;
    wait_for_copies<0>();  // which go to the same places
    range = known;
  }
  if (!range.has(chunk)) {
    if (range.length < 0 && chunk == 0) {
      Element* const out = static_cast<Element*>(p.out) + row * p.out_stride + kv_head * group * D;
      for (int i = thread; i < group * D / 8; i += kThreads) reinterpret_cast<uint4*>(out)[i] = uint4{};
    }
    return;
  }
  const int length = range.length;

#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    if (8 * i >= items) break;
    const int item = 8 * i + own_item;
    const bool is_query = item < group, is_key = item == group;
    uint2 x = loaded[i];
    if (p.q_norm_weight != nullptr || p.k_norm_weight != nullptr) {
      const float2 a = unpack<Element>(x.x), b = unpack<Element>(x.y);
      float squares = fmaf(b.y, b.y, fmaf(b.x, b.x, fmaf(a.y, a.y, a.x * a.x)));
#pragma unroll
      for (int other = kLanes / 2; other > 0; other /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, other);
      const float factor = rsqrtf(squares * (1.0f / D) + p.norm_eps);
      if (is_query ? p.q_norm_weight != nullptr : is_key && p.k_norm_weight != nullptr) {
        const float2 v = unpack<Element>(is_query ? q_weight.x : k_weight.x);
        const float2 w = unpack<Element>(is_query ? q_weight.y : k_weight.y);
        x.x = pack<Element>(v.x * (factor * a.x), v.y * (factor * a.y));
        x.y = pack<Element>(w.x * (factor * b.x), w.y * (factor * b.y));
      }
    }
    if (p.cos != nullptr) {
      const uint32_t sign = quad < kLanes / 2 ? 0x80008000u : 0;
      const uint2 rotated = {__shfl_xor_sync(0xffffffffu, x.x, kLanes / 2) ^ sign,
                             __shfl_xor_sync(0xffffffffu, x.y, kLanes / 2) ^ sign};
      if (is_query || is_key) {
        x.x = rounded_sum<Element>(rounded_product<Element>(x.x, cosines.x),
                                   rounded_product<Element>(rotated.x, sines.x));
        x.y = rounded_sum<Element>(rounded_product<Element>(x.y, cosines.y),
                                   rounded_product<Element>(rotated.y, sines.y));
      }
    }
    if (item >= items) continue;
    char* const to = is_query ? smem.queries + item * kPitch : is_key ? smem.new_key : smem.new_value;
    const int swizzle = is_query ? item % 2 * 4 : is_key ? length % 2 * 4 : length % 8;
    *reinterpret_cast<uint2*>(to + 16 * (quad / 2 ^ swizzle) + 8 * (quad % 2)) = x;
    if (!is_query && chunk == range.last_chunk()) {
      Element* const cache = static_cast<Element*>(is_key ? p.key_cache : p.value_cache);
      *reinterpret_cast<uint2*>(cache + cached + (length - first) * D + 4 * quad) = x;
    }
  }
  wait_for_copies<1>();
  __syncthreads();

  // Scores, in units of the logarithm to the base 2.
  float scores[kKeyTiles][kTiles][4];
  float2 largest[kTiles];  // of heads 2t and 2t + 1 of each tile, as all that follow
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) largest[tile] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
    const int own = 16 * (warp * kKeyTiles + key_tile) + g;
    const char* const upper = first + own == length ? smem.new_key : smem.keys + own * kPitch;
    const char* const lower = first + own + 8 == length ? smem.new_key : smem.keys + (own + 8) * kPitch;
    // 8 neighbouring channels stand for those of the fragments of two products: a sum does not depend on their order.
    uint4 a[D / 32], b[D / 32];
    const auto place = [&](int i) { return 16 * ((4 * i + t) ^ (g % 2 * 4)); };
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      a[i] = *reinterpret_cast<const uint4*>(upper + place(i));
      b[i] = *reinterpret_cast<const uint4*>(lower + place(i));
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float one[4] = {}, other[4] = {};
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        const uint4 x = *reinterpret_cast<const uint4*>(smem.queries + (8 * tile + g) * kPitch + place(i));
        mma<Element>(one, {a[i].x, b[i].x, a[i].y, b[i].y}, x.x, x.y);
        mma<Element>(other, {a[i].z, b[i].z, a[i].w, b[i].w}, x.z, x.w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + own + 8 * (i / 2);
        const bool is_there = key >= range.start && key <= length;
        scores[key_tile][tile][i] = is_there ? (one[i] + other[i]) * (p.scale * kLog2E) : -INFINITY;
      }
      largest[tile].x = fmaxf(largest[tile].x, fmaxf(scores[key_tile][tile][0], scores[key_tile][tile][2]));
      largest[tile].y = fmaxf(largest[tile].y, fmaxf(scores[key_tile][tile][1], scores[key_tile][tile][3]));
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int other = 4; other < 32; other *= 2) {
      largest[tile].x = fmaxf(largest[tile].x, __shfl_xor_sync(0xffffffffu, largest[tile].x, other));
      largest[tile].y = fmaxf(largest[tile].y, __shfl_xor_sync(0xffffffffu, largest[tile].y, other));
    }
    if (g == 0) smem.largest[warp][4 * tile + t] = largest[tile];
  }
  __syncthreads();

  float2 sums[kTiles];  // of the weights
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      const float2 its = smem.largest[other][4 * tile + t];
      largest[tile] = {fmaxf(largest[tile].x, its.x), fmaxf(largest[tile].y, its.y)};
    }
    // Without any key, the weights shall be 0.
    if (largest[tile].x == -INFINITY) largest[tile].x = 0.0f;
    if (largest[tile].y == -INFINITY) largest[tile].y = 0.0f;
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
      const int own = 16 * (warp * kKeyTiles + key_tile) + g;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = exp2_approx(scores[key_tile][tile][i] - (i % 2 == 0 ? largest[tile].x : largest[tile].y));
        (i % 2 == 0 ? sum.x : sum.y) += weight;
        char* const weights = smem.weights + (8 * tile + 2 * t + i % 2) * Shape::kWeightPitch;
        store_value<Element>(weights, own + 8 * (i / 2), weight);
      }
    }
#pragma unroll
    for (int other = 4; other < 32; other *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, other);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, other);
    }
    if (g == 0) smem.sums[warp][4 * tile + t] = sum;
  }
  wait_for_copies<0>();
  __syncthreads();

  // Of channels 16 warp + g and + 8, of heads 2t and 2t + 1: as the fragments have them.
  float out[kTiles][4];
  {
    uint32_t a[kChunkKeys / 16][4];
#pragma unroll
    for (int i = 0; i < kChunkKeys / 16; ++i) {
      const int key = 16 * i + lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;
      const char* const from = first + key == length ? smem.new_value : smem.values + key * kPitch;
      load_matrices_transposed(a[i], from + 16 * (piece ^ (lane % 8)));
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const char* const weights = smem.weights + (8 * tile + lane % 8) * Shape::kWeightPitch + lane / 8 * 16;
      float one[4] = {}, other[4] = {};
#pragma unroll
      for (int i = 0; i < kChunkKeys / 32; ++i) {
        uint32_t b[4];
        load_matrices(b, weights + 64 * i);
        mma<Element>(one, a[2 * i], b[0], b[1]);
        mma<Element>(other, a[2 * i + 1], b[2], b[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) out[tile][i] = one[i] + other[i];
      sums[tile] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const float2 its = smem.sums[i][4 * tile + t];
        sums[tile] = {sums[tile].x + its.x, sums[tile].y + its.y};
      }
    }
  }

  // Chunks of a group, and then groups.
  const AttentionWorkspace layout{p.B * p.KVH, gridDim.z, kHeads, D};
  const int chunks = gridDim.z, groups = static_cast<int>(layout.groups()), own_group = chunk / kGroupChunks;
#pragma unroll 1
  for (int level = 0; level < 2; ++level) {
    const bool is_chunk = level == 0;
    const int begin =
        is_chunk ? max(range.first_chunk(), own_group * kGroupChunks) : range.first_chunk() / kGroupChunks;
    const int end = is_chunk ? min(range.last_chunk(), own_group * kGroupChunks + kGroupChunks - 1) + 1
                             : range.last_chunk() / kGroupChunks + 1;
    const int count = end - begin, own = is_chunk ? chunk : own_group, first_slot = is_chunk ? 0 : chunks;
    if (count == 1) continue;
    // In the workspace, what a thread has lies as it has it: no other one needs that.
    char* const workspace = static_cast<char*>(p.workspace);
    const int64_t slot = unit * layout.slots() + first_slot;
    float2* const its_statistics = reinterpret_cast<float2*>(workspace + layout.statistics_at()) + slot * kHeads;
    float4* const its_sums =
        reinterpret_cast<float4*>(workspace + layout.sums_at()) + slot * kTiles * kThreads + thread;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (8 * tile + 2 * t < group)
        its_sums[(own * kTiles + tile) * kThreads] = {out[tile][0], out[tile][1], out[tile][2], out[tile][3]};
      if (warp == 0 && g == 0)
        *reinterpret_cast<float4*>(its_statistics + own * kHeads + 8 * tile + 2 * t) = {largest[tile].x, sums[tile].x,
                                                                                        largest[tile].y, sums[tile].y};
    }
    __syncthreads();
    if (thread == 0) {
      unsigned* const counters = static_cast<unsigned*>(p.workspace) + static_cast<int64_t>(unit) * (groups + 1);
      smem.is_last = is_last_of(count, counters + (is_chunk ? own_group : groups));
    }
    __syncthreads();
    if (!smem.is_last) return;

#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      largest[tile] = {-INFINITY, -INFINITY}, sums[tile] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < 4; ++i) out[tile][i] = 0.0f;
    }
#pragma unroll 1
    for (int at = begin; at < end; at += Shape::kMergedAtATime) {
      const int now = min(end - at, Shape::kMergedAtATime);
      char* const place = smem_bytes + 16 * thread;  // nobody needs keys and values any more
      static_assert(Shape::kMergedAtATime * kTiles * kThreads * 16 == sizeof(smem.keys) + sizeof(smem.values));
      for (int i = 0; i < now; ++i) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (8 * tile + 2 * t < group)
            copy_async(place + (i * kTiles + tile) * kThreads * 16, its_sums + ((at + i) * kTiles + tile) * kThreads);
        }
      }
      copy_async(reinterpret_cast<char*>(smem.statistics), its_statistics + at * kHeads,
                 now * kHeads * static_cast<int>(sizeof(float2)), thread, kThreads);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      static_assert(Shape::kMergedAtATime * kHeads <= kThreads);
      if (thread < now * kHeads) {
        const int head = thread % kHeads;
        const float2 its = smem.statistics[thread / kHeads][head];
        float best = its.x;
        for (int i = 0; i < now; ++i) best = fmaxf(best, smem.statistics[i][head].x);
        const float factor = exp2_approx(its.x - best);
        smem.factors[thread / kHeads][head] = {factor, factor * its.y};
        if (thread < kHeads) smem.largest_merged[head] = best;
      }
      __syncthreads();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float merged[4] = {};
        float2 sum = {0.0f, 0.0f};
#pragma unroll 4
        for (int i = 0; i < now; ++i) {
          const float4 x = *reinterpret_cast<const float4*>(place + (i * kTiles + tile) * kThreads * 16);
          const float4 its = *reinterpret_cast<const float4*>(&smem.factors[i][8 * tile + 2 * t]);  // of both heads
          merged[0] = fmaf(its.x, x.x, merged[0]), merged[1] = fmaf(its.z, x.y, merged[1]);
          merged[2] = fmaf(its.x, x.z, merged[2]), merged[3] = fmaf(its.z, x.w, merged[3]);
          sum.x += its.y, sum.y += its.w;
        }
        const float2 its = *reinterpret_cast<const float2*>(&smem.largest_merged[8 * tile + 2 * t]);
        const float2 best = {fmaxf(largest[tile].x, its.x), fmaxf(largest[tile].y, its.y)};
        const float2 before = {exp2_approx(largest[tile].x - best.x), exp2_approx(largest[tile].y - best.y)};
        const float2 now_factor = {exp2_approx(its.x - best.x), exp2_approx(its.y - best.y)};
        largest[tile] = best;
        sums[tile].x = fmaf(sums[tile].x, before.x, sum.x * now_factor.x);
        sums[tile].y = fmaf(sums[tile].y, before.y, sum.y * now_factor.y);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool is_even = i % 2 == 0;
          out[tile][i] =
              fmaf(out[tile][i], is_even ? before.x : before.y, merged[i] * (is_even ? now_factor.x : now_factor.y));
        }
      }
    }
  }

  Element* const to = static_cast<Element*>(p.out) + row * p.out_stride + kv_head * group * D + 16 * warp + g;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int head = 8 * tile + 2 * t + i % 2;
      const float sum = i % 2 == 0 ? sums[tile].x : sums[tile].y;
      if (head < group) store_value<Element>(to, head * D + 8 * (i / 2), sum == 0.0f ? 0.0f : out[tile][i] / sum);
    }
  }
}

}  // namespace kda

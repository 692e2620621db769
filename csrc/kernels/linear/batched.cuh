// A product of up to 32 rows with a large weight, at the speed of the weight's bytes.
//
// Data flow
//   The columns of weight and x are split among the CTAs of a cluster, the rows of the weight among clusters. A CTA's part of
//   the weight comes in units of 64 rows and columns through a ring in shared memory, by TMA, as much as the ring holds before the
//   kernel waits for the one that makes x: so the weights of the next product come while the last one is being finished.
//   Its columns of x come at once, without the copy engine, which has a queue of weights, or with 32 rows, where that would take
//   too much room, through a ring, too.
//   The tensor cores see 64 rows of the weight at a time, and the tokens as columns. Of those beyond M, nobody looks at the sums.
//   In the end each CTA of the cluster gets the sums for a share of the outputs from all of them, in its own shared memory, adds them
//   up in a fixed order, and makes of them what the product is for. What a row gets does not depend on the others.
#pragma once

#include <cuda.h>

#include "api/linear.h"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/prefetch.cuh"
#include "common/tile.cuh"
#include "common/vector.cuh"

namespace kda {

constexpr int kBatchedWarpgroups = 2, kBatchedWarps = 4 * kBatchedWarpgroups, kBatchedConsumers = 32 * kBatchedWarps;
constexpr int kBatchedThreads = kBatchedConsumers + 32;  // and a warp that copies
constexpr int kUnitColumns = 64, kUnitBytes = kHalfBytes;
constexpr int kMostStages = 24, kUnitsAhead = 4;  // of the ring, and units behind it that come to L2
constexpr int kChunksInFlight = 1;                // of 64 columns, whose products a warpgroup does not wait for

struct BatchedMaps {
  CUtensorMap weight, x;
};

struct BatchedPlan {
  int stages;    // units of the weight that there is room for
  int x_stages;  // chunks of x: all of a CTA, or those of a ring
};

// kTokens: M, rounded up to what the kernel is made for. kUnits: of 64 rows of the weight, that a CTA has. kSplits: CTAs of a
// cluster.
template <int kTokens, int kUnits, int kSplits>
struct BatchedShape {
  static constexpr int kRows = 64 * kUnits, kShare = kRows / kSplits;  // a CTA makes the outputs of that many
  static constexpr int kXBytes = kTokens * kRowBytes;                  // of a chunk
  static constexpr bool kStreamsX = kTokens > 16;
  // Both warpgroups have sums of one unit, of every other chunk each; or of every other unit.
  static constexpr bool kSharesUnits = kUnits == 1;
  static constexpr int kOwnUnits = kSharesUnits ? 1 : kUnits / kBatchedWarpgroups;
  static constexpr int kChunkStep =
      kSharesUnits ? kBatchedWarpgroups : 1;  // from one of a warpgroup's chunks to the next

  // Sums of a block of 16 rows of the weight, [kTokens][kBlockRow] floats, so that neither who writes nor who reads them meets
  // others at a bank.
  static constexpr int kBlockRows = 16, kBlockRow = kBlockRows + 4, kBlockBytes = 4 * kTokens * kBlockRow;
  static constexpr int kParts = kSplits * (kSharesUnits ? kBatchedWarpgroups : 1);  // whose sum is an output
  static constexpr int kBlocks = 4 * kUnits / kSplits;                              // that a CTA gets of each part
  static constexpr int kSumsBytes =
      kParts * kBlocks * kBlockBytes;  // of all parts that a CTA gets, as of those it makes
  static constexpr int kSumsPlace = (kSumsBytes + 1023) / 1024 * 1024;

  // Below these, the warpgroups would wait for what they themselves have not given back.
  static constexpr int kLeastChunks = (kChunksInFlight + 1) * kChunkStep, kLeastStages = kLeastChunks * kUnits;

  static_assert(kSharesUnits || kUnits % kBatchedWarpgroups == 0);
  static_assert(4 * kUnits % kSplits == 0);
};

// Of a power of two.
constexpr int log2_of(int x) { return x == 1 ? 0 : 1 + log2_of(x / 2); }

// Copies `bytes` of this CTA's shared memory to that of another of the cluster, and tells the barrier there. Addresses are the
// cluster's.
__device__ __forceinline__ void send(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(smem_address(from)), "r"(bytes), "r"(barrier)
               : "memory");
}

// The place `steps` before this one, of a ring.
__device__ __forceinline__ int stage_before(int stage, int steps, int stages) {
  return stage < steps ? stage - steps + stages : stage - steps;
}

// Pairs of numbers, each rounded: gate / (1 + exp(-gate)) · up.
template <class Element>
__device__ __forceinline__ uint32_t swiglu_of(uint32_t gate, uint32_t up) {
  const float2 g = unpack<Element>(gate), u = unpack<Element>(up);
  const float2 s = unpack<Element>(pack<Element>(g.x / (1.0f + expf(-g.x)), g.y / (1.0f + expf(-g.y))));
  return pack<Element>(s.x * u.x, s.y * u.y);
}

template <class Element, int kTokens, int kUnits, int kSplits>
__global__ void __cluster_dims__(kSplits, 1, 1) __launch_bounds__(kBatchedThreads, 2)
    batched_linear(const __grid_constant__ BatchedMaps maps, const __grid_constant__ BatchedPlan plan,
                   const __grid_constant__ LinearParams p) {
  using Shape = BatchedShape<kTokens, kUnits, kSplits>;
  constexpr bool kSharesUnits = Shape::kSharesUnits, kStreamsX = Shape::kStreamsX;
  // [kParts][kBlocks] blocks of sums for this CTA's outputs, with SwiGLU those of gate, then of up; columns of x; the ring.
  extern __shared__ __align__(1024) char sums[];
  __shared__ __align__(8) uint64_t full[kMostStages], empty[kMostStages], x_full[kMostStages], x_empty[kMostStages];
  __shared__ __align__(8) uint64_t received;
  __shared__ float factors[kTokens];

  launch_dependents();
  const int warp = cutlass::canonical_warp_idx_sync(), lane = threadIdx.x & 31;
  const unsigned rank = blockIdx.x % kSplits, cluster = blockIdx.x / kSplits;
  const int outputs = p.swiglu ? Shape::kRows / 2 : Shape::kRows;  // of the cluster
  const int first_output = static_cast<int>(cluster) * outputs;
  const unsigned all_chunks = static_cast<unsigned>(p.K + kUnitColumns - 1) / kUnitColumns;
  const int first_chunk = static_cast<int>(all_chunks * rank / kSplits);
  const int chunks = static_cast<int>(all_chunks * (rank + 1) / kSplits) - first_chunk;
  const int first_column = first_chunk * kUnitColumns;
  int x_column = first_column;
  if constexpr (kSharesUnits)
    if (p.groups > 1) x_column += static_cast<int>(cluster / (static_cast<unsigned>(p.N) / p.groups / 64)) * p.K;
  char* const x_ring = sums + Shape::kSumsPlace;
  char* const ring = x_ring + plan.x_stages * Shape::kXBytes;

  // Nothing is in the way of the first weights: one thread makes their barriers and asks for them, while others make the other
  // barriers. Where the lanes of a warp make one each, that is a loop of 30 ns a barrier.
  if (warp == kBatchedWarps) {
    const int units = chunks * kUnits, first = min(units, plan.stages);
    int unit = 0, chunk = 0, stage = 0, phase = 0, x_chunk = 0, x_stage = 0, x_phase = 0;
    const auto row_of = [&](int unit) {
      return first_output + 64 * unit + (p.swiglu && unit >= kUnits / 2 ? p.N - outputs : 0);
    };
    const auto copy_weight = [&] {
      TransactionBarrier::arrive_and_expect_tx(full + stage, kUnitBytes);
      cute::SM90_TMA_LOAD_2D::copy(&maps.weight, full + stage,
                                   static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
                                   ring + stage * kUnitBytes, first_column + chunk * kUnitColumns, row_of(unit));
      if (++unit == kUnits) unit = 0, ++chunk;
      if (++stage == plan.stages) stage = 0, phase ^= 1;
    };
    const auto copy_x = [&] {
      TransactionBarrier::arrive_and_expect_tx(x_full + x_stage, Shape::kXBytes);
      cute::SM90_TMA_LOAD_2D::copy(&maps.x, x_full + x_stage,
                                   static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                   x_ring + x_stage * Shape::kXBytes, x_column + x_chunk * kUnitColumns, 0);
      ++x_chunk;
      if (++x_stage == plan.x_stages) x_stage = 0, x_phase ^= 1;
    };
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < first; ++i) Barrier::init(full + i, 1);
      cutlass::arch::fence_barrier_init();
      fence_async_proxy();
#pragma unroll 1
      for (int i = 0; i < first; ++i) copy_weight();
      if constexpr (kStreamsX) prefetch_map(&maps.x);
#pragma unroll 1
      for (int i = first; i < min(units, first + kUnitsAhead); ++i)
        cute::SM90_TMA_LOAD_2D::PREFETCH::copy(&maps.weight, first_column + i / kUnits * kUnitColumns,
                                               row_of(i % kUnits));
    }
    __syncwarp();
    if constexpr (kSplits > 1) cute::cluster_arrive_relaxed();
    __syncthreads();  // the barriers are there
    if (lane == 0) {
      if constexpr (kStreamsX) {
        wait_for_previous_kernel();
#pragma unroll 1
        for (int i = min(chunks, plan.x_stages); i > 0; --i) copy_x();
      }
#pragma unroll 1
      for (int i = first; i < units; ++i) {
        if constexpr (kStreamsX) {
          if (x_chunk < chunks && x_chunk <= chunk) {
            Barrier::wait(x_empty + x_stage, x_phase ^ 1);
            copy_x();
          }
        }
        Barrier::wait(empty + stage, phase ^ 1);
        copy_weight();
      }
    }
    if constexpr (kSplits > 1) {
      __syncwarp();
      cute::cluster_wait();
      cute::cluster_arrive_relaxed();
      cute::cluster_wait();
    }
    return;
  }

  if (lane == 0) {
#pragma unroll 1
    for (int i = warp; i < plan.stages; i += kBatchedWarps) Barrier::init(empty + i, 4);
    if constexpr (kStreamsX)
#pragma unroll 1
      for (int i = warp; i < plan.x_stages; i += kBatchedWarps) {
        Barrier::init(x_full + i, 1);
        Barrier::init(x_empty + i, kSharesUnits ? 4 : kBatchedWarps);
      }
    if (kSplits > 1 && warp == 0) {
      Barrier::init(&received, 1);
      // Sums of the other CTAs.
      TransactionBarrier::arrive_and_expect_tx(&received, Shape::kSumsBytes / kSplits * (kSplits - 1));
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncwarp();
  if constexpr (kSplits > 1) cute::cluster_arrive_relaxed();

  // Four outputs of a token, and what they need besides, asked for early.
  const int share = p.swiglu ? Shape::kShare / 2 : Shape::kShare;  // of the outputs
  const int log_fours = log2_of(Shape::kShare / 4) - (p.swiglu ? 1 : 0), fours = 1 << log_fours,
            count = p.M << log_fours;
  const int begin = first_output + static_cast<int>(rank) * share;
  const Element* const residuals = static_cast<const Element*>(p.residual);
  const Element* const next_weights = static_cast<const Element*>(p.next_norm_weight);
  const float* parts;
  Element *out, *next_x;
  float* next_square = nullptr;
  uint2 residual = {0, 0}, next_weight = {0, 0};
  int m;
  bool is_there;
  const auto prepare = [&](int i, bool is_first) {
    m = i < count ? i >> log_fours : 0;
    const int at = 4 * (i & (fours - 1)), n = begin + at;
    is_there = i < count && n < p.N;
    parts = reinterpret_cast<const float*>(sums + at / Shape::kBlockRows * Shape::kBlockBytes) + m * Shape::kBlockRow +
            at % Shape::kBlockRows;
    out = static_cast<Element*>(p.out) + m * p.out_stride + n;
    if (next_weights != nullptr) {
      next_x = static_cast<Element*>(p.next_x) + static_cast<int64_t>(m) * p.N + n;
      next_square = at == 0 && i < count ? p.next_squares + m * p.next_squares_count + blockIdx.x : nullptr;
      if (is_there) next_weight = *reinterpret_cast<const uint2*>(next_weights + n);
    }
    if (is_first) wait_for_previous_kernel();
    if (residuals != nullptr && is_there)
      residual = __ldcg(reinterpret_cast<const uint2*>(residuals + m * p.residual_stride + n));
  };
  __syncthreads();  // the barriers are there
  prepare(static_cast<int>(threadIdx.x), true);

  if constexpr (!kStreamsX) {
    const Element* const x = static_cast<const Element*>(p.x) + x_column;
    for (int row = warp; row < p.M; row += kBatchedWarps)
      for (int piece = lane; piece < 8 * chunks; piece += 32) {  // of 16 bytes, swizzled as WGMMA wants them
        const bool is_inside = first_column + 8 * piece < p.K;
        copy_async_if(is_inside, x_ring + piece / 8 * Shape::kXBytes + row * kRowBytes + ((piece % 8 ^ row % 8) << 4),
                      x + row * p.x_stride + (is_inside ? 8 * piece : 0));
      }
    commit_copies();
  }
  // Parts of the sums of squares: 128 of each row at once, a row by kRowThreads neighbours.
  constexpr int kRowThreads = kBatchedConsumers / kTokens;
  const int own_row = static_cast<int>(threadIdx.x) / kRowThreads,
            own_part = static_cast<int>(threadIdx.x) % kRowThreads;
  float4 squares[kTokens / 8] = {};
  const auto load_squares = [&](int first) {
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i)
      if (const int at = first + 4 * (own_part + i * kRowThreads); own_row < p.M && at < p.squares_count) {
        const float4 square = __ldcg(reinterpret_cast<const float4*>(p.squares + own_row * p.squares_count + at));
        squares[i].x += square.x, squares[i].y += square.y, squares[i].z += square.z, squares[i].w += square.w;
      }
  };
  if (p.squares != nullptr) load_squares(0);
  if constexpr (!kStreamsX) {
    wait_for_copies<0>();
    fence_async_proxy();
    named_barrier(1, kBatchedConsumers);
  }

  const int warpgroup = warp / 4, first_own = kSharesUnits ? warpgroup : 0;
  float acc[Shape::kOwnUnits][kTokens / 2] = {};
  int stage = warpgroup, phase = 0, x_stage = first_own, x_phase = 0;
#pragma unroll 1
  for (int chunk = first_own; chunk < chunks; chunk += Shape::kChunkStep) {
    if constexpr (kStreamsX) Barrier::wait(x_full + x_stage, x_phase);
    const uint64_t b = descriptor_k_major(smem_address(x_ring + x_stage * Shape::kXBytes));
#pragma unroll
    for (int unit = 0; unit < Shape::kOwnUnits; ++unit) {
      Barrier::wait(full + stage, phase);
      const uint64_t a = descriptor_k_major(smem_address(ring + stage * kUnitBytes));
      fence_registers(acc[unit]);
      cute::warpgroup_arrive();
#pragma unroll
      for (int i = 0; i < kUnitColumns / 16; ++i)
        wgmma_k_major<Element, kTokens>(acc[unit], advance(a, 32 * i), advance(b, 32 * i));
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<kChunksInFlight * Shape::kOwnUnits>();
      constexpr int kSteps = kChunksInFlight * Shape::kChunkStep;
      if (chunk >= kSteps && lane == 0) {
        Barrier::arrive(empty + stage_before(stage, kSteps * kUnits, plan.stages));
        if (kStreamsX && unit == Shape::kOwnUnits - 1)
          Barrier::arrive(x_empty + stage_before(x_stage, kSteps, plan.x_stages));
      }
      stage += kBatchedWarpgroups;
      if (stage >= plan.stages) stage -= plan.stages, phase ^= 1;
    }
    x_stage += Shape::kChunkStep;
    if (x_stage >= plan.x_stages) x_stage -= plan.x_stages, x_phase ^= 1;
  }
  cute::warpgroup_wait<0>();
#pragma unroll
  for (int unit = 0; unit < Shape::kOwnUnits; ++unit) fence_registers(acc[unit]);

  if (p.squares != nullptr) {
#pragma unroll 1
    for (int first = 128; first < p.squares_count; first += 128) load_squares(first);
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) square += squares[i].x + squares[i].y + (squares[i].z + squares[i].w);
#pragma unroll
    for (int other = kRowThreads / 2; other > 0; other /= 2) square += __shfl_xor_sync(0xffffffffu, square, other);
    if (own_part == 0) factors[own_row] = rsqrtf(square / static_cast<float>(p.K) + p.norm_eps);
  }
  named_barrier(1, kBatchedConsumers);  // the factors are there, and nobody reads the ring any more

  // The other CTAs' barriers are there, too. To wait for that earlier would be in the way of everything.
  if constexpr (kSplits > 1) cute::cluster_wait();

  // Each block of sums goes to the CTA that has its outputs; to another one, by way of where the ring was.
  const int log_blocks = log2_of(Shape::kBlocks) - (p.swiglu ? 1 : 0), blocks = 1 << log_blocks;  // of each kind
#pragma unroll
  for (int i = 0; i < Shape::kOwnUnits; ++i) {
    const int unit = kSharesUnits ? 0 : i * kBatchedWarpgroups + warpgroup;
    const bool is_up = p.swiglu && unit >= kUnits / 2;
    const int index = 4 * (is_up ? unit - kUnits / 2 : unit) + warp % 4, owner = index >> log_blocks;
    const int place = (index & (blocks - 1)) + (is_up ? blocks : 0);
    const int part = kSharesUnits ? rank * kBatchedWarpgroups + warpgroup : rank;
    char* const to = sums + (part * Shape::kBlocks + place) * Shape::kBlockBytes;
    char* const from =
        kSplits == 1 || owner == static_cast<int>(rank) ? to : ring + (warp + i * kBatchedWarps) * Shape::kBlockBytes;
    float* const own = reinterpret_cast<float*>(from) + lane / 4;
#pragma unroll
    for (int j = 0; j < kTokens / 2; ++j)
      own[(8 * (j / 4) + 2 * (lane % 4) + j % 2) * Shape::kBlockRow + 8 * (j / 2 % 2)] = acc[i][j];
    if (kSplits > 1 && owner != static_cast<int>(rank)) {
      fence_async_proxy();
      __syncwarp();
      if (lane == 0)
        send(cute::set_block_rank(smem_address(to), owner), from, Shape::kBlockBytes,
             cute::set_block_rank(smem_address(&received), owner));
    }
  }
  named_barrier(1, kBatchedConsumers);  // this CTA's sums are in place
  if constexpr (kSplits > 1) {
    Barrier::wait(&received, 0);
    __syncwarp();  // arriving in parts of a warp would count several times
    cute::cluster_arrive_relaxed();
  }

  int i = static_cast<int>(threadIdx.x);
#pragma unroll 1
  while (true) {
    const float factor = p.squares != nullptr ? factors[m] : 1.0f;
    const auto add_up = [&](const float* from) {
      float4 y = *reinterpret_cast<const float4*>(from);
#pragma unroll
      for (int part = 1; part < Shape::kParts; ++part) {
        const float4 more = *reinterpret_cast<const float4*>(from + part * Shape::kBlocks * Shape::kBlockBytes / 4);
        y.x += more.x, y.y += more.y, y.z += more.z, y.w += more.w;
      }
      return uint2{pack<Element>(y.x * factor, y.y * factor), pack<Element>(y.z * factor, y.w * factor)};
    };
    uint2 y = add_up(parts);
    if (p.swiglu) {
      const uint2 up = add_up(parts + Shape::kBlocks / 2 * Shape::kBlockBytes / 4);
      y = {swiglu_of<Element>(y.x, up.x), swiglu_of<Element>(y.y, up.y)};
    }
    if (residuals != nullptr) {
      const float2 a = unpack<Element>(y.x), b = unpack<Element>(y.y);
      const float2 c = unpack<Element>(residual.x), d = unpack<Element>(residual.y);
      y = {pack<Element>(a.x + c.x, a.y + c.y), pack<Element>(b.x + d.x, b.y + d.y)};
    }
    if (is_there) *reinterpret_cast<uint2*>(out) = y;
    if (next_weights != nullptr) {
      const float2 a = unpack<Element>(y.x), b = unpack<Element>(y.y);
      const float2 c = unpack<Element>(next_weight.x), d = unpack<Element>(next_weight.y);
      if (is_there)
        *reinterpret_cast<uint2*>(next_x) = {pack<Element>(a.x * c.x, a.y * c.y), pack<Element>(b.x * d.x, b.y * d.y)};
      float square = is_there ? fmaf(a.x, a.x, a.y * a.y) + fmaf(b.x, b.x, b.y * b.y) : 0.0f;
      for (int other = fours / 2; other > 0; other /= 2) square += __shfl_xor_sync(0xffffffffu, square, other);
      if (next_square != nullptr) {
        *next_square = square;
        if (blockIdx.x + 1 == gridDim.x)  // nobody has the parts behind
          for (int more = 1; more < p.next_squares_count - static_cast<int>(blockIdx.x); ++more)
            next_square[more] = 0.0f;
      }
    }
    i += kBatchedConsumers;
    if (i - lane >= count) break;  // the same for the whole warp
    prepare(i, false);
  }
  if constexpr (kSplits > 1) {  // what this CTA has sent has arrived
    __syncwarp();
    cute::cluster_wait();
  }
}

}  // namespace kda

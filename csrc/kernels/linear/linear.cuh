// A product of up to 8 rows with a large weight, at the speed of the weight's bytes.
//
// Data flow
//   A CTA has tiles of 16 rows of the weight, one after the other. A warp has every kWarpsK-th step of 64 columns of them; the warps
//   beside it have the others. As many steps as a warp has places for are on their way to shared memory at any time, the first ones
//   before the kernel waits for the one that makes x: so the weights of the next product come while the last one is being
//   finished.
//   x goes from L2 straight to registers, where it stays for all tiles if there is room. A thread's piece has 8 neighbouring columns,
//   of weight and x alike: they stand for the columns that the fragments of two products of 16 columns would have, since a sum
//   does not depend on their order.
//   At the end of a tile the warps' sums meet in shared memory, with those of x² for the norm, whose factor is applied to the sums.
#pragma once

#include "api/linear.h"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/prefetch.cuh"

namespace kda {

constexpr int kLinearWarps = 8, kLinearThreads = 32 * kLinearWarps;
constexpr int kStepColumns = 64, kStepBytes = 16 * kStepColumns * 2;
constexpr int kMostTokens = 8, kMostNormed = 16384;  // rows and columns of x
constexpr int kLinearCtas = 2;                       // an SM

// kWarpsK warps share the columns of a tile, and have kSlots steps on their way, and x of kHeld steps in registers.
template <int kWarpsK, int kSlots>
struct LinearShape {
  static constexpr int kRowTiles = kLinearWarps / kWarpsK;  // tiles of the weight that a CTA has at a time
  static constexpr int kHeld = kWarpsK == 2 ? 2 : 4;
  struct Smem {
    alignas(128) char ring[kLinearWarps][kSlots][kStepBytes];
    float sums[2][kLinearWarps][16][kMostTokens + 1];  // of one tile and the next
    float squares[kLinearWarps][kMostTokens];
  };  // behind it, the norm's weight
};

// Multiplies x with the norm's weight, rounded. Returns the sum of its squares from before.
template <class Element>
__device__ __forceinline__ float weigh(uint4& x, const uint4& weight) {
  float squares = 0.0f;
  uint32_t* const words = reinterpret_cast<uint32_t*>(&x);
  const uint32_t* const factors = reinterpret_cast<const uint32_t*>(&weight);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = unpack<Element>(words[i]), w = unpack<Element>(factors[i]);
    squares = fmaf(a.x, a.x, fmaf(a.y, a.y, squares));
    words[i] = pack<Element>(a.x * w.x, a.y * w.y);
  }
  return squares;
}

template <class Element, int kWarpsK, int kSlots>
__global__ void __launch_bounds__(kLinearThreads, kLinearCtas) linear(const __grid_constant__ LinearParams p) {
  using Shape = LinearShape<kWarpsK, kSlots>;
  constexpr int kHeld = Shape::kHeld;
  extern __shared__ __align__(128) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Shape::Smem*>(smem_bytes);
  const uint4* const factors = reinterpret_cast<const uint4*>(smem_bytes + sizeof(smem));
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x & 31, row = lane / 4, quarter = lane % 4;
  const int own_part = warp % kWarpsK;
  const int rows = p.swiglu ? 8 : 16;  // outputs of a tile
  const int tiles = (p.N + rows - 1) / rows, rounds = (tiles + Shape::kRowTiles - 1) / Shape::kRowTiles;  // of CTAs
  const int steps = (p.K + kStepColumns - 1) / kStepColumns;
  const int own_steps = steps > own_part ? (steps - own_part + kWarpsK - 1) / kWarpsK : 0;

  // The next step to copy, of the round of tiles it belongs to.
  int copied_round = blockIdx.x, copied_step = 0, copied_slot = 0;
  const auto begin_step = [&]() {
    if (copied_round < rounds && own_steps > 0) {
      char* const place = smem.ring[warp][copied_slot];
      const int first = (copied_round * Shape::kRowTiles + warp / kWarpsK) * rows;
      const int column = (own_part + copied_step * kWarpsK) * kStepColumns + 8 * (lane % 8);
      const bool is_there = column < p.K;
      const Element* const weight = static_cast<const Element*>(p.weight) + (is_there ? column : 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // 4 rows of 128 bytes each
        const int r = 4 * i + lane / 8;
        // The upper 8 rows of a tile with SwiGLU are `up`.
        const int from = p.swiglu ? min(first + r % 8, p.N - 1) + (i < 2 ? 0 : p.N) : min(first + r, p.N - 1);
        // Every other row has its halves swapped, so that two rows of 64 bytes share no bank.
        copy_async_if(is_there, place + r * 128 + 16 * (lane % 8 ^ (r % 2 * 4)),
                      weight + static_cast<int64_t>(from) * p.K);
      }
      if (++copied_step == own_steps) copied_step = 0, copied_round += static_cast<int>(gridDim.x);
      if (++copied_slot == kSlots) copied_slot = 0;
    }
    commit_copies();
  };

  launch_dependents();
  const bool has_norm = p.norm_weight != nullptr;
  if (has_norm) {
    copy_async(smem_bytes + sizeof(smem), p.norm_weight, 2 * p.K, static_cast<int>(threadIdx.x), kLinearThreads);
    commit_copies();
  }
#pragma unroll
  for (int i = 0; i < kSlots; ++i) begin_step();
  if (has_norm) {
    wait_for_copies<kSlots>();
    __syncthreads();
  }
  wait_for_previous_kernel();

  uint4 pieces[kHeld][2];
  float squares = 0.0f;
  int slot = 0, parity = 0;
#pragma unroll 1
  for (int round = blockIdx.x; round < rounds; round += static_cast<int>(gridDim.x), parity ^= 1) {
    const bool is_first = round == static_cast<int>(blockIdx.x);
    const Element* const x = static_cast<const Element*>(p.x);
    float sums[4] = {};
#pragma unroll 1
    for (int begin = 0; begin < own_steps; begin += kHeld) {
      if (is_first || own_steps > kHeld) {
        const auto column_of = [&](int i, int half) {
          return (own_part + (begin + i) * kWarpsK) * kStepColumns + 32 * half + 8 * quarter;
        };
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int column = column_of(i, half);
            pieces[i][half] = {0, 0, 0, 0};
            if (begin + i < own_steps && column < p.K && row < p.M)
              pieces[i][half] = __ldcg(reinterpret_cast<const uint4*>(x + row * p.x_stride + column));
          }
        }
        if (has_norm) {
#pragma unroll
          for (int i = 0; i < kHeld; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int column = column_of(i, half);
              if (begin + i >= own_steps || column >= p.K) continue;
              const float square = weigh<Element>(pieces[i][half], factors[column / 8]);
              if (is_first) squares += square;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (begin + i >= own_steps) break;
        wait_for_copies<kSlots - 1>();
        __syncwarp();  // the copies of all lanes are there
        const char* const place = smem.ring[warp][slot] + row * 128;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = 16 * ((4 * half + quarter) ^ (row % 2 * 4));
          const uint4 a = *reinterpret_cast<const uint4*>(place + at);
          const uint4 b = *reinterpret_cast<const uint4*>(place + 1024 + at);
          const uint32_t one[4] = {a.x, b.x, a.y, b.y}, other[4] = {a.z, b.z, a.w, b.w};
          mma<Element>(sums, one, pieces[i][half].x, pieces[i][half].y);
          mma<Element>(sums, other, pieces[i][half].z, pieces[i][half].w);
        }
        __syncwarp();  // all lanes have read
        begin_step();
        if (++slot == kSlots) slot = 0;
      }
    }

    auto& own_sums = smem.sums[parity][warp];
#pragma unroll
    for (int i = 0; i < 4; ++i) own_sums[row + 8 * (i / 2)][2 * quarter + i % 2] = sums[i];
    if (has_norm && is_first) {
      squares += __shfl_xor_sync(0xffffffffu, squares, 1);
      squares += __shfl_xor_sync(0xffffffffu, squares, 2);
      if (quarter == 0) smem.squares[warp][row] = squares;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < Shape::kRowTiles * p.M * rows; i += kLinearThreads) {
      const int channel = i % rows, token = i / rows % p.M, tile = i / rows / p.M;
      const int n = (round * Shape::kRowTiles + tile) * rows + channel;
      if (n >= p.N) continue;
      float y = 0.0f, up = 0.0f, square = 0.0f;
#pragma unroll
      for (int part = 0; part < kWarpsK; ++part) {
        const auto& own = smem.sums[parity][tile * kWarpsK + part];
        y += own[channel][token];
        if (p.swiglu) up += own[channel + 8][token];
        if (has_norm) square += smem.squares[tile * kWarpsK + part][token];
      }
      if (has_norm) {
        const float factor = rsqrtf(square / static_cast<float>(p.K) + p.norm_eps);
        y *= factor, up *= factor;
      }
      y = rounded<Element>(y);
      if (p.swiglu) y = rounded<Element>(y / (1.0f + expf(-y))) * rounded<Element>(up);
      if (p.residual != nullptr) {
        const uint16_t bits = __ldcg(static_cast<const uint16_t*>(p.residual) + token * p.residual_stride + n);
        y += load_float<Element>(&bits, 0);
      }
      store_value<Element>(p.out, token * p.out_stride + n, y);
    }
  }
  wait_for_copies<0>();
}

}  // namespace kda

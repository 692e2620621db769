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

// Multiplies x with the norm's weight, rounded.
template <class Element>
__device__ __forceinline__ void weigh(uint4& x, const uint4& weight) {
  using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
  Pair* const pairs = reinterpret_cast<Pair*>(&x);
  const Pair* const factors = reinterpret_cast<const Pair*>(&weight);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __hmul2(pairs[i], factors[i]);
}

// An output of a round: its channel of a tile, its row of x, its tile, and the channel of the round.
struct Output {
  int channel, token, tile, n;
};

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

  // The next step to copy, of the round of tiles it belongs to: where this lane's pieces of four rows are, and how many columns there
  // are from there on. Beyond the last one, pieces are zeros, and the place stays where it is.
  int copied_round = blockIdx.x, copied_step = 0, copied_slot = 0, left;
  const Element* from[4];
  const auto begin_round = [&]() {
    const int first = (copied_round * Shape::kRowTiles + warp / kWarpsK) * rows;
    const int column = own_part * kStepColumns + 8 * (lane % 8);
    left = p.K - column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 4 * i + lane / 8;
      // The upper 8 rows of a tile with SwiGLU are `up`.
      const int n = p.swiglu ? min(first + r % 8, p.N - 1) + (i < 2 ? 0 : p.N) : min(first + r, p.N - 1);
      from[i] = static_cast<const Element*>(p.weight) + static_cast<int64_t>(n) * p.K + (left > 0 ? column : 0);
    }
  };
  // Every other row has its halves swapped, so that two rows of 64 bytes share no bank.
  char* const own_place = smem.ring[warp][0] + lane / 8 * 128 + 16 * (lane % 8 ^ (lane / 8 % 2 * 4));
  const auto begin_step = [&]() {
    if (copied_round < rounds && own_steps > 0) {
      constexpr int kColumns = kWarpsK * kStepColumns;  // to this warp's next step
      const int further = left > kColumns ? kColumns : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // 4 rows of 128 bytes each
        copy_async_if(left > 0, own_place + copied_slot * kStepBytes + i * 512, from[i]);
        from[i] += further;
      }
      left -= kColumns;
      if (++copied_step == own_steps) {
        copied_step = 0, copied_round += static_cast<int>(gridDim.x);
        begin_round();
      }
      if (++copied_slot == kSlots) copied_slot = 0;
    }
    commit_copies();
  };

  launch_dependents();
  const bool has_norm = p.norm_weight != nullptr;
  if (has_norm) {
    // Few times, so that unrolling, as the compiler would, is code in the way of everything else.
#pragma unroll 1
    for (int at = 16 * static_cast<int>(threadIdx.x); at < 2 * p.K; at += 16 * kLinearThreads)
      copy_async(smem_bytes + sizeof(smem) + at, static_cast<const char*>(p.norm_weight) + at);
    commit_copies();
  }
  begin_round();
#pragma unroll 1
  for (int i = 0; i < kSlots; ++i) begin_step();
  const auto output_at = [&](int i) {
    const int channel = i % rows, token = i / rows % p.M, tile = i / rows / p.M;
    return Output{channel, token, tile, tile * rows + channel};
  };
  // What can be computed before it is needed: x of this thread, how many columns it has there, and what the thread makes first of
  // each round.
  const int first_column = own_part * kStepColumns + 8 * quarter, columns = row < p.M ? p.K - first_column : 0;
  const Element* x = static_cast<const Element*>(p.x) + min(row, p.M - 1) * p.x_stride + first_column;
  const int outputs = Shape::kRowTiles * p.M * rows;  // of a round
  const Output own = output_at(static_cast<int>(threadIdx.x));
  const uint16_t* own_residual = p.residual == nullptr || static_cast<int>(threadIdx.x) >= outputs
                                     ? nullptr
                                     : static_cast<const uint16_t*>(p.residual) + own.token * p.residual_stride + own.n;
  settle(x), settle(own_residual);
  if (has_norm) {
    wait_for_copies<kSlots>();
    __syncthreads();
  }
  wait_for_previous_kernel();

  uint4 pieces[kHeld][2];
  float squares[2][4] = {};  // products of the rows of x with each other, of half of the columns each
  int slot = 0, parity = 0;
#pragma unroll 1
  for (int round = blockIdx.x; round < rounds; round += static_cast<int>(gridDim.x), parity ^= 1) {
    const bool is_first = round == static_cast<int>(blockIdx.x);
    const int first_n = round * Shape::kRowTiles * rows;
    uint16_t residual = 0;
    if (own_residual != nullptr && first_n + own.n < p.N) residual = __ldcg(own_residual + first_n);
    float sums[2][4] = {};
#pragma unroll 1
    for (int begin = 0; begin < own_steps; begin += kHeld) {
      if (is_first || own_steps > kHeld) {
        const int begin_column = begin * kWarpsK * kStepColumns, columns_left = columns - begin_column;
        const uint4* const x_from = reinterpret_cast<const uint4*>(x + begin_column);
        const uint4* const factors_from = factors + (first_column + begin_column) / 8;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int column = i * kWarpsK * kStepColumns + 32 * half;
            pieces[i][half] = {0, 0, 0, 0};
            if (column < columns_left) pieces[i][half] = __ldcg(x_from + column / 8);
          }
        }
        if (has_norm) {
#pragma unroll
          for (int i = 0; i < kHeld; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              uint4& piece = pieces[i][half];
              if (is_first) {
                mma<Element>(squares[0], {piece.x, 0, piece.y, 0}, piece.x, piece.y);
                mma<Element>(squares[1], {piece.z, 0, piece.w, 0}, piece.z, piece.w);
              }
              const int column = i * kWarpsK * kStepColumns + 32 * half;
              if (column < columns_left) weigh<Element>(piece, factors_from[column / 8]);
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
          mma<Element>(sums[0], one, pieces[i][half].x, pieces[i][half].y);
          mma<Element>(sums[1], other, pieces[i][half].z, pieces[i][half].w);
        }
        __syncwarp();  // all lanes have read
        begin_step();
        if (++slot == kSlots) slot = 0;
      }
    }

    auto& own_sums = smem.sums[parity][warp];
#pragma unroll
    for (int i = 0; i < 4; ++i) own_sums[row + 8 * (i / 2)][2 * quarter + i % 2] = sums[0][i] + sums[1][i];
    if (has_norm && is_first && quarter == row / 2)
      smem.squares[warp][row] = row % 2 == 0 ? squares[0][0] + squares[1][0] : squares[0][1] + squares[1][1];
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < outputs; i += kLinearThreads) {
      const bool is_own = i == static_cast<int>(threadIdx.x);
      const Output output = is_own ? own : output_at(i);
      const int channel = output.channel, token = output.token, tile = output.tile;
      const int n = first_n + output.n;
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
        if (!is_own) residual = __ldcg(static_cast<const uint16_t*>(p.residual) + token * p.residual_stride + n);
        y += unpack<Element>(residual).x;
      }
      store_value<Element>(p.out, token * p.out_stride + n, y);
    }
  }
  wait_for_copies<0>();
}

}  // namespace kda

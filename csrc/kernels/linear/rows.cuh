// What stands between products, row by row.
#pragma once

#include "api/linear.h"
#include "common/launch.cuh"
#include "common/vector.cuh"

namespace kda {

constexpr int kRowsThreads = 256;
constexpr int kMostRowPieces = 8;  // of 8 elements, a thread's

// y = x / sqrt(mean(x²) + eps) ∘ weight, rounded once: a CTA a row, whose elements stay in registers.
template <class Element, int kPieces>
__global__ void __launch_bounds__(kRowsThreads) rms_norm(const __grid_constant__ RowsParams p) {
  __shared__ float sums[kRowsThreads / 32];
  const int first = 8 * static_cast<int>(threadIdx.x);
  float weight[kPieces][8], x[kPieces][8], square = 0.0f;
  launch_dependents();
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
    if (const int at = first + 8 * kRowsThreads * i; at < p.N) load_neighbours<Element>(p.weight, at, weight[i]);
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = first + 8 * kRowsThreads * i;
    if (at >= p.N) break;
    load_neighbours<Element>(p.x, blockIdx.x * p.x_stride + at, x[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) square = fmaf(x[i][j], x[i][j], square);
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) square += __shfl_xor_sync(0xffffffffu, square, other);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = square;
  __syncthreads();
  square = 0.0f;
#pragma unroll
  for (const float sum : sums) square += sum;
  const float factor = rsqrtf(square / static_cast<float>(p.N) + p.norm_eps);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = first + 8 * kRowsThreads * i;
    if (at >= p.N) break;
#pragma unroll
    for (int j = 0; j < 8; ++j) x[i][j] *= factor * weight[i][j];
    store_neighbours<Element>(p.out, blockIdx.x * p.out_stride + at, x[i]);
  }
}

// y = x / sqrt(mean(x²) + eps) ∘ weight ∘ sigmoid(gate), rounded once: N / 8 lanes a row.
template <class Element, int N>
__global__ void __launch_bounds__(kRowsThreads) gated_rms_norm(const __grid_constant__ RowsParams p) {
  constexpr int kLanes = N / 8;
  static_assert(kLanes <= 32 && 32 % kLanes == 0);
  const int row = static_cast<int>(blockIdx.x) * (kRowsThreads / kLanes) + static_cast<int>(threadIdx.x) / kLanes;
  const int at = static_cast<int>(threadIdx.x) % kLanes * 8;
  const bool is_there = row < p.M;  // all lanes of a warp go on, since they meet
  float weight[8], x[8] = {}, gate[8] = {}, square = 0.0f;
  launch_dependents();
  wait_for_previous_kernel();
  load_neighbours<Element>(p.weight, at, weight);
  if (is_there) {
    load_neighbours<Element>(p.x, row * p.x_stride + at, x);
    load_neighbours<Element>(p.gate, row * p.gate_stride + at, gate);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) square = fmaf(x[j], x[j], square);
#pragma unroll
  for (int other = kLanes / 2; other > 0; other /= 2) square += __shfl_xor_sync(0xffffffffu, square, other);
  const float factor = rsqrtf(square / static_cast<float>(N) + p.norm_eps);
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] *= factor * weight[j] / (1.0f + expf(-gate[j]));
  if (is_there) store_neighbours<Element>(p.out, row * p.out_stride + at, x);
}

// out [M, N] = silu(first half of x) ∘ second half, silu rounded as well.
template <class Element>
__global__ void __launch_bounds__(kRowsThreads) swiglu(const __grid_constant__ RowsParams p) {
  launch_dependents();
  wait_for_previous_kernel();
  const int at = 8 * (static_cast<int>(blockIdx.y * kRowsThreads + threadIdx.x));
  if (at >= p.N) return;
  float gate[8], up[8];
  load_neighbours<Element>(p.x, blockIdx.x * p.x_stride + at, gate);
  load_neighbours<Element>(p.x, blockIdx.x * p.x_stride + p.N + at, up);
#pragma unroll
  for (int j = 0; j < 8; ++j) up[j] *= rounded<Element>(gate[j] / (1.0f + expf(-gate[j])));
  store_neighbours<Element>(p.out, blockIdx.x * p.out_stride + at, up);
}

}  // namespace kda

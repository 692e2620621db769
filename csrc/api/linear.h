// Products of few rows with large weights, as a decode step has them, and what stands between: the host side of the kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kda.h"

namespace kda {

// out [M, N] = f(norm(x) · weightᵀ), for one token of each of M sequences, where
//
//   norm(x) = x / sqrt(mean(x²) + norm_eps) ∘ norm_weight, or x
//   f(y) = y, or y + residual, or with `swiglu`, silu(y of gate) ∘ y of up, whose weights are the first and the last N rows
//
// The products are summed in fp32, and rounded to the dtype before f, like its parts. M is 1 to 32.
struct LinearParams {
  int M, N, K;
  // N / groups of the outputs each have K columns of x for themselves, one group's after the other's.
  int groups;
  bool swiglu;
  DType dtype;  // bf16 or fp16: of all tensors but sums of squares

  // Rows of 16-byte aligned vectors; the stride is in elements. `weight` is contiguous.
  const void *x, *weight, *residual;
  void* out;
  int64_t x_stride, residual_stride, out_stride;

  // The norm. Of up to 8 rows, its weight [K], or null.
  const void* norm_weight;
  // Of any number, parts [M, squares_count] of the sums of x², for x that has been multiplied with the norm's weight since; or null.
  const float* squares;
  int squares_count;
  float norm_eps;

  // What a norm of the output needs of this product, or null: the norm's weight [N], out ∘ weight [M, N], and parts [M, linear_parts]
  // of the sums of out².
  const void* next_norm_weight;
  void* next_x;
  float* next_squares;
  int next_squares_count;

  int num_sms;
};

// Null, or why such a call cannot be served: a static string that names the argument. Looks at sizes and dtypes.
const char* linear_refusal(const LinearParams& params);

// Launches on `stream` of the current device. Checks nothing, waits for nothing, and a CUDA graph can capture it. M is at least 1.
// `residual` may be `out`.
cudaError_t linear(const LinearParams& params, cudaStream_t stream);

// How many parts of sums of squares a product makes.
int linear_parts(int M, int N, int K);

// What stands between products of more rows: out [M, N] = x / sqrt(mean(x²) + norm_eps) ∘ weight, for x [M, N], or without a weight,
// silu(first half) ∘ second half of each row of x [M, 2 N], with the silu rounded to the dtype, too. With a gate [M, N], the norm is
// that of the heads of a prefill: many short rows, of N = 64, 128 or 256, and sigmoid(gate) is a factor.
struct RowsParams {
  int M, N;
  DType dtype;  // of all tensors
  const void *x, *weight, *gate;
  void* out;
  int64_t x_stride, gate_stride, out_stride;  // in elements; rows are of 16-byte aligned vectors
  float norm_eps;
};

const char* rows_refusal(const RowsParams& params);

cudaError_t rows(const RowsParams& params, cudaStream_t stream);

}  // namespace kda

// What a decode step has on the CPU beside products of matrices and mixers, row by row. No torch here.
#pragma once

#include <cstdint>

#include "vector.h"

namespace kda::cpu {

// Rows of N elements, which are contiguous; row m is at m / heads * batch_stride + m % heads * head_stride, in elements.
struct RowsParams {
  const void* x;  // of 2 N elements for swiglu
  int64_t heads, batch_stride, head_stride;
  const void* weight;  // [N], of rms_norm alone
  void* out;           // one row after the other
  int64_t N;
  DType dtype, weight_dtype;
  float norm_eps;
};

// Rows begin to end of x / sqrt(mean(x²) + eps) ∘ weight.
void rms_norm(const RowsParams& params, int64_t begin, int64_t end);

// Of silu(first half), rounded to its dtype, times the second half.
void swiglu(const RowsParams& params, int64_t begin, int64_t end);

// Of out + x, in the place of out.
void add(const RowsParams& params, int64_t begin, int64_t end);

}  // namespace kda::cpu

// What a decode step has on the CPU beside products of matrices and mixers, row by row. No torch here.
#pragma once

#include <cstdint>

#include "vector.h"

namespace kda::cpu {

// Rows of contiguous elements; row m is at m / heads * batch_stride + m % heads * head_stride.
struct Rows {
  void* data;
  int64_t batch_stride, head_stride;  // in elements
};

struct RowsParams {
  Rows x;              // of 2 N elements for swiglu; never written
  Rows out;            // of N elements
  const void* weight;  // [N], of rms_norm alone
  int64_t N, heads;
  DType dtype, weight_dtype;
  float norm_eps;
};

// Rows begin to end of x / sqrt(mean(x²) + eps) ∘ weight. May be in the place of x.
void rms_norm(const RowsParams& params, int64_t begin, int64_t end);

// Of silu(first half), rounded to its dtype, times the second half.
void swiglu(const RowsParams& params, int64_t begin, int64_t end);

// Of out + x, in the place of out.
void add(const RowsParams& params, int64_t begin, int64_t end);

}  // namespace kda::cpu

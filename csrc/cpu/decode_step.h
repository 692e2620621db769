// One token through a KDA layer on the CPU, from its projections to the input of its last one. No torch here.
//
//   q, k, v ← silu(conv(·)), rounded to their dtype     o ← recurrence     out = norm(o) ∘ weight ∘ sigmoid(output_gate)
//
// Shapes, formulas and roundings are those of kda_hf/ops/recurrent.py: B sequences, H query/key heads, HV value heads (a
// multiple of H), K and V head widths, W taps of the convolution.
#pragma once

#include <cstdint>

#include "vector.h"

namespace kda::cpu {

// Rows of [B, heads, width] with contiguous elements, or numbers of [B, heads].
struct Heads {
  const void* data;
  DType dtype;
  int64_t batch_stride, head_stride;  // in elements
};

// Contiguous.
struct Array {
  const void* data;  // null where there is none
  DType dtype;
};

struct DecodeStepParams {
  int64_t B, H, HV, K, V, W;
  Heads q, k, v, g, output_gate, beta;
  Array A_log, dt_bias;  // [HV], [HV, K]; without them, zeros
  Array q_conv_weight, k_conv_weight, v_conv_weight, norm_weight;
  void *conv_state, *recurrent_state;  // contiguous: [rows, 2 H K + HV V, W]; [rows, HV, K, V], or [rows, HV, V, K]
  DType conv_state_dtype, recurrent_state_dtype;
  int64_t rows;
  const void* state_indices;  // [B], or null: sequence b has row b. Numbers that are no rows skip their sequences
  bool state_indices_are_int64;
  void* out;  // [B, HV, V], contiguous, dtype of v
  float scale, lower_bound, norm_eps;
  bool is_safe_gate, allow_neg_eigval, state_v_first;
};

// Items begin to end of the B H that there are: a sequence and a query/key head, with the value heads that read it. Which
// items go together changes nothing of the results.
void decode_step(const DecodeStepParams& params, int64_t begin, int64_t end);

}  // namespace kda::cpu

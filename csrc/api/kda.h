// What the host sides of all KDA kernels take. No torch here.
//
// Shapes: B batch, T tokens, H query/key heads, HV value heads (a multiple of H), K and V head widths, N sequences.
// The formulas are those of kda_hf/ops/reference.py.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace kda {

enum class DType : int { kBF16, kFP16, kFP32 };

enum class Gate : int {
  kNone,      // g is the log-decay, at most 0
  kSafe,      // lower_bound * sigmoid(exp(A_log) * (g + dt_bias))
  kSoftplus,  // -exp(A_log) * softplus(g + dt_bias)
};

struct KdaParams {
  // q, k [B, T, H, K]; v, out [B, T, HV, V]; g [B, T, HV, K]; beta [B, T, HV]. Rows of K or V elements are contiguous
  // and start at multiples of 16 bytes. Rows of `out` that no sequence covers become zeros. `out` overlaps nothing.
  const void *q, *k, *v, *g, *beta;
  void* out;

  // Contiguous, 16-byte aligned, any of them null. States are [N, HV, V, K] with state_v_first, else [N, HV, K, V].
  // final_state may be initial_state itself. `states` [B, NT, HV, ...] gets states between tokens, see each operator.
  const void* initial_state;
  void* final_state;
  void* states;

  // [N + 1] on the device, or null: dense, N = B. Packed sequences have B = 1. The values are not to be trusted:
  // whatever they are, nothing out of bounds is read or written.
  const void* cu_seqlens;
  bool cu_seqlens_is_int64;

  // Of B, T and head, in elements: multiples of 16 bytes but for beta, whose strides are arbitrary.
  int64_t q_strides[3], k_strides[3], v_strides[3], g_strides[3], beta_strides[3], out_strides[3];

  int B, T, H, HV, K, V, N;

  // q, k, v and out share `dtype`; g and beta have that or fp32; states fp32 or bf16.
  DType dtype, g_dtype, beta_dtype, state_dtype;

  Gate gate;
  float scale, lower_bound;  // lower_bound in [-5, 0], of the safe gate only
  bool use_qk_norm, use_beta_sigmoid, allow_neg_eigval, state_v_first;
  int num_sms;
};

}  // namespace kda

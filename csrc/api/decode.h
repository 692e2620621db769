// Kimi Delta Attention token by token, for decoding: the host side of the kernels.
#pragma once

#include "kda.h"

namespace kda {

// `states` gets the state after every token: [B, T, HV, ...].
struct RecurrentParams : KdaParams {
  // [HV] and [HV, K], contiguous, of one dtype, 16-byte aligned; null stands for zeros.
  const void *A_log, *dt_bias;
  DType parameter_dtype;

  // [N] on the device, or null. With it, states are rows of a pool, `initial_state` and `final_state` at once: sequence n
  // has row state_indices[n] of `rows`. Any other number skips the sequence: its output is zeros.
  const void* state_indices;
  bool state_indices_is_int64;
  int rows;  // of the states

  int tokens_at_a_time;  // set by `recurrent`
};

// Null, or why such a call cannot be served: a static string that names the argument. Looks at sizes and dtypes.
const char* recurrent_refusal(const RecurrentParams& params);

// Launches on `stream` of the current device. Checks nothing, waits for nothing, and a CUDA graph can capture it.
// Sequences may have any number of tokens, none as well. B, N, HV, H are at least 1.
cudaError_t recurrent(const RecurrentParams& params, cudaStream_t stream);

// One token of each of N = B sequences through a KDA layer, from its projections to the input of its last one:
//
//   q, k, v ← silu(conv(·)), rounded to their dtype     o ← recurrence     out = norm(o) ∘ weight ∘ sigmoid(output_gate)
//
// where norm(o) = o / sqrt(mean(o²) + eps) over the V channels of a head, and o is rounded to the dtype of q before. q, k and v
// are the raw projections. Both states are updated in place, in rows of the same number: `initial_state` and `final_state`
// are one. Gate, norms of q and k and β are as the flags of KdaParams say.
struct DecodeStepParams : RecurrentParams {
  const void* output_gate;         // [B, T, HV, V], dtype of q; rows as those of v
  int64_t output_gate_strides[3];  // of B, T and head
  const void* norm_weight;         // [V]; as all weights, contiguous and 16-byte aligned
  float norm_eps;
  const void *q_conv_weight, *k_conv_weight, *v_conv_weight;  // [channels, W]
  void* conv_state;        // [rows, 2 H K + HV V, W], contiguous: the last W inputs of q, k and v, oldest first
  int conv_width;          // W, 2 to 4
  DType weight_dtype;      // of all four weights, that of q or fp32
  DType conv_state_dtype;  // that of q, or fp32
};

const char* decode_step_refusal(const DecodeStepParams& params);

cudaError_t decode_step(const DecodeStepParams& params, cudaStream_t stream);

// The same from the inputs of two more layers: `g` and `output_gate` [B, T, 1, K] are multiplied with these weights [HV K, K] and
// [HV V, K], contiguous and 16-byte aligned, and the products rounded. All but recurrent states is of the dtype of q, W is 4, heads lie
// side by side, and neither A_log nor dt_bias is null. All weights, A_log and dt_bias are read before the kernel that comes right before
// this one in the stream has ended, which therefore must not have written them.
struct LowRankStepParams : DecodeStepParams {
  const void *g_weight, *output_gate_weight;
};

const char* low_rank_step_refusal(const LowRankStepParams& params);

cudaError_t low_rank_step(const LowRankStepParams& params, cudaStream_t stream);

}  // namespace kda

// Causal depthwise convolution over whole sequences: the host side of the kernel.
//
//   y_t = activation(bias + Σ_w weight[:, w] x_{t - W + 1 + w})
//
// Shapes: B batch, T tokens, D channels, W taps, N sequences. The semantics are those of kda_hf/ops/conv.py.
#pragma once

#include "kda.h"

namespace kda {

struct ConvParams {
  // x, y [B, T, D]. Rows of D elements are contiguous and start at multiples of 16 bytes. Rows of `y` that no sequence
  // covers become zeros. `y` overlaps nothing.
  const void* x;
  void* y;

  // [D, W] and [D], contiguous, 16-byte aligned; bias may be null.
  const void *weight, *bias;

  // [N, D, W], the last W inputs, oldest first. Contiguous, 16-byte aligned, either null: before a sequence are zeros
  // then. final_state may be initial_state itself.
  const void* initial_state;
  void* final_state;

  // [N + 1] on the device, or null: dense, N = B. Packed sequences have B = 1. The values are not to be trusted:
  // whatever they are, nothing out of bounds is read or written.
  const void* cu_seqlens;
  bool cu_seqlens_is_int64;

  int64_t x_strides[2], y_strides[2];  // of B and T, in elements: multiples of 16 bytes

  int B, T, D, W, N;

  // x and y share `dtype`; weight and bias have that or fp32; both states share any.
  DType dtype, weight_dtype, bias_dtype, state_dtype;

  bool silu;
  int num_sms;

  int tokens_at_a_time;  // set by `causal_conv1d`
};

// Null, or why this call cannot be served: a static string that names the argument. Looks at sizes and dtypes.
const char* conv_refusal(const ConvParams& params);

// Launches on `stream` of the current device. Checks nothing, waits for nothing, and a CUDA graph can capture it.
// Sequences may have any number of tokens, none as well.
cudaError_t causal_conv1d(const ConvParams& params, cudaStream_t stream);

}  // namespace kda

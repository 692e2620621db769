// Softmax attention token by token, for decoding: the host side of the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kda.h"

namespace kda {

// One token of each of B sequences through an attention layer, from its projections to the input of its last one:
//
//   q, k ← rope(norm(·))   caches[length] ← k, v   out = softmax(scale q · keys) · values, over keys start..length
//
//   norm(x) = weight ∘ x / sqrt(mean(x²) + norm_eps) over a head, rounded once; x where the weight is null
//   rope(x) = x ∘ cos + rotate_half(x) ∘ sin, whose products and sum are rounded; x where `cos` is null
//
// H / KVH neighbouring heads of q share a head of the caches. The sums are fp32; the weights of the softmax are rounded
// to the dtype before they meet the values. The result is the same, bit for bit, whatever B and capacity are.
struct AttentionStepParams {
  int B, H, KVH, D, capacity;
  DType dtype;  // bf16 or fp16: of all tensors

  // [B, H, D], [B, KVH, D] and [B, KVH, D]: rows of heads, one after the other, 16-byte aligned. Strides in elements.
  const void *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;

  void *key_cache, *value_cache;  // [B, KVH, capacity, D], contiguous, 16-byte aligned; they overlap nothing

  // One number on the device: how many tokens the caches have. Where it is not in [0, capacity), nothing is cached, and
  // the output is zeros.
  const int64_t* length;
  const void* starts;  // [B] on the device, or null for zeros: the first key of each row. Without any, it gets zeros
  bool starts_are_int64;

  const void *q_norm_weight, *k_norm_weight;  // [D], 16-byte aligned, any of them null
  float norm_eps;

  const void *cos, *sin;  // [B, D] or [1, D], then of stride 0; both or none; rows 16-byte aligned
  int64_t rotary_stride;

  float scale;

  // attention_step_workspace_bytes(...) bytes, 16-byte aligned. They have to be zeros before the first call, and are
  // the kernel's own from then on, for calls of the same sizes that follow each other.
  void* workspace;

  void* out;  // [B, H, D], as q
  int64_t out_stride;

  int num_sms;
  int group;  // H / KVH, set by `attention_step`
};

// Null, or why such a call cannot be served: a static string that names the argument. Looks at sizes and dtypes.
const char* attention_step_refusal(const AttentionStepParams& params);

size_t attention_step_workspace_bytes(int B, int H, int KVH, int D, int capacity);

// Launches on `stream` of the current device. Checks nothing, waits for nothing, and a CUDA graph can capture it. B is
// at least 1.
cudaError_t attention_step(const AttentionStepParams& params, cudaStream_t stream);

}  // namespace kda

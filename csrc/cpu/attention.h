// Softmax attention of one token on the CPU, over all keys. No torch here.
#pragma once

#include <cstdint>

#include "vector.h"

namespace kda::cpu {

// Rows of [B, KVH, length, D] with contiguous elements.
struct Kept {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;  // in elements
};

struct AttentionParams {
  int64_t B, H, KVH, D, length;  // H is a multiple of KVH; at least one key
  const void* q;                 // [B, H, D]
  int64_t q_batch_stride, q_head_stride;
  Kept keys, values;
  DType dtype;  // of all of them
  float scale;
  float* partial;  // [B, H, spans of the length, partial_size of D]
  void* out;       // [B, H, D], contiguous
};

// Keys are taken in spans, which threads share, and whose results are merged in their order. How many there are depends on
// the length alone, and so does each bit of the result.
int64_t spans_of(int64_t length);
int64_t partial_size(int64_t D);

// Items begin to end of the B KVH spans that there are.
void attend_spans(const AttentionParams& params, int64_t begin, int64_t end);

// Of the B H heads that there are, when all spans are done.
void merge_spans(const AttentionParams& params, int64_t begin, int64_t end);

}  // namespace kda::cpu

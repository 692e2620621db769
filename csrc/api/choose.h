// The choice of the next tokens by their logits: the host side of the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kda.h"

namespace kda {

constexpr int kMostChoices = 1 << 18;  // tokens of a vocabulary

// tokens [B] of logits [B, V]: the largest one's, the first of equals, or with `noise`, a draw.
//
// A draw divides the probability of each token by its noise, which is exponentially distributed, and takes the largest quotient. Scores
// are logits times inverse_temperature, of which remain, one filter after the other,
//
//   top_k   the k largest, and equals of the last one; all with k >= V
//   top_p   the largest, until their probabilities are p together; of equals, the later ones; all with p >= 1
//   min_p   those at least min_p times as probable as the most probable one; all with 0
//
// Rows that have finished get `pad`, and finish with a token that is in `eos`.
struct ChooseParams {
  int B, V;
  DType dtype;  // of logits
  const void* logits;
  int64_t logits_stride;  // in elements, of rows, which are contiguous
  const float* noise;     // [B, V], or null
  float inverse_temperature, min_p;
  double top_p;
  int top_k;
  const int64_t* pad;  // [1], or null, if rows never finish
  const int64_t* eos;  // [eos_count]
  int eos_count;
  bool* unfinished;  // [B]
  int64_t* tokens;
};

// Null, or why such a call cannot be served: a static string that names the argument. Looks at sizes.
const char* choose_refusal(const ChooseParams& params);

// Launches on `stream` of the current device. Checks nothing, waits for nothing, and a CUDA graph can capture it. B is at least 1. Ends
// like an assertion that fails, as torch.multinomial does, where scores are to be drawn from that have a NaN or are infinite.
cudaError_t choose_tokens(const ChooseParams& params, cudaStream_t stream);

}  // namespace kda

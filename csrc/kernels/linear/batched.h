// Products of more rows than linear.cuh's kernel has registers for.
#pragma once

#include "api/linear.h"

namespace kda {

const char* batched_linear_refusal(const LinearParams& params);

cudaError_t batched_linear(const LinearParams& params, cudaStream_t stream);

}  // namespace kda

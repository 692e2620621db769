// Descriptors of q, k, v and g as the copy engine takes them: 64 tokens of one head at a time.
#pragma once

#include <cuda.h>

#include "api/prefill.h"

namespace kda {

struct PrepareMaps {
  CUtensorMap q, k, v, g;
};

// Touches no GPU.
cudaError_t make_maps(const PrefillParams& params, PrepareMaps& maps);

}  // namespace kda

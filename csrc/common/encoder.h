// Descriptors of tensors in global memory, as the copy engine takes them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace kda {

// The driver's function that makes them, found through the runtime, so that nothing links to the driver. Touches no GPU.
cudaError_t find_encoder(decltype(&cuTensorMapEncodeTiled)& encode);

}  // namespace kda

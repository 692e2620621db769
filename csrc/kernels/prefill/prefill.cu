// Stands where the prefill kernels will be: the extension builds, loads, and refuses every call.
#include "api/prefill.h"

namespace kda {

size_t prefill_workspace_bytes(const PrefillParams&) { return 0; }

cudaError_t prefill(const PrefillParams&, cudaStream_t) { return cudaErrorNotSupported; }

const char* prefill_refusal(const PrefillParams&) { return "the prefill kernel is not part of this build"; }

}  // namespace kda

#include "launch.cuh"

namespace kda {
template cudaError_t launch_prefill<__nv_bfloat16, 64>(PrefillParams&, cudaStream_t);
template cudaError_t launch_prefill<__nv_bfloat16, 128>(PrefillParams&, cudaStream_t);
}  // namespace kda

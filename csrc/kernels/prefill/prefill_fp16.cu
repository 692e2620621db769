#include "launch.cuh"

namespace kda {
template cudaError_t launch_prefill<__half, 64>(const PrefillParams&, cudaStream_t);
template cudaError_t launch_prefill<__half, 128>(const PrefillParams&, cudaStream_t);
}  // namespace kda

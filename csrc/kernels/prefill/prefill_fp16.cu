#include "launch.cuh"

namespace kda {
template cudaError_t launch_prefill<__half, 64>(PrefillParams&, cudaStream_t);
template cudaError_t launch_prefill<__half, 128>(PrefillParams&, cudaStream_t);
}  // namespace kda

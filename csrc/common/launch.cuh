// Launching kernels that may overlap with the one before them.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace kda {

constexpr int kSmemOfSm = 228 * 1024, kSmemOfSystem = 1024;  // bytes: an SM has, and each CTA takes besides its own

// Programmatic dependent launch: lets the next kernel of the stream start as soon as this one leaves room for it, and
// there waits until this one has ended and its writes are visible.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Has an address computed here, and not where it is first needed.
template <class T>
__device__ __forceinline__ void settle(T*& address) {
  asm volatile("" : "+l"(address));
}

// threadIdx.x, read anew: where registers are scarce, the compiler would rather spill it.
__device__ __forceinline__ int this_thread() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

__device__ __forceinline__ uint32_t this_sm() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(x));
  return x;
}

__device__ __forceinline__ uint32_t all_sms() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%nsmid;" : "=r"(x));
  return x;
}

// The place of this warp among those that its SM has at a time.
__device__ __forceinline__ int this_warp_of_sm() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%warpid;" : "=r"(x));
  return static_cast<int>(x);
}

// Allows `Kernel` its dynamic shared memory, once a device: always the same, where it is more than all kernels may have.
template <auto Kernel>
cudaError_t allow_shared_memory(int bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  static std::atomic<uint64_t> allowed{0};  // a bit a device
  int device;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  cudaError_t error = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < 64) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// With `overlap`, the kernel may start while the one before it is still running (programmatic dependent launch). `cluster` CTAs
// make a cluster. kMostSmem: the most bytes of shared memory that any launch of it asks for, where they differ.
template <auto Kernel, int kMostSmem = 0, class... Arguments>
cudaError_t launch(dim3 grid, int cluster, int threads, int smem_bytes, bool overlap, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (cudaError_t error = allow_shared_memory<Kernel>(kMostSmem > 0 ? kMostSmem : smem_bytes); error != cudaSuccess)
    return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = overlap ? 2 : 1;
  return cudaLaunchKernelEx(&config, Kernel, arguments...);
}

}  // namespace kda

// Loads that are begun long before they are needed.
#pragma once

#include <cstdint>

namespace kda {

// A hint: brings `bytes`, a multiple of 16 at such an address, into L2, where they stay what they are in memory. So it may come
// before the kernel waits for the one that writes them, and of a place that is never read.
__device__ __forceinline__ void hint(const void* address, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
}

// A word for a hint to go by: from L2, so that a load after the wait finds no old one nearer.
__device__ __forceinline__ int load_for_hint(const int* address) {
  int word;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(word) : "l"(address));
  return word;
}

// Copies bytes from global to shared memory, for this thread, without registers: after `wait_for_copies` it has them.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    static_assert(kBytes == 4 || kBytes == 8);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes) : "memory");
  }
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace kda

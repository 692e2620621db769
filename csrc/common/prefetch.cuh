// Loads that are begun long before they are needed.
#pragma once

#include <cstdint>

namespace kda {

// A hint: brings the line of an address into L2, where it stays what it is in memory. So it may come before the kernel waits for
// the one that writes it.
__device__ __forceinline__ void hint(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// A word for a hint to go by: from L2, so that a load after the wait finds no old one nearer.
__device__ __forceinline__ int load_for_hint(const int* address) {
  int word;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(word) : "l"(address));
  return word;
}

// Copies 16 bytes from global to shared memory, without registers. All threads that read them wait for their own copies, and
// then for each other.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}

// The same where `copies`; else fills them with zeros.
__device__ __forceinline__ void copy_async_if(bool copies, void* to, const void* from) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(copies ? 16 : 0)
      : "memory");
}

// Copies `bytes`, a multiple of 16 at such addresses, with several threads, of which this is number `thread`.
__device__ __forceinline__ void copy_async(char* to, const void* from, int bytes, int thread, int threads) {
  for (int at = 16 * thread; at < bytes; at += 16 * threads) copy_async(to + at, static_cast<const char*>(from) + at);
}

// Ends a group of copies, which may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last kLeft groups of this thread have arrived.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

}  // namespace kda

// Shared-memory tiles and the ways in and out of them.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "launch.cuh"
#include "mma.cuh"

namespace kda {

using Barrier = cutlass::arch::ClusterBarrier;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;

__device__ __forceinline__ uint32_t smem_address(const void* p) { return cute::cast_smem_ptr_to_uint(p); }

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const char* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(p))
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], const char* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_address(p))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[2], const char* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_address(p))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const char* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(p))
               : "memory");
}

__device__ __forceinline__ void store_matrices(char* p, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(p)), "r"(r0),
               "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

__device__ __forceinline__ void store_matrices(char* p, uint32_t r0, uint32_t r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(smem_address(p)), "r"(r0), "r"(r1)
               : "memory");
}

__device__ __forceinline__ void store_matrices_transposed(char* p, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(p)), "r"(r0),
               "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// 64 tokens of a head from `token` on: for each 128 bytes of a row 64 rows of as many, swizzled. Zeros for rows beyond the tensor.
__device__ __forceinline__ void load_tile(const CUtensorMap* map, uint64_t* barrier, char* destination, int head,
                                          int token, int batch) {
  cute::SM90_TMA_LOAD_5D::copy(map, barrier, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST), destination,
                               0, token, 0, head, batch);
}

// Has such a tile on its way to L2.
__device__ __forceinline__ void prefetch_tile(const CUtensorMap* map, int head, int token, int batch) {
  cute::SM90_TMA_LOAD_5D::PREFETCH::copy(map, 0, token, 0, head, batch);
}

// Has the copy engine read its map.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
}

// Orders this thread's writes to shared memory before later reads by the tensor cores or the copy engine.
__device__ __forceinline__ void fence_async_proxy() { cutlass::arch::fence_view_async_shared(); }

// Orders what this thread has seen of global memory before what the copy engine reads for it.
__device__ __forceinline__ void fence_global_proxy() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Waits until everything that this thread told the copy engine to store has been read out of shared memory.
__device__ __forceinline__ void bulk_stores_have_read() { cute::tma_store_wait<0>(); }

// Waits until it has also been written, and orders it before what this thread does next.
__device__ __forceinline__ void bulk_stores_are_done() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

// Copies to the same place in each of the cluster's first `ctas` CTAs, one or two, and tells the same barrier there.
__device__ __forceinline__ void bulk_load(const char* source, uint64_t* barrier, char* destination, int bytes,
                                          int ctas) {
  if (ctas == 1) {
    cute::SM90_BULK_COPY_G2S::copy(source, barrier, destination, bytes);
  } else {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(smem_address(destination)),
        "l"(source), "r"(bytes), "r"(smem_address(barrier)), "h"(uint16_t{3})
        : "memory");
  }
}

// A word of the shared memory of CTA `rank` of the cluster.
__device__ __forceinline__ int load_from(const int* p, int rank) {
  int value;
  asm volatile("ld.shared::cluster.s32 %0, [%1];"
               : "=r"(value)
               : "r"(cute::set_block_rank(smem_address(p), rank))
               : "memory");
  return value;
}

__device__ __forceinline__ void store_to(uint64_t* p, int rank, uint64_t value) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(cute::set_block_rank(smem_address(p), rank)), "l"(value)
               : "memory");
}

__device__ __forceinline__ void bulk_store(void* destination, const char* source, int bytes) {
  cute::SM90_BULK_COPY_S2G::copy(source, destination, bytes);
}

__device__ __forceinline__ void bulk_store_commit() { cute::tma_store_arrive(); }

// By address, where the compiler would find it out anew.
__device__ __forceinline__ float load_shared(uint32_t at) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
  return x;
}

__device__ __forceinline__ void store_shared(uint32_t at, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(x), "f"(y) : "memory");
}

// Barrier among `threads` threads, a multiple of 32; id 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A flag in global memory: who reads a value other than 0 sees what all threads wrote that the writer of it had waited for.
__device__ __forceinline__ int load_flag(const int* flag) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void set_flag(int* flag) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
}

}  // namespace kda

// Shared-memory tiles and the ways in and out of them.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>

#include "mma.cuh"

namespace kda {

// Byte offset of 16-byte chunk `chunk` (8 elements) of row `row` in a tile of 64 rows of 16-bit elements: halves of 64
// columns one after the other, 128-byte rows, chunks swizzled as WGMMA's 128-byte mode wants them.
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  return (chunk >> 3) * kHalfBytes + row * kRowBytes + (((chunk & 7) ^ (row & 7)) << 4);
}

__device__ __forceinline__ uint32_t smem_address(const void* p) { return cute::cast_smem_ptr_to_uint(p); }

// The 16 × 16 block of rows first_row.. and columns 16 * column.. as four 8 × 8 matrices. As an A operand of m16n8k16
// they are its four registers; as a B operand (a row per n), registers 0 and 2 are n = 0..7, registers 1 and 3 n = 8..15.
__device__ __forceinline__ int block_offset(int first_row, int column) {
  int lane = threadIdx.x & 31;
  return tile_offset(first_row + (lane & 15), 2 * column + (lane >> 4));
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const char* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
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

__device__ __forceinline__ void store_matrices_transposed(char* p, uint32_t r0, uint32_t r1, uint32_t r2,
                                                          uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(p)),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// 16 bytes from global to shared memory, asynchronously; zeros if not `valid`, and then `source` is not read.
__device__ __forceinline__ void copy_async_16(char* destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(destination)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Orders this thread's writes to shared memory before later reads by the tensor cores or the copy engine.
__device__ __forceinline__ void fence_async_proxy() { cutlass::arch::fence_view_async_shared(); }

// Waits until everything that this thread told the copy engine to store has been read out of shared memory.
__device__ __forceinline__ void bulk_stores_have_read() { cute::tma_store_wait<0>(); }

__device__ __forceinline__ void bulk_store(void* destination, const char* source, int bytes) {
  cute::SM90_BULK_COPY_S2G::copy(source, destination, bytes);
}

__device__ __forceinline__ void bulk_store_commit() { cute::tma_store_arrive(); }

// Barrier among `threads` threads, a multiple of 32; id 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace kda

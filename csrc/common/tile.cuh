// Shared-memory tiles and the ways in and out of them.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "mma.cuh"

namespace kda {

// Byte offset of 16-byte chunk `chunk` (8 elements) of row `row` in a tile of 64 rows of 16-bit elements: halves of 64
// columns one after the other, 128-byte rows, chunks swizzled as WGMMA's 128-byte mode wants them.
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  return (chunk >> 3) * kHalfBytes + row * kRowBytes + (((chunk & 7) ^ (row & 7)) << 4);
}

__device__ __forceinline__ uint32_t smem_address(const void* p) { return cute::cast_smem_ptr_to_uint(p); }

// Where this lane's row of a 16 × 16 block of a tile lies, for load_matrices and store_matrices: four 8 × 8 matrices. As an
// A operand of m16n8k16 they are its four registers; as a B operand (a row per n), registers 0 and 2 are n = 0..7,
// registers 1 and 3 n = 8..15.
class BlockAddress {
 public:
  __device__ __forceinline__ BlockAddress() {
    int lane = threadIdx.x & 31;
    base = (lane & 15) * kRowBytes + (((lane >> 4) ^ (lane & 7)) << 4);
  }
  // Rows 16 * row_block.. and columns 16 * column_block.. of the tile.
  __device__ __forceinline__ int operator()(int row_block, int column_block) const {
    return (base ^ (column_block & 3) << 5) + (column_block >> 2) * kHalfBytes + row_block * 16 * kRowBytes;
  }

 private:
  int base;
};

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

__device__ __forceinline__ void store_matrices_transposed(char* p, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(p)), "r"(r0),
               "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// 16 bytes from global to shared memory, asynchronously; zeros if not `valid`, and then `source` is not read.
__device__ __forceinline__ void copy_async_16(char* destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(destination)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Has the 128-byte line on its way to L2.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

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

// Programmatic dependent launch: lets the next kernel of the stream start as soon as this one leaves room for it, and
// there waits until this one has ended and its writes are visible.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace kda

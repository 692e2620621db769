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

// Byte offset of 16-byte chunk `chunk` (8 elements) of row `row` in a tile of 64 rows of 16-bit elements: halves of 64
// columns one after the other, 128-byte rows, chunks swizzled as WGMMA's 128-byte mode wants them.
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  return (chunk >> 3) * kHalfBytes + row * kRowBytes + (((chunk & 7) ^ (row & 7)) << 4);
}

__device__ __forceinline__ uint32_t smem_address(const void* p) { return cute::cast_smem_ptr_to_uint(p); }

// Where a lane's row of a 16 × 16 block of a tile lies, for load_matrices and store_matrices: four 8 × 8 matrices.
class MatricesAddress {
 public:
  // Rows 16 * row_block.. and columns 16 * column_block.. of the tile.
  __device__ __forceinline__ int operator()(int row_block, int column_block) const {
    return (base ^ (column_block & 3) << 5) + (column_block >> 2) * kHalfBytes + row_block * 16 * kRowBytes;
  }

 protected:
  __device__ __forceinline__ MatricesAddress(int row, int chunk) : base(row * kRowBytes + ((chunk ^ (row & 7)) << 4)) {}

 private:
  int base;
};

// As an A operand of m16n8k16 they are its four registers; as a B operand (a row per n), registers 0 and 2 are n = 0..7,
// registers 1 and 3 n = 8..15.
struct BlockAddress : MatricesAddress {
  __device__ __forceinline__ explicit BlockAddress(int lane) : MatricesAddress(lane & 15, lane >> 4) {}
};

// As B operand of m16n8k16, tokens as n: registers 0 and 1 are rows 0..7, registers 2 and 3 rows 8..15.
struct ColumnAddress : MatricesAddress {
  __device__ __forceinline__ explicit ColumnAddress(int lane)
      : MatricesAddress((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1) {}
};

// Half of such a block, 16 rows of 8 columns: two matrices.
class StripeAddress {
 public:
  __device__ __forceinline__ explicit StripeAddress(int lane) {
    int row = lane & 15;
    base = row * kRowBytes + ((row & 7) << 4);
  }
  // Rows 16 * row_block.. and columns 8 * chunk.. of the tile.
  __device__ __forceinline__ int operator()(int row_block, int chunk) const {
    return (base ^ (chunk & 7) << 4) + (chunk >> 3) * kHalfBytes + row_block * 16 * kRowBytes;
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

// The 16 × 16 block of halves at `p` times d: two channels for the first 8 columns, two for the others, as the fragments have
// them.
__device__ __forceinline__ void scale_block(char* p, const uint32_t (&d)[2]) {
  uint32_t r[4];
  load_matrices(r, p);
#pragma unroll
  for (int i = 0; i < 4; ++i) r[i] = multiply_half2(r[i], d[i >> 1]);
  store_matrices(p, r[0], r[1], r[2], r[3]);
}

// Zeros in rows first..63 of a tile of `columns` columns.
__device__ __forceinline__ void clear_rows(char* tile, int columns, int first, int thread, int threads) {
  for (int i = first * 8 + thread; i < 64 * 8; i += threads)
    for (int half = 0; half < columns / 64; ++half)
      *reinterpret_cast<uint4*>(tile + half * kHalfBytes + i * 16) = uint4{};
}

// 64 rows of 128 bytes, from column `column` of tokens token.. of a head, swizzled. Zeros for rows beyond the tensor.
__device__ __forceinline__ void load_tile(const CUtensorMap* map, uint64_t* barrier, char* destination, int column,
                                          int head, int token, int batch) {
  cute::SM90_TMA_LOAD_4D::copy(map, barrier, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST), destination,
                               column, head, token, batch);
}

// Has the copy engine read its map.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
}

// Has the 128-byte line on its way to L2.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

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

__device__ __forceinline__ void bulk_store(void* destination, const char* source, int bytes) {
  cute::SM90_BULK_COPY_S2G::copy(source, destination, bytes);
}

__device__ __forceinline__ void bulk_store_commit() { cute::tma_store_arrive(); }

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

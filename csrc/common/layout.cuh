// Where the elements of a tile lie in shared memory. Arithmetic alone: nothing here needs a GPU.
#pragma once

#include <cuda_runtime.h>

namespace kda {

// Tiles have 64 rows of 16-bit elements, in halves of 64 columns: rows of 128 bytes, whose 16-byte chunks are swizzled by
// (row % 8) as WGMMA's 128-byte mode wants them.
constexpr int kRowBytes = 128;
constexpr int kHalfBytes = 64 * kRowBytes;  // 64 rows of one half
constexpr int kNarrowRowBytes = 32;         // of 16 elements and no more: see descriptor_k_major_narrow

// Byte offset of 16-byte chunk `chunk` (8 elements) of row `row`; the halves follow each other.
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  return (chunk >> 3) * kHalfBytes + row * kRowBytes + (((chunk & 7) ^ (row & 7)) << 4);
}

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

}  // namespace kda

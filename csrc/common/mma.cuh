// Tensor-core products on registers and shared memory: thin wrappers of CuTe's atoms that take register arrays.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>

#include "layout.cuh"
#include "math.cuh"

namespace kda {

using Major = cute::SM90::GMMA::Major;
using ScaleIn = cute::SM90::GMMA::ScaleIn;
using ScaleOut = cute::SM90::GMMA::ScaleOut;

// ---------------------------------------------------------------------------------------- one warp: m16n8k16, m16n8k8

// Fragments, with g = lane / 4 and t = lane % 4: accumulators c[0..3] are (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
__device__ __forceinline__ void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cute::SM80_16x8x16_F32F16F16F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2],
                                          c[3]);
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2],
                                            c[3]);
}

template <class Element>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, __half>) {
    mma_fp16(c, a, b0, b1);
  } else {
    mma_bf16(c, a, b0, b1);
  }
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cute::SM80_16x8x8_F32TF32TF32F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2],
                                           c[3]);
}

// From the lane that has the same columns of an accumulator, and its last rows.
__device__ __forceinline__ float from_last_row(float x) {
  float y;
  asm volatile("shfl.sync.idx.b32 %0, %1, 28, 0x031f, 0xffffffff;" : "=f"(y) : "f"(x));  // lanes are 28 | lane & 3
  return y;
}

// -------------------------------------------------------------------------------------------- one warpgroup: WGMMA

// Shared-memory matrices are the tiles of layout.cuh.

// `leading_bytes` from one half to the next, `stride_bytes` from 8 rows to the next 8. `swizzle` is 1 for 128 bytes, 3 for 32.
__device__ __forceinline__ uint64_t descriptor(uint32_t smem_address, int leading_bytes, int stride_bytes,
                                               int swizzle) {
  cute::GmmaDescriptor d;
  d.desc_ = 0;
  d.bitfield.start_address_ = smem_address >> 4;
  d.bitfield.leading_byte_offset_ = leading_bytes >> 4;
  d.bitfield.stride_byte_offset_ = stride_bytes >> 4;
  d.bitfield.layout_type_ = swizzle;
  return d;
}

// K-major operand: a row per M or N index. Add 32 bytes for the next 16 elements of K, kHalfBytes for the next 64.
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t smem_address) {
  return descriptor(smem_address, 16, 8 * kRowBytes, 1);  // the first offset means nothing here
}

// The same for rows of 16 elements of K and no more: 32 bytes, their two 16-byte chunks swizzled by bit 2 of the row.
__device__ __forceinline__ uint64_t descriptor_k_major_narrow(uint32_t smem_address) {
  return descriptor(smem_address, 16, 8 * kNarrowRowBytes, 3);
}

// MN-major operand: a row per K index, 64 of M or N in a half. Add 16 * kRowBytes for the next 16 elements of K.
__device__ __forceinline__ uint64_t descriptor_mn_major(uint32_t smem_address) {
  return descriptor(smem_address, kHalfBytes, 8 * kRowBytes, 1);
}

__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

namespace detail {

template <class Atom, size_t... I, size_t N, class... Operands>
__device__ __forceinline__ void wgmma(std::index_sequence<I...>, float (&c)[N], ScaleOut scale,
                                      const Operands&... operands) {
  Atom::fma(operands..., c[I]..., scale);
}

}  // namespace detail

// c (64 × N, fp32) = ±A B + (accumulate ? c : 0) for 16 elements of K; A in registers, B in shared memory.
template <int N, Major kMajorB, ScaleIn kSign = ScaleIn::One>
__device__ __forceinline__ void wgmma_rs(float (&c)[N / 2], const uint32_t* a, uint64_t b, bool accumulate = true) {
  using namespace cute::SM90::GMMA;
  using Atom = std::conditional_t<N == 64, MMA_64x64x16_F32F16F16_RS<Major::K, kMajorB, kSign, ScaleIn::One>,
                                  MMA_64x128x16_F32F16F16_RS<Major::K, kMajorB, kSign, ScaleIn::One>>;
  detail::wgmma<Atom>(std::make_index_sequence<N / 2>{}, c, accumulate ? ScaleOut::One : ScaleOut::Zero, a[0], a[1],
                      a[2], a[3], b);
}

// The same for N = 64 with both operands in shared memory, of type Element (__half or __nv_bfloat16).
template <class Element, Major kMajorA, Major kMajorB>
__device__ __forceinline__ void wgmma_ss(float (&c)[32], uint64_t a, uint64_t b, bool accumulate = true) {
  using namespace cute::SM90::GMMA;
  using Atom = std::conditional_t<std::is_same_v<Element, __half>, MMA_64x64x16_F32F16F16_SS<kMajorA, kMajorB>,
                                  MMA_64x64x16_F32BF16BF16_SS<kMajorA, kMajorB>>;
  detail::wgmma<Atom>(std::make_index_sequence<32>{}, c, accumulate ? ScaleOut::One : ScaleOut::Zero, a, b);
}

// The same for N = 16 or 32, both operands K-major.
template <class Element, int N>
__device__ __forceinline__ void wgmma_k_major(float (&c)[N / 2], uint64_t a, uint64_t b) {
  using namespace cute::SM90::GMMA;
  static_assert(N == 16 || N == 32);
  using OfHalf = std::conditional_t<N == 16, MMA_64x16x16_F32F16F16_SS<Major::K, Major::K>,
                                    MMA_64x32x16_F32F16F16_SS<Major::K, Major::K>>;
  using OfBfloat16 = std::conditional_t<N == 16, MMA_64x16x16_F32BF16BF16_SS<Major::K, Major::K>,
                                        MMA_64x32x16_F32BF16BF16_SS<Major::K, Major::K>>;
  using Atom = std::conditional_t<std::is_same_v<Element, __half>, OfHalf, OfBfloat16>;
  detail::wgmma<Atom>(std::make_index_sequence<N / 2>{}, c, ScaleOut::One, a, b);
}

// Keeps the compiler from moving reads and writes of these registers across a point where WGMMA uses them.
template <class T, size_t N>
__device__ __forceinline__ void fence_registers(T (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(c[i]);
}

}  // namespace kda

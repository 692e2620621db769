// Arithmetic helpers with one meaning each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace kda {

constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one; a NaN if either is one.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// 2^e as a float; 0 below the normal range, and never infinite.
__device__ __forceinline__ float power_of_two(int e) {
  return e < -126 ? 0.0f : __int_as_float((min(e, 127) + 127) << 23);
}

// floor(log2(x)) of a positive float given by its bits; -127 for 0 and denormals, 128 for infinity and NaN.
__device__ __forceinline__ int exponent_of(uint32_t bits) { return static_cast<int>(bits >> 23) - 127; }

__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Largest of the bit patterns in the warp: of magnitudes, so also their order as floats, NaN on top.
__device__ __forceinline__ uint32_t warp_max(uint32_t bits) {
  uint32_t result;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(bits));
  return result;
}

// Rounded to the 10 mantissa bits of tf32, for the tensor cores, which ignore the other 13 bits. A NaN may get lost: for
// values whose NaN reaches the result by another way.
__device__ __forceinline__ uint32_t to_tf32(float x) { return __float_as_uint(x) + 0x1000u; }

// Pairs of 16-bit numbers in a register, the first in the low half. `Element` is __half or __nv_bfloat16.
template <class Element>
__device__ __forceinline__ uint32_t pack(float lo, float hi);

template <>
__device__ __forceinline__ uint32_t pack<__half>(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<__half2*>(&pair));
}

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// Product of two pairs of halves.
__device__ __forceinline__ uint32_t multiply_half2(uint32_t a, uint32_t b) {
  __half2 y = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<uint32_t*>(&y);
}

// The larger ones of two pairs of halves; a NaN where either is one.
__device__ __forceinline__ uint32_t max_half2_or_nan(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

template <class T>
__device__ __forceinline__ float rounded(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(__float2bfloat16(x));
  if constexpr (std::is_same_v<T, __half>) return __half2float(__float2half(x));
  return x;
}

template <class T>
__device__ __forceinline__ float load_float(const void* base, int64_t index) {
  if constexpr (sizeof(T) == 4) {
    return static_cast<const float*>(base)[index];
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(static_cast<const __half*>(base)[index]);
  } else {
    return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[index]);
  }
}

template <class T>
__device__ __forceinline__ void store_value(void* base, int64_t index, float x) {
  if constexpr (std::is_same_v<T, float>) {
    static_cast<float*>(base)[index] = x;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16(x);
  } else {
    static_cast<__half*>(base)[index] = __float2half(x);
  }
}

}  // namespace kda

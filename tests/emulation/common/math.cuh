// Arithmetic, exact where the GPU approximates.
#pragma once

#include "emulation.h"

namespace kda {

constexpr float kLog2E = 1.4426950408889634f;

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float rsqrt_approx(float x) { return 1.0f / std::sqrt(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float max_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::max(x, y); }
inline float power_of_two(int e) { return e < -126 ? 0.0f : std::ldexp(1.0f, std::min(e, 127)); }
inline int exponent_of(uint32_t bits) { return static_cast<int>(bits >> 23) - 127; }
inline uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }
inline uint32_t to_tf32(float x) { return __float_as_uint(x) + 0x1000u; }

inline uint32_t warp_max(uint32_t bits) {
  return emulation::hand_around(bits, [](const auto& of) {
    uint32_t most = 0;
    for (int lane = 0; lane < 32; ++lane) most = std::max(most, of(lane));
    return most;
  });
}

template <class Element>
uint16_t element_of(float x) {
  if constexpr (std::is_same_v<Element, __half>) return emulation::bits_of<uint16_t>(__float2half_rn(x));
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) return emulation::bits_of<uint16_t>(__float2bfloat16_rn(x));
}

template <class Element>
float float_of(uint16_t x) {
  if constexpr (std::is_same_v<Element, __half>) return __half2float(emulation::bits_of<__half>(x));
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) return __uint_as_float(x << 16);
}

template <class Element>
uint32_t pack(float lo, float hi) {
  return element_of<Element>(lo) | static_cast<uint32_t>(element_of<Element>(hi)) << 16;
}

template <class Element>
float2 unpack(uint32_t pair) {
  return {float_of<Element>(pair & 0xffff), float_of<Element>(pair >> 16)};
}

inline uint32_t multiply_half2(uint32_t a, uint32_t b) {
  const float2 x = unpack<__half>(a), y = unpack<__half>(b);
  return pack<__half>(x.x * y.x, x.y * y.y);
}

inline uint32_t max_half2_or_nan(uint32_t a, uint32_t b) {
  const float2 x = unpack<__half>(a), y = unpack<__half>(b);
  return pack<__half>(max_or_nan(x.x, y.x), max_or_nan(x.y, y.y));
}

template <class T>
float load_float(const void* base, int64_t index) {
  if constexpr (sizeof(T) == 4) {
    return static_cast<const float*>(base)[index];
  } else {
    return float_of<T>(static_cast<const uint16_t*>(base)[index]);
  }
}

}  // namespace kda

// Eight floats at a time, and the functions of them that a decode step needs. Sums are in fp32 whatever the dtype.
//
// The vectors are GCC's and Clang's, which lower them to what the target has. Everything here is inlined into its callers,
// of which there is one for each instruction set (KDA_VERSIONS): what is not inlined would be compiled for the oldest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define KDA_INLINE inline __attribute__((always_inline))

// Defines `name`, which calls `body`, as compiled for the best instruction set that the processor has. A wheel runs
// everywhere: x86-64 has AVX2 and FMA chosen when it runs, and ARM's vectors are part of its first version.
#if defined(__x86_64__)
#define KDA_VERSIONS(name, body, Params)                                                                          \
  static void name##_plain(const Params& params, int64_t begin, int64_t end) { body(params, begin, end); }        \
  __attribute__((target("avx2,fma"))) static void name##_avx2(const Params& params, int64_t begin, int64_t end) { \
    body(params, begin, end);                                                                                     \
  }                                                                                                               \
  void name(const Params& params, int64_t begin, int64_t end) {                                                   \
    static const auto best = has_avx2() ? name##_avx2 : name##_plain;                                             \
    best(params, begin, end);                                                                                     \
  }
#else
#define KDA_VERSIONS(name, body, Params) \
  void name(const Params& params, int64_t begin, int64_t end) { body(params, begin, end); }
#endif

namespace kda::cpu {

enum class DType : int { kBF16, kFP16, kFP32 };

struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

KDA_INLINE int64_t size_of(DType dtype) { return dtype == DType::kFP32 ? 4 : 2; }

constexpr int kLanes = 8;
using Vec = float __attribute__((vector_size(4 * kLanes)));
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Half = uint16_t __attribute__((vector_size(2 * kLanes)));

#if defined(__x86_64__)
// ATEN_CPU_CAPABILITY is torch's own variable for this.
inline bool has_avx2() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  const bool is_wanted = capability == nullptr || std::strcmp(capability, "default") != 0;
  return is_wanted && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

KDA_INLINE Vec all(float x) { return Vec{} + x; }
KDA_INLINE Vec as_floats(Bits x) { return reinterpret_cast<Vec>(x); }
KDA_INLINE Bits as_bits(Vec x) { return reinterpret_cast<Bits>(x); }
KDA_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// ------------------------------------------------------------------------------------------------------------- dtypes

template <class T>
KDA_INLINE T read(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

KDA_INLINE Vec widen(Vec x, float) { return x; }

KDA_INLINE Vec widen(Half x, BF16) { return as_floats(__builtin_convertvector(x, Bits) << 16); }

KDA_INLINE Vec widen(Half x, FP16) {
  const Bits half = __builtin_convertvector(x, Bits), sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  const Bits normal = (magnitude << 13) + ((127 - 15) << 23);
  const Bits infinite = normal + ((127 - 15) << 23);  // or NaN
  // A subnormal's bits under the exponent of 0.5 are as many steps of 2^-24 above it.
  const Bits subnormal = as_bits(as_floats(magnitude + 0x3f000000) - 0.5f);
  const Bits finite = magnitude < 0x0400 ? subnormal : normal;
  return as_floats((magnitude < 0x7c00 ? finite : infinite) | sign);
}

// To the nearest, ties to even.
KDA_INLINE Vec narrow(Vec x, float) { return x; }

KDA_INLINE Half narrow(Vec x, BF16) {
  const Bits bits = as_bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return __builtin_convertvector(is_nan ? Bits{} + 0x7fc0 : rounded, Half);
}

KDA_INLINE Half narrow(Vec x, FP16) {
  const Bits bits = as_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const Bits normal = (magnitude - ((127 - 15) << 23) + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  const Bits subnormal = as_bits(as_floats(magnitude) + 0.5f) - 0x3f000000;
  const Bits finite = magnitude < ((127 - 14) << 23) ? subnormal : normal;  // what rounds up to 2^16 becomes infinity
  const Bits beyond = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
  return __builtin_convertvector((magnitude < ((127 + 16) << 23) ? finite : beyond) | sign, Half);
}

template <class T>
struct Stored {
  using Type = Half;
};
template <>
struct Stored<float> {
  using Type = Vec;
};

template <class T>
KDA_INLINE Vec load(const T* p) {
  return widen(read<typename Stored<T>::Type>(p), T{});
}

template <class T>
KDA_INLINE void store(T* p, Vec x) {
  const typename Stored<T>::Type y = narrow(x, T{});
  std::memcpy(p, &y, sizeof(y));
}

// The first n of them; zeros for the rest.
template <class T>
KDA_INLINE Vec load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
KDA_INLINE void store(T* p, Vec x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  T buffer[kLanes];
  store(buffer, x);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

template <class T>
KDA_INLINE Vec rounded(Vec x) {
  return widen(narrow(x, T{}), T{});
}

// ----------------------------------------------------------------------------------------------------------- functions

// Within 1.5 units in the last place; NaN, infinities and subnormal results are as they should be.
KDA_INLINE Vec exp(Vec x) {
  x = x < -104.0f ? all(-104.0f) : x;  // where it is 0
  x = x > 89.0f ? all(89.0f) : x;      // and where it is infinite; comparisons leave a NaN as it is
  // x = n ln 2 + r, and ln 2 in two parts, of which n times the first is exact.
  const float kRound = 0x1.8p23f;  // adding it leaves no bits behind the point
  const Vec shifted = x * 1.44269504088896341f + kRound, n = shifted - kRound;
  const Vec r = (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
  Vec y = all(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  // Two factors, since 2^n may be out of range where the result isn't.
  const Ints exponent = reinterpret_cast<Ints>(as_bits(shifted) - 0x4b400000), half = exponent >> 1;
  return y * as_floats(reinterpret_cast<Bits>((half + 127) << 23)) *
         as_floats(reinterpret_cast<Bits>((exponent - half + 127) << 23));
}

KDA_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

KDA_INLINE Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

KDA_INLINE Vec softplus(Vec x) {
  const Vec e = exp(x);
  Vec y = x;
  for (int i = 0; i < kLanes; ++i) {
    if (!(x[i] > 40.0f)) y[i] = std::log1p(e[i]);
  }
  return y;
}

KDA_INLINE float sum(Vec x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// ---------------------------------------------------------------------------------------------------------------- rows

template <class T>
KDA_INLINE void load_row_of(const T* p, int64_t n, float* row) {
  for (int64_t i = 0; i < n; i += kLanes) store(row + i, load(p + i, n - i));
}

template <class T>
KDA_INLINE void store_row_of(T* p, int64_t n, const float* row) {
  for (int64_t i = 0; i < n; i += kLanes) store(p + i, load(row + i), n - i);
}

template <class T>
KDA_INLINE void round_row_to(int64_t n, float* row) {
  for (int64_t i = 0; i < n; i += kLanes) store(row + i, rounded<T>(load(row + i)));
}

// Rows of floats in memory of our own have room for, and zeros in, all lanes of their last vector.
KDA_INLINE void load_row(const void* p, DType dtype, int64_t offset, int64_t n, float* row) {
  switch (dtype) {
    case DType::kBF16: return load_row_of(static_cast<const BF16*>(p) + offset, n, row);
    case DType::kFP16: return load_row_of(static_cast<const FP16*>(p) + offset, n, row);
    case DType::kFP32: return load_row_of(static_cast<const float*>(p) + offset, n, row);
  }
}

KDA_INLINE void store_row(void* p, DType dtype, int64_t offset, int64_t n, const float* row) {
  switch (dtype) {
    case DType::kBF16: return store_row_of(static_cast<BF16*>(p) + offset, n, row);
    case DType::kFP16: return store_row_of(static_cast<FP16*>(p) + offset, n, row);
    case DType::kFP32: return store_row_of(static_cast<float*>(p) + offset, n, row);
  }
}

KDA_INLINE void round_row(DType dtype, int64_t n, float* row) {
  if (dtype == DType::kBF16) round_row_to<BF16>(n, row);
  if (dtype == DType::kFP16) round_row_to<FP16>(n, row);
}

KDA_INLINE void clear_padding(float* row, int64_t n) {
  for (int64_t i = n; i < padded(n); ++i) row[i] = 0;
}

KDA_INLINE float sum_of_squares(const float* row, int64_t n) {
  Vec total{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec x = load(row + i);
    total += x * x;
  }
  return sum(total);
}

}  // namespace kda::cpu

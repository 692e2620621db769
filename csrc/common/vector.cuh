// Runs of neighbouring numbers as vectors.
#pragma once

#include <type_traits>

#include "common/math.cuh"

namespace kda {

// N neighbours that 32-bit words hold.
template <class T, int N>
__device__ __forceinline__ void expand(const uint32_t (&words)[N * sizeof(T) / 4], float (&x)[N]) {
  if constexpr (sizeof(T) == 4) {
    __builtin_memcpy(x, words, sizeof(x));
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 pair = unpack<T>(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

template <class T, int N>
__device__ __forceinline__ void compress(const float (&x)[N], uint32_t (&words)[N * sizeof(T) / 4]) {
  if constexpr (sizeof(T) == 4) {
    __builtin_memcpy(words, x, sizeof(x));
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  }
}

// The widest that N elements are a multiple of.
template <class T, int N>
using WidestVector =
    std::conditional_t<N * sizeof(T) % 16 == 0, uint4, std::conditional_t<N * sizeof(T) % 8 == 0, uint2, uint32_t>>;

// N neighbours from element `index` on, in global memory, at a multiple of what WidestVector has.
template <class T, int N>
__device__ __forceinline__ void load_neighbours(const void* base, int64_t index, float (&x)[N]) {
  using Vector = WidestVector<T, N>;
  constexpr int kVectors = N * sizeof(T) / sizeof(Vector);
  const Vector* const from = reinterpret_cast<const Vector*>(static_cast<const T*>(base) + index);
  Vector vectors[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) vectors[i] = from[i];
  uint32_t words[N * sizeof(T) / 4];
  __builtin_memcpy(words, vectors, sizeof(words));
  expand<T>(words, x);
}

template <class T, int N>
__device__ __forceinline__ void store_neighbours(void* base, int64_t index, const float (&x)[N]) {
  using Vector = WidestVector<T, N>;
  constexpr int kVectors = N * sizeof(T) / sizeof(Vector);
  Vector* const to = reinterpret_cast<Vector*>(static_cast<T*>(base) + index);
  uint32_t words[N * sizeof(T) / 4];
  compress<T>(x, words);
  Vector vectors[kVectors];
  __builtin_memcpy(vectors, words, sizeof(words));
#pragma unroll
  for (int i = 0; i < kVectors; ++i) to[i] = vectors[i];
}

// Stores four neighbours in one piece, which the compiler does not where registers are scarce.
template <class T>
__device__ __forceinline__ void store_whole(T* to, const float (&x)[4]) {
  uint32_t words[sizeof(T)];
  compress<T>(x, words);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
  } else {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1]) : "memory");
  }
}

}  // namespace kda

// Tensor-core products: inputs as the instructions see them, sums in fp64, rounded to fp32 once.
#pragma once

#include "common/layout.cuh"
#include "emulation.h"
#include "math.cuh"

namespace kda {

enum class Major { K, MN };

extern thread_local char smem[];  // that of the kernel

// a: 16 × 8 n, b: 8 n × 8, as m16n8k16 (n = 2) and m16n8k8 in tf32 have them; `element` takes one of a register.
template <int kSize, class Function>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Function& element) {
  struct Own {
    uint32_t a[4], b[2];
  };
  const Own own{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  constexpr int kHalf = kSize / 2, kInRegister = kHalf / 4;  // of the inner index
  emulation::hand_around(own, [&](const auto& of) {
    for (int i = 0; i < 4; ++i) {
      const int row = emulation::lane() / 4 + i / 2 * 8, column = emulation::lane() % 4 * 2 + i % 2;
      double sum = c[i];
      for (int k = 0; k < kSize; ++k) {
        const int t = k % kHalf / kInRegister, upper = k / kHalf, which = k % kInRegister;
        sum += static_cast<double>(element(of(row % 8 * 4 + t).a[row / 8 + 2 * upper], which)) *
               element(of(column * 4 + t).b[upper], which);
      }
      c[i] = static_cast<float>(sum);
    }
    return 0;
  });
}

template <class Element>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<16>(c, a, b0, b1, [](uint32_t pair, int which) {
    return float_of<Element>(static_cast<uint16_t>(which == 0 ? pair & 0xffff : pair >> 16));
  });
}

inline void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma<__half>(c, a, b0, b1); }

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<8>(c, a, b0, b1, [](uint32_t x, int) { return __uint_as_float(x & ~0x1fffu); });
}

inline float from_last_row(float x) { return emulation::from_lane(x, emulation::lane() % 4 + 28); }

enum class ScaleIn { One, Neg };

// A descriptor is the address, which the swizzle changes as a whole, and a bit for rows of 32 bytes.
constexpr uint64_t kNarrow = uint64_t{1} << 40;
inline uint64_t descriptor_k_major(uint32_t address) { return address; }
inline uint64_t descriptor_mn_major(uint32_t address) { return address; }
inline uint64_t descriptor_k_major_narrow(uint32_t address) { return kNarrow | address; }
inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + bytes; }

template <class Element, Major kMajor>
float operand(uint64_t descriptor, int mn, int k) {
  auto at = static_cast<uint32_t>(descriptor);
  if (descriptor & kNarrow) {
    at += mn * kNarrowRowBytes + 2 * k;
    at ^= at >> 3 & 0x10;
  } else {
    at += kMajor == Major::K ? mn * kRowBytes + 2 * k : mn / 64 * kHalfBytes + k * kRowBytes + mn % 64 * 2;
    at ^= at >> 3 & 0x70;
  }
  uint16_t x;
  std::memcpy(&x, smem + at, 2);
  return float_of<Element>(x);
}

// Calls `a` for 64 × 16 of the first operand: a row of this warp's 16, and k.
template <class Element, Major kMajorB, size_t N, class Function>
void multiply_warpgroup(float (&c)[N], uint64_t b, bool accumulate, const Function& a) {
  for (size_t i = 0; i < N; ++i) {
    const int row = emulation::lane() / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + emulation::lane() % 4 * 2 + i % 2;
    double sum = accumulate ? c[i] : 0.0f;
    for (int k = 0; k < 16; ++k) sum += static_cast<double>(a(row, k)) * operand<Element, kMajorB>(b, column, k);
    c[i] = static_cast<float>(sum);
  }
}

template <class Element, Major kMajorA, Major kMajorB>
void wgmma_ss(float (&c)[32], uint64_t a, uint64_t b, bool accumulate = true) {
  multiply_warpgroup<Element, kMajorB>(c, b, accumulate, [&](int row, int k) {
    return operand<Element, kMajorA>(a, emulation::warp() % 4 * 16 + row, k);
  });
}

template <int N, Major kMajorB, ScaleIn kSign = ScaleIn::One>
void wgmma_rs(float (&c)[N / 2], const uint32_t* a, uint64_t b, bool accumulate = true) {
  struct Own {
    uint32_t a[4];
  };
  const Own own{{a[0], a[1], a[2], a[3]}};
  emulation::hand_around(own, [&](const auto& of) {
    multiply_warpgroup<__half, kMajorB>(c, b, accumulate, [&](int row, int k) {
      const float2 pair = unpack<__half>(of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2]);
      return (kSign == ScaleIn::Neg ? -1.0f : 1.0f) * (k % 2 == 0 ? pair.x : pair.y);
    });
    return 0;
  });
}

template <class T, size_t N>
void fence_registers(T (&)[N]) {}

}  // namespace kda

namespace cute {
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() {}
template <int kLeft>
void warpgroup_wait() {}
}  // namespace cute

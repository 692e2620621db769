// The choice of the next token of each sequence. A cluster has a row of logits, and each of its CTAs a part of the vocabulary.
//
// For a draw, a CTA has its scores in shared memory, as their distances from the row's largest: whole numbers of units of 2^-22, up to 32,
// from where on a token has less than 1e-13 of that one's probability. So equals are equal, sums are exact, and the order of additions
// does not matter. Filters look for the distance at which they cut: digit by digit, each of which takes the sums of weights by digit,
// of the CTA's tokens that have the digits before, and adds up those of all CTAs of the cluster.
#pragma once

#include "api/choose.h"
#include "common/tile.cuh"

namespace kda {

constexpr int kChooseThreads = 512, kChooseCtas = 8;
constexpr int kDigitBits = 9, kDigits = 3;  // of a key
constexpr int kBins = 1 << kDigitBits;      // a thread's one each
constexpr uint32_t kMostKey = (1u << kDigits * kDigitBits) - 1;
constexpr float kDistanceUnits = 1 << 22;
constexpr uint32_t kRemoved = ~0u;  // in place of a distance or a key

extern __shared__ uint32_t own_distances[];  // of the CTA's tokens; before that, their scores

struct ChooseSmem {
  uint32_t bins[2][2][kBins];  // of a digit and of the next one: lower 16 bits of weights, summed up, and the others
  uint64_t warp_sums[kChooseThreads / 32];
  uint64_t below;              // the weights below the bin that was looked for
  uint32_t digit;              // which is this
  float largest;               // score of this CTA
  uint64_t best[kChooseCtas];  // of each CTA, in the first one
  uint64_t warp_best[kChooseThreads / 32];
};

__device__ __forceinline__ void meet_in_cluster() {
  cute::cluster_arrive();
  cute::cluster_wait();
}

__device__ __forceinline__ uint32_t load_from(const uint32_t* p, int rank) {
  return static_cast<uint32_t>(load_from(reinterpret_cast<const int*>(p), rank));
}

// What orders scores as integers; a NaN comes last.
__device__ __forceinline__ uint32_t order_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return isnan(x) ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// e^-x of a distance. Up to 1, in units of 2^-32, it is a weight.
__device__ __forceinline__ float decay_of(uint32_t distance) {
  return distance == kRemoved ? 0.0f : exp2f(static_cast<float>(distance) * (-kLog2E / kDistanceUnits));
}

__device__ __forceinline__ uint64_t weight_of(uint32_t distance) {
  return __float2ull_rn(decay_of(distance) * 0x1p32f);
}

// The largest of a number and a token of each thread, with the first of equal tokens: the number above, and the token's complement below.
__device__ __forceinline__ uint64_t candidate(uint32_t number, int token) {
  return static_cast<uint64_t>(number) << 32 | ~static_cast<uint32_t>(token);
}

__device__ __forceinline__ uint64_t warp_largest(uint64_t x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, other));
  return x;
}

// A CTA's part of a row, as distances.
struct Distances {
  ChooseSmem& smem;
  uint32_t* distances;
  int count, thread, round = 0;

  struct Cut {
    uint32_t key;
    uint64_t rest;  // of the target, for tokens of this key
  };

  // The smallest key such that all tokens up to it have together more than a target, which is less than what all have. `key(i)` is that
  // of token i, or kRemoved. A token has its weight with kWeighted, else 1. `target` is of what all have.
  template <bool kWeighted, class Key, class Target>
  __device__ __forceinline__ Cut cut(const Key& key, const Target& target) {
    Cut result{0, 0};
    for (int shift = (kDigits - 1) * kDigitBits; shift >= 0; shift -= kDigitBits) {
      auto& bins = smem.bins[round++ % 2];  // whoever reads the other ones still has not met this CTA yet
      bins[0][thread] = bins[1][thread] = 0;
      __syncthreads();
      for (int i = thread; i < count; i += kChooseThreads) {
        const uint32_t own = key(i);
        if (own == kRemoved || own >> shift >> kDigitBits != result.key) continue;
        const uint32_t bin = own >> shift & (kBins - 1);
        if constexpr (kWeighted) {
          const uint64_t weight = weight_of(distances[i]);
          if (weight == 0) continue;
          atomicAdd(&bins[0][bin], static_cast<uint32_t>(weight) & 0xffffu);
          atomicAdd(&bins[1][bin], static_cast<uint32_t>(weight >> 16));
        } else {
          atomicAdd(&bins[0][bin], 1u);
        }
      }
      meet_in_cluster();
      uint64_t own = 0;
#pragma unroll
      for (int rank = 0; rank < kChooseCtas; ++rank) {
        own += load_from(&bins[0][thread], rank);
        if constexpr (kWeighted) own += static_cast<uint64_t>(load_from(&bins[1][thread], rank)) << 16;
      }
      uint64_t sum = own;  // of the bins up to this thread's
#pragma unroll
      for (int other = 1; other < 32; other *= 2) {
        const uint64_t before = __shfl_up_sync(0xffffffffu, sum, other);
        if (thread % 32 >= other) sum += before;
      }
      if (thread % 32 == 31) smem.warp_sums[thread / 32] = sum;
      __syncthreads();
      uint64_t total = 0;
#pragma unroll
      for (int warp = 0; warp < kChooseThreads / 32; ++warp) {
        if (warp < thread / 32) sum += smem.warp_sums[warp];
        total += smem.warp_sums[warp];
      }
      if (shift == (kDigits - 1) * kDigitBits) result.rest = min(target(total), total - 1);
      if (sum - own <= result.rest && result.rest < sum) smem.digit = thread, smem.below = sum - own;
      __syncthreads();
      result.key = result.key << kDigitBits | smem.digit;
      result.rest -= smem.below;
    }
    return result;
  }

  template <class Condition>
  __device__ __forceinline__ void remove_if(const Condition& condition) {
    for (int i = thread; i < count; i += kChooseThreads)
      if (condition(i, distances[i])) distances[i] = kRemoved;
    __syncthreads();
  }

  __device__ __forceinline__ void top_k(uint64_t k) {
    const Cut last = cut<false>([&](int i) { return distances[i]; }, [&](uint64_t) { return k - 1; });
    remove_if([&](int, uint32_t distance) { return distance > last.key; });
  }

  // `first`: of the CTA's tokens.
  __device__ __forceinline__ void top_p(double p, int first) {
    // From the farthest on, whose key is the smallest.
    const auto key = [&](int i) { return distances[i] == kRemoved ? kRemoved : kMostKey - distances[i]; };
    const Cut kept = cut<true>(
        key, [&](uint64_t total) { return p < 1 ? static_cast<uint64_t>((1 - p) * static_cast<double>(total)) : 0; });
    const uint32_t farthest = kMostKey - kept.key;
    uint32_t first_of_equals = 0;
    if (const uint64_t removed = kept.rest / weight_of(farthest); removed > 0) {
      first_of_equals =
          cut<false>([&](int i) { return distances[i] == farthest ? first + static_cast<uint32_t>(i) : kRemoved; },
                     [&](uint64_t) { return removed; })
              .key;
    }
    remove_if([&](int i, uint32_t distance) {
      return distance > farthest || (distance == farthest && first + static_cast<uint32_t>(i) < first_of_equals);
    });
  }
};

template <class Element, bool kDraws>
__global__ void __launch_bounds__(kChooseThreads) __cluster_dims__(kChooseCtas, 1, 1)
    choose_tokens(const __grid_constant__ ChooseParams p) {
  __shared__ ChooseSmem smem;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int rank = static_cast<int>(blockIdx.x) % kChooseCtas, row = static_cast<int>(blockIdx.x) / kChooseCtas;
  const int width = (p.V + kChooseCtas - 1) / kChooseCtas, first = rank * width;
  const int count = min(width, p.V - first);    // of tokens, which may be less than one
  if (!kDraws) cute::cluster_arrive_relaxed();  // it is here, and others may write to its shared memory
  wait_for_previous_kernel();

  uint64_t best = 0;
  if constexpr (!kDraws) {
#pragma unroll 8
    for (int i = thread; i < count; i += kChooseThreads) {
      const float x = load_float<Element>(p.logits, row * p.logits_stride + first + i);
      best = max(best, candidate(order_of(x), first + i));
    }
  } else {
    float largest = -INFINITY;
#pragma unroll 8
    for (int i = thread; i < count; i += kChooseThreads) {
      const float x = load_float<Element>(p.logits, row * p.logits_stride + first + i) * p.inverse_temperature;
      own_distances[i] = __float_as_uint(x);
      largest = max_or_nan(largest, x);
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2)
      largest = max_or_nan(largest, __shfl_xor_sync(0xffffffffu, largest, other));
    if (lane == 0) smem.warp_sums[warp] = __float_as_uint(largest);
    __syncthreads();
    if (thread == 0) {
#pragma unroll
      for (int i = 0; i < kChooseThreads / 32; ++i)
        largest = max_or_nan(largest, __uint_as_float(static_cast<uint32_t>(smem.warp_sums[i])));
      smem.largest = largest;
    }
    meet_in_cluster();
#pragma unroll
    for (int other = 0; other < kChooseCtas; ++other)
      largest =
          max_or_nan(largest, __uint_as_float(load_from(reinterpret_cast<const uint32_t*>(&smem.largest), other)));
    if (!isfinite(largest) && thread == 0)
      __assert_fail("scores are finite or -inf, and not all -inf", __FILE__, __LINE__, __func__);
    for (int i = thread; i < count; i += kChooseThreads) {
      const float distance = largest - __uint_as_float(own_distances[i]);
      own_distances[i] = distance == INFINITY ? kRemoved : min(__float2uint_rn(distance * kDistanceUnits), kMostKey);
    }
    __syncthreads();

    Distances distances{smem, own_distances, count, thread};
    if (p.top_k < p.V) distances.top_k(p.top_k);
    if (p.top_p < 1) distances.top_p(p.top_p, first);
#pragma unroll 8
    for (int i = thread; i < count; i += kChooseThreads) {
      const float decay = decay_of(own_distances[i]);
      if (own_distances[i] == kRemoved || decay < p.min_p) continue;
      const float noise = p.noise[static_cast<int64_t>(row) * p.V + first + i];
      best = max(best, candidate(__float_as_uint(decay / noise), first + i));
    }
  }

  best = warp_largest(best);
  if (lane == 0) smem.warp_best[warp] = best;
  __syncthreads();
  if (!kDraws) cute::cluster_wait();
  if (warp == 0) {
    best = warp_largest(lane < kChooseThreads / 32 ? smem.warp_best[lane] : 0);
    if (lane == 0) store_to(&smem.best[rank], 0, best);
  }
  meet_in_cluster();
  if (rank != 0 || thread != 0) return;
#pragma unroll
  for (int i = 1; i < kChooseCtas; ++i) best = max(best, smem.best[i]);
  int64_t token = ~static_cast<uint32_t>(best);
  if (p.pad != nullptr && !p.unfinished[row]) token = *p.pad;
  for (int i = 0; i < p.eos_count; ++i)
    if (token == p.eos[i]) p.unfinished[row] = false;
  p.tokens[row] = token;
}

}  // namespace kda

// Threads of one CTA on a CPU: each is a context of its own, and runs until it meets others, in a warp or at a barrier. Kernels are
// compiled as C++, with the headers of this folder in the place of those in csrc/common that consist of instructions of a GPU.
//
// What this shows is arithmetic, addresses, the order of what threads tell each other, and reads of what nobody has written. What
// it does not: memory that becomes visible late, the copy engine's limits, time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#undef __shared__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n)
#define __shared__

namespace emulation {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr size_t kStack = 128 << 10;

struct Meeting {  // of a number of threads
  int arrived = 0;
  unsigned round = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool has_ended;
};

struct Cta {
  Thread threads[kThreads];
  ucontext_t scheduler;
  int current = 0;
  unsigned index = 0, count = 1;  // blockIdx.x, gridDim.x
  std::function<void()> kernel;
  Meeting all, named[16], warps[kWarps];
  uint64_t handed[kWarps][32][4];  // what lanes show each other
};

inline Cta cta;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

inline int lane() { return cta.current % 32; }
inline int warp() { return cta.current / 32; }

inline void pause() { swapcontext(&cta.threads[cta.current].context, &cta.scheduler); }

inline void meet(Meeting& meeting, int threads) {
  const unsigned round = meeting.round;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.round;
  } else {
    while (meeting.round == round) pause();
  }
}

inline void meet_warp() { meet(cta.warps[warp()], 32); }

// Shows the others of the warp a value, calls `look` with all of theirs, and lets nobody go on before all have looked.
template <class T, class Function>
auto hand_around(const T& own, const Function& look) {
  static_assert(sizeof(T) <= sizeof(cta.handed[0][0]));
  std::memcpy(cta.handed[warp()][lane()], &own, sizeof(T));
  meet_warp();
  const auto result = look([](int lane) {
    T value;
    std::memcpy(&value, cta.handed[warp()][lane & 31], sizeof(T));
    return value;
  });
  meet_warp();
  return result;
}

template <class T>
T from_lane(const T& own, int lane) {
  return hand_around(own, [&](const auto& of) { return of(lane); });
}

inline uint32_t ballot(bool own) {
  return hand_around(own, [](const auto& of) {
    uint32_t mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= static_cast<uint32_t>(of(lane)) << lane;
    return mask;
  });
}

inline void run_thread() {
  cta.kernel();
  cta.threads[cta.current].has_ended = true;
  while (true) pause();
}

// Runs one CTA. Warps take turns in an order that `order` draws anew each time, and some of them stand still for a while, so that
// whoever should wait for others and does not is found out.
inline void run(unsigned index, unsigned count, std::mt19937& order, const std::function<void()>& kernel) {
  cta.index = index, cta.count = count, cta.kernel = kernel;
  cta.all = {};
  for (Meeting& meeting : cta.named) meeting = {};
  for (Meeting& meeting : cta.warps) meeting = {};
  for (int i = 0; i < kThreads; ++i) {
    Thread& thread = cta.threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
    thread.has_ended = false;
  }
  std::vector<int> turns(kWarps);
  for (int i = 0; i < kWarps; ++i) turns[i] = i;
  uint32_t stands_still = 0;  // a bit a warp
  for (long rounds = 0; !turns.empty(); ++rounds) {
    if (rounds == 10'000'000) fail("threads wait for ever");
    if (order() % 128 == 0) stands_still = order() & order();
    std::shuffle(turns.begin(), turns.end(), order);
    for (const int warp : turns)
      for (int i = 32 * warp; i < 32 * (warp + 1) && !(stands_still >> warp & 1); ++i) {
        if (cta.threads[i].has_ended) continue;
        cta.current = i;
        swapcontext(&cta.scheduler, &cta.threads[i].context);
      }
    const auto has_ended = [](int warp) {
      const Thread* const first = cta.threads + 32 * warp;
      return std::all_of(first, first + 32, [](const Thread& thread) { return thread.has_ended; });
    };
    turns.erase(std::remove_if(turns.begin(), turns.end(), has_ended), turns.end());
  }
}

struct Index {
  unsigned x, y = 0, z = 0;
};

template <class T>
T bits_of(const auto& x) {
  static_assert(sizeof(T) == sizeof(x));
  T y;
  std::memcpy(&y, &x, sizeof(T));
  return y;
}

template <class T>
T fetch_and_add(T* at, T more) {
  const T before = *at;
  *at += more;
  return before;
}

}  // namespace emulation

// CUDA's names for it.
#define threadIdx (emulation::Index{static_cast<unsigned>(emulation::cta.current)})
#define blockIdx (emulation::Index{emulation::cta.index})
#define gridDim (emulation::Index{emulation::cta.count})
#define __syncthreads() emulation::meet(emulation::cta.all, emulation::kThreads)
#define __syncwarp() emulation::meet_warp()
#define __shfl_sync(mask, x, lane) emulation::from_lane(x, lane)
#define __shfl_xor_sync(mask, x, other) emulation::from_lane(x, emulation::lane() ^ (other))
#define __ballot_sync(mask, x) emulation::ballot(x)
#define __any_sync(mask, x) (emulation::ballot(x) != 0)
#define __popc(x) __builtin_popcount(x)
#define __nanosleep(ns) emulation::pause()
#define __threadfence()
#define __ldg(at) (*(at))
#define atomicAdd(at, more) emulation::fetch_and_add(at, more)
#define clock() (static_cast<uint32_t>(1 << 20) * emulation::fetch_and_add(&emulation::ticks, 1u))
#define __int_as_float(x) emulation::bits_of<float>(static_cast<int32_t>(x))
#define __uint_as_float(x) emulation::bits_of<float>(static_cast<uint32_t>(x))
#define __float_as_uint(x) emulation::bits_of<uint32_t>(static_cast<float>(x))

namespace emulation {
inline uint32_t ticks = 0;
}

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

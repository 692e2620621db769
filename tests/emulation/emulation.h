// CTAs on a CPU. Each thread is a context of its own, and runs until it meets others, in a warp or at a barrier; each CTA is a thread
// of the CPU, of which one runs at a time. Kernels are compiled as C++, with the headers of this folder in the place of those
// in csrc/common that consist of instructions of a GPU.
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
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#undef __cluster_dims__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#undef __shared__
#define __cluster_dims__(...)
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n)
#define __shared__ thread_local

namespace emulation {

constexpr int kMostThreads = 512, kMostWarps = kMostThreads / 32;
constexpr size_t kStack = 128 << 10;

struct Meeting {  // of a number of threads
  int arrived = 0;
  unsigned round = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool has_ended;
  const unsigned* round = nullptr;  // of the meeting that it waits for, and which one that is
  unsigned arrived_in;

  bool waits() const { return round != nullptr && *round == arrived_in; }
};

struct Cta {
  Thread threads[kMostThreads];
  ucontext_t scheduler;
  int current = 0, size = 0;
  unsigned index = 0, count = 1;  // blockIdx.x, gridDim.x
  std::function<void()> kernel;
  Meeting all, named[16], warps[kMostWarps];
  unsigned cluster_round[kMostThreads];  // when a thread has arrived
  uint64_t handed[kMostWarps][32][4];    // what lanes show each other
};

inline thread_local Cta cta;

// A cluster: shared memory of each of its CTAs, and where all of their threads meet that have not ended.
struct Cluster {
  std::vector<char*> memory;
  Meeting all;
  int threads = 0;

  void look() {
    if (all.arrived < threads || threads == 0) return;
    all.arrived = 0;
    ++all.round;
  }
};

inline thread_local Cluster* cluster;
inline thread_local unsigned rank_in_cluster;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

inline int lane() { return cta.current % 32; }
inline int warp() { return cta.current / 32; }

inline void pause() { swapcontext(&cta.threads[cta.current].context, &cta.scheduler); }

inline void wait_while(const unsigned& round, unsigned arrived_in) {
  Thread& thread = cta.threads[cta.current];
  thread.round = &round, thread.arrived_in = arrived_in;
  while (thread.waits()) pause();
  thread.round = nullptr;
}

inline void meet(Meeting& meeting, int threads) {
  const unsigned round = meeting.round;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.round;
  } else {
    wait_while(meeting.round, round);
  }
}

inline void arrive_in_cluster() {
  cta.cluster_round[cta.current] = cluster->all.round;
  ++cluster->all.arrived;
  cluster->look();
}

inline void wait_for_cluster() { wait_while(cluster->all.round, cta.cluster_round[cta.current]); }

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

template <class T, class Function>
T reduce(const T& own, const Function& function) {
  return hand_around(own, [&](const auto& of) {
    T result = of(0);
    for (int lane = 1; lane < 32; ++lane) result = function(result, of(lane));
    return result;
  });
}

inline void run_thread() {
  cta.kernel();
  cta.threads[cta.current].has_ended = true;
  --cluster->threads;
  cluster->look();
  while (true) pause();
}

// CTAs of a grid take turns: whose it is, of those that have not ended.
class Turns {
 public:
  Turns(int ctas, uint32_t seed) : order(seed) {
    for (int i = 0; i < ctas; ++i) alive.push_back(i);
    draw();
  }
  void wait(int own) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return now == own; });
  }
  void pass(int own, bool has_ended) {
    const std::lock_guard lock(mutex);
    if (has_ended) alive.erase(std::find(alive.begin(), alive.end(), own));
    draw();
    changed.notify_all();
  }

 private:
  void draw() { now = alive.empty() ? -1 : alive[order() % alive.size()]; }

  std::mutex mutex;
  std::condition_variable changed;
  std::mt19937 order;
  std::vector<int> alive;
  int now;
};

// Runs this thread's CTA. Warps take turns in an order that `order` draws anew each time, and some of them stand still for a
// while, so that whoever should wait for others and does not is found out.
inline void run_cta(std::mt19937& order, Turns& turns_of_ctas, int own) {
  for (int i = 0; i < cta.size; ++i) {
    Thread& thread = cta.threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
    thread.has_ended = false;
  }
  std::vector<int> turns(cta.size / 32);
  for (size_t i = 0; i < turns.size(); ++i) turns[i] = static_cast<int>(i);
  uint32_t stands_still = 0;  // a bit a warp
  bool has_run = true;        // a thread, in the last round
  for (long rounds = 0; !turns.empty(); ++rounds) {
    if (rounds == 10'000'000) fail("threads wait for ever");
    if (rounds % 16 == 15 || !has_run) {
      turns_of_ctas.pass(own, false);
      turns_of_ctas.wait(own);
    }
    if (order() % 128 == 0) stands_still = order() & order();
    std::shuffle(turns.begin(), turns.end(), order);
    has_run = false;
    for (const int warp : turns)
      for (int i = 32 * warp; i < 32 * (warp + 1) && !(stands_still >> warp & 1); ++i) {
        if (cta.threads[i].has_ended || cta.threads[i].waits()) continue;
        cta.current = i, has_run = true;
        swapcontext(&cta.scheduler, &cta.threads[i].context);
      }
    const auto has_ended = [](int warp) {
      const Thread* const first = cta.threads + 32 * warp;
      return std::all_of(first, first + 32, [](const Thread& thread) { return thread.has_ended; });
    };
    turns.erase(std::remove_if(turns.begin(), turns.end(), has_ended), turns.end());
  }
}

// Runs CTAs first.. of a grid of `count` at the same time, `size` threads each, `cluster_size` of them in a cluster. `memory`
// gives a CTA's shared memory, which is filled with NaN.
template <class Memory>
void run(unsigned first, unsigned ctas, unsigned count, int size, unsigned cluster_size, uint32_t seed,
         const Memory& memory, const std::function<void()>& kernel) {
  Turns turns(static_cast<int>(ctas), seed);
  std::vector<Cluster> clusters((ctas + cluster_size - 1) / cluster_size);
  for (Cluster& each : clusters) each.memory.resize(cluster_size), each.threads = size * static_cast<int>(cluster_size);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < ctas; ++i)
    threads.emplace_back([&, i] {
      turns.wait(static_cast<int>(i));
      cta.index = first + i, cta.count = count, cta.size = size, cta.kernel = kernel;
      cluster = &clusters[i / cluster_size], rank_in_cluster = i % cluster_size;
      cluster->memory[rank_in_cluster] = memory();
      std::mt19937 order(seed + 7919 * (first + i));
      run_cta(order, turns, static_cast<int>(i));
      turns.pass(static_cast<int>(i), true);
    });
  for (std::thread& thread : threads) thread.join();
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

// Rounded, within the range of uint32_t.
inline uint32_t to_uint(float x) { return x >= 0x1p32f ? ~0u : x > 0 ? static_cast<uint32_t>(std::llrint(x)) : 0; }

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
#define __syncthreads() emulation::meet(emulation::cta.all, emulation::cta.size)
#define __syncwarp() emulation::meet_warp()
#define __shfl_sync(mask, x, lane) emulation::from_lane(x, lane)
#define __shfl_xor_sync(mask, x, other) emulation::from_lane(x, emulation::lane() ^ (other))
#define __shfl_up_sync(mask, x, other) \
  emulation::from_lane(x, emulation::lane() - (emulation::lane() < (other) ? 0 : (other)))
#define __ballot_sync(mask, x) emulation::ballot(x)
#define __any_sync(mask, x) (emulation::ballot(x) != 0)
#define __all_sync(mask, x) (emulation::ballot(x) == ~0u)
#define __reduce_max_sync(mask, x) emulation::reduce(x, [](auto a, auto b) { return a > b ? a : b; })
#define __reduce_min_sync(mask, x) emulation::reduce(x, [](auto a, auto b) { return a < b ? a : b; })
#define __reduce_add_sync(mask, x) emulation::reduce(x, [](auto a, auto b) { return a + b; })
#define __popc(x) __builtin_popcount(x)
#define __ffs(x) __builtin_ffs(x)
#define __nanosleep(ns) emulation::pause()
#define __threadfence()
#define __ldg(at) (*(at))
#define __ldcg(at) (*(at))
#define atomicAdd(at, more) emulation::fetch_and_add(at, more)
#define clock() (static_cast<uint32_t>(1 << 20) * emulation::fetch_and_add(&emulation::ticks, 1u))
#define __int_as_float(x) emulation::bits_of<float>(static_cast<int32_t>(x))
#define __uint_as_float(x) emulation::bits_of<float>(static_cast<uint32_t>(x))
#define __float2uint_rn(x) emulation::to_uint(x)
#define __float2ull_rn(x) static_cast<uint64_t>(std::llrint(x))
#define __float_as_uint(x) emulation::bits_of<uint32_t>(static_cast<float>(x))

namespace emulation {
inline uint32_t ticks = 0;
}

using std::isfinite;
using std::isnan;
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

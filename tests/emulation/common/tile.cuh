// Ways in and out of tiles. What the copy engine does is done at once.
#pragma once

#include <cuda.h>

#include "launch.cuh"
#include "mma.cuh"

namespace kda {

// What a CUtensorMap holds here.
struct TileSource {
  const char* base;
  int pieces, tokens;                               // of 128 bytes, that a row has; rows, beyond which there are zeros
  int64_t batch_stride, token_stride, head_stride;  // bytes
};
static_assert(sizeof(TileSource) <= sizeof(CUtensorMap));

// A word of shared memory: phases that have ended, arrivals of a phase, and what is left of this one, bytes by the 16.
struct BarrierWord {
  uint16_t phases;
  int16_t arrivals, left, transfers;
};

// The same place in the shared memory of another CTA of the cluster.
template <class T>
T* of_cta(T* at, unsigned rank) {
  return reinterpret_cast<T*>(
      emulation::cluster->memory[rank] +
      (reinterpret_cast<const char*>(at) - emulation::cluster->memory[emulation::rank_in_cluster]));
}

struct Barrier {
  static BarrierWord& word(uint64_t* barrier) { return *reinterpret_cast<BarrierWord*>(barrier); }
  static void init(uint64_t* barrier, int arrivals) {
    word(barrier) = {0, static_cast<int16_t>(arrivals), static_cast<int16_t>(arrivals), 0};
  }
  static void change(uint64_t* barrier, int arrivals, int bytes) {
    BarrierWord& x = word(barrier);
    x.left -= arrivals, x.transfers += bytes / 16;
    if (x.left < 0) emulation::fail("more arrivals than a barrier expects");
    if (x.left == 0 && x.transfers == 0) ++x.phases, x.left = x.arrivals;
  }
  static void wait(uint64_t* barrier, uint32_t phase) {
    while ((word(barrier).phases & 1) == phase) emulation::pause();
  }
  static void arrive(uint64_t* barrier) { change(barrier, 1, 0); }
  static void arrive(uint64_t* barrier, unsigned rank, bool does) {
    if (does) change(of_cta(barrier, rank), 1, 0);
  }
};

struct TransactionBarrier : Barrier {
  static void arrive_and_expect_tx(uint64_t* barrier, int bytes) {
    word(barrier).transfers += bytes / 16;
    change(barrier, 1, 0);
  }
  static void complete(uint64_t* barrier, int bytes) { change(barrier, 0, -bytes); }
};

inline uint32_t smem_address(const void* p) { return static_cast<uint32_t>(static_cast<const char*>(p) - smem); }

inline float load_shared(uint32_t at) {
  float x;
  std::memcpy(&x, smem + at, 4);
  return x;
}

inline void store_shared(uint32_t at, float x, float y) {
  std::memcpy(smem + at, &x, 4);
  std::memcpy(smem + at + 4, &y, 4);
}

// Lane 8 i + j has the address of row j of matrix i.
template <int N>
void load(uint32_t (&r)[N], const char* own, bool transposed) {
  emulation::hand_around(own, [&](const auto& of) {
    const int g = emulation::lane() / 4, t = emulation::lane() % 4;
    for (int i = 0; i < N; ++i) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int row = transposed ? 2 * t + e : g, column = transposed ? g : 2 * t + e;
        std::memcpy(pair + e, of(8 * i + row) + 2 * column, 2);
      }
      r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
    return 0;
  });
}

template <int N>
void store(char* own, const uint32_t (&r)[N], bool transposed) {
  emulation::hand_around(own, [&](const auto& of) {
    const int g = emulation::lane() / 4, t = emulation::lane() % 4;
    for (int i = 0; i < N; ++i)
      for (int e = 0; e < 2; ++e) {
        const auto x = static_cast<uint16_t>(r[i] >> 16 * e);
        const int row = transposed ? 2 * t + e : g, column = transposed ? g : 2 * t + e;
        std::memcpy(of(8 * i + row) + 2 * column, &x, 2);
      }
    return 0;
  });
}

template <size_t N>
void load_matrices(uint32_t (&r)[N], const char* p) {
  load(r, p, false);
}
template <size_t N>
void load_matrices_transposed(uint32_t (&r)[N], const char* p) {
  load(r, p, true);
}
inline void store_matrices(char* p, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  store(p, {r0, r1, r2, r3}, false);
}
inline void store_matrices(char* p, uint32_t r0, uint32_t r1) { store(p, {r0, r1}, false); }
inline void store_matrices_transposed(char* p, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  store(p, {r0, r1, r2, r3}, true);
}

inline void load_tile(const CUtensorMap* map, uint64_t* barrier, char* destination, int head, int token, int batch) {
  TileSource source;
  std::memcpy(&source, map, sizeof(source));
  for (int piece = 0; piece < source.pieces; ++piece)
    for (int row = 0; row < 64; ++row)
      for (int chunk = 0; chunk < 8; ++chunk) {
        char* const to = destination + piece * kHalfBytes + row * kRowBytes + ((chunk ^ row % 8) << 4);
        if (token + row < source.tokens) {
          std::memcpy(to,
                      source.base + batch * source.batch_stride + (token + row) * source.token_stride +
                          head * source.head_stride + piece * kRowBytes + chunk * 16,
                      16);
        } else {
          std::memset(to, 0, 16);
        }
      }
  TransactionBarrier::complete(barrier, source.pieces * kHalfBytes);
}

inline void prefetch_tile(const CUtensorMap*, int, int, int) {}

inline void bulk_load(const char* from, uint64_t* barrier, char* to, int bytes, int ctas) {
  for (int i = 0; i < ctas; ++i) {
    const unsigned rank = ctas == 1 ? emulation::rank_in_cluster : i;
    std::memcpy(of_cta(to, rank), from, bytes);
    TransactionBarrier::complete(of_cta(barrier, rank), bytes);
  }
}

inline int load_from(const int* p, int rank) { return *of_cta(p, rank); }
inline void store_to(uint64_t* p, int rank, uint64_t value) { *of_cta(p, rank) = value; }

inline void prefetch_map(const CUtensorMap*) {}
inline void fence_async_proxy() {}
inline void bulk_store(void* to, const char* from, int bytes) { std::memcpy(to, from, bytes); }
inline void bulk_store_commit() {}
inline void bulk_stores_have_read() {}
inline void bulk_stores_are_done() {}
inline void named_barrier(int id, int threads) { emulation::meet(emulation::cta.named[id], threads); }
inline void set_flag(int* flag) { *flag = 1; }
inline int load_flag(const int* flag) {
  emulation::pause();
  return *flag;
}
inline void fence_global_proxy() {}

}  // namespace kda

namespace cute {
template <int kLeft>
void tma_store_wait() {}
inline unsigned block_rank_in_cluster() { return emulation::rank_in_cluster; }
inline void cluster_arrive() { emulation::arrive_in_cluster(); }
inline void cluster_arrive_relaxed() { emulation::arrive_in_cluster(); }
inline void cluster_wait() { emulation::wait_for_cluster(); }
inline void cluster_sync() { cluster_arrive(), cluster_wait(); }
}  // namespace cute

namespace cutlass {
inline int canonical_warp_group_idx() { return emulation::cta.current / 128; }
inline int canonical_warp_idx_sync() { return emulation::warp(); }
namespace arch {
inline void fence_barrier_init() {}
template <int kRegisters>
void warpgroup_reg_alloc() {}
template <int kRegisters>
void warpgroup_reg_dealloc() {}
}  // namespace arch
}  // namespace cutlass

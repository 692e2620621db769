// The kernel that chooses tokens on a CPU, for tests/test_emulation.py.
#include <cassert>

#include "api/choose.h"
#include "emulation.h"

namespace kda {

// What the kernel has by name, and has to know before.
alignas(1024) thread_local char smem[1];
thread_local uint32_t own_distances[kMostChoices / 8];

}  // namespace kda

#include "kernels/choose/choose.cuh"

namespace kda {

namespace {

char* memory_of_cta() {
  std::memset(own_distances, 0xff, sizeof(own_distances));
  return smem;  // everything that is thread-local lies where it lies in other threads, as seen from here
}

template <class Element>
void run(const ChooseParams& p, uint32_t seed) {
  for (int row = 0; row < p.B; ++row)
    emulation::run(row * kChooseCtas, kChooseCtas, p.B * kChooseCtas, kChooseThreads, kChooseCtas, seed, memory_of_cta,
                   [&] { p.noise == nullptr ? choose_tokens<Element, false>(p) : choose_tokens<Element, true>(p); });
}

}  // namespace

}  // namespace kda

extern "C" {

struct Choice {
  const void* logits;
  const float* noise;
  const int64_t *pad, *eos;
  bool* unfinished;
  int64_t* tokens;
  double top_p;
  float inverse_temperature, min_p;
  int B, V, dtype, top_k, eos_count, seed;
};

void emulate_choice(const Choice* choice) {
  kda::ChooseParams p{};
  p.B = choice->B, p.V = choice->V, p.dtype = static_cast<kda::DType>(choice->dtype);
  p.logits = choice->logits, p.logits_stride = p.V, p.noise = choice->noise;
  p.inverse_temperature = choice->inverse_temperature, p.min_p = choice->min_p;
  p.top_p = choice->top_p, p.top_k = choice->top_k;
  p.pad = choice->pad, p.eos = choice->eos, p.eos_count = choice->eos_count;
  p.unfinished = choice->unfinished, p.tokens = choice->tokens;
  const auto seed = static_cast<uint32_t>(choice->seed);
  switch (p.dtype) {
    case kda::DType::kBF16: return kda::run<__nv_bfloat16>(p, seed);
    case kda::DType::kFP16: return kda::run<__half>(p, seed);
    default: return kda::run<float>(p, seed);
  }
}

}  // extern "C"

// The prefill kernels on a CPU, for tests/test_emulation.py.
#include "kernels/prefill/prepare.cuh"
#include "kernels/prefill/recurrence.cuh"

namespace kda {

alignas(1024) thread_local char smem[232 << 10];

namespace {

char* memory_of_cta() {
  std::memset(smem, 0xff, sizeof(smem));  // NaN
  return smem;
}

constexpr int kCtasBeside = 3;  // of `prepare`, where `recurrence` runs beside it

template <class Element, int K, Gate kGate, bool kFloatGate>
void run(const PrefillParams& p, const PrepareMaps& maps, uint32_t seed) {
  const auto constants = prepare_constants<kGate>(p);
  const auto ctas = static_cast<unsigned>(p.ready == nullptr ? places(p) : p.prepare_ctas);
  for (unsigned i = 0; i < ctas; ++i)
    emulation::run(i, 1, ctas, kPrepareThreads, 1, seed, memory_of_cta, [&] {
      if constexpr (K == 128)
        if (p.ready != nullptr) return prepare<Element, K, kGate, kFloatGate, true>(p, maps, constants);
      prepare<Element, K, kGate, kFloatGate, false>(p, maps, constants);
    });
}

template <class Element, int K, int kHalves, bool kCompose, bool kStates>
void run_recurrence(const PrefillParams& p, uint32_t seed) {
  const unsigned ctas = p.sequences * p.HV * (p.V / 64 / kHalves) * p.segments;
  emulation::run(0, ctas, ctas, kRecurrenceThreads<kHalves, kCompose>, p.sharers, seed, memory_of_cta,
                 [&] { recurrence<Element, K, kHalves, kCompose, kStates>(p); });
}

template <class Element, int K>
void run_recurrence(const PrefillParams& p, uint32_t seed) {
  if (p.halves == 2) {
    p.states == nullptr ? run_recurrence<Element, K, 2, false, false>(p, seed)
                        : run_recurrence<Element, K, 2, false, true>(p, seed);
  } else if (p.composed_chunks > 0) {
    p.states == nullptr ? run_recurrence<Element, K, 1, true, false>(p, seed)
                        : run_recurrence<Element, K, 1, true, true>(p, seed);
  } else {
    p.states == nullptr ? run_recurrence<Element, K, 1, false, false>(p, seed)
                        : run_recurrence<Element, K, 1, false, true>(p, seed);
  }
}

template <class Element, int K, Gate kGate>
void run(const PrefillParams& p, const PrepareMaps& maps, uint32_t seed) {
  p.g_dtype == DType::kFP32 ? run<Element, K, kGate, true>(p, maps, seed)
                            : run<Element, K, kGate, false>(p, maps, seed);
}

template <class Element, int K>
void run(const PrefillParams& p, const PrepareMaps& maps, uint32_t seed) {
  if (p.gate == Gate::kSafe) run<Element, K, Gate::kSafe>(p, maps, seed);
  if (p.gate == Gate::kSoftplus) run<Element, K, Gate::kSoftplus>(p, maps, seed);
  if (p.gate == Gate::kNone) run<Element, K, Gate::kNone>(p, maps, seed);
}

template <class Element>
void run(const PrefillParams& p, const PrepareMaps& maps, uint32_t seed) {
  p.K == 64 ? run<Element, 64>(p, maps, seed) : run<Element, 128>(p, maps, seed);
}

int bytes_of(DType dtype) { return dtype == DType::kFP32 ? 4 : 2; }

float half_at(const char* at) {
  uint16_t x;
  std::memcpy(&x, at, 2);
  return float_of<__half>(x);
}

template <int K>
void read(const PrefillParams& p, int slot, int head, float* w, float* u, float* kr, float* q, float* P, float* decay,
          float* scale) {
  using In = Record<K>;
  const char* const in = record<K>(p, slot, head);
  for (int row = 0; row < kChunk; ++row) {
    for (int column = 0; column < K; ++column) {
      const int at = tile_offset(row, column / 8) + column % 8 * 2;
      w[row * K + column] = half_at(in + In::kW + at);
      kr[row * K + column] = half_at(in + In::kKr + at);
      q[row * K + column] = half_at(in + In::kQ + at);
    }
    for (int column = 0; column < (row / kBlock + 1) * kBlock; ++column)
      P[row * kChunk + column] = half_at(in + In::kP + p_offset(row, column & ~1) + column % 2 * 2);
    std::memcpy(scale + row, in + In::kScale + 4 * row, 4);
  }
  for (int channel = 0; channel < K; ++channel)
    std::memcpy(decay + channel, in + In::kDecay + 4 * decay_index(channel), 4);
  for (int half = 0; half < p.V / 64; ++half)
    for (int thread = 0; thread < 128; ++thread) {
      int exponent;
      std::memcpy(&exponent, in + In::kExponents + 4 * (4 * half + thread / 32), 4);
      for (int i = 0; i < 32; ++i) {  // as an accumulator of Uᵀ has it
        const int channel = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8,
                  token = i / 4 * 8 + thread % 4 * 2 + i % 2;
        u[token * p.V + 64 * half + channel] = std::ldexp(
            half_at(in + In::kU + half * In::kUHalfBytes + (i / 8 * 128 + thread) * 16 + i % 8 * 2), exponent);
      }
    }
}

}  // namespace

}  // namespace kda

extern "C" {

// q, k [B, T, H, K], v and out [B, T, HV, V], g [B, T, HV, K], beta [B, T, HV], all contiguous.
struct Call {
  const void *q, *k, *v, *g, *beta;
  void* out;
  const float *A_log, *dt_bias;
  const int64_t* cu_seqlens;
  const float* initial_state;
  float *final_state, *states;
  void* workspace;
  float* retention;
  char* compositions;
  int *flags, *ready;
  kda::PrepareProgress* progress;
  int B, T, H, HV, K, V, N, dtype, g_dtype, gate, halves, segments, sharers, composed_chunks, group_heads;
  float scale, lower_bound;
  int use_qk_norm, use_beta_sigmoid, allow_neg_eigval, state_v_first, seed;
};

static kda::PrefillParams params_of(const Call& call) {
  kda::PrefillParams p{};
  p.q = call.q, p.k = call.k, p.v = call.v, p.g = call.g, p.beta = call.beta, p.out = call.out;
  p.A_log = call.A_log, p.dt_bias = call.dt_bias, p.cu_seqlens = call.cu_seqlens, p.cu_seqlens_is_int64 = true;
  p.workspace = call.workspace, p.retention = call.retention, p.compositions = call.compositions, p.flags = call.flags;
  p.initial_state = call.initial_state, p.final_state = call.final_state, p.states = call.states;
  p.state_dtype = kda::DType::kFP32, p.state_v_first = call.state_v_first, p.state_heads = call.HV;
  p.B = call.B, p.T = call.T, p.H = call.H, p.HV = call.HV, p.K = call.K, p.V = call.V, p.N = call.N;
  p.dtype = static_cast<kda::DType>(call.dtype), p.beta_dtype = p.dtype;
  p.g_dtype = static_cast<kda::DType>(call.g_dtype), p.gate = static_cast<kda::Gate>(call.gate);
  p.scale = call.scale, p.lower_bound = call.lower_bound, p.use_qk_norm = call.use_qk_norm;
  p.use_beta_sigmoid = call.use_beta_sigmoid, p.allow_neg_eigval = call.allow_neg_eigval, p.num_sms = 1;
  const auto set = [&](int64_t (&strides)[3], int heads, int width) {
    strides[0] = int64_t{call.T} * heads * width, strides[1] = heads * width, strides[2] = width;
  };
  set(p.q_strides, p.H, p.K), set(p.k_strides, p.H, p.K), set(p.g_strides, p.HV, p.K);
  set(p.v_strides, p.HV, p.V), set(p.out_strides, p.HV, p.V), set(p.beta_strides, p.HV, 1);
  p.sequences = p.N, p.slots = static_cast<int>(kda::slots_for(p, p.N)), p.segments = call.segments;
  p.halves = call.halves, p.sharers = call.sharers, p.composed_chunks = call.composed_chunks;
  p.ready = call.ready, p.progress = call.progress, p.group_heads = call.group_heads;
  p.prepare_ctas = kda::kCtasBeside;
  p.runs = p.ready == nullptr ? p.sequences * p.segments : 1, p.run_slots = (p.slots + p.runs - 1) / p.runs;
  return p;
}

int emulate_slots(const Call* call) { return params_of(*call).slots; }

int emulate_record_bytes(const Call* call) {
  return call->K == 64 ? kda::Record<64>::kBytes : kda::Record<128>::kBytes;
}

void emulate_prepare(const Call* call) {
  const kda::PrefillParams p = params_of(*call);
  kda::PrepareMaps maps;
  const auto make = [&](CUtensorMap& map, const void* base, kda::DType dtype, int width, const int64_t (&strides)[3]) {
    const int element = kda::bytes_of(dtype);
    const kda::TileSource source{static_cast<const char*>(base), width * element / 128, p.T,
                                 strides[0] * element,           strides[1] * element,  strides[2] * element};
    std::memcpy(&map, &source, sizeof(source));
  };
  make(maps.q, p.q, p.dtype, p.K, p.q_strides), make(maps.k, p.k, p.dtype, p.K, p.k_strides);
  make(maps.v, p.v, p.dtype, p.V, p.v_strides), make(maps.g, p.g, p.g_dtype, p.K, p.g_strides);
  const auto seed = static_cast<uint32_t>(call->seed);
  p.dtype == kda::DType::kFP16 ? kda::run<__half>(p, maps, seed) : kda::run<__nv_bfloat16>(p, maps, seed);
}

void emulate_recurrence(const Call* call) {
  const kda::PrefillParams p = params_of(*call);
  const auto seed = static_cast<uint32_t>(call->seed);
  if (p.dtype == kda::DType::kFP16) {
    p.K == 64 ? kda::run_recurrence<__half, 64>(p, seed) : kda::run_recurrence<__half, 128>(p, seed);
  } else {
    p.K == 64 ? kda::run_recurrence<__nv_bfloat16, 64>(p, seed) : kda::run_recurrence<__nv_bfloat16, 128>(p, seed);
  }
}

int64_t emulate_composition_bytes(const Call* call) {
  const kda::PrefillParams p = params_of(*call);
  if (p.composed_chunks == 0) return 0;
  return kda::compositions_for(p.slots, p.composed_chunks) * p.HV *
         (p.K == 64 ? kda::Composition<64>::bytes(p.V) : kda::Composition<128>::bytes(p.V));
}

// Where the records of sequence n begin.
int emulate_first_slot(const Call* call, int n) { return kda::first_slot(params_of(*call), n); }

// W, Kr and Q [64, K], U [64, V], P [64, 64], of which nothing above the diagonal's blocks is written, decay [K], scale [64].
void emulate_record(const Call* call, int slot, int head, float* w, float* u, float* kr, float* q, float* P,
                    float* decay, float* scale) {
  const kda::PrefillParams p = params_of(*call);
  p.K == 64 ? kda::read<64>(p, slot, head, w, u, kr, q, P, decay, scale)
            : kda::read<128>(p, slot, head, w, u, kr, q, P, decay, scale);
}

}  // extern "C"

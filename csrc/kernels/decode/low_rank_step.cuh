// One token through a KDA layer as in decode_step.cuh, with the second layers of decay and output gate: a cluster has a head of a
// sequence, and each of its CTAs some of the value channels, or one CTA has all.
//
// Data flow
//   1. The two layers' weights, and all others, are on their way before the kernel waits for the one before it: of the decay in
//      registers, as fragments, for all key channels, which each CTA makes for itself; of the gate in shared memory, for its own
//      value channels.
//   2. Each thread convolves a channel of q or k, which each CTA makes for itself, too, and some one of v. The recurrent state is
//      on its way to shared memory meanwhile (`Slice`). Each warp makes the decay of 16 key channels.
//   3. The recurrence. Each CTA of a cluster sends the sum of its outputs' squares to all of them, and they meet: then all have read the state of
//      the convolution, and a part of q and k in it is written by each.
//
// A CTA goes through its code once, and fetching that may take longer than what it does. So there is one dtype, but for recurrent
// states, and one width of the convolution.
#pragma once

#include "common/mma.cuh"
#include "common/tile.cuh"
#include "slice.cuh"

namespace kda {

constexpr int kLowRankThreads = 256;
constexpr int kLowRankCtas = 2;  // an SM
constexpr int kLowRankTaps = 4;  // of the convolution

// What the kernel needs of LowRankStepParams. Strides are those of sequences, in elements.
struct LowRankCall {
  static constexpr bool use_qk_norm = true, use_beta_sigmoid = true;
  const void *g_weight, *output_gate_weight, *q_conv_weight, *k_conv_weight, *v_conv_weight;
  const void *A_log, *dt_bias, *norm_weight;
  void *recurrent_state, *conv_state;
  const void *q, *k, *v, *g, *beta, *output_gate;
  void* out;
  int64_t q_stride, k_stride, v_stride, g_stride, beta_stride, output_gate_stride, out_stride;
  int H;
  float scale, lower_bound, norm_eps;
  Gate gate;
  bool allow_neg_eigval;
};

template <int K, int kWidth, int kSplits, class State>
struct LowRankSmem {
  alignas(128) char state[K * kWidth * sizeof(State)];
  alignas(128) char gate_weight[kWidth * 2 * K];  // every other row has the halves of each 128 bytes swapped
  Token<K> token;
  float values[kWidth], outputs[kWidth], gates[kWidth];
  float squares[kSplits];        // of the outputs of each CTA
  alignas(8) uint64_t received;  // a barrier: these are here
  typename Slice<K, kWidth, kLowRankThreads, false, State, false>::Exchange exchange;
};

// A number as it lies in memory: nobody waits for its load before it is asked for.
template <class Element>
struct Bits {
  uint16_t bits;

  __device__ __forceinline__ Bits(const void* base, int64_t index)
      : bits(__ldcg(static_cast<const uint16_t*>(base) + index)) {}
  __device__ __forceinline__ float value() const { return unpack<Element>(bits).x; }
};

// A channel of the convolution: its weights, and its last inputs, oldest first.
template <class Element>
struct ConvChannel {
  uint2 weight, inputs;
  uint16_t x;

  __device__ __forceinline__ void load_weight(const void* weights, int channel) {
    weight = static_cast<const uint2*>(weights)[channel];
  }

  __device__ __forceinline__ void load(const uint2* state, const void* xs, int64_t at) {
    x = __ldcg(static_cast<const uint16_t*>(xs) + at);
    inputs = __ldcg(state);
  }

  // The inputs that it will have had last.
  __device__ __forceinline__ uint2 next() const {
    return {__byte_perm(inputs.x, inputs.y, 0x5432), __byte_perm(inputs.y, x, 0x5432)};
  }

  __device__ __forceinline__ float output() const {
    const uint2 words = next();
    const float2 x0 = unpack<Element>(words.x), x1 = unpack<Element>(words.y);
    const float2 w0 = unpack<Element>(weight.x), w1 = unpack<Element>(weight.y);
    const float sum = fmaf(x1.y, w1.y, fmaf(x1.x, w1.x, fmaf(x0.y, w0.y, x0.x * w0.x)));
    return rounded<Element>(sum * sigmoid(sum));
  }
};

// What a thread has of a vector of K, as a matrix of equal columns: its pieces of 8 neighbours stand for the columns that the fragments
// of two products would have, as in linear.cuh.
template <int K>
struct InputPieces {
  uint4 pieces[K / 32];

  __device__ __forceinline__ void load(const void* from, int quarter) {
#pragma unroll
    for (int i = 0; i < K / 32; ++i) pieces[i] = __ldcg(static_cast<const uint4*>(from) + 4 * i + quarter);
  }
};

// The product of a vector with row lane / 4 of 16, or 8 rows further for odd lanes. `row(i, half)` has this thread's piece i of row
// lane / 4 + 8 half.
template <class Element, int K, class Row>
__device__ __forceinline__ float product(const InputPieces<K>& x, int lane, const Row& row) {
  float even[4] = {}, odd[4] = {};
#pragma unroll
  for (int i = 0; i < K / 32; ++i) {
    const uint4 a = row(i, 0), b = row(i, 1);
    const uint32_t one[4] = {a.x, b.x, a.y, b.y}, other[4] = {a.z, b.z, a.w, b.w};
    mma<Element>(even, one, x.pieces[i].x, x.pieces[i].y);
    mma<Element>(odd, other, x.pieces[i].z, x.pieces[i].w);
  }
  return rounded<Element>(lane % 2 == 0 ? even[0] + odd[0] : even[2] + odd[2]);
}

// A word for the shared memory of another CTA of the cluster, whose barrier is told. Addresses are the cluster's. To meet at the
// cluster's barrier instead would wait for all that was written to global memory before, which are states.
__device__ __forceinline__ void send(uint32_t to, float x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(x),
               "r"(barrier)
               : "memory");
}

template <class Element, int K, int V, int kSplits, class State>
__global__ void __launch_bounds__(kLowRankThreads, kLowRankCtas) low_rank_step(const __grid_constant__ LowRankCall p) {
  constexpr int kThreads = kLowRankThreads, kWarps = kThreads / 32, kWidth = V / kSplits;
  constexpr int kFirstOfValues = kThreads / 2;  // of the threads that have a channel of v, too
  static_assert(kThreads == 2 * K && kWarps * 16 == K && kFirstOfValues + kWidth <= kThreads);
  using OwnSlice = Slice<K, kWidth, kThreads, false, State, false>;
  extern __shared__ __align__(128) char smem_bytes[];
  auto& smem = *reinterpret_cast<LowRankSmem<K, kWidth, kSplits, State>*>(smem_bytes);

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, quarter = lane % 4;
  const int head = static_cast<int>(blockIdx.x) / kSplits, rank = static_cast<int>(blockIdx.x) % kSplits;
  const int64_t n = blockIdx.y;
  const int first = rank * kWidth;                        // value channel
  const int row = 16 * warp + lane / 4 + 8 * (lane % 2);  // of products
  const bool is_key = thread >= K, has_value = thread >= kFirstOfValues && thread < kFirstOfValues + kWidth;
  const int channel = head * K + thread % K, value_channel = head * V + first + thread - kFirstOfValues;
  launch_dependents();

  // What lies in memory as weights do.
  uint4 decay_weight[K / 32][2];
  const uint4* const decay_rows =
      static_cast<const uint4*>(p.g_weight) + (head * K + 16 * warp + lane / 4) * (K / 8) + quarter;
#pragma unroll
  for (int i = 0; i < K / 32; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) decay_weight[i][half] = decay_rows[half * 8 * (K / 8) + 4 * i];
  const uint4* const gate_rows =
      static_cast<const uint4*>(p.output_gate_weight) + (head * V + first) * (K / 8) + thread;
#pragma unroll
  for (int i = 0; i < kWidth * K / 8 / kThreads; ++i)
    copy_async(smem.gate_weight + 16 * (i * kThreads + (thread ^ thread / (K / 8) % 2 * 4)), gate_rows + i * kThreads);
  commit_copies();

  const int64_t matrix = n * p.H + head;
  uint2* const conv_state = static_cast<uint2*>(p.conv_state) + n * p.H * (2 * K + V);
  uint2* const own_state = conv_state + (is_key ? p.H * K : 0) + channel;
  uint2* const value_state = conv_state + 2 * p.H * K + value_channel;
  OwnSlice::hint_at(p.recurrent_state, matrix, V, rank);
  if (thread % 16 == 0) {
    hint(own_state);
    if (has_value) hint(value_state);
  }
  ConvChannel<Element> own, value;
  own.load_weight(is_key ? p.k_conv_weight : p.q_conv_weight, channel);
  if (has_value) value.load_weight(p.v_conv_weight, value_channel);
  const Bits<Element> dt_bias(p.dt_bias, head * K + row), A_log(p.A_log, head);
  const Bits<Element> norm_weight(p.norm_weight, first + thread % kWidth);

  if constexpr (kSplits > 1) {
    if (thread == 0) {
      Barrier::init(&smem.received, 1);
      cutlass::arch::fence_barrier_init();
    }
    cute::cluster_arrive_relaxed();
  }
  OwnSlice state(smem.exchange, V, first, thread);
  wait_for_previous_kernel();

  InputPieces<K> decay_input, gate_input;
  decay_input.load(static_cast<const Element*>(p.g) + n * p.g_stride, quarter);
  own.load(own_state, is_key ? p.k : p.q, n * (is_key ? p.k_stride : p.q_stride) + channel);
  if (has_value) value.load(value_state, p.v, n * p.v_stride + value_channel);
  const Bits<Element> beta(p.beta, n * p.beta_stride + head);
  if (warp < kWidth / 16)
    gate_input.load(static_cast<const Element*>(p.output_gate) + n * p.output_gate_stride, quarter);
  state.copy(p.recurrent_state, matrix, smem.state);
  commit_copies();

  (is_key ? smem.token.key : smem.token.query)[thread % K] = own.output();
  if (has_value) smem.values[thread - kFirstOfValues] = value.output();
  const float g = product<Element>(decay_input, lane, [&](int i, int half) { return decay_weight[i][half]; });
  if (quarter < 2) smem.token.decay[row] = expm1f(log_decay(p, g, expf(A_log.value()), dt_bias.value()));
  wait_for_copies<1>();  // the gate's weights
  __syncthreads();
  if (warp == kWarps - 1) sum_up(p, smem.token.query, smem.token.key, beta.value(), smem.token);
  if (warp < kWidth / 16) {
    const char* const rows = smem.gate_weight + (16 * warp + lane / 4) * (2 * K);
    const float gate = product<Element>(gate_input, lane, [&](int i, int half) {
      const int piece = (4 * i + quarter) ^ (lane / 4 % 2 * 4);
      return *reinterpret_cast<const uint4*>(rows + half * 8 * (2 * K) + 16 * piece);
    });
    if (quarter < 2) smem.gates[row] = sigmoid(gate);
  }
  wait_for_copies<0>();
  if (!OwnSlice::kOwnCopies) __syncthreads();
  // All CTAs of the cluster have begun, and their shared memory is there. Not before: to wait for a cluster drops what L1 has.
  if constexpr (kSplits > 1) {
    if (thread == 0) TransactionBarrier::arrive_and_expect_tx(&smem.received, sizeof(smem.squares));
    cute::cluster_wait();
  }

  const auto output = [&](int channel, float o) { smem.outputs[channel] = rounded<Element>(o); };
  state.step_once(smem.token, smem.values, smem.state, p.recurrent_state, matrix, output, [&] {
    if (warp == 0) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kWidth / 32; ++i)
        squares = fmaf(smem.outputs[32 * i + lane], smem.outputs[32 * i + lane], squares);
      squares = warp_sum(squares);
      if (kSplits == 1) {
        if (lane == 0) smem.squares[0] = squares;
      } else if (lane < kSplits) {
        send(cute::set_block_rank(smem_address(&smem.squares[rank]), lane), squares,
             cute::set_block_rank(smem_address(&smem.received), lane));
      }
    }
  });
  if constexpr (kSplits > 1) {
    Barrier::wait(&smem.received, 0);
  } else {
    __syncthreads();
  }
  if (thread * kSplits / kThreads == rank) *own_state = own.next();
  if (has_value) *value_state = value.next();
  if (thread < kWidth) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kSplits; ++i) squares += smem.squares[i];
    const float scale = rsqrtf(squares * (1.0f / V) + p.norm_eps);
    store_value<Element>(p.out, n * p.out_stride + head * V + first + thread,
                         smem.outputs[thread] * scale * norm_weight.value() * smem.gates[thread]);
  }
}

}  // namespace kda

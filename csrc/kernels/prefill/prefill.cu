// Which prefill kernels a call gets.
#include <algorithm>

#include "record.cuh"

namespace kda {

template <class Element, int K>
cudaError_t launch_prefill(PrefillParams& params, cudaStream_t stream);  // prefill_bf16.cu, prefill_fp16.cu

namespace {

int64_t element_bytes(DType dtype) { return dtype == DType::kFP32 ? 4 : 2; }

int64_t record_bytes(const PrefillParams& params) {
  return params.HV * static_cast<int64_t>(params.K == 64 ? Record<64>::kBytes : Record<128>::kBytes);
}

int64_t retention_bytes(const PrefillParams& params) { return 2 * params.HV * sizeof(float); }

int64_t composition_bytes(const PrefillParams& params) {
  return params.HV *
         static_cast<int64_t>(params.K == 64 ? Composition<64>::bytes(params.V) : Composition<128>::bytes(params.V));
}

int64_t flag_bytes(const PrefillParams& params, int64_t sequences, int segments) {
  return params.HV * sequences * segments * (params.V / 64) * sizeof(int);
}

// CTAs of `recurrence` that only see to it that its instructions are in L2: a cluster, where there are clusters.
constexpr int kScouts = 2;

// CTAs that may share a chain: as many as SMs are left over for it. Where half of the SMs have nothing to prepare, these are
// enough: CTAs that begin on others begin late.
int segments_of(const PrefillParams& params, int64_t sequences) {
  const int64_t ctas = sequences * params.HV * (params.V / 64), chunks = (params.T + kChunk - 1) / kChunk;
  const int64_t idle = params.num_sms - slots_for(params, sequences) * params.HV;
  const int64_t sms = (2 * idle >= params.num_sms ? idle : params.num_sms) - kScouts;
  return chunks > kMaxPlannedChunks ? 1 : static_cast<int>(std::max<int64_t>(std::min(sms / ctas, chunks), 1));
}

// CTAs and chunks of a chain from which on composing pays: with shorter ones, the kernel that cannot compose is faster by more
// than it gains.
constexpr int kComposedSegments = kLeastComposed, kComposedChain = 48;
// Records from which on clusters of two that share them pay: clusters start late.
constexpr int kLeastShared = 1500;

// Chunks for each segment of a chain, at least, where states are composed: so few that a sequence of half the average
// length gets all the segments that there are. 0 where no state is.
int composed_chunks_of(const PrefillParams& params, int64_t sequences) {
  const int64_t segments = segments_of(params, sequences), chunks = (params.T + kChunk - 1) / kChunk;
  if (segments < kComposedSegments || chunks < kComposedChain) return 0;
  const int64_t least =
      std::max<int64_t>(slots_for(params, sequences) / (2 * sequences * segments), kLeastComposedChunks);
  return chunks / least < kLeastComposed ? 0 : static_cast<int>(least);
}

// Whether and how both kernels run side by side, with records that are read soon after they are written. The recurrence gets
// SMs of its own; each of them carries one value head, or half of one, through a sequence, and what is prepared first are
// the heads that are carried first.
struct SideBySide {
  int reserved_sms = 0;  // 0: one kernel after the other
  int group_heads = 0, halves = 0;
};

// In µs, measured on one H100: what matters is their ratio.
constexpr double kPrepareTime = 6.3;          // a chunk and head on an SM
constexpr double kChainTime[] = {1.85, 3.4};  // a chunk in a CTA that carries one half, or two, beside `prepare`
constexpr double kTurnTime = 11.6;            // a chunk and head on an SM, all of it, one kernel after the other
constexpr int kLeastRecords = 20, kLeastChunks = 16;  // records an SM, and chunks a sequence, that make it worth while

SideBySide side_by_side(const PrefillParams& params, int64_t sequences) {
  const int64_t slots = slots_for(params, sequences), records = slots * params.HV;
  SideBySide best;
  // Heads of 64 have small records, and were slower: 533 instead of 451 µs for 96 heads and T = 8192, on an H200.
  if (params.K == 64 || records < kLeastRecords * params.num_sms || slots < kLeastChunks * sequences) return best;
  double best_time = 0.93 * records * kTurnTime / params.num_sms;
  for (int halves = 1; halves <= params.V / 64; ++halves) {
    const int ctas = params.V / 64 / halves;  // that a head takes
    for (int groups = 1; groups <= params.HV; ++groups) {
      const int heads = (params.HV + groups - 1) / groups, reserved = heads * ctas;
      if (reserved > params.num_sms / 2) continue;
      const double chain = slots * groups * kChainTime[halves - 1];
      const double prepare = records * kPrepareTime / (params.num_sms - reserved);
      if (const double time = std::max(chain, prepare); time < best_time) {
        best_time = time;
        best = {reserved, heads, halves};
      }
      if (chain > prepare) break;
    }
  }
  return best;
}

int64_t ready_bytes(const PrefillParams& params) { return params.HV * static_cast<int64_t>(sizeof(int)); }

int64_t input_bytes(const PrefillParams& params) {
  const int64_t token_bytes = (2 * params.H * params.K + params.HV * params.V) * element_bytes(params.dtype) +
                              params.HV * params.K * element_bytes(params.g_dtype);
  return params.B * params.T * token_bytes;
}

// Sequences of one launch: as many as keep the records within twice the inputs, since a short sequence takes as much room
// as one of 64 tokens. Never so few that launches get in the way.
int64_t sequences_at_a_time(const PrefillParams& params) {
  const int64_t room = 2 * input_bytes(params) / record_bytes(params);
  const int64_t chunks = (params.T + kChunk - 1) / kChunk;
  const int64_t sequences = params.cu_seqlens == nullptr ? room / chunks : room - params.T / kChunk;
  const int64_t least = params.cu_seqlens == nullptr ? (64 + chunks - 1) / chunks : 64;
  return std::min<int64_t>(params.N, std::max(sequences, least));
}

cudaError_t launch(PrefillParams& params, cudaStream_t stream) {
  if (params.dtype == DType::kBF16)
    return params.K == 64 ? launch_prefill<__nv_bfloat16, 64>(params, stream)
                          : launch_prefill<__nv_bfloat16, 128>(params, stream);
  return params.K == 64 ? launch_prefill<__half, 64>(params, stream) : launch_prefill<__half, 128>(params, stream);
}

// Of a launch for all heads of `params`, and for as many sequences as go at a time.
int64_t workspace_bytes(const PrefillParams& params) {
  const int64_t sequences = sequences_at_a_time(params), slots = slots_for(params, sequences);
  int64_t bytes = slots * record_bytes(params);
  if (side_by_side(params, sequences).reserved_sms > 0)
    return bytes + sizeof(PrepareProgress) + slots * ready_bytes(params);
  const int segments = segments_of(params, sequences), composed_chunks = composed_chunks_of(params, sequences);
  if (segments > 1) bytes += slots * retention_bytes(params);
  if (composed_chunks > 0)
    bytes +=
        compositions_for(slots, composed_chunks) * composition_bytes(params) + flag_bytes(params, sequences, segments);
  return bytes;
}

cudaError_t launch_for_all_sequences(PrefillParams params, cudaStream_t stream) {
  const int step = static_cast<int>(sequences_at_a_time(params));
  // Of the last, smaller launch, too: the workspace is made for these.
  const SideBySide side = side_by_side(params, step);
  const bool beside = side.reserved_sms > 0;
  params.segments = beside ? 1 : segments_of(params, step);
  params.composed_chunks = beside ? 0 : composed_chunks_of(params, step);
  params.reserved_sms = side.reserved_sms;
  params.group_heads = side.group_heads;
  for (params.first_sequence = 0; params.first_sequence < params.N; params.first_sequence += step) {
    params.sequences = std::min(step, params.N - params.first_sequence);
    params.slots = static_cast<int>(slots_for(params, params.sequences));
    params.runs = beside ? 1 : params.sequences * params.segments;
    params.run_slots = (params.slots + params.runs - 1) / params.runs;
    // With few chains, more SMs serve one: 64 value channels each, and segments of its chunks.
    const int64_t chains = static_cast<int64_t>(params.sequences) * params.HV;
    params.halves = beside ? side.halves : params.V == 128 && 2 * chains > params.num_sms ? 2 : 1;
    const bool shares = params.halves == 1 && params.V == 128 && params.slots * params.HV >= kLeastShared;
    params.sharers = shares ? 2 : 1;
    const int64_t ctas = chains * (params.V / 64 / params.halves) * params.segments;
    params.scouts = !beside && ctas + kScouts <= params.num_sms ? kScouts : 0;
    char* room = static_cast<char*>(params.workspace) + params.slots * record_bytes(params);
    if (beside) {
      params.progress = reinterpret_cast<PrepareProgress*>(room);
      params.ready = reinterpret_cast<int*>(params.progress + 1);
      const size_t bytes = sizeof(PrepareProgress) + params.slots * ready_bytes(params);
      if (cudaError_t error = cudaMemsetAsync(room, 0, bytes, stream); error != cudaSuccess) return error;
    }
    if (params.composed_chunks > 0) {
      params.compositions = room;
      room += compositions_for(params.slots, params.composed_chunks) * composition_bytes(params);
      params.flags = reinterpret_cast<int*>(room);
      room += flag_bytes(params, params.sequences, params.segments);
    }
    if (params.segments > 1) params.retention = reinterpret_cast<float*>(room);
    if (cudaError_t error = launch(params, stream); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Heads of one launch: all of them, unless its workspace would be larger than twice the inputs. Records take more room than
// that where many value heads share one of q and k, and V is 64.
constexpr int64_t kSmallWorkspace = int64_t{32} << 20;  // bytes that nobody needs to save

template <class Void>  // void or const void
Void* moved(Void* base, int64_t bytes) {
  return base == nullptr ? nullptr : reinterpret_cast<Void*>(reinterpret_cast<uintptr_t>(base) + bytes);
}

// `count` value heads from `first` on: whole groups of those that share a head of q and k, or a part of one group.
PrefillParams heads_of(const PrefillParams& params, int first, int count) {
  const int group = params.HV / params.H;
  const int64_t element = element_bytes(params.dtype), matrix = static_cast<int64_t>(params.K) * params.V;
  const int64_t state_bytes = first * matrix * element_bytes(params.state_dtype);
  PrefillParams part = params;
  part.HV = count;
  part.H = std::max(count / group, 1);
  part.q = moved(params.q, first / group * params.q_strides[2] * element);
  part.k = moved(params.k, first / group * params.k_strides[2] * element);
  part.v = moved(params.v, first * params.v_strides[2] * element);
  part.g = moved(params.g, first * params.g_strides[2] * element_bytes(params.g_dtype));
  part.beta = moved(params.beta, first * params.beta_strides[2] * element_bytes(params.beta_dtype));
  part.out = moved(params.out, first * params.out_strides[2] * element);
  if (params.A_log != nullptr) part.A_log += first;
  if (params.dt_bias != nullptr) part.dt_bias += static_cast<int64_t>(first) * params.K;
  part.initial_state = moved(params.initial_state, state_bytes);
  part.final_state = moved(params.final_state, state_bytes);
  part.states = moved(params.states, state_bytes);
  return part;
}

int heads_at_a_time(const PrefillParams& params) {
  const int group = params.HV / params.H;
  const int64_t state_bytes = params.initial_state == nullptr ? 0
                                                              : static_cast<int64_t>(params.N) * params.HV * params.K *
                                                                    params.V * element_bytes(params.state_dtype);
  const int64_t most = std::max(2 * (input_bytes(params) + state_bytes), kSmallWorkspace);
  int heads = params.HV;
  for (int parts = 2; heads > 1 && workspace_bytes(heads_of(params, 0, heads)) > most; ++parts) {
    const int groups = (params.H + parts - 1) / parts;
    heads = parts <= params.H ? groups * group : (group + parts / params.H - 1) / (parts / params.H);
  }
  return heads;
}

// Calls `f` for the heads of each launch.
template <class Function>
cudaError_t for_heads_of_launches(const PrefillParams& params, const Function& f) {
  const int step = heads_at_a_time(params), group = params.HV / params.H;
  for (int head = 0; head < params.HV;) {
    const int count = std::min(step, step < group ? group - head % group : params.HV - head);
    if (cudaError_t error = f(heads_of(params, head, count)); error != cudaSuccess) return error;
    head += count;
  }
  return cudaSuccess;
}

}  // namespace

const char* prefill_refusal(const PrefillParams& params) {
  if (params.dtype == DType::kFP32) return "`q` is float32; the CUDA kernels take bfloat16 and float16";
  if (params.state_dtype == DType::kFP16)
    return "`initial_state` is float16; the CUDA kernels take float32 and bfloat16";
  if (params.K != 64 && params.K != 128) return "`q` has a head dimension other than 64 and 128";
  if (params.V != 64 && params.V != 128) return "`v` has a head dimension other than 64 and 128";
  if (slots_for(params, params.N) * params.HV > INT32_MAX) return "`q` has too many tokens for one launch";
  return nullptr;
}

size_t prefill_workspace_bytes(const PrefillParams& params) {
  int64_t bytes = 0;
  for_heads_of_launches(params, [&](const PrefillParams& part) {
    bytes = std::max(bytes, workspace_bytes(part));
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t prefill(const PrefillParams& given, cudaStream_t stream) {
  PrefillParams params = given;
  params.state_heads = params.HV;
  return for_heads_of_launches(params,
                               [&](const PrefillParams& part) { return launch_for_all_sequences(part, stream); });
}

}  // namespace kda

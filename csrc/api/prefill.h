// Kimi Delta Attention over whole sequences: the host side of the prefill kernels.
#pragma once

#include "kda.h"

namespace kda {

// How far `prepare` is, where `recurrence` runs beside it.
struct PrepareProgress {
  int taken;     // chunks and heads that a CTA has begun with
  int left;      // CTAs that left their SM to `recurrence`
  int finished;  // CTAs that have ended
};

// `states` gets the state before every 64th token of each sequence: NT is the chunks of one sequence when dense; packed, those
// of all sequences follow one another, and NT is the most that there could be, min(T, (T + 63 N) / 64).
struct PrefillParams : KdaParams {
  // [HV] and [HV, K], contiguous; null stands for zeros.
  const float *A_log, *dt_bias;
  void* workspace;  // prefill_workspace_bytes, of any content, 256-byte aligned; null where that is 0

  // Set by `prefill`, which launches for a range of heads and sequences at a time where records of all would need too much
  // room. H, HV and what has heads are then those of the range, but for the states' stride.
  int state_heads;
  int first_sequence, sequences;
  int halves;    // 64 value channels each, that a CTA of `recurrence` carries
  int segments;  // CTAs that share a chain of chunks
  int sharers;   // CTAs of a cluster, which copy records for each other: 2, for both halves of the value channels, or 1
  // Null, unless both kernels run side by side: for each record whether it is complete, and how far `prepare` is.
  int* ready;
  PrepareProgress* progress;
  int reserved_sms, prepare_ctas;  // for `recurrence` alone; CTAs of `prepare`
  int group_heads;                 // heads whose chunks are prepared by turns
  float* retention;                // in the workspace: see record.cuh; null where nobody asks
  int slots;
  int runs, run_slots;  // runs of slots that `recurrence` begins with at the same time, where it comes after `prepare`
  int composed_chunks;  // chunks for each segment of a chain whose state is composed, at least; 0: none is composed
  char* compositions;   // in the workspace: see record.cuh
  int scouts;           // CTAs of `recurrence` before all others that only see to it that its instructions are in L2
  int* flags;           // in the workspace: [HV][sequences][segments][V / 64], whether the composition is there
};

// Bytes of workspace that a call needs: from shapes, dtypes and num_sms, on the host.
size_t prefill_workspace_bytes(const PrefillParams& params);

// Launches on `stream` of the current device. Checks nothing, waits for nothing, and a CUDA graph can capture it. All
// sizes are at least 1: the caller has dealt with calls that have no tokens.
cudaError_t prefill(const PrefillParams& params, cudaStream_t stream);

// Null, or why this call cannot be served: a static string that names the argument. Looks at sizes, dtypes and flags.
const char* prefill_refusal(const PrefillParams& params);

}  // namespace kda

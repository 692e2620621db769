// Which kernel a step gets.
#include "attention.cuh"

namespace kda {

namespace {

constexpr int kMost = 65535;  // what a grid may have in y and z

int chunks_of(int capacity) { return (capacity + kChunkKeys - 1) / kChunkKeys; }

template <class Element, int D, int kTiles>
cudaError_t launch_attention(const AttentionStepParams& params, cudaStream_t stream) {
  using Shape = AttentionShape<D, kTiles>;
  return launch<attention_step<Element, D, kTiles>>(dim3(params.KVH, params.B, chunks_of(params.capacity)), 1,
                                                    Shape::kThreads, sizeof(typename Shape::Smem), true, stream,
                                                    params);
}

template <class Element, int D>
cudaError_t launch_attention(const AttentionStepParams& params, cudaStream_t stream) {
  switch (head_tiles(params.group)) {
    case 1: return launch_attention<Element, D, 1>(params, stream);
    case 2: return launch_attention<Element, D, 2>(params, stream);
    default: return launch_attention<Element, D, 4>(params, stream);
  }
}

template <class Element>
cudaError_t launch_attention(const AttentionStepParams& params, cudaStream_t stream) {
  return params.D == 64 ? launch_attention<Element, 64>(params, stream)
                        : launch_attention<Element, 128>(params, stream);
}

}  // namespace

const char* attention_step_refusal(const AttentionStepParams& params) {
  if (params.dtype == DType::kFP32) return "`q` is float32; the kernel takes bfloat16 and float16";
  if (params.D != 64 && params.D != 128) return "`q` has heads of another width than 64 and 128";
  if (params.KVH < 1 || params.H < 1 || params.H % params.KVH != 0)
    return "`q` must have a multiple of the heads of `k`";
  if (params.H / params.KVH > kMostGroupHeads) return "`q` has more than 32 heads for each of `k`";
  if (params.capacity < 1) return "`key_cache` has no room";
  if (params.B > kMost) return "`q` has more rows than 65535";
  if (params.capacity > kMost * kChunkKeys) return "`key_cache` has more rows than 8388480";
  return nullptr;
}

size_t attention_step_workspace_bytes(int B, int H, int KVH, int D, int capacity) {
  const AttentionWorkspace layout{static_cast<int64_t>(B) * KVH, chunks_of(capacity), 8 * head_tiles(H / KVH), D};
  return static_cast<size_t>(layout.bytes());
}

cudaError_t attention_step(const AttentionStepParams& params, cudaStream_t stream) {
  AttentionStepParams grouped = params;
  grouped.group = params.H / params.KVH;
  return params.dtype == DType::kBF16 ? launch_attention<__nv_bfloat16>(grouped, stream)
                                      : launch_attention<__half>(grouped, stream);
}

}  // namespace kda

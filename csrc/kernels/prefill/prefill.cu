// Which prefill kernels a call gets.
#include "record.cuh"

namespace kda {

template <class Element, int K>
cudaError_t launch_prefill(const PrefillParams& params, cudaStream_t stream);  // prefill_bf16.cu, prefill_fp16.cu

const char* prefill_refusal(const PrefillParams& params) {
  if (params.dtype == DType::kFP32) return "`q` is float32; the CUDA kernels take bfloat16 and float16";
  if (params.K != 64 && params.K != 128) return "`q` has a head dimension other than 64 and 128";
  if (params.V != 64 && params.V != 128) return "`v` has a head dimension other than 64 and 128";
  if (slots(params) * params.HV > INT32_MAX) return "`q` has too many tokens for one launch";
  return nullptr;
}

size_t prefill_workspace_bytes(const PrefillParams& params) {
  const size_t bytes = params.K == 64 ? Record<64>::kBytes : Record<128>::kBytes;
  return slots(params) * params.HV * bytes;
}

cudaError_t prefill(const PrefillParams& params, cudaStream_t stream) {
  if (params.dtype == DType::kBF16)
    return params.K == 64 ? launch_prefill<__nv_bfloat16, 64>(params, stream)
                          : launch_prefill<__nv_bfloat16, 128>(params, stream);
  return params.K == 64 ? launch_prefill<__half, 64>(params, stream) : launch_prefill<__half, 128>(params, stream);
}

}  // namespace kda

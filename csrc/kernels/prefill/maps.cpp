#include "kernels/prefill/maps.h"

#include "common/encoder.h"

namespace kda {

cudaError_t make_maps(const PrefillParams& params, PrepareMaps& maps) {
  decltype(&cuTensorMapEncodeTiled) encode;
  if (cudaError_t error = find_encoder(encode); error != cudaSuccess) return error;

  const auto make = [&](CUtensorMap& map, const void* base, DType dtype, int width, int heads,
                        const int64_t (&strides)[3]) {
    const cuuint64_t element = dtype == DType::kFP32 ? 4 : 2;
    const CUtensorMapDataType type = dtype == DType::kFP32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                     : dtype == DType::kFP16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    // Columns of 128 bytes come one after the other, each with all of its rows.
    const cuuint64_t columns = 128 / element, pieces = width / columns;
    const cuuint64_t sizes[5] = {columns, static_cast<cuuint64_t>(params.T), pieces, static_cast<cuuint64_t>(heads),
                                 static_cast<cuuint64_t>(params.B)};
    const cuuint64_t bytes[4] = {strides[1] * element, 128, strides[2] * element, strides[0] * element};
    const cuuint32_t box[5] = {static_cast<cuuint32_t>(columns), 64, static_cast<cuuint32_t>(pieces), 1, 1};
    const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
    return encode(&map, type, 5, const_cast<void*>(base), sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  };
  const bool made = make(maps.q, params.q, params.dtype, params.K, params.H, params.q_strides) &&
                    make(maps.k, params.k, params.dtype, params.K, params.H, params.k_strides) &&
                    make(maps.v, params.v, params.dtype, params.V, params.HV, params.v_strides) &&
                    make(maps.g, params.g, params.g_dtype, params.K, params.HV, params.g_strides);
  return made ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace kda

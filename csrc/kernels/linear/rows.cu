// Which kernel rows get.
#include "rows.cuh"

namespace kda {

namespace {

constexpr int kLeastGated = 64, kMostGated = 256;  // columns

template <class Element, int kPieces>
cudaError_t launch_norm(const RowsParams& params, cudaStream_t stream) {
  if (params.N > 8 * kRowsThreads * kPieces) {
    if constexpr (kPieces < kMostRowPieces) return launch_norm<Element, 2 * kPieces>(params, stream);
  }
  return launch<rms_norm<Element, kPieces>>(dim3(params.M), 1, kRowsThreads, 0, true, stream, params);
}

template <class Element, int N>
cudaError_t launch_gated(const RowsParams& params, cudaStream_t stream) {
  if constexpr (N < kMostGated) {
    if (params.N > N) return launch_gated<Element, 2 * N>(params, stream);
  }
  constexpr int kRows = kRowsThreads / (N / 8);  // of a CTA
  return launch<gated_rms_norm<Element, N>>(dim3((params.M + kRows - 1) / kRows), 1, kRowsThreads, 0, true, stream,
                                            params);
}

template <class Element>
cudaError_t launch_rows(const RowsParams& params, cudaStream_t stream) {
  if (params.gate != nullptr) return launch_gated<Element, kLeastGated>(params, stream);
  if (params.weight != nullptr) return launch_norm<Element, 1>(params, stream);
  const int ctas = (params.N + 8 * kRowsThreads - 1) / (8 * kRowsThreads);
  return launch<swiglu<Element>>(dim3(params.M, ctas), 1, kRowsThreads, 0, true, stream, params);
}

}  // namespace

const char* rows_refusal(const RowsParams& params) {
  if (params.dtype == DType::kFP32) return "`x` is float32; the kernel takes bfloat16 and float16";
  if (params.N % 8 != 0) return "`x` has a number of columns that is no multiple of 8";
  if (params.gate != nullptr && params.N != 64 && params.N != 128 && params.N != 256)
    return "`x` has other than 64, 128 or 256 columns";
  if (params.weight != nullptr && params.N > 8 * kRowsThreads * kMostRowPieces)
    return "`x` has more columns than 16384";
  return nullptr;
}

cudaError_t rows(const RowsParams& params, cudaStream_t stream) {
  return params.dtype == DType::kBF16 ? launch_rows<__nv_bfloat16>(params, stream)
                                      : launch_rows<__half>(params, stream);
}

}  // namespace kda

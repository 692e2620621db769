#include "common/encoder.h"

namespace kda {

cudaError_t find_encoder(decltype(&cuTensorMapEncodeTiled)& encode) {
  static decltype(&cuTensorMapEncodeTiled) found = nullptr;  // the same whoever writes it
  if (found == nullptr) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) return error;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    found = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }
  encode = found;
  return cudaSuccess;
}

}  // namespace kda

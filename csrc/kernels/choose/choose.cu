// Which kernel chooses.
#include "choose.cuh"

#include "common/launch.cuh"

namespace kda {

namespace {

template <class Element>
cudaError_t launch_choose(const ChooseParams& params, cudaStream_t stream) {
  constexpr int kMostBytes = 4 * kMostChoices / kChooseCtas;
  const dim3 grid(params.B * kChooseCtas);
  // A draw comes after the noise, in the same stream; the largest one after whatever made the logits.
  return params.noise == nullptr
             ? launch<choose_tokens<Element, false>>(grid, kChooseCtas, kChooseThreads, 0, false, stream, params)
             : launch<choose_tokens<Element, true>, kMostBytes>(grid, kChooseCtas, kChooseThreads,
                                                                4 * ((params.V + kChooseCtas - 1) / kChooseCtas), true,
                                                                stream, params);
}

}  // namespace

const char* choose_refusal(const ChooseParams& params) {
  return params.V > kMostChoices ? "`logits` has more than 262144 columns" : nullptr;
}

cudaError_t choose_tokens(const ChooseParams& params, cudaStream_t stream) {
  switch (params.dtype) {
    case DType::kBF16: return launch_choose<__nv_bfloat16>(params, stream);
    case DType::kFP16: return launch_choose<__half>(params, stream);
    default: return launch_choose<float>(params, stream);
  }
}

}  // namespace kda

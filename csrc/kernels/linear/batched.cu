// How a product of many rows is cut, and what lies in shared memory.
#include "batched.h"

#include <algorithm>

#include "batched.cuh"
#include "common/encoder.h"

namespace kda {

namespace {

constexpr int kMostBatched = 32;  // tokens
// Of shared memory, for a CTA: two, or three, fit an SM, with what their barriers take.
constexpr int kSmemOfTwo = kSmemOfSm / 2 - kSmemOfSystem - 1024,
              kSmemOfThree = kSmemOfSm / 3 / 1024 * 1024 - kSmemOfSystem - 1024;

int divided(int a, int b) { return (a + b - 1) / b; }

struct Cut {
  int tokens, units, splits;  // as the kernel's
  int clusters;
};

// Enough CTAs for nearly all of 132 SMs to have weights on their way; beyond that, fewer splits leave less to add up.
Cut cut(int M, int N, int K, int groups, bool swiglu) {
  using Whole = BatchedShape<16, 2, 1>;
  const int tokens = M <= 16 ? 16 : 32;
  const int all_chunks = divided(K, kUnitColumns);
  if (groups > 1) return {all_chunks <= 16 ? tokens : 32, 1, 1, N / 64};
  Cut cut{tokens, 2, 1, divided(N, swiglu ? 64 : 128)};
  const int enough = 118, most = swiglu ? 4 : 8;
  while (cut.splits < most && cut.clusters * cut.splits < enough && 2 * cut.splits <= all_chunks) cut.splits *= 2;
  const int x_bytes = divided(all_chunks, cut.splits) * Whole::kXBytes;
  if (Whole::kSumsPlace + x_bytes + Whole::kLeastStages * kUnitBytes > kSmemOfTwo) cut.tokens = 32;
  return cut;
}

template <class Element, int kTokens, int kUnits, int kSplits>
cudaError_t launch_batched(const LinearParams& p, int clusters, cudaStream_t stream) {
  using Shape = BatchedShape<kTokens, kUnits, kSplits>;
  const int chunks = divided(divided(p.K, kUnitColumns), kSplits);  // the most that a CTA has
  const int ctas = clusters * kSplits, units = chunks * kUnits;
  const int least = std::min(Shape::kLeastStages, units + units % 2);
  BatchedPlan plan;
  int bytes;
  const auto fits = [&](int limit) {
    // An even number, so that each place belongs to one warpgroup.
    for (plan.stages = std::min(units + units % 2, kMostStages); plan.stages >= least; plan.stages -= 2) {
      plan.x_stages = chunks;
      if (Shape::kStreamsX) {
        plan.x_stages = std::min(chunks, std::max(Shape::kLeastChunks, plan.stages / kUnits + 1));
        if (Shape::kSharesUnits && plan.x_stages < chunks) plan.x_stages = plan.x_stages / 2 * 2;
      }
      const int ring = std::max(plan.stages * kUnitBytes, kSplits > 1 ? Shape::kSumsBytes : 0);
      bytes = Shape::kSumsPlace + plan.x_stages * Shape::kXBytes + ring;
      if (bytes <= limit) return true;
    }
    return false;
  };
  if (!(ctas > 2 * p.num_sms && fits(kSmemOfThree)) && !fits(kSmemOfTwo)) return cudaErrorInvalidConfiguration;

  decltype(&cuTensorMapEncodeTiled) encode;
  if (cudaError_t error = find_encoder(encode); error != cudaSuccess) return error;
  const auto make = [&](CUtensorMap& map, const void* base, int64_t rows, int64_t columns, int64_t stride,
                        int box_rows) {
    constexpr auto kType =
        std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t bytes[1] = {static_cast<cuuint64_t>(2 * stride)};
    const cuuint32_t box[2] = {kUnitColumns, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
    return encode(&map, kType, 2, const_cast<void*>(base), sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  };
  BatchedMaps maps;
  if (!make(maps.weight, p.weight, static_cast<int64_t>(p.N) * (p.swiglu ? 2 : 1), p.K, p.K, 64) ||
      !make(maps.x, p.x, p.M, static_cast<int64_t>(p.groups) * p.K, p.x_stride, kTokens))
    return cudaErrorInvalidValue;
  return launch<batched_linear<Element, kTokens, kUnits, kSplits>, kSmemOfTwo>(dim3(ctas), kSplits, kBatchedThreads,
                                                                               bytes, true, stream, maps, plan, p);
}

template <class Element, int kTokens>
cudaError_t launch_batched(const LinearParams& p, const Cut& cut, cudaStream_t stream) {
  if (cut.units == 1) return launch_batched<Element, kTokens, 1, 1>(p, cut.clusters, stream);
  switch (cut.splits) {
    case 1: return launch_batched<Element, kTokens, 2, 1>(p, cut.clusters, stream);
    case 2: return launch_batched<Element, kTokens, 2, 2>(p, cut.clusters, stream);
    case 4: return launch_batched<Element, kTokens, 2, 4>(p, cut.clusters, stream);
    default: return launch_batched<Element, kTokens, 2, 8>(p, cut.clusters, stream);
  }
}

}  // namespace

const char* batched_linear_refusal(const LinearParams& params) {
  if (params.M > kMostBatched) return "`x` has more rows than 32";
  if (params.norm_weight != nullptr) return "`norm_weight` is for up to 8 rows; of more, the norm comes in parts";
  if (params.N % 8 != 0) return "`weight` has a number of rows that is no multiple of 8";
  if (params.groups > 1 && (params.swiglu || params.squares != nullptr || params.N / params.groups % 64 != 0))
    return "`groups` needs a multiple of 64 rows each, and neither a norm nor SwiGLU";
  if (params.squares != nullptr && params.squares_count % 4 != 0)
    return "`squares` has a number of parts that is no multiple of 4";
  if (params.next_norm_weight != nullptr && (params.swiglu || params.groups > 1))
    return "`next_norm_weight` needs a product without groups and SwiGLU";
  if (params.next_norm_weight != nullptr && params.next_squares_count != linear_parts(params.M, params.N, params.K))
    return "`next_squares` has another number of parts than this product makes";
  return nullptr;
}

int linear_parts(int M, int N, int K) {
  const Cut parts = cut(M, N, K, 1, false);
  return divided(parts.clusters * parts.splits, 4) * 4;
}

cudaError_t batched_linear(const LinearParams& params, cudaStream_t stream) {
  const Cut parts = cut(params.M, params.N, params.K, params.groups, params.swiglu);
  const auto launch = [&](auto element) {
    using Element = decltype(element);
    return parts.tokens == 16 ? launch_batched<Element, 16>(params, parts, stream)
                              : launch_batched<Element, 32>(params, parts, stream);
  };
  return params.dtype == DType::kBF16 ? launch(__nv_bfloat16{}) : launch(__half{});
}

}  // namespace kda

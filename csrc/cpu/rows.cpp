#include "rows.h"

namespace kda::cpu {
namespace {

// Each a function of one row.

struct Norm {
  template <class T>
  KDA_INLINE static void run(const RowsParams& p, const T* x, T* out) {
    Vec total{};
    for (int64_t i = 0; i < p.N; i += kLanes) {
      const Vec values = load(x + i, p.N - i);
      total += values * values;
    }
    const float factor = 1.0f / std::sqrt(sum(total) / static_cast<float>(p.N) + p.norm_eps);
    for (int64_t i = 0; i < p.N; i += kLanes) {
      float weight[kLanes] = {};
      load_row(p.weight, p.weight_dtype, i, p.N - i < kLanes ? p.N - i : kLanes, weight);
      store(out + i, load(x + i, p.N - i) * factor * load(weight), p.N - i);
    }
  }
};

struct SwiGLU {
  template <class T>
  KDA_INLINE static void run(const RowsParams& p, const T* x, T* out) {
    for (int64_t i = 0; i < p.N; i += kLanes) {
      store(out + i, rounded<T>(silu(load(x + i, p.N - i))) * load(x + p.N + i, p.N - i), p.N - i);
    }
  }
};

struct Add {
  template <class T>
  KDA_INLINE static void run(const RowsParams& p, const T* x, T* out) {
    for (int64_t i = 0; i < p.N; i += kLanes) store(out + i, load(out + i, p.N - i) + load(x + i, p.N - i), p.N - i);
  }
};

template <class T>
KDA_INLINE T* at(const Rows& rows, int64_t batch, int64_t head) {
  return static_cast<T*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride;
}

template <class Function, class T>
KDA_INLINE void rows_of(const RowsParams& p, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const int64_t batch = m / p.heads, head = m % p.heads;
    Function::run(p, at<const T>(p.x, batch, head), at<T>(p.out, batch, head));
  }
}

template <class Function>
KDA_INLINE void rows(const RowsParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kBF16: return rows_of<Function, BF16>(p, begin, end);
    case DType::kFP16: return rows_of<Function, FP16>(p, begin, end);
    case DType::kFP32: return rows_of<Function, float>(p, begin, end);
  }
}

}  // namespace

KDA_VERSIONS(rms_norm, rows<Norm>, RowsParams)
KDA_VERSIONS(swiglu, rows<SwiGLU>, RowsParams)
KDA_VERSIONS(add, rows<Add>, RowsParams)

}  // namespace kda::cpu

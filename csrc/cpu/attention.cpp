#include "attention.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace kda::cpu {
namespace {

constexpr int64_t kTile = 64;  // keys whose scores are known before their values are read
constexpr int64_t kMostSpans = 64;

// A span's result for a head: Σ exp(score - most) value, and behind its vectors `most` and Σ exp(score - most).
constexpr int kMost = 0, kTotal = 1, kNumbers = 8;

KDA_INLINE int64_t span_length(int64_t length) {
  return (length + kMostSpans * kTile - 1) / (kMostSpans * kTile) * kTile;
}

KDA_INLINE int64_t count_spans(int64_t length) { return (length + span_length(length) - 1) / span_length(length); }

// What is subtracted from scores. Where they are all -infinity, that would make NaN of them, and not zeros.
KDA_INLINE float finite(float most) { return most == -std::numeric_limits<float>::infinity() ? 0.0f : most; }

// Scores of kKeys keys, one row after the other.
template <int kKeys, class T>
KDA_INLINE void score(const AttentionParams& p, const float* query, const T* keys, float* scores) {
  Vec sums[kKeys] = {};
  for (int64_t i = 0; i < p.D; i += kLanes) {
    const Vec q = load(query + i);
    for (int j = 0; j < kKeys; ++j) sums[j] += q * load(keys + j * p.keys.row_stride + i, p.D - i);
  }
  for (int j = 0; j < kKeys; ++j) scores[j] = p.scale * sum(sums[j]);
}

// sum ← factor sum + Σ weights[j] values[j], of kVecs vectors of the rows from `first` on.
template <int kVecs, class T>
KDA_INLINE void add_weighted(const AttentionParams& p, const float* weights, const T* values, int64_t count,
                             int64_t first, float factor, float* sum) {
  Vec sums[kVecs];
  for (int v = 0; v < kVecs; ++v) sums[v] = factor * load(sum + first + v * kLanes);
  for (int64_t j = 0; j < count; ++j) {
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = first + v * kLanes;
      sums[v] += weights[j] * load(values + j * p.values.row_stride + at, kVecs > 1 ? kLanes : p.D - at);
    }
  }
  for (int v = 0; v < kVecs; ++v) store(sum + first + v * kLanes, sums[v]);
}

template <class T>
KDA_INLINE void attend_head(const AttentionParams& p, const float* query, const T* keys, const T* values, int64_t count,
                            float* partial) {
  float* numbers = partial + padded(p.D);
  float most = -std::numeric_limits<float>::infinity(), total = 0;
  for (int64_t i = 0; i < padded(p.D); ++i) partial[i] = 0;
  for (int64_t first = 0; first < count; first += kTile) {
    const int64_t tile = count - first < kTile ? count - first : kTile;
    float scores[kTile];
    int64_t j = 0;
    for (; j + 4 <= tile; j += 4) score<4>(p, query, keys + (first + j) * p.keys.row_stride, scores + j);
    for (; j < tile; ++j) score<1>(p, query, keys + (first + j) * p.keys.row_stride, scores + j);
    for (; j < padded(tile); ++j) scores[j] = -std::numeric_limits<float>::infinity();  // no keys: exp makes them zeros

    const float before = most;
    for (j = 0; j < tile; ++j) most = scores[j] > most ? scores[j] : most;
    const float factor = before == most ? 1.0f : std::exp(before - most);
    total *= factor;
    for (j = 0; j < tile; j += kLanes) {
      const Vec weights = exp(load(scores + j) - finite(most));
      store(scores + j, weights);
      total += sum(weights);
    }
    constexpr int kVecs = 4;
    int64_t i = 0;
    const T* rows = values + first * p.values.row_stride;
    for (; i + kVecs * kLanes <= p.D; i += kVecs * kLanes) {
      add_weighted<kVecs>(p, scores, rows, tile, i, factor, partial);
    }
    for (; i < p.D; i += kLanes) add_weighted<1>(p, scores, rows, tile, i, factor, partial);
  }
  numbers[kMost] = most, numbers[kTotal] = total;
}

template <class T>
KDA_INLINE const T* rows_at(const Kept& kept, int64_t b, int64_t head, int64_t row) {
  return static_cast<const T*>(kept.data) + b * kept.batch_stride + head * kept.head_stride + row * kept.row_stride;
}

template <class T>
KDA_INLINE void attend_items(const AttentionParams& p, int64_t begin, int64_t end) {
  const int64_t spans = count_spans(p.length), group = p.H / p.KVH;
  std::vector<float> query(padded(p.D));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t span = item % spans, key_head = item / spans % p.KVH, b = item / spans / p.KVH;
    const int64_t first = span * span_length(p.length);
    const int64_t count = p.length - first < span_length(p.length) ? p.length - first : span_length(p.length);
    const T *keys = rows_at<T>(p.keys, b, key_head, first), *values = rows_at<T>(p.values, b, key_head, first);
    for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h) {
      load_row_of(static_cast<const T*>(p.q) + b * p.q_batch_stride + h * p.q_head_stride, p.D, query.data());
      float* partial = p.partial + ((b * p.H + h) * spans + span) * (padded(p.D) + kNumbers);
      attend_head(p, query.data(), keys, values, count, partial);
    }
  }
}

KDA_INLINE void attend_any(const AttentionParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kBF16: return attend_items<BF16>(p, begin, end);
    case DType::kFP16: return attend_items<FP16>(p, begin, end);
    case DType::kFP32: return attend_items<float>(p, begin, end);
  }
}

KDA_INLINE void merge_heads(const AttentionParams& p, int64_t begin, int64_t end) {
  const int64_t spans = count_spans(p.length), width = padded(p.D);
  std::vector<float> row(width);
  for (int64_t item = begin; item < end; ++item) {
    const float* partial = p.partial + item * spans * (width + kNumbers);
    float most = partial[width + kMost], total = 0;
    for (int64_t s = 1; s < spans; ++s) {
      const float other = partial[s * (width + kNumbers) + width + kMost];
      most = other > most ? other : most;
    }
    for (int64_t i = 0; i < width; ++i) row[i] = 0;
    for (int64_t s = 0; s < spans; ++s) {
      const float* own = partial + s * (width + kNumbers);
      const float factor = std::exp(own[width + kMost] - finite(most));
      total += factor * own[width + kTotal];
      for (int64_t i = 0; i < width; i += kLanes) store(row.data() + i, load(row.data() + i) + factor * load(own + i));
    }
    for (int64_t i = 0; i < width; i += kLanes) store(row.data() + i, load(row.data() + i) / total);
    store_row(p.out, p.dtype, item * p.D, p.D, row.data());
  }
}

}  // namespace

int64_t spans_of(int64_t length) { return count_spans(length); }
int64_t partial_size(int64_t D) { return padded(D) + kNumbers; }

KDA_VERSIONS(attend_spans, attend_any, AttentionParams)
KDA_VERSIONS(merge_spans, merge_heads, AttentionParams)

}  // namespace kda::cpu

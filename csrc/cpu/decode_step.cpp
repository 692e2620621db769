#include "decode_step.h"

#include <algorithm>
#include <vector>

namespace kda::cpu {
namespace {

// Rows of floats, each with room for whole vectors.
class Scratch {
 public:
  explicit Scratch(const DecodeStepParams& params)
      : keys_(padded(params.K)), values_(padded(params.V)), memory_(3 * keys_ + 3 * values_ + 2 * taps(params)) {}

  float* query() { return memory_.data(); }
  float* key() { return query() + keys_; }
  float* decay() { return key() + keys_; }
  float* value() { return decay() + keys_; }
  float* output() { return value() + values_; }
  float* other() { return output() + values_; }  // norm's weight, and then the gate
  float* window() { return other() + values_; }
  float* weight() { return window() + (memory_.data() + memory_.size() - window()) / 2; }

 private:
  static int64_t taps(const DecodeStepParams& params) { return padded(std::max(params.K, params.V) * params.W); }

  int64_t keys_, values_;
  std::vector<float> memory_;
};

// ------------------------------------------------------------------------------------------------ convolution and gate

// The newest input joins the window of each channel, whose weighted sum takes its place in `row`.
template <int W>
KDA_INLINE void shift_and_sum(int64_t channels, float* window, const float* weight, float* row) {
  for (int64_t c = 0; c < channels; ++c) {
    float total = 0;
    for (int w = 0; w < W; ++w) {
      const float x = w + 1 < W ? window[c * W + w + 1] : row[c];
      window[c * W + w] = x;
      total += x * weight[c * W + w];
    }
    row[c] = total;
  }
}

// silu(conv(x)) of a head, whose first channel is `channel` of all in the state and `own` of those of the weight.
KDA_INLINE void convolve(const DecodeStepParams& p, const Heads& x, int64_t b, int64_t head, int64_t width,
                         const Array& weight, int64_t state_row, int64_t first_channel, Scratch& scratch, float* row) {
  const int64_t taps = width * p.W, own = head * width;
  const int64_t channel = state_row * (2 * p.H * p.K + p.HV * p.V) + first_channel + own;
  float* window = scratch.window();
  load_row(x.data, x.dtype, b * x.batch_stride + head * x.head_stride, width, row);
  load_row(weight.data, weight.dtype, own * p.W, taps, scratch.weight());
  load_row(p.conv_state, p.conv_state_dtype, channel * p.W, taps, window);
  if (p.W == 2) shift_and_sum<2>(width, window, scratch.weight(), row);
  if (p.W == 3) shift_and_sum<3>(width, window, scratch.weight(), row);
  if (p.W == 4) shift_and_sum<4>(width, window, scratch.weight(), row);
  store_row(p.conv_state, p.conv_state_dtype, channel * p.W, taps, window);
  for (int64_t i = 0; i < width; i += kLanes) store(row + i, silu(load(row + i)));
  round_row(p.q.dtype, width, row);
  clear_padding(row, width);
}

KDA_INLINE void multiply(float* row, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += kLanes) store(row + i, load(row + i) * factor);
}

KDA_INLINE void normalize(float* row, int64_t n) { multiply(row, n, 1.0f / std::sqrt(sum_of_squares(row, n) + 1e-6f)); }

KDA_INLINE float number(const void* data, DType dtype, int64_t offset) {
  float x[kLanes];
  load_row(data, dtype, offset, 1, x);
  return x[0];
}

// exp of the log-decay of a head.
KDA_INLINE void compute_decay(const DecodeStepParams& p, int64_t b, int64_t head, Scratch& scratch) {
  float *decay = scratch.decay(), *bias = scratch.weight();
  load_row(p.g.data, p.g.dtype, b * p.g.batch_stride + head * p.g.head_stride, p.K, decay);
  if (p.dt_bias.data != nullptr) {
    load_row(p.dt_bias.data, p.dt_bias.dtype, head * p.K, p.K, bias);
    for (int64_t i = 0; i < p.K; i += kLanes) store(decay + i, load(decay + i) + load(bias + i));
  }
  const float rate = p.A_log.data == nullptr ? 1.0f : std::exp(number(p.A_log.data, p.A_log.dtype, head));
  for (int64_t i = 0; i < p.K; i += kLanes) {
    const Vec g = load(decay + i);
    store(decay + i, exp(p.is_safe_gate ? p.lower_bound * sigmoid(rate * g) : -rate * softplus(g)));
  }
  clear_padding(decay, p.K);
}

KDA_INLINE float compute_beta(const DecodeStepParams& p, int64_t b, int64_t head) {
  const float x = number(p.beta.data, p.beta.dtype, b * p.beta.batch_stride + head * p.beta.head_stride);
  const float beta = 1.0f / (1.0f + std::exp(-x));
  return p.allow_neg_eigval ? 2 * beta : beta;
}

// ---------------------------------------------------------------------------------------------------------- recurrence
//
//   S ← Diag(decay) S     u = β (v - Sᵀ k)     S ← S + k uᵀ     o = Sᵀ q
//
// Value channels have nothing to do with each other. So a few of them are read, which is where u comes from, and read again
// and written while they are in the first cache. The decayed state is computed twice rather than written twice.

struct Token {
  int64_t K, V;
  const float *query, *key, *decay, *value;
  float beta;
  float* output;
};

// kVecs vectors of value channels of a state [K, V], from the first one, of which there are `channels`. Tokens come by value:
// for what the compiler knows, a store to the state could change one in memory.
template <int kVecs, class T>
KDA_INLINE void update_columns(const Token token, T* state, int64_t first, int64_t channels) {
  state += first;
  Vec u[kVecs] = {}, output[kVecs] = {};
  for (int64_t k = 0; k < token.K; ++k) {
    const float decay = token.decay[k], key = token.key[k];
    for (int i = 0; i < kVecs; ++i) {
      u[i] += key * (decay * load(state + k * token.V + i * kLanes, channels - i * kLanes));
    }
  }
  for (int i = 0; i < kVecs; ++i) u[i] = (load(token.value + first + i * kLanes) - u[i]) * token.beta;
  for (int64_t k = 0; k < token.K; ++k) {
    const float decay = token.decay[k], key = token.key[k], query = token.query[k];
    for (int i = 0; i < kVecs; ++i) {
      T* place = state + k * token.V + i * kLanes;
      const Vec updated = decay * load(place, channels - i * kLanes) + key * u[i];
      output[i] += query * updated;
      store(place, updated, channels - i * kLanes);
    }
  }
  for (int i = 0; i < kVecs; ++i) store(token.output + first + i * kLanes, output[i]);
}

template <class T>
KDA_INLINE void update_key_first(const Token token, T* state) {
  constexpr int kVecs = 4;  // 16 KB of fp32 states with K = 128, which stay in the first cache
  int64_t v = 0;
  for (; v + kVecs * kLanes <= token.V; v += kVecs * kLanes) update_columns<kVecs>(token, state, v, kVecs * kLanes);
  for (; v < token.V; v += kLanes) update_columns<1>(token, state, v, token.V - v);
}

// kRows value channels of a state [V, K], from the first one.
template <int kRows, class T>
KDA_INLINE void update_rows(const Token token, T* state, int64_t first) {
  state += first * token.K;
  Vec sums[kRows] = {}, outputs[kRows] = {};
  float u[kRows];
  for (int64_t k = 0; k < token.K; k += kLanes) {
    const Vec decay = load(token.decay + k), key = load(token.key + k);
    for (int i = 0; i < kRows; ++i) sums[i] += key * (decay * load(state + i * token.K + k, token.K - k));
  }
  for (int i = 0; i < kRows; ++i) u[i] = (token.value[first + i] - sum(sums[i])) * token.beta;
  for (int64_t k = 0; k < token.K; k += kLanes) {
    const Vec decay = load(token.decay + k), key = load(token.key + k), query = load(token.query + k);
    for (int i = 0; i < kRows; ++i) {
      T* place = state + i * token.K + k;
      const Vec updated = decay * load(place, token.K - k) + key * u[i];
      outputs[i] += query * updated;
      store(place, updated, token.K - k);
    }
  }
  for (int i = 0; i < kRows; ++i) token.output[first + i] = sum(outputs[i]);
}

template <class T>
KDA_INLINE void update_value_first(const Token token, T* state) {
  constexpr int kRows = 4;
  int64_t v = 0;
  for (; v + kRows <= token.V; v += kRows) update_rows<kRows>(token, state, v);
  for (; v < token.V; ++v) update_rows<1>(token, state, v);
}

template <class T>
KDA_INLINE void update(const DecodeStepParams& p, const Token token, int64_t matrix) {
  T* state = static_cast<T*>(p.recurrent_state) + matrix * token.K * token.V;
  if (p.state_v_first) return update_value_first(token, state);
  update_key_first(token, state);
}

// --------------------------------------------------------------------------------------------------------------- items

// norm(o) ∘ weight ∘ sigmoid(gate), stored.
KDA_INLINE void finish(const DecodeStepParams& p, int64_t b, int64_t head, Scratch& scratch) {
  float *o = scratch.output(), *other = scratch.other();
  round_row(p.v.dtype, p.V, o);
  clear_padding(o, p.V);
  const float factor = 1.0f / std::sqrt(sum_of_squares(o, p.V) / static_cast<float>(p.V) + p.norm_eps);
  load_row(p.norm_weight.data, p.norm_weight.dtype, 0, p.V, other);
  for (int64_t i = 0; i < p.V; i += kLanes) store(o + i, load(o + i) * factor * load(other + i));
  const Heads& gate = p.output_gate;
  load_row(gate.data, gate.dtype, b * gate.batch_stride + head * gate.head_stride, p.V, other);
  for (int64_t i = 0; i < p.V; i += kLanes) store(o + i, load(o + i) * sigmoid(load(other + i)));
  store_row(p.out, p.v.dtype, (b * p.HV + head) * p.V, p.V, o);
}

KDA_INLINE int64_t row_of(const DecodeStepParams& p, int64_t b) {
  if (p.state_indices == nullptr) return b;
  return p.state_indices_are_int64 ? static_cast<const int64_t*>(p.state_indices)[b]
                                   : static_cast<const int32_t*>(p.state_indices)[b];
}

KDA_INLINE void decode_items(const DecodeStepParams& p, int64_t begin, int64_t end) {
  Scratch scratch(p);
  float *query = scratch.query(), *key = scratch.key(), *value = scratch.value();
  const int64_t group = p.HV / p.H;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.H, h = item % p.H, row = row_of(p, b);
    if (row < 0 || row >= p.rows) {
      std::memset(static_cast<char*>(p.out) + (b * p.HV + h * group) * p.V * size_of(p.v.dtype), 0,
                  group * p.V * size_of(p.v.dtype));
      continue;
    }
    convolve(p, p.q, b, h, p.K, p.q_conv_weight, row, 0, scratch, query);
    convolve(p, p.k, b, h, p.K, p.k_conv_weight, row, p.H * p.K, scratch, key);
    normalize(query, p.K);
    normalize(key, p.K);
    multiply(query, p.K, p.scale);
    for (int64_t head = h * group; head < (h + 1) * group; ++head) {
      convolve(p, p.v, b, head, p.V, p.v_conv_weight, row, 2 * p.H * p.K, scratch, value);
      compute_decay(p, b, head, scratch);
      const Token token{p.K, p.V, query, key, scratch.decay(), value, compute_beta(p, b, head), scratch.output()};
      switch (p.recurrent_state_dtype) {
        case DType::kBF16: update<BF16>(p, token, row * p.HV + head); break;
        case DType::kFP16: update<FP16>(p, token, row * p.HV + head); break;
        case DType::kFP32: update<float>(p, token, row * p.HV + head); break;
      }
      finish(p, b, head, scratch);
    }
  }
}

}  // namespace

KDA_VERSIONS(decode_step, decode_items, DecodeStepParams)

}  // namespace kda::cpu

// The operators of the CPU extension, on torch's stable ABI: the only file of it that includes torch.
//
// As in csrc/bindings.cpp, the checks are cheap and complete; where one fails, nothing has been written, and the exception
// starts with kRefused.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "decode_step.h"
#include "rows.h"

namespace {

using kda::cpu::Array;
using kda::cpu::DType;
using kda::cpu::Heads;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr const char* kRefused = "kda_hf refuses: ";
// What a thread gets at least: some 10 µs of work, of which waking it takes a good part.
constexpr int64_t kStateElements = 1 << 16, kRowElements = 1 << 15, kAttentionProducts = 1 << 18;

void require(bool holds, const char* reason) {
  if (!holds) throw std::runtime_error(std::string(kRefused) + reason);
}

bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  const auto sizes = x.sizes();
  return sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
}

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return DType::kBF16;
    case ScalarType::Half: return DType::kFP16;
    case ScalarType::Float: return DType::kFP32;
    default: throw std::runtime_error(std::string(kRefused) + "the tensors must be bfloat16, float16 or float32");
  }
}

// Of [B, 1, heads, width], or [B, 1, heads].
Heads heads_of(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  require(x.is_cpu(), "the tensors must be on the CPU");
  require(sizes.size() == 3 || sizes[3] == 1 || strides[3] == 1, "the tensors must have contiguous rows");
  return {x.const_data_ptr(), dtype_of(x), strides[0], strides[2]};
}

Array array_of(const Tensor& x) {
  require(x.is_cpu(), "the tensors must be on the CPU");
  require(x.is_contiguous(), "weights, states and parameters must be contiguous");
  return {x.const_data_ptr(), dtype_of(x)};
}

Array array_of(const MaybeTensor& x) { return x ? array_of(*x) : Array{nullptr, DType::kFP32}; }

void decode_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor output_gate, double scale, Tensor out,
                 MaybeTensor A_log, MaybeTensor dt_bias, std::optional<double> lower_bound, Tensor recurrent_state,
                 Tensor conv_state, Tensor q_conv_weight, Tensor k_conv_weight, Tensor v_conv_weight,
                 Tensor norm_weight, double norm_eps, MaybeTensor state_indices, bool allow_neg_eigval,
                 bool state_v_first) {
  require(q.dim() == 4 && q.size(1) == 1, "`q` must have shape [B, 1, H, K]");
  require(v.dim() == 4, "`v` must have shape [B, 1, HV, V]");
  require(q_conv_weight.dim() == 2, "`q_conv_weight` must have shape [H * K, W]");
  require(recurrent_state.dim() == 4, "`recurrent_state` must have four dimensions");
  const int64_t B = q.size(0), H = q.size(2), K = q.size(3), HV = v.size(2), V = v.size(3), W = q_conv_weight.size(1);
  const int64_t rows = recurrent_state.size(0);
  require(H > 0 && HV % H == 0 && K > 0, "`v` must have a multiple of the heads of `q`");
  require(W >= 2 && W <= 4, "the convolution must have 2 to 4 taps");
  require(has_shape(k, {B, 1, H, K}), "`k` must have the shape of `q`");
  require(has_shape(v, {B, 1, HV, V}), "`v` must have shape [B, 1, HV, V]");
  require(has_shape(g, {B, 1, HV, K}), "`g` must have shape [B, 1, HV, K]");
  require(has_shape(beta, {B, 1, HV}), "`beta` must have shape [B, 1, HV]");
  require(has_shape(output_gate, {B, 1, HV, V}), "`output_gate` must have the shape of `v`");
  require(has_shape(out, {B, 1, HV, V}) && out.scalar_type() == v.scalar_type(), "`out` must be like `v`");
  require(!A_log || has_shape(*A_log, {HV}), "`A_log` must have shape [HV]");
  require(!dt_bias || has_shape(*dt_bias, {HV, K}) || has_shape(*dt_bias, {HV * K}),
          "`dt_bias` must have shape [HV, K] or [HV * K]");
  require(!lower_bound || (*lower_bound >= -5 && *lower_bound <= 0), "`lower_bound` must be in [-5, 0]");
  require(has_shape(q_conv_weight, {H * K, W}) && has_shape(k_conv_weight, {H * K, W}),
          "`q_conv_weight` and `k_conv_weight` must have shape [H * K, W]");
  require(has_shape(v_conv_weight, {HV * V, W}), "`v_conv_weight` must have shape [HV * V, W]");
  require(has_shape(norm_weight, {V}), "`norm_weight` must have shape [V]");
  require(has_shape(recurrent_state, {rows, HV, state_v_first ? V : K, state_v_first ? K : V}),
          "`recurrent_state` must have shape [P, HV, V, K], or [P, HV, K, V]");
  require(has_shape(conv_state, {rows, 2 * H * K + HV * V, W}), "`conv_state` must have shape [P, 2 H K + HV V, W]");
  require(state_indices || rows == B, "`recurrent_state` must have a row for each sequence");
  require(
      !state_indices || (has_shape(*state_indices, {B}) && state_indices->is_contiguous() && state_indices->is_cpu()),
      "`state_indices` must have shape [B], and be contiguous");
  const bool are_int64 = state_indices && state_indices->scalar_type() == ScalarType::Long;
  require(!state_indices || are_int64 || state_indices->scalar_type() == ScalarType::Int,
          "`state_indices` must be int32 or int64");
  array_of(out), array_of(recurrent_state), array_of(conv_state);

  kda::cpu::DecodeStepParams params{};
  params.B = B, params.H = H, params.HV = HV, params.K = K, params.V = V, params.W = W, params.rows = rows;
  params.q = heads_of(q), params.k = heads_of(k), params.v = heads_of(v), params.g = heads_of(g);
  params.output_gate = heads_of(output_gate), params.beta = heads_of(beta);
  params.A_log = array_of(A_log), params.dt_bias = array_of(dt_bias);
  params.q_conv_weight = array_of(q_conv_weight), params.k_conv_weight = array_of(k_conv_weight);
  params.v_conv_weight = array_of(v_conv_weight), params.norm_weight = array_of(norm_weight);
  params.conv_state = conv_state.mutable_data_ptr(), params.conv_state_dtype = dtype_of(conv_state);
  params.recurrent_state = recurrent_state.mutable_data_ptr();
  params.recurrent_state_dtype = dtype_of(recurrent_state);
  params.state_indices = state_indices ? state_indices->const_data_ptr() : nullptr;
  params.state_indices_are_int64 = are_int64;
  params.out = out.mutable_data_ptr();
  params.scale = static_cast<float>(scale), params.norm_eps = static_cast<float>(norm_eps);
  params.lower_bound = static_cast<float>(lower_bound.value_or(0)), params.is_safe_gate = lower_bound.has_value();
  params.allow_neg_eigval = allow_neg_eigval, params.state_v_first = state_v_first;
  const int64_t grain = std::max<int64_t>(1, kStateElements / std::max<int64_t>(1, HV / H * K * V));
  torch::stable::parallel_for(0, B * H, grain,
                              [&](int64_t begin, int64_t end) { kda::cpu::decode_step(params, begin, end); });
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t dim = shape.size(); dim-- > 0; stride *= shape.begin()[dim]) strides[dim] = stride;
  int32_t dtype = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A part of x as a tensor of its own. The caller sees to it that there is one.
Tensor view(const Tensor& x, std::initializer_list<int64_t> shape, std::initializer_list<int64_t> strides,
            int64_t first) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), static_cast<int64_t>(shape.size()), shape.begin(),
                                                        strides.begin(), first, &handle));
  return Tensor(handle);
}

// Of [B, N] or [B, heads, N].
kda::cpu::Rows rows_of(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const size_t last = sizes.size() - 1;
  require(last == 1 || last == 2, "the tensors must have two or three dimensions");
  require(x.is_cpu(), "the tensors must be on the CPU");
  require(sizes[last] <= 1 || strides[last] == 1, "the tensors must have contiguous rows");
  return {const_cast<void*>(x.const_data_ptr()), strides[0], last == 2 ? strides[1] : 0};
}

void for_rows(void (*run)(const kda::cpu::RowsParams&, int64_t, int64_t), const Tensor& x, const Tensor& out,
              const Tensor* weight = nullptr, double eps = 0) {
  kda::cpu::RowsParams params{};
  params.x = rows_of(x), params.out = rows_of(out);
  params.N = out.sizes().back(), params.heads = out.dim() == 3 ? out.size(1) : 1;
  require(x.scalar_type() == out.scalar_type(), "the tensors must be of one dtype");
  params.dtype = dtype_of(x), params.norm_eps = static_cast<float>(eps);
  if (weight != nullptr) {
    require(has_shape(*weight, {params.N}), "the weight of a norm must have as many elements as a row");
    const Array array = array_of(*weight);
    params.weight = array.data, params.weight_dtype = array.dtype;
  }
  torch::stable::parallel_for(0, out.size(0) * params.heads, std::max<int64_t>(1, kRowElements / (params.N + 1)),
                              [&](int64_t begin, int64_t end) { run(params, begin, end); });
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  require(x.dim() == 2 || x.dim() == 3, "`x` must have two or three dimensions");
  const Tensor out = x.dim() == 2 ? empty(x, {x.size(0), x.size(1)}) : empty(x, {x.size(0), x.size(1), x.size(2)});
  for_rows(kda::cpu::rms_norm, x, out, &weight, eps);
  return out;
}

// By torch. `torch::stable::matmul` would come to the same in more steps.
Tensor product(const Tensor& x, const Tensor& weight) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  Tensor y = torch::stable::detail::to<Tensor>(stack[0]);
  require(y.is_contiguous() && y.scalar_type() == x.scalar_type(), "products must be like `x`");  // not so in autocast
  return y;
}

// x + y, in the place of y.
Tensor added(const Tensor& x, Tensor y) {
  for_rows(kda::cpu::add, x, y);
  return y;
}

// Weights of products are transposed, [K, N], as views of those of linear layers.
void require_product(const Tensor& weight, const Tensor& x, int64_t columns) {
  require(weight.dim() == 2 && weight.size(0) == columns, "the weights must have as many rows as their inputs columns");
  require(weight.is_cpu() && weight.scalar_type() == x.scalar_type(), "`x` and the weights must be of one dtype");
}

Tensor mlp(Tensor x, Tensor norm_weight, double norm_eps, Tensor gate_and_up, Tensor down) {
  require(x.dim() == 2 && gate_and_up.dim() == 2 && gate_and_up.size(1) % 2 == 0, "`x` must have shape [B, D]");
  const int64_t B = x.size(0), D = x.size(1), N = gate_and_up.size(1) / 2;
  require_product(gate_and_up, x, D), require_product(down, x, N);
  require(down.size(1) == D, "`down` must have shape [N, D]");
  const Tensor y = product(rms_norm(x, norm_weight, norm_eps), gate_and_up), hidden = empty(x, {B, N});
  for_rows(kda::cpu::swiglu, y, hidden);
  return added(x, product(hidden, down));
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

ThreeTensors attention_inputs(Tensor x, Tensor norm_weight, double norm_eps, Tensor projections, int64_t heads,
                              int64_t key_heads, int64_t width, MaybeTensor q_norm_weight, MaybeTensor k_norm_weight,
                              double head_norm_eps) {
  require(x.dim() == 2, "`x` must have shape [B, D]");
  const int64_t B = x.size(0), first_key = heads * width, first_value = first_key + key_heads * width;
  require_product(projections, x, x.size(1));
  require(heads > 0 && key_heads > 0 && width > 0 && projections.size(1) >= first_value + key_heads * width,
          "`projections` must have all columns");
  const Tensor y = product(rms_norm(x, norm_weight, norm_eps), projections);
  const int64_t stride = y.stride(0);
  const auto normed = [&](int64_t first, int64_t count, const MaybeTensor& weight) {
    if (weight) {
      const Tensor rows = view(y, {B, count, width}, {stride, width, 1}, first);
      for_rows(kda::cpu::rms_norm, rows, rows, &*weight, head_norm_eps);
    }
    return view(y, {B, count, 1, width}, {stride, width, width, 1}, first);
  };
  return {normed(0, heads, q_norm_weight), normed(first_key, key_heads, k_norm_weight),
          normed(first_value, key_heads, std::nullopt)};
}

Tensor attention_output(Tensor x, Tensor q, Tensor keys, Tensor values, double scale, Tensor output) {
  require(x.dim() == 2 && q.dim() == 4 && keys.dim() == 4, "`keys` must have shape [B, KVH, length, D]");
  kda::cpu::AttentionParams params{};
  params.B = x.size(0), params.H = q.size(1), params.D = q.size(3), params.KVH = keys.size(1);
  params.length = keys.size(2), params.scale = static_cast<float>(scale), params.dtype = dtype_of(x);
  require(has_shape(q, {params.B, params.H, 1, params.D}), "`q` must have shape [B, H, 1, D]");
  require(params.KVH > 0 && params.H % params.KVH == 0, "`q` must have a multiple of the heads of `keys`");
  require(params.D > 0 && params.length > 0, "there must be a key");
  for (const Tensor* kept : {&keys, &values}) {
    require(has_shape(*kept, {params.B, params.KVH, params.length, params.D}),
            "`keys` and `values` must have shape [B, KVH, length, D]");
  }
  for (const Tensor* rows : {&q, &keys, &values}) {
    require(rows->is_cpu() && rows->scalar_type() == x.scalar_type(), "the tensors must be of one dtype");
    require(params.D == 1 || rows->stride(3) == 1, "the tensors must have contiguous rows");
  }
  require_product(output, x, params.H * params.D);
  require(output.size(1) == x.size(1), "`output` must have shape [H * D, hidden size]");
  rows_of(x);

  const Tensor o = empty(x, {params.B, params.H * params.D});
  const int64_t spans = kda::cpu::spans_of(params.length);
  std::vector<float> partial(params.B * params.H * spans * kda::cpu::partial_size(params.D));
  params.q = q.const_data_ptr(), params.q_batch_stride = q.stride(0), params.q_head_stride = q.stride(1);
  params.keys = {keys.const_data_ptr(), keys.stride(0), keys.stride(1), keys.stride(2)};
  params.values = {values.const_data_ptr(), values.stride(0), values.stride(1), values.stride(2)};
  params.partial = partial.data(), params.out = o.mutable_data_ptr();
  const int64_t per_span = 2 * params.H / params.KVH * params.length * params.D / spans;
  torch::stable::parallel_for(0, params.B * params.KVH * spans, std::max<int64_t>(1, kAttentionProducts / per_span),
                              [&](int64_t begin, int64_t end) { kda::cpu::attend_spans(params, begin, end); });
  torch::stable::parallel_for(0, params.B * params.H, std::max<int64_t>(1, kStateElements / (spans * params.D)),
                              [&](int64_t begin, int64_t end) { kda::cpu::merge_spans(params, begin, end); });
  return added(x, product(o, output));
}

// Columns of y [B, P] from `first` on as [B, 1, heads, width].
Tensor heads_at(const Tensor& y, int64_t first, int64_t heads, int64_t width) {
  const int64_t stride = y.stride(0);
  return view(y, {y.size(0), 1, heads, width}, {stride, stride, width, 1}, first);
}

Tensor kda_layer(Tensor x, Tensor layer_norm_weight, double layer_norm_eps, Tensor projections, Tensor decay,
                 Tensor gate, Tensor output, double scale, MaybeTensor A_log, MaybeTensor dt_bias,
                 std::optional<double> lower_bound, Tensor recurrent_state, Tensor conv_state, Tensor q_conv_weight,
                 Tensor k_conv_weight, Tensor v_conv_weight, Tensor norm_weight, double norm_eps,
                 bool allow_neg_eigval) {
  require(x.dim() == 2 && decay.dim() == 2 && gate.dim() == 2, "`x` must have shape [B, D]");
  require(recurrent_state.dim() == 4 && recurrent_state.size(2) > 0 && recurrent_state.size(3) > 0,
          "`recurrent_state` must have shape [B, HV, K, V]");
  const int64_t B = x.size(0), D = x.size(1);
  const int64_t HV = recurrent_state.size(1), K = recurrent_state.size(2), V = recurrent_state.size(3);
  const int64_t keys = q_conv_weight.size(0), values = HV * V, H = keys / K;
  const int64_t of_decay = decay.size(0), of_gate = gate.size(0), first = 2 * keys + values;
  require_product(projections, x, D), require_product(decay, x, of_decay), require_product(gate, x, of_gate);
  require_product(output, x, values);
  require(projections.size(1) >= first + of_decay + of_gate + HV, "`projections` must have all columns");
  require(decay.size(1) == HV * K && gate.size(1) == values && output.size(1) == D, "the weights must go together");

  const Tensor y = product(rms_norm(x, layer_norm_weight, layer_norm_eps), projections);
  const int64_t stride = y.stride(0), first_gate = first + of_decay, first_beta = first_gate + of_gate;
  const Tensor g = product(view(y, {B, of_decay}, {stride, 1}, first), decay);
  const Tensor output_gate = product(view(y, {B, of_gate}, {stride, 1}, first_gate), gate);
  const Tensor beta = view(y, {B, 1, HV}, {stride, stride, 1}, first_beta), out = empty(x, {B, values});
  decode_step(heads_at(y, 0, H, K), heads_at(y, keys, H, K), heads_at(y, 2 * keys, HV, V), heads_at(g, 0, HV, K), beta,
              heads_at(output_gate, 0, HV, V), scale, heads_at(out, 0, HV, V), A_log, dt_bias, lower_bound,
              recurrent_state, conv_state, q_conv_weight, k_conv_weight, v_conv_weight, norm_weight, norm_eps,
              std::nullopt, allow_neg_eigval, false);
  return added(x, product(out, output));
}

}  // namespace

STABLE_TORCH_LIBRARY(kda_hf_cpu, m) {
  m.def(
      "decode_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor output_gate, float scale, "
      "Tensor(a!) out, Tensor? A_log, Tensor? dt_bias, float? lower_bound, Tensor(b!) recurrent_state, "
      "Tensor(c!) conv_state, Tensor q_conv_weight, Tensor k_conv_weight, Tensor v_conv_weight, Tensor norm_weight, "
      "float norm_eps, Tensor? state_indices, bool allow_neg_eigval, bool state_v_first) -> ()");
  // x + a layer of norm(x), of one token a row: x [B, D].
  m.def(
      "kda_layer(Tensor x, Tensor layer_norm_weight, float layer_norm_eps, Tensor projections, Tensor decay, "
      "Tensor gate, Tensor output, float scale, Tensor? A_log, Tensor? dt_bias, float? lower_bound, "
      "Tensor(a!) recurrent_state, Tensor(b!) conv_state, Tensor q_conv_weight, Tensor k_conv_weight, "
      "Tensor v_conv_weight, Tensor norm_weight, float norm_eps, bool allow_neg_eigval) -> Tensor");
  // q, k and v [B, heads, 1, width] of norm(x), q and k with norms of their own.
  m.def(
      "attention_inputs(Tensor x, Tensor norm_weight, float norm_eps, Tensor projections, int heads, int key_heads, "
      "int width, Tensor? q_norm_weight, Tensor? k_norm_weight, float head_norm_eps) -> (Tensor q, Tensor k, Tensor "
      "v)");
  // x + what attention of q [B, H, 1, D] to keys and values [B, KVH, length, D] comes to.
  m.def("attention_output(Tensor x, Tensor q, Tensor keys, Tensor values, float scale, Tensor output) -> Tensor");
  m.def("mlp(Tensor x, Tensor norm_weight, float norm_eps, Tensor gate_and_up, Tensor down) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kda_hf_cpu, CPU, m) {
  m.impl("decode_step", TORCH_BOX(&decode_step));
  m.impl("kda_layer", TORCH_BOX(&kda_layer));
  m.impl("attention_inputs", TORCH_BOX(&attention_inputs));
  m.impl("attention_output", TORCH_BOX(&attention_output));
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
}

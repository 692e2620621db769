// The operators of the CPU extension, on torch's stable ABI: the only file of it that includes torch.
//
// As in csrc/bindings.cpp, the checks are cheap and complete; where one fails, nothing has been written, and the exception
// starts with kRefused.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

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
constexpr int64_t kStateElements = 1 << 16, kRowElements = 1 << 15;

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
  return torch::stable::new_empty(like, {shape.begin(), shape.size()});
}

// `run` over rows of x, which has two or three dimensions.
void for_rows(void (*run)(const kda::cpu::RowsParams&, int64_t, int64_t), const Tensor& x, const Tensor& out,
              const Tensor* weight = nullptr, double eps = 0) {
  const auto sizes = x.sizes(), strides = x.strides();
  const size_t last = sizes.size() - 1;
  require(last == 1 || last == 2, "the tensors must have two or three dimensions");
  require(x.is_cpu() && x.scalar_type() == out.scalar_type(), "the tensors must be on the CPU, and of one dtype");
  require(sizes[last] <= 1 || strides[last] == 1, "the tensors must have contiguous rows");
  array_of(out);
  kda::cpu::RowsParams params{};
  params.x = x.const_data_ptr(), params.out = out.mutable_data_ptr(), params.dtype = dtype_of(x);
  params.heads = last == 2 ? sizes[1] : 1, params.head_stride = last == 2 ? strides[1] : 0;
  params.batch_stride = strides[0], params.norm_eps = static_cast<float>(eps);
  params.N = out.sizes().back();
  if (weight != nullptr) {
    require(has_shape(*weight, {params.N}), "the weight of a norm must have as many elements as a row");
    const Array array = array_of(*weight);
    params.weight = array.data, params.weight_dtype = array.dtype;
  }
  torch::stable::parallel_for(0, sizes[0] * params.heads, std::max<int64_t>(1, kRowElements / (params.N + 1)),
                              [&](int64_t begin, int64_t end) { run(params, begin, end); });
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  Tensor out = torch::stable::new_empty(x, x.sizes());
  for_rows(kda::cpu::rms_norm, x, out, &weight, eps);
  return out;
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
  const Tensor y = torch::stable::matmul(rms_norm(x, norm_weight, norm_eps), gate_and_up), product = empty(x, {B, N});
  for_rows(kda::cpu::swiglu, y, product);
  return added(x, torch::stable::matmul(product, down));
}

// Columns of y [B, P] from `first` on as [B, 1, heads, width], or as [B, 1, heads] without a width.
Tensor heads_at(const Tensor& y, int64_t first, int64_t heads, int64_t width = 0) {
  require(y.is_contiguous(), "products must be contiguous");
  const int64_t stride = y.stride(0), sizes[] = {y.size(0), 1, heads, width};
  const int64_t strides[] = {stride, stride, width > 0 ? width : 1, 1};
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(y.get(), width > 0 ? 4 : 3, sizes, strides, first, &view));
  return Tensor(view);
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

  const Tensor y = torch::stable::matmul(rms_norm(x, layer_norm_weight, layer_norm_eps), projections);
  Tensor columns = y;
  const Tensor g = torch::stable::matmul(torch::stable::narrow(columns, 1, first, of_decay), decay);
  const Tensor output_gate = torch::stable::matmul(torch::stable::narrow(columns, 1, first + of_decay, of_gate), gate);
  const Tensor out = empty(x, {B, values});
  require(y.scalar_type() == x.scalar_type(), "products must have the dtype of `x`");  // not so within autocast
  decode_step(heads_at(y, 0, H, K), heads_at(y, keys, H, K), heads_at(y, 2 * keys, HV, V), heads_at(g, 0, HV, K),
              heads_at(y, first + of_decay + of_gate, HV), heads_at(output_gate, 0, HV, V), scale,
              heads_at(out, 0, HV, V), A_log, dt_bias, lower_bound, recurrent_state, conv_state, q_conv_weight,
              k_conv_weight, v_conv_weight, norm_weight, norm_eps, std::nullopt, allow_neg_eigval, false);
  return added(x, torch::stable::matmul(out, output));
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
  m.def("mlp(Tensor x, Tensor norm_weight, float norm_eps, Tensor gate_and_up, Tensor down) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kda_hf_cpu, CPU, m) {
  m.impl("decode_step", TORCH_BOX(&decode_step));
  m.impl("kda_layer", TORCH_BOX(&kda_layer));
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
}

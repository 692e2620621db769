// The operators of the extension, on torch's stable ABI: the only file that includes torch.
//
// The checks here are cheap and complete, so that Python need not look at the arguments of a call that succeeds. Where
// one fails, nothing has been written, and the exception starts with kRefused: Python then finds the error that the
// contract documents, or hands the call to a backend that can serve it.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "api/attention.h"
#include "api/choose.h"
#include "api/conv.h"
#include "api/decode.h"
#include "api/linear.h"
#include "api/prefill.h"

// Only a torch with CUDA has it. Weak, so that the extension loads, and can say what it needs, with a CPU torch too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr const char* kRefused = "kda_hf refuses: ";
constexpr uintptr_t kAlignment = 16;  // bytes: what bulk copies and vector loads need

[[noreturn]] void refuse(const std::string& reason) { throw std::runtime_error(kRefused + reason); }

void require(bool holds, const char* reason) {
  if (!holds) refuse(reason);
}

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // the error is reported here: no later call shall find it again
    throw std::runtime_error(std::string("kda_hf: ") + what + ": " + cudaGetErrorString(status));
  }
}

struct DeviceInfo {
  int sms = 0;
  int capability = 0;  // 10 * major + minor
};

DeviceInfo device_info(int device) {
  constexpr int kCached = 64;
  static std::array<std::atomic<uint64_t>, kCached> cache{};
  if (device < kCached) {
    if (const uint64_t known = cache[device].load(std::memory_order_relaxed)) {
      return {static_cast<int>(known >> 32), static_cast<int>(known & 0xffffffffu)};
    }
  }
  int sms = 0, major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "number of SMs");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  const int capability = 10 * major + minor;
  if (device < kCached) {
    cache[device].store(static_cast<uint64_t>(sms) << 32 | static_cast<uint64_t>(capability));
  }
  return {sms, capability};
}

bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  const auto sizes = x.sizes();
  return sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
}

kda::DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::BFloat16: return kda::DType::kBF16;
    case ScalarType::Half: return kda::DType::kFP16;
    case ScalarType::Float: return kda::DType::kFP32;
    default: refuse(std::string("`") + name + "` must be bfloat16, float16 or float32");
  }
}

bool is_aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment == 0; }

// Whether bulk copies can take the rows of x [B, T, heads, width] as they lie. The stride of a dimension of size 1
// means nothing; one of 0 repeats rows.
bool has_aligned_rows(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const auto element = static_cast<int64_t>(x.element_size());
  if (!is_aligned(x) || strides[3] != 1) return false;
  for (int dim = 0; dim < 3; ++dim) {
    const int64_t bytes = strides[dim] * element;
    if (sizes[dim] > 1 && (bytes <= 0 || bytes % static_cast<int64_t>(kAlignment) != 0)) return false;
  }
  return true;
}

Tensor fresh_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }  // contiguous

Tensor fresh_copy(const Tensor& x) {
  Tensor copy = fresh_like(x);
  torch::stable::copy_(copy, x);
  return copy;
}

Tensor with_aligned_rows(const Tensor& x) { return has_aligned_rows(x) ? x : fresh_copy(x); }

bool is_plain(const Tensor& x) { return x.is_contiguous() && is_aligned(x); }

// Strides of B, T and head; those of dimensions of size 1 as if contiguous, whatever torch has noted for them.
void set_strides(const Tensor& x, int64_t (&result)[3]) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t contiguous = x.dim() == 4 ? sizes[3] : 1;
  for (int dim = 2; dim >= 0; --dim) {
    result[dim] = sizes[dim] == 1 ? contiguous : strides[dim];
    contiguous *= sizes[dim];
  }
}

bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

const void* contiguous_data(MaybeTensor& x, ScalarType dtype) {
  if (!x) return nullptr;
  if (x->scalar_type() != dtype) x = torch::stable::to(*x, dtype);
  if (!is_plain(*x)) x = fresh_copy(*x);
  return x->const_data_ptr();
}

// A buffer that a kernel writes: the caller's own where the kernel can, else a temporary one that is copied into it.
class Output {
 public:
  Output(const MaybeTensor& target, bool (*suits)(const Tensor&)) : target_(target) {
    if (target_) written_ = suits(*target_) ? *target_ : fresh_like(*target_);
  }

  void* data() const { return written_ ? written_->mutable_data_ptr() : nullptr; }
  const Tensor& tensor() const { return *written_; }

  void copy_back() {
    if (written_ && written_->get() != target_->get()) torch::stable::copy_(*target_, *written_);
  }

 private:
  MaybeTensor target_, written_;
};

int as_int(int64_t size, const char* name) {
  if (size > INT_MAX) refuse(std::string("`") + name + "` is too large");
  return static_cast<int>(size);
}

// The arguments that all KDA operators share.
struct Arguments {
  Tensor q, k, v, g, beta;
  double scale;
  Tensor out;
  MaybeTensor A_log, dt_bias;
  std::optional<double> lower_bound;
  MaybeTensor initial_state, final_state, states, cu_seqlens;
  bool use_gate, use_qk_norm, use_beta_sigmoid, allow_neg_eigval, state_v_first;
  bool g_is_low_rank = false;  // one head, which a weight makes all of

  // Checks all of them and sets sizes, dtypes and flags. States have `rows` rows, or one a sequence; `states` has `count` in
  // its second dimension, or as many as there are chunks of 64 tokens.
  void check(kda::KdaParams& params, std::optional<int64_t> rows, std::optional<int64_t> count) const;

  // Whether there is nothing to compute: then the final state is the initial one, which this sees to.
  bool are_empty(const kda::KdaParams& params);

  // Sets pointers and strides, of copies where a kernel could not read what the caller gave.
  void point(kda::KdaParams& params);
  void point_parameters(kda::PrefillParams& params);
  void point_parameters(kda::RecurrentParams& params);

  int32_t device() const { return q.get_device_index(); }
};

void Arguments::check(kda::KdaParams& params, std::optional<int64_t> rows, std::optional<int64_t> count) const {
  // Shapes
  require(q.dim() == 4, "`q` must have shape [B, T, H, K]");
  require(v.dim() == 4, "`v` must have shape [B, T, HV, V]");
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), K = q.size(3), HV = v.size(2), V = v.size(3);
  require(has_shape(k, {B, T, H, K}), "`k` must have the shape of `q`");
  require(has_shape(v, {B, T, HV, V}), "`v` must have shape [B, T, HV, V]");
  require(H > 0 && HV % H == 0, "`v` must have a multiple of the heads of `q`");
  require(g_is_low_rank || has_shape(g, {B, T, HV, K}), "`g` must have shape [B, T, HV, K]");
  require(!g_is_low_rank || has_shape(g, {B, T, 1, K}), "`g` must have shape [B, T, 1, K] with `g_weight`");
  require(has_shape(beta, {B, T, HV}), "`beta` must have shape [B, T, HV]");
  require(has_shape(out, {B, T, HV, V}), "`out` must have the shape of `v`");
  require(!A_log || has_shape(*A_log, {HV}), "`A_log` must have shape [HV]");
  require(!dt_bias || has_shape(*dt_bias, {HV, K}) || has_shape(*dt_bias, {HV * K}),
          "`dt_bias` must have shape [HV, K] or [HV * K]");
  int64_t N = B;
  if (cu_seqlens) {
    require(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && B == 1,
            "`cu_seqlens` must have shape [N + 1] with N >= 1, and B must be 1");
    N = cu_seqlens->size(0) - 1;
  }
  const int64_t matrix_rows = state_v_first ? V : K, columns = state_v_first ? K : V;
  for (const MaybeTensor* state : {&initial_state, &final_state}) {
    require(!*state || has_shape(**state, {rows.value_or(N), HV, matrix_rows, columns}),
            "`initial_state` and `final_state` must have shape [N, HV, V, K], or [N, HV, K, V]");
  }
  if (states) {
    const int64_t dense = (T + 63) / 64, most = (T + 63 * N) / 64;
    require(has_shape(*states, {B, count.value_or(cu_seqlens ? std::min(T, most) : dense), HV, matrix_rows, columns}),
            "`states` must have shape [B, NT, HV, V, K], or [B, NT, HV, K, V]");
  }
  require(!lower_bound || (*lower_bound >= -5 && *lower_bound <= 0), "`lower_bound` must be in [-5, 0]");
  require(use_beta_sigmoid || !allow_neg_eigval, "`allow_neg_eigval` needs a sigmoid of beta");

  // Dtypes
  const ScalarType dtype = q.scalar_type();
  for (const Tensor* x : {&k, &v, &out}) {
    require(x->scalar_type() == dtype, "`q`, `k`, `v` and `out` must have one dtype");
  }
  for (const Tensor* x : {&g, &beta}) {
    require(x->scalar_type() == dtype || x->scalar_type() == ScalarType::Float,
            "`g` and `beta` must have the dtype of `q`, or float32");
  }
  for (const MaybeTensor* x : {&A_log, &dt_bias}) {
    require(!*x || is_floating((*x)->scalar_type()), "`A_log` and `dt_bias` must have a floating dtype");
  }
  std::optional<ScalarType> state_dtype;
  for (const MaybeTensor* state : {&initial_state, &final_state, &states}) {
    if (!*state) continue;
    require(!state_dtype || state_dtype == (*state)->scalar_type(), "`final_state` must have `initial_state`'s dtype");
    state_dtype = (*state)->scalar_type();
  }
  if (cu_seqlens) {
    require(cu_seqlens->scalar_type() == ScalarType::Int || cu_seqlens->scalar_type() == ScalarType::Long,
            "`cu_seqlens` must be int32 or int64");
  }

  // Devices
  for (const Tensor* x : {&q, &k, &v, &g, &beta, &out}) {
    require(x->is_cuda() && x->get_device_index() == device(), "the tensors must be on one CUDA device");
  }
  for (const MaybeTensor* x : {&A_log, &dt_bias, &initial_state, &final_state, &states, &cu_seqlens}) {
    require(!*x || ((*x)->is_cuda() && (*x)->get_device_index() == device()), "the tensors must be on one CUDA device");
  }
  const DeviceInfo info = device_info(device());
  require(info.capability == 90, "the device is not of compute capability 9.0");

  params.B = as_int(B, "q"), params.T = as_int(T, "q"), params.H = as_int(H, "q"), params.K = as_int(K, "q");
  params.HV = as_int(HV, "v"), params.V = as_int(V, "v"), params.N = as_int(N, "cu_seqlens");
  params.dtype = dtype_of(dtype, "q");
  params.g_dtype = dtype_of(g.scalar_type(), "g");
  params.beta_dtype = dtype_of(beta.scalar_type(), "beta");
  params.state_dtype = dtype_of(state_dtype.value_or(ScalarType::Float), "initial_state");
  params.gate = !use_gate ? kda::Gate::kNone : lower_bound ? kda::Gate::kSafe : kda::Gate::kSoftplus;
  params.scale = static_cast<float>(scale);
  params.lower_bound = static_cast<float>(lower_bound.value_or(0));
  params.use_qk_norm = use_qk_norm;
  params.use_beta_sigmoid = use_beta_sigmoid;
  params.allow_neg_eigval = allow_neg_eigval;
  params.state_v_first = state_v_first;
  params.num_sms = info.sms;
}

void Arguments::point_parameters(kda::PrefillParams& params) {
  params.A_log = static_cast<const float*>(contiguous_data(A_log, ScalarType::Float));
  params.dt_bias = static_cast<const float*>(contiguous_data(dt_bias, ScalarType::Float));
}

void Arguments::point_parameters(kda::RecurrentParams& params) {
  ScalarType dtype = A_log ? A_log->scalar_type() : dt_bias ? dt_bias->scalar_type() : ScalarType::Float;
  if (dtype == ScalarType::Double || (dt_bias && dt_bias->scalar_type() != dtype)) dtype = ScalarType::Float;
  params.parameter_dtype = dtype_of(dtype, "A_log");
  params.A_log = contiguous_data(A_log, dtype), params.dt_bias = contiguous_data(dt_bias, dtype);
}

void Arguments::point(kda::KdaParams& params) {
  q = with_aligned_rows(q), k = with_aligned_rows(k), v = with_aligned_rows(v), g = with_aligned_rows(g);
  set_strides(q, params.q_strides), set_strides(k, params.k_strides), set_strides(v, params.v_strides);
  set_strides(g, params.g_strides), set_strides(beta, params.beta_strides);
  params.q = q.const_data_ptr(), params.k = k.const_data_ptr(), params.v = v.const_data_ptr();
  params.g = g.const_data_ptr(), params.beta = beta.const_data_ptr();
  if (initial_state && !is_plain(*initial_state)) initial_state = fresh_copy(*initial_state);
  params.initial_state = initial_state ? initial_state->const_data_ptr() : nullptr;
  if (cu_seqlens && !cu_seqlens->is_contiguous()) cu_seqlens = fresh_copy(*cu_seqlens);
  params.cu_seqlens = cu_seqlens ? cu_seqlens->const_data_ptr() : nullptr;
  params.cu_seqlens_is_int64 = cu_seqlens && cu_seqlens->scalar_type() == ScalarType::Long;
}

bool Arguments::are_empty(const kda::KdaParams& params) {
  if (static_cast<int64_t>(params.B) * params.T * params.HV * params.N != 0) return false;
  if (final_state && initial_state) {
    if (final_state->get() != initial_state->get()) torch::stable::copy_(*final_state, *initial_state);
  } else if (final_state) {
    torch::stable::zero_(*final_state);
  }
  return true;
}

// The tensor's device for the calls of this library's CUDA runtime, which is not torch's, and the stream on it.
class Place {
 public:
  explicit Place(int32_t device) {
    int32_t current = device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&current));
    if (current != device) guard_.emplace(device);
    check_cuda(cudaSetDevice(device), "device");
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &handle));
    stream_ = static_cast<cudaStream_t>(handle);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

void prefill(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, double scale, Tensor out, MaybeTensor A_log,
             MaybeTensor dt_bias, std::optional<double> lower_bound, MaybeTensor initial_state, MaybeTensor final_state,
             MaybeTensor states, MaybeTensor cu_seqlens, bool use_gate, bool use_qk_norm, bool use_beta_sigmoid,
             bool allow_neg_eigval, bool state_v_first) {
  Arguments arguments{q,
                      k,
                      v,
                      g,
                      beta,
                      scale,
                      out,
                      A_log,
                      dt_bias,
                      lower_bound,
                      initial_state,
                      final_state,
                      states,
                      cu_seqlens,
                      use_gate,
                      use_qk_norm,
                      use_beta_sigmoid,
                      allow_neg_eigval,
                      state_v_first};
  kda::PrefillParams params{};
  arguments.check(params, std::nullopt, std::nullopt);
  if (const char* reason = kda::prefill_refusal(params)) refuse(reason);

  // From here on the call is served.
  const Place place(arguments.device());
  if (arguments.are_empty(params)) return;
  arguments.point(params);
  arguments.point_parameters(params);
  Output output(out, has_aligned_rows), final_output(final_state, is_plain), states_output(states, is_plain);
  set_strides(output.tensor(), params.out_strides);
  params.out = output.data(), params.final_state = final_output.data(), params.states = states_output.data();

  MaybeTensor workspace;  // torch's allocator takes it back for later work of this stream
  if (const size_t bytes = kda::prefill_workspace_bytes(params)) {
    const auto size = static_cast<int64_t>(bytes), stride = int64_t{1};
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(),
                                                    aoti_torch_device_type_cuda(), arguments.device(), &handle));
    workspace.emplace(handle);
    params.workspace = workspace->mutable_data_ptr();
  }
  check_cuda(kda::prefill(params, place.stream()), "prefill");
  output.copy_back();
  final_output.copy_back();
  states_output.copy_back();
}

void check_indices(const MaybeTensor& state_indices, int64_t N, int32_t device) {
  if (!state_indices) return;
  require(has_shape(*state_indices, {N}), "`state_indices` must have shape [N]");
  require(state_indices->scalar_type() == ScalarType::Int || state_indices->scalar_type() == ScalarType::Long,
          "`state_indices` must be int32 or int64");
  require(state_indices->is_cuda() && state_indices->get_device_index() == device,
          "the tensors must be on one CUDA device");
}

void recurrent(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, double scale, Tensor out, MaybeTensor A_log,
               MaybeTensor dt_bias, std::optional<double> lower_bound, MaybeTensor initial_state,
               MaybeTensor final_state, MaybeTensor states, MaybeTensor cu_seqlens, MaybeTensor state_indices,
               bool use_gate, bool use_qk_norm, bool use_beta_sigmoid, bool allow_neg_eigval, bool state_v_first) {
  std::optional<int64_t> rows;
  if (state_indices) {
    // One argument for the pool: an operator that is traced may not have what it writes under another name, too.
    require(final_state && !initial_state, "with `state_indices`, `final_state` is the pool, without `initial_state`");
    require(final_state->dim() == 4, "`initial_state` must have shape [P, HV, V, K], or [P, HV, K, V]");
    rows = final_state->size(0);
    initial_state = final_state;
  }
  Arguments arguments{q,
                      k,
                      v,
                      g,
                      beta,
                      scale,
                      out,
                      A_log,
                      dt_bias,
                      lower_bound,
                      initial_state,
                      final_state,
                      states,
                      cu_seqlens,
                      use_gate,
                      use_qk_norm,
                      use_beta_sigmoid,
                      allow_neg_eigval,
                      state_v_first};
  kda::RecurrentParams params{};
  arguments.check(params, rows, q.dim() == 4 ? q.size(1) : 0);
  params.rows = rows ? as_int(*rows, "initial_state") : params.N;
  if (const char* reason = kda::recurrent_refusal(params)) refuse(reason);
  check_indices(state_indices, params.N, arguments.device());
  if (state_indices) require(is_plain(*final_state), "`initial_state` must be contiguous with `state_indices`");

  const Place place(arguments.device());
  if (!state_indices && arguments.are_empty(params)) return;
  if (static_cast<int64_t>(params.B) * params.T * params.HV * params.N == 0) return;  // no state of a pool changes
  arguments.point(params);
  arguments.point_parameters(params);
  Output output(out, has_aligned_rows), final_output(final_state, is_plain), states_output(states, is_plain);
  set_strides(output.tensor(), params.out_strides);
  params.out = output.data(), params.final_state = final_output.data(), params.states = states_output.data();
  if (state_indices && !state_indices->is_contiguous()) state_indices = fresh_copy(*state_indices);
  params.state_indices = state_indices ? state_indices->const_data_ptr() : nullptr;
  params.state_indices_is_int64 = state_indices && state_indices->scalar_type() == ScalarType::Long;
  check_cuda(kda::recurrent(params, place.stream()), "recurrent");
  output.copy_back();
  final_output.copy_back();
  states_output.copy_back();
}

void decode_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor output_gate, double scale, Tensor out,
                 MaybeTensor A_log, MaybeTensor dt_bias, std::optional<double> lower_bound, Tensor recurrent_state,
                 Tensor conv_state, Tensor q_conv_weight, Tensor k_conv_weight, Tensor v_conv_weight,
                 Tensor norm_weight, double norm_eps, MaybeTensor state_indices, bool allow_neg_eigval,
                 bool state_v_first, MaybeTensor g_weight, MaybeTensor output_gate_weight) {
  const bool is_low_rank = g_weight.has_value();
  require(is_low_rank == output_gate_weight.has_value(), "`g_weight` and `output_gate_weight` go together");
  require(recurrent_state.dim() == 4, "`recurrent_state` must have shape [P, HV, V, K], or [P, HV, K, V]");
  Arguments arguments{q,
                      k,
                      v,
                      g,
                      beta,
                      scale,
                      out,
                      A_log,
                      dt_bias,
                      lower_bound,
                      recurrent_state,
                      recurrent_state,
                      std::nullopt,
                      std::nullopt,
                      true,
                      true,
                      true,
                      allow_neg_eigval,
                      state_v_first,
                      is_low_rank};
  kda::LowRankStepParams params{};
  const int64_t rows = recurrent_state.size(0);
  arguments.check(params, rows, std::nullopt);
  require(params.T == 1, "`q` must have one token a sequence");
  require(state_indices || rows == params.N, "`recurrent_state` must have a row for each sequence");
  params.rows = as_int(rows, "recurrent_state");

  const int64_t key_channels = int64_t{params.H} * params.K, value_channels = int64_t{params.HV} * params.V;
  require(q_conv_weight.dim() == 2, "`q_conv_weight` must have shape [H * K, W]");
  const int64_t width = q_conv_weight.size(1);
  params.conv_width = as_int(width, "q_conv_weight");
  if (const char* reason = is_low_rank ? kda::low_rank_step_refusal(params) : kda::decode_step_refusal(params))
    refuse(reason);
  require(is_low_rank || has_shape(output_gate, {params.B, 1, params.HV, params.V}),
          "`output_gate` must have the shape of `v`");
  require(has_shape(q_conv_weight, {key_channels, width}), "`q_conv_weight` must have shape [H * K, W]");
  require(has_shape(k_conv_weight, {key_channels, width}), "`k_conv_weight` must have shape [H * K, W]");
  require(has_shape(v_conv_weight, {value_channels, width}), "`v_conv_weight` must have shape [HV * V, W]");
  require(has_shape(norm_weight, {params.V}), "`norm_weight` must have shape [V]");
  require(has_shape(conv_state, {rows, 2 * key_channels + value_channels, width}),
          "`conv_state` must have shape [P, 2 H K + HV V, W]");
  check_indices(state_indices, params.N, arguments.device());

  const ScalarType dtype = q.scalar_type(), weight_dtype = norm_weight.scalar_type();
  require(output_gate.scalar_type() == dtype, "`output_gate` must have the dtype of `q`");
  for (const Tensor* x : {&q_conv_weight, &k_conv_weight, &v_conv_weight}) {
    require(x->scalar_type() == weight_dtype, "the weights must have one dtype");
  }
  for (const Tensor* x : {&norm_weight, &conv_state}) {
    require(x->scalar_type() == dtype || x->scalar_type() == ScalarType::Float,
            "the weights and `conv_state` must have the dtype of `q`, or float32");
  }
  for (const Tensor* x : {&output_gate, &q_conv_weight, &k_conv_weight, &v_conv_weight, &norm_weight, &conv_state}) {
    require(x->is_cuda() && x->get_device_index() == arguments.device(), "the tensors must be on one CUDA device");
  }
  require(is_plain(recurrent_state), "`recurrent_state` must be contiguous");
  require(is_plain(conv_state), "`conv_state` must be contiguous");
  if (is_low_rank) {
    require(has_shape(output_gate, {params.B, 1, 1, params.K}),
            "`output_gate` must have shape [B, T, 1, K] with `output_gate_weight`");
    require(has_shape(*g_weight, {int64_t{params.HV} * params.K, params.K}), "`g_weight` must have shape [HV * K, K]");
    require(has_shape(*output_gate_weight, {value_channels, params.K}),
            "`output_gate_weight` must have shape [HV * V, K]");
    require(A_log && dt_bias && !state_indices, "`g_weight` needs `A_log` and `dt_bias`, and no `state_indices`");
    for (const Tensor* x :
         {&g, &beta, &*g_weight, &*output_gate_weight, &norm_weight, &conv_state, &*A_log, &*dt_bias}) {
      require(x->scalar_type() == dtype, "all but `recurrent_state` must have the dtype of `q` with `g_weight`");
    }
    for (const Tensor* x : {&*g_weight, &*output_gate_weight, &q_conv_weight, &k_conv_weight, &v_conv_weight,
                            &norm_weight, &*A_log, &*dt_bias}) {  // of which there is no time for copies
      require(x->is_cuda() && x->get_device_index() == arguments.device(), "the tensors must be on one CUDA device");
      require(is_plain(*x), "the weights must be contiguous with `g_weight`");
    }
    for (const Tensor* x : {&q, &k, &v}) {
      require(has_aligned_rows(*x) && (params.H == 1 || x->stride(2) == params.K),
              "`q`, `k` and `v` must have heads side by side with `g_weight`");
    }
    require(params.H == 1 || beta.stride(2) == 1, "`beta` must have contiguous rows with `g_weight`");
  }

  const Place place(arguments.device());
  if (params.B == 0) return;
  arguments.point(params);
  arguments.point_parameters(params);
  params.final_state = recurrent_state.mutable_data_ptr();
  const auto plain_data = [](Tensor& x) { return (is_plain(x) ? x : x = fresh_copy(x)).const_data_ptr(); };
  params.q_conv_weight = plain_data(q_conv_weight), params.k_conv_weight = plain_data(k_conv_weight);
  params.v_conv_weight = plain_data(v_conv_weight), params.norm_weight = plain_data(norm_weight);
  output_gate = with_aligned_rows(output_gate);
  set_strides(output_gate, params.output_gate_strides);
  params.output_gate = output_gate.const_data_ptr();
  params.norm_eps = static_cast<float>(norm_eps);
  params.conv_state = conv_state.mutable_data_ptr();
  params.weight_dtype = dtype_of(weight_dtype, "norm_weight");
  params.conv_state_dtype = dtype_of(conv_state.scalar_type(), "conv_state");
  if (state_indices) params.state_indices = plain_data(*state_indices);
  params.state_indices_is_int64 = state_indices && state_indices->scalar_type() == ScalarType::Long;
  Output output(out, is_low_rank ? is_plain : has_aligned_rows);
  set_strides(output.tensor(), params.out_strides);
  params.out = output.data();
  if (is_low_rank) {
    params.g_weight = g_weight->const_data_ptr(), params.output_gate_weight = output_gate_weight->const_data_ptr();
    check_cuda(kda::low_rank_step(params, place.stream()), "low_rank_step");
  } else {
    check_cuda(kda::decode_step(params, place.stream()), "decode_step");
  }
  output.copy_back();
}

void causal_conv1d(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor initial_state, MaybeTensor cu_seqlens,
                   Tensor y, MaybeTensor final_state, bool silu) {
  require(x.dim() == 3, "`x` must have shape [B, T, D]");
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  require(weight.dim() == 2 && weight.size(0) == D, "`weight` must have shape [D, W]");
  const int64_t W = weight.size(1);
  require(!bias || has_shape(*bias, {D}), "`bias` must have shape [D]");
  require(has_shape(y, {B, T, D}), "`y` must have the shape of `x`");
  int64_t N = B;
  if (cu_seqlens) {
    require(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && B == 1,
            "`cu_seqlens` must have shape [N + 1] with N >= 1, and B must be 1");
    N = cu_seqlens->size(0) - 1;
    require(cu_seqlens->scalar_type() == ScalarType::Int || cu_seqlens->scalar_type() == ScalarType::Long,
            "`cu_seqlens` must be int32 or int64");
  }
  for (const MaybeTensor* state : {&initial_state, &final_state})
    require(!*state || has_shape(**state, {N, D, W}), "`initial_state` and `final_state` must have shape [N, D, W]");
  require(!initial_state || !final_state || initial_state->scalar_type() == final_state->scalar_type(),
          "`final_state` must have `initial_state`'s dtype");
  require(y.scalar_type() == x.scalar_type(), "`y` must have the dtype of `x`");
  for (const Tensor* parameter : {&weight, bias ? &*bias : &weight})
    require(parameter->scalar_type() == x.scalar_type() || parameter->scalar_type() == ScalarType::Float,
            "`weight` and `bias` must have the dtype of `x`, or float32");
  const int32_t device = x.get_device_index();
  for (const Tensor* tensor : {&x, &weight, &y})
    require(tensor->is_cuda() && tensor->get_device_index() == device, "the tensors must be on one CUDA device");
  for (const MaybeTensor* tensor : {&bias, &initial_state, &final_state, &cu_seqlens})
    require(!*tensor || ((*tensor)->is_cuda() && (*tensor)->get_device_index() == device),
            "the tensors must be on one CUDA device");
  const DeviceInfo info = device_info(device);
  require(info.capability == 90, "the device is not of compute capability 9.0");

  kda::ConvParams params{};
  params.B = as_int(B, "x"), params.T = as_int(T, "x"), params.D = as_int(D, "x");
  params.W = as_int(W, "weight"), params.N = as_int(N, "cu_seqlens");
  params.dtype = dtype_of(x.scalar_type(), "x");
  params.weight_dtype = dtype_of(weight.scalar_type(), "weight");
  params.bias_dtype = bias ? dtype_of(bias->scalar_type(), "bias") : params.weight_dtype;
  const MaybeTensor& state = initial_state ? initial_state : final_state;
  params.state_dtype = state ? dtype_of(state->scalar_type(), "initial_state") : params.dtype;
  params.silu = silu;
  params.num_sms = info.sms;
  if (const char* reason = kda::conv_refusal(params)) refuse(reason);

  const Place place(device);
  if (B * T * D * N == 0) {
    if (final_state && initial_state) torch::stable::copy_(*final_state, *initial_state);
    if (final_state && !initial_state) torch::stable::zero_(*final_state);
    return;
  }
  // Rows of [B, T, D] as those of [B, T, 1, D].
  const auto has_rows = [](const Tensor& rows) {
    const auto sizes = rows.sizes(), strides = rows.strides();
    const auto element = static_cast<int64_t>(rows.element_size());
    if (!is_aligned(rows) || strides[2] != 1) return false;
    for (int dim = 0; dim < 2; ++dim) {
      const int64_t bytes = strides[dim] * element;
      if (sizes[dim] > 1 && (bytes <= 0 || bytes % static_cast<int64_t>(kAlignment) != 0)) return false;
    }
    return true;
  };
  const auto set_row_strides = [](const Tensor& rows, int64_t (&strides)[2]) {
    const auto sizes = rows.sizes(), own = rows.strides();
    strides[1] = sizes[1] == 1 ? sizes[2] : own[1];
    strides[0] = sizes[0] == 1 ? sizes[1] * sizes[2] : own[0];
  };
  if (!has_rows(x)) x = fresh_copy(x);
  set_row_strides(x, params.x_strides);
  params.x = x.const_data_ptr();
  if (!is_plain(weight)) weight = fresh_copy(weight);
  params.weight = weight.const_data_ptr();
  if (bias && !is_plain(*bias)) bias = fresh_copy(*bias);
  params.bias = bias ? bias->const_data_ptr() : nullptr;
  if (initial_state && !is_plain(*initial_state)) initial_state = fresh_copy(*initial_state);
  params.initial_state = initial_state ? initial_state->const_data_ptr() : nullptr;
  if (cu_seqlens && !cu_seqlens->is_contiguous()) cu_seqlens = fresh_copy(*cu_seqlens);
  params.cu_seqlens = cu_seqlens ? cu_seqlens->const_data_ptr() : nullptr;
  params.cu_seqlens_is_int64 = cu_seqlens && cu_seqlens->scalar_type() == ScalarType::Long;
  Output output(y, has_rows), final_output(final_state, is_plain);
  set_row_strides(output.tensor(), params.y_strides);
  params.y = output.data(), params.final_state = final_output.data();
  check_cuda(kda::causal_conv1d(params, place.stream()), "causal_conv1d");
  output.copy_back();
  final_output.copy_back();
}

// Matrices or rows on one device that has the kernels, which this returns.
int32_t check_matrices(std::initializer_list<const Tensor*> matrices) {
  const Tensor& first = **matrices.begin();
  const int32_t device = first.get_device_index();
  for (const Tensor* matrix : matrices) {
    require(matrix->is_cuda() && matrix->get_device_index() == device, "the tensors must be on one CUDA device");
    require(matrix->scalar_type() == first.scalar_type(), "the tensors must have one dtype");
    require(matrix->strides().back() == 1, "the tensors must have contiguous rows");
  }
  require(device_info(device).capability == 90, "the device is not of compute capability 9.0");
  return device;
}

bool has_aligned_vectors(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  return is_aligned(x) && (sizes.size() < 2 || sizes[0] == 1 || strides[0] % 8 == 0);
}

int64_t row_stride(const Tensor& x) { return x.size(0) == 1 ? x.size(1) : x.stride(0); }

void linear(Tensor x, Tensor weight, Tensor out, MaybeTensor norm_weight, double norm_eps, MaybeTensor squares,
            MaybeTensor residual, MaybeTensor next_norm_weight, MaybeTensor next_x, MaybeTensor next_squares,
            int64_t groups, bool swiglu) {
  require(x.dim() == 2 && weight.dim() == 2 && out.dim() == 2, "`x`, `weight` and `out` must have two dimensions");
  const int64_t M = x.size(0), K = weight.size(1), N = weight.size(0) / (swiglu ? 2 : 1);
  require(K > 0 && N > 0 && groups > 0 && x.size(1) == groups * K && N % groups == 0,
          "`x` must have shape [M, groups * K], and `weight` [N, K]");
  require(!swiglu || weight.size(0) % 2 == 0, "`weight` must have an even number of rows with `swiglu`");
  require(has_shape(out, {M, N}), "`out` must have shape [M, N]");
  require(!residual || has_shape(*residual, {M, N}), "`residual` must have shape [M, N]");
  require(!norm_weight || has_shape(*norm_weight, {K}), "`norm_weight` must have shape [K]");
  require(weight.is_contiguous(), "`weight` must be contiguous");
  const bool has_next = next_norm_weight.has_value();
  require(has_next == next_x.has_value() && has_next == next_squares.has_value(),
          "`next_norm_weight`, `next_x` and `next_squares` go together");
  require(!has_next || (has_shape(*next_norm_weight, {N}) && has_shape(*next_x, {M, N}) && next_x->is_contiguous()),
          "`next_norm_weight` must have shape [N], and `next_x` [M, N], contiguous");
  for (const MaybeTensor* parts : {&squares, &next_squares})
    require(!*parts || ((*parts)->dim() == 2 && (*parts)->size(0) == M && (*parts)->is_contiguous() &&
                        is_aligned(**parts) && (*parts)->scalar_type() == ScalarType::Float &&
                        (*parts)->get_device_index() == x.get_device_index() && (*parts)->is_cuda()),
            "sums of squares must be float32 of shape [M, parts], contiguous, on the device of `x`");
  const auto or_x = [&](const MaybeTensor& tensor) { return tensor ? &*tensor : &x; };
  const int32_t device =
      check_matrices({&x, &weight, &out, or_x(residual), or_x(norm_weight), or_x(next_norm_weight), or_x(next_x)});

  require(has_aligned_vectors(x), "`x` must have rows of aligned vectors");
  require(!has_next || (is_aligned(*next_norm_weight) && has_aligned_vectors(*next_x)), "`next_x` must be aligned");
  require(is_aligned(weight) && (!norm_weight || is_aligned(*norm_weight)), "the weights must be aligned");

  kda::LinearParams params{};
  params.M = as_int(M, "x"), params.N = as_int(N, "weight"), params.K = as_int(K, "weight");
  params.groups = as_int(groups, "groups"), params.swiglu = swiglu;
  params.dtype = dtype_of(x.scalar_type(), "x");
  params.x_stride = row_stride(x), params.out_stride = row_stride(out);
  params.residual_stride = residual ? row_stride(*residual) : 0;
  params.norm_eps = static_cast<float>(norm_eps);
  params.x = x.const_data_ptr(), params.weight = weight.const_data_ptr(), params.out = out.mutable_data_ptr();
  params.norm_weight = norm_weight ? norm_weight->const_data_ptr() : nullptr;
  params.residual = residual ? residual->const_data_ptr() : nullptr;
  if (squares)
    params.squares = static_cast<const float*>(squares->const_data_ptr()),
    params.squares_count = as_int(squares->size(1), "squares");
  if (has_next) {
    params.next_norm_weight = next_norm_weight->const_data_ptr(), params.next_x = next_x->mutable_data_ptr();
    params.next_squares = static_cast<float*>(next_squares->mutable_data_ptr());
    params.next_squares_count = as_int(next_squares->size(1), "next_squares");
  }
  params.num_sms = device_info(device).sms;
  if (const char* reason = kda::linear_refusal(params)) refuse(reason);
  if (M > 8 || groups > 1 || squares || has_next)
    require(has_aligned_vectors(out) && (!residual || has_aligned_vectors(*residual)),
            "`out` and `residual` must have rows of aligned vectors");
  if (M == 0) return;
  const Place place(device);
  check_cuda(kda::linear(params, place.stream()), "linear");
}

// Needs no device.
int64_t linear_parts(int64_t M, int64_t N, int64_t K) {
  return kda::linear_parts(as_int(M, "x"), as_int(N, "weight"), as_int(K, "weight"));
}

void rows(const Tensor& x, const Tensor* weight, const Tensor* gate, double norm_eps, Tensor& out) {
  require(x.dim() == 2 && out.dim() == 2, "`x` and `out` must have two dimensions");
  const int64_t M = x.size(0), N = out.size(1);
  require(has_shape(x, {M, weight == nullptr ? 2 * N : N}) && out.size(0) == M, "`x` must have the rows of `out`");
  require(weight == nullptr || has_shape(*weight, {N}), "`weight` must have shape [N]");
  require(gate == nullptr || has_shape(*gate, {M, N}), "`gate` must have shape [M, N]");
  const auto or_x = [&](const Tensor* tensor) { return tensor == nullptr ? &x : tensor; };
  const int32_t device = check_matrices({&x, &out, or_x(weight), or_x(gate)});
  for (const Tensor* tensor : {&x, static_cast<const Tensor*>(&out), or_x(weight), or_x(gate)})
    require(has_aligned_vectors(*tensor), "the tensors must have rows of aligned vectors");

  kda::RowsParams params{};
  params.M = as_int(M, "x"), params.N = as_int(N, "x");
  params.dtype = dtype_of(x.scalar_type(), "x");
  params.x = x.const_data_ptr(), params.out = out.mutable_data_ptr();
  params.weight = weight == nullptr ? nullptr : weight->const_data_ptr();
  if (gate != nullptr) params.gate = gate->const_data_ptr(), params.gate_stride = row_stride(*gate);
  params.x_stride = row_stride(x), params.out_stride = row_stride(out);
  params.norm_eps = static_cast<float>(norm_eps);
  if (const char* reason = kda::rows_refusal(params)) refuse(reason);
  if (M * N == 0) return;
  const Place place(device);
  check_cuda(kda::rows(params, place.stream()), "rows");
}

void rms_norm(Tensor x, Tensor weight, double eps, Tensor out) { rows(x, &weight, nullptr, eps, out); }

void gated_rms_norm(Tensor x, Tensor weight, Tensor gate, double eps, Tensor out) { rows(x, &weight, &gate, eps, out); }

void swiglu(Tensor x, Tensor out) { rows(x, nullptr, nullptr, 0, out); }

void attention_step(Tensor q, Tensor k, Tensor v, Tensor key_cache, Tensor value_cache, Tensor length,
                    MaybeTensor starts, MaybeTensor q_norm_weight, MaybeTensor k_norm_weight, double norm_eps,
                    MaybeTensor cos, MaybeTensor sin, double scale, Tensor workspace, Tensor out) {
  require(q.dim() == 3 && k.dim() == 3 && key_cache.dim() == 4,
          "`q` must have shape [B, H, D], and `key_cache` [B, KVH, capacity, D]");
  const int64_t B = q.size(0), H = q.size(1), D = q.size(2), KVH = k.size(1), capacity = key_cache.size(2);
  require(has_shape(k, {B, KVH, D}) && has_shape(v, {B, KVH, D}), "`k` and `v` must have shape [B, KVH, D]");
  require(has_shape(key_cache, {B, KVH, capacity, D}) && has_shape(value_cache, {B, KVH, capacity, D}),
          "`key_cache` and `value_cache` must have shape [B, KVH, capacity, D]");
  require(has_shape(out, {B, H, D}), "`out` must have the shape of `q`");
  require(length.numel() == 1 && length.scalar_type() == ScalarType::Long, "`length` must be one int64");
  require(!starts || has_shape(*starts, {B}), "`starts` must have shape [B]");
  require(!starts || starts->scalar_type() == ScalarType::Int || starts->scalar_type() == ScalarType::Long,
          "`starts` must be int32 or int64");
  for (const MaybeTensor* weight : {&q_norm_weight, &k_norm_weight})
    require(!*weight || has_shape(**weight, {D}), "`q_norm_weight` and `k_norm_weight` must have shape [D]");
  require(cos.has_value() == sin.has_value(), "`cos` and `sin` must come together");
  for (const MaybeTensor* x : {&cos, &sin})
    require(!*x || has_shape(**x, {B, D}) || has_shape(**x, {1, D}),
            "`cos` and `sin` must have shape [B, D] or [1, D]");
  require(!cos || cos->size(0) == sin->size(0), "`cos` and `sin` must have one shape");

  const int32_t device = q.get_device_index();
  for (const Tensor* x : {&q, &k, &v, &key_cache, &value_cache, &out, q_norm_weight ? &*q_norm_weight : &q,
                          k_norm_weight ? &*k_norm_weight : &q, cos ? &*cos : &q, sin ? &*sin : &q}) {
    require(x->scalar_type() == q.scalar_type(), "the tensors must have one dtype");
    require(x->strides().back() == 1 && is_aligned(*x), "the tensors must have rows of aligned vectors");
  }
  for (const Tensor* x :
       {&q, &k, &v, &key_cache, &value_cache, &out, &length, &workspace, starts ? &*starts : &q,
        q_norm_weight ? &*q_norm_weight : &q, k_norm_weight ? &*k_norm_weight : &q, cos ? &*cos : &q, sin ? &*sin : &q})
    require(x->is_cuda() && x->get_device_index() == device, "the tensors must be on one CUDA device");
  const DeviceInfo info = device_info(device);
  require(info.capability == 90, "the device is not of compute capability 9.0");
  require(key_cache.is_contiguous() && value_cache.is_contiguous(), "the caches must be contiguous");
  require(!starts || starts->is_contiguous(), "`starts` must be contiguous");
  for (const Tensor* x : {&q, &k, &v, &out}) {
    require(x->size(1) == 1 || x->stride(1) == D, "`q`, `k`, `v` and `out` must have heads one after the other");
    require(B == 1 || (x->stride(0) > 0 && x->stride(0) % 8 == 0),
            "`q`, `k`, `v` and `out` must have rows of aligned vectors");
  }
  for (const MaybeTensor* x : {&cos, &sin})
    require(!*x || (*x)->size(0) == 1 || ((*x)->stride(0) == cos->stride(0) && (*x)->stride(0) % 8 == 0),
            "`cos` and `sin` must have rows of aligned vectors, of one stride");

  kda::AttentionStepParams params{};
  params.B = as_int(B, "q"), params.H = as_int(H, "q"), params.KVH = as_int(KVH, "k"), params.D = as_int(D, "q");
  params.capacity = as_int(capacity, "key_cache");
  params.dtype = dtype_of(q.scalar_type(), "q");
  if (const char* reason = kda::attention_step_refusal(params)) refuse(reason);
  const size_t bytes = kda::attention_step_workspace_bytes(params.B, params.H, params.KVH, params.D, params.capacity);
  require(is_plain(workspace) && static_cast<size_t>(workspace.numel()) * workspace.element_size() >= bytes,
          "`workspace` must be contiguous, and have attention_step_workspace_bytes(...) bytes");
  if (B == 0) return;

  const auto stride = [&](const Tensor& rows) { return B == 1 ? rows.size(1) * D : rows.stride(0); };
  params.q = q.const_data_ptr(), params.k = k.const_data_ptr(), params.v = v.const_data_ptr();
  params.q_stride = stride(q), params.k_stride = stride(k), params.v_stride = stride(v);
  params.key_cache = key_cache.mutable_data_ptr(), params.value_cache = value_cache.mutable_data_ptr();
  params.length = static_cast<const int64_t*>(length.const_data_ptr());
  params.starts = starts ? starts->const_data_ptr() : nullptr;
  params.starts_are_int64 = starts && starts->scalar_type() == ScalarType::Long;
  params.q_norm_weight = q_norm_weight ? q_norm_weight->const_data_ptr() : nullptr;
  params.k_norm_weight = k_norm_weight ? k_norm_weight->const_data_ptr() : nullptr;
  params.norm_eps = static_cast<float>(norm_eps);
  params.cos = cos ? cos->const_data_ptr() : nullptr, params.sin = sin ? sin->const_data_ptr() : nullptr;
  params.rotary_stride = cos && cos->size(0) > 1 ? cos->stride(0) : 0;
  params.scale = static_cast<float>(scale);
  params.workspace = workspace.mutable_data_ptr();
  params.out = out.mutable_data_ptr(), params.out_stride = stride(out);
  params.num_sms = info.sms;
  const Place place(device);
  check_cuda(kda::attention_step(params, place.stream()), "attention_step");
}

// Needs no device.
int64_t attention_step_workspace_bytes(int64_t B, int64_t H, int64_t KVH, int64_t D, int64_t capacity) {
  kda::AttentionStepParams params{};
  params.B = as_int(B, "q"), params.H = as_int(H, "q"), params.KVH = as_int(KVH, "k"), params.D = as_int(D, "q");
  params.capacity = as_int(capacity, "key_cache");
  if (const char* reason = kda::attention_step_refusal(params)) refuse(reason);
  return static_cast<int64_t>(
      kda::attention_step_workspace_bytes(params.B, params.H, params.KVH, params.D, params.capacity));
}

void choose_tokens(Tensor logits, MaybeTensor noise, double temperature, int64_t top_k, double top_p, double min_p,
                   MaybeTensor pad, MaybeTensor eos, Tensor unfinished, Tensor tokens) {
  require(logits.dim() == 2 && logits.size(1) > 0, "`logits` must have shape [B, V]");
  const int64_t B = logits.size(0), V = logits.size(1);
  require(logits.stride(1) == 1, "`logits` must have contiguous rows");
  require(!noise || (has_shape(*noise, {B, V}) && noise->is_contiguous() && noise->scalar_type() == ScalarType::Float),
          "`noise` must be float32 of shape [B, V], contiguous");
  require(temperature > 0 && top_k > 0 && top_p >= 0 && min_p >= 0 && min_p <= 1,
          "`temperature` and `top_k` must be above 0, `top_p` at least 0, and `min_p` between 0 and 1");
  require(!pad || (pad->numel() == 1 && pad->scalar_type() == ScalarType::Long), "`pad` must be one int64");
  require(!eos || (eos->dim() == 1 && eos->is_contiguous() && eos->scalar_type() == ScalarType::Long),
          "`eos` must be int64 of shape [E], contiguous");
  require(has_shape(unfinished, {B}) && unfinished.is_contiguous() && unfinished.scalar_type() == ScalarType::Bool,
          "`unfinished` must be bool of shape [B], contiguous");
  require(has_shape(tokens, {B}) && tokens.is_contiguous() && tokens.scalar_type() == ScalarType::Long,
          "`tokens` must be int64 of shape [B], contiguous");
  const int32_t device = logits.get_device_index();
  for (const Tensor* x :
       {&logits, &unfinished, &tokens, noise ? &*noise : &logits, pad ? &*pad : &logits, eos ? &*eos : &logits})
    require(x->is_cuda() && x->get_device_index() == device, "the tensors must be on one CUDA device");
  require(device_info(device).capability == 90, "the device is not of compute capability 9.0");

  kda::ChooseParams params{};
  params.B = as_int(B, "logits"), params.V = as_int(V, "logits");
  params.dtype = dtype_of(logits.scalar_type(), "logits");
  params.logits = logits.const_data_ptr(), params.logits_stride = row_stride(logits);
  params.noise = noise ? static_cast<const float*>(noise->const_data_ptr()) : nullptr;
  params.inverse_temperature = 1 / static_cast<float>(temperature);  // as torch divides by a number
  params.top_k = static_cast<int>(std::min(top_k, V)), params.top_p = top_p;
  params.min_p = static_cast<float>(min_p);
  params.pad = pad ? static_cast<const int64_t*>(pad->const_data_ptr()) : nullptr;
  if (eos)
    params.eos = static_cast<const int64_t*>(eos->const_data_ptr()), params.eos_count = as_int(eos->numel(), "eos");
  params.unfinished = static_cast<bool*>(unfinished.mutable_data_ptr());
  params.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  if (const char* reason = kda::choose_refusal(params)) refuse(reason);
  if (B == 0) return;
  const Place place(device);
  check_cuda(kda::choose_tokens(params, place.stream()), "choose_tokens");
}

// Why no call with these widths and dtypes could be served, or an empty string. Needs no device.
template <class Params>
std::string refusal(const char* (&of)(const Params&), int64_t K, int64_t V, ScalarType dtype, ScalarType state_dtype) {
  try {
    Params params{};
    params.B = params.T = params.H = params.HV = params.N = 1;
    params.K = as_int(K, "q"), params.V = as_int(V, "v");
    params.dtype = params.g_dtype = params.beta_dtype = dtype_of(dtype, "q");
    params.state_dtype = dtype_of(state_dtype, "initial_state");
    params.gate = kda::Gate::kSafe;
    params.lower_bound = -5;
    params.scale = 1;
    params.use_qk_norm = params.use_beta_sigmoid = params.state_v_first = true;
    const char* reason = of(params);
    return reason ? reason : "";
  } catch (const std::runtime_error& error) {
    return std::string(error.what()).substr(std::char_traits<char>::length(kRefused));
  }
}

std::string prefill_refusal(int64_t K, int64_t V, ScalarType dtype, ScalarType state_dtype) {
  return refusal(kda::prefill_refusal, K, V, dtype, state_dtype);
}

std::string recurrent_refusal(int64_t K, int64_t V, ScalarType dtype, ScalarType state_dtype) {
  return refusal(kda::recurrent_refusal, K, V, dtype, state_dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY(kda_hf_cuda, m) {
  m.def(
      "prefill(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, Tensor? A_log, "
      "Tensor? dt_bias, float? lower_bound, Tensor? initial_state, Tensor(b!)? final_state, Tensor(c!)? states, "
      "Tensor? cu_seqlens, bool use_gate, bool use_qk_norm, bool use_beta_sigmoid, bool allow_neg_eigval, "
      "bool state_v_first) -> ()");
  m.def(
      "recurrent(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, Tensor? A_log, "
      "Tensor? dt_bias, float? lower_bound, Tensor? initial_state, Tensor(b!)? final_state, Tensor(c!)? states, "
      "Tensor? cu_seqlens, Tensor? state_indices, bool use_gate, bool use_qk_norm, bool use_beta_sigmoid, "
      "bool allow_neg_eigval, bool state_v_first) -> ()");
  m.def(
      "decode_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor output_gate, float scale, "
      "Tensor(a!) out, Tensor? A_log, Tensor? dt_bias, float? lower_bound, Tensor(b!) recurrent_state, "
      "Tensor(c!) conv_state, Tensor q_conv_weight, Tensor k_conv_weight, Tensor v_conv_weight, Tensor norm_weight, "
      "float norm_eps, Tensor? state_indices, bool allow_neg_eigval, bool state_v_first, Tensor? g_weight=None, "
      "Tensor? output_gate_weight=None) -> ()");
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor(a!) y, "
      "Tensor(b!)? final_state, bool silu) -> ()");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor(a!) out, Tensor? norm_weight, float norm_eps, Tensor? squares, "
      "Tensor? residual, Tensor? next_norm_weight, Tensor(b!)? next_x, Tensor(c!)? next_squares, int groups, bool "
      "swiglu) -> ()");
  m.def("linear_parts(int M, int N, int K) -> int");
  m.def(
      "attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor length, "
      "Tensor? starts, Tensor? q_norm_weight, Tensor? k_norm_weight, float norm_eps, Tensor? cos, Tensor? sin, "
      "float scale, Tensor(c!) workspace, Tensor(d!) out) -> ()");
  m.def("attention_step_workspace_bytes(int B, int H, int KVH, int D, int capacity) -> int");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
  m.def("gated_rms_norm(Tensor x, Tensor weight, Tensor gate, float eps, Tensor(a!) out) -> ()");
  m.def("swiglu(Tensor x, Tensor(a!) out) -> ()");
  m.def(
      "choose_tokens(Tensor logits, Tensor? noise, float temperature, int top_k, float top_p, float min_p, "
      "Tensor? pad, Tensor? eos, Tensor(a!) unfinished, Tensor(b!) tokens) -> ()");
  m.def("prefill_refusal(int K, int V, ScalarType dtype, ScalarType state_dtype) -> str");
  m.def("recurrent_refusal(int K, int V, ScalarType dtype, ScalarType state_dtype) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(kda_hf_cuda, CUDA, m) {
  m.impl("prefill", TORCH_BOX(&prefill));
  m.impl("recurrent", TORCH_BOX(&recurrent));
  m.impl("decode_step", TORCH_BOX(&decode_step));
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("attention_step", TORCH_BOX(&attention_step));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("gated_rms_norm", TORCH_BOX(&gated_rms_norm));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("choose_tokens", TORCH_BOX(&choose_tokens));
}

STABLE_TORCH_LIBRARY_IMPL(kda_hf_cuda, CompositeExplicitAutograd, m) {
  m.impl("prefill_refusal", TORCH_BOX(&prefill_refusal));
  m.impl("recurrent_refusal", TORCH_BOX(&recurrent_refusal));
  m.impl("attention_step_workspace_bytes", TORCH_BOX(&attention_step_workspace_bytes));
  m.impl("linear_parts", TORCH_BOX(&linear_parts));
}

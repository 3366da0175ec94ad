// RMS norm of each head and the rotary embedding of its first channels, and the gradient.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "fused_tensors.h"
#include "smxx/fused/norm_rotary.h"

namespace msa::api {

namespace {

HeadStrides head_strides(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// All but the output.
NormRotaryParams norm_rotary_params(const Tensor& states, const Tensor& weight, const Tensor& cos,
                                    const Tensor& sin, double eps) {
  STD_TORCH_CHECK(states.dim() == 4 && weight.dim() == 1 && cos.dim() == 3 && sin.dim() == 3,
                  "`states` must be 4-D, `weight` 1-D, `cos` and `sin` 3-D");
  const int64_t batch = states.size(0), head_dim = states.size(3), rotary_dim = cos.size(2);
  STD_TORCH_CHECK(head_dim >= 8 && head_dim % 8 == 0 && head_dim <= kMaxNormRotaryDim,
                  "the head dimension must be a multiple of 8 up to ", kMaxNormRotaryDim, ", got ",
                  head_dim);
  STD_TORCH_CHECK(rotary_dim >= 16 && rotary_dim % 16 == 0 && rotary_dim <= head_dim,
                  "the rotary channels must be a multiple of 16 up to the head dimension, got ",
                  rotary_dim);
  STD_TORCH_CHECK(weight.size(0) == head_dim, "`weight` must have ", head_dim, " elements");
  STD_TORCH_CHECK((cos.size(0) == 1 || cos.size(0) == batch) && cos.size(1) == states.size(1) &&
                      cos.size(0) == sin.size(0) && cos.size(1) == sin.size(1) &&
                      cos.size(2) == sin.size(2) && cos.scalar_type() == sin.scalar_type(),
                  "`cos` and `sin` must have the batch rows (or 1) and tokens of `states`");
  to_int("heads of all tokens", states.numel() / head_dim);

  NormRotaryParams params{};
  params.states = vector_data("states", states);
  params.weight = contiguous_data("weight", weight);
  params.cos = contiguous_data("cos", cos);
  params.sin = contiguous_data("sin", sin);
  params.strides = head_strides(states);
  params.batch = to_int("batch", batch);
  params.tokens = to_int("tokens", states.size(1));
  params.heads = to_int("heads", states.size(2));
  params.head_dim = static_cast<int>(head_dim);
  params.rotary_dim = static_cast<int>(rotary_dim);
  params.angle_batch_stride = cos.size(0) == 1 ? 0 : cos.size(1) * rotary_dim;
  params.dtype = float_dtype_of("states", states);
  params.weight_is_float = is_float_beside("weight", weight, params.dtype);
  params.angles_are_float = is_float_beside("cos", cos, params.dtype);
  params.eps = static_cast<float>(eps);
  return params;
}

Tensor norm_rotary(const Tensor& states, const Tensor& weight, const Tensor& cos, const Tensor& sin,
                   double eps) {
  NormRotaryParams params = norm_rotary_params(states, weight, cos, sin, eps);
  Tensor out = torch::stable::new_empty(states, states.sizes());
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  const DeviceScope device(states);
  launch_norm_rotary(params, device.stream());
  return out;
}

std::tuple<Tensor, Tensor> norm_rotary_backward(const Tensor& grad_out, const Tensor& states,
                                                const Tensor& weight, const Tensor& cos,
                                                const Tensor& sin, double eps, bool needs_states,
                                                bool needs_weight) {
  NormRotaryGradientParams params{};
  params.forward = norm_rotary_params(states, weight, cos, sin, eps);
  bool is_like = grad_out.scalar_type() == states.scalar_type() && grad_out.dim() == 4;
  for (int64_t dim = 0; is_like && dim < 4; ++dim) is_like = grad_out.size(dim) == states.size(dim);
  STD_TORCH_CHECK(is_like, "`grad_out` must have the shape and dtype of `states`");
  Tensor grad_states = needs_states ? torch::stable::new_empty(states, states.sizes())
                                    : torch::stable::new_empty(states, {0});
  Tensor grad_weight =
      torch::stable::new_empty(weight, {needs_weight ? params.forward.head_dim : 0});
  if (states.numel() == 0) return {grad_states, torch::stable::fill_(grad_weight, 0)};

  params.grad_out = vector_data("grad_out", grad_out);
  params.grad_strides = head_strides(grad_out);
  if (needs_states) params.grad_states = grad_states.mutable_data_ptr();
  const DeviceScope device(states);
  const int thread_blocks = norm_rotary_gradient_thread_blocks(params, device.num_sms());
  Tensor partial_sums = allocate_workspace(
      states, needs_weight ? int64_t{thread_blocks} * params.forward.head_dim : 0);
  if (needs_weight) {
    params.grad_weight = grad_weight.mutable_data_ptr();
    params.partial_sums = static_cast<float*>(partial_sums.mutable_data_ptr());
  }
  launch_norm_rotary_gradient(params, thread_blocks, device.stream());
  return {grad_states, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def(
      "norm_rotary(Tensor states, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor");
  library.def(
      "norm_rotary_backward(Tensor grad_out, Tensor states, Tensor weight, Tensor cos, Tensor sin, "
      "float eps, bool needs_states, bool needs_weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("norm_rotary", TORCH_BOX(&norm_rotary));
  library.impl("norm_rotary_backward", TORCH_BOX(&norm_rotary_backward));
}

}  // namespace msa::api

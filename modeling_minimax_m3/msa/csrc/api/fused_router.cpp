// The routing of tokens to experts and its gradient.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "fused_tensors.h"
#include "smxx/fused/router.h"

namespace msa::api {

namespace {

void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  "`router_logits` must be 2-D and contiguous in its last dimension");
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, const Tensor& bias, int64_t top_k) {
  check_logits(logits);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == logits.size(1) && bias.is_contiguous(),
                  "`bias` must have one element for each expert and be contiguous");
  const int64_t tokens = logits.size(0);
  Tensor weights = torch::stable::new_empty(logits, {tokens, top_k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(logits, {tokens, top_k}, ScalarType::Long);
  if (tokens == 0) return {weights, indices};

  const DeviceScope device(logits);
  RouterParams params{};
  params.logits = logits.const_data_ptr();
  params.bias = bias.const_data_ptr();
  params.weights = static_cast<float*>(weights.mutable_data_ptr());
  params.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  params.row_stride = logits.stride(0);
  params.tokens = to_int("tokens", tokens);
  params.num_experts = to_int("experts", logits.size(1));
  params.top_k = to_int("top_k", top_k);
  params.dtype = float_dtype_of("router_logits", logits);
  params.bias_is_float = is_float_beside("bias", bias, params.dtype);
  launch_router(params, device.stream());
  return {weights, indices};
}

Tensor route_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& weights,
                      const Tensor& indices) {
  check_logits(logits);
  const int64_t tokens = logits.size(0), top_k = indices.size(1);
  for (const Tensor& tensor : {grad_weights, weights}) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                        tensor.numel() == tokens * top_k,
                    "the weights and their gradient must be contiguous, float32, one per choice");
  }
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.is_contiguous() &&
                      indices.size(0) == tokens,
                  "`indices` must be contiguous, int64, one row for each token");
  Tensor grad_logits = torch::stable::new_empty(logits, {tokens, logits.size(1)});
  if (tokens == 0) return grad_logits;

  const DeviceScope device(logits);
  RouterBackwardParams params{};
  params.grad_weights = static_cast<const float*>(grad_weights.const_data_ptr());
  params.logits = logits.const_data_ptr();
  params.weights = static_cast<const float*>(weights.const_data_ptr());
  params.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  params.grad_logits = grad_logits.mutable_data_ptr();
  params.row_stride = logits.stride(0);
  params.tokens = to_int("tokens", tokens);
  params.num_experts = to_int("experts", logits.size(1));
  params.top_k = to_int("top_k", top_k);
  params.dtype = float_dtype_of("router_logits", logits);
  launch_router_backward(params, device.stream());
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def("route(Tensor router_logits, Tensor bias, int top_k) -> (Tensor, Tensor)");
  library.def(
      "route_backward(Tensor grad_weights, Tensor router_logits, Tensor weights, Tensor indices) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("route", TORCH_BOX(&route));
  library.impl("route_backward", TORCH_BOX(&route_backward));
}

}  // namespace msa::api

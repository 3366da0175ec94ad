// The gated activation of the MLPs and its gradient.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "fused_tensors.h"
#include "smxx/fused/swiglu.h"

namespace msa::api {

namespace {

// What the forward and the backward share; rows are those of a contiguous or a 2-D tensor.
SwigluParams swiglu_params(const Tensor& gate_up, double alpha, double limit) {
  const int64_t dim = gate_up.dim();
  STD_TORCH_CHECK(dim == 2 || (dim >= 1 && gate_up.is_contiguous()),
                  "`gate_up` must be 2-D or contiguous");
  const int64_t last = gate_up.size(dim - 1);
  SwigluParams params{};
  params.dtype = float_dtype_of("gate_up", gate_up);
  STD_TORCH_CHECK(last % 16 == 0, "`gate_up` must be a multiple of 16 wide, got ", last);
  params.gate_up = vector_data("gate_up", gate_up);
  params.row_stride = dim == 2 ? gate_up.stride(0) : last;
  params.rows = to_int("rows", last == 0 ? 0 : gate_up.numel() / last);
  params.width = to_int("width", last / 2);
  params.alpha = static_cast<float>(alpha);
  params.limit = static_cast<float>(limit);
  return params;
}

std::vector<int64_t> sizes_with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) sizes.push_back(tensor.size(dim));
  sizes.push_back(last);
  return sizes;
}

Tensor swiglu_oai(const Tensor& gate_up, double alpha, double limit) {
  SwigluParams params = swiglu_params(gate_up, alpha, limit);
  Tensor out = torch::stable::new_empty(gate_up, sizes_with_last(gate_up, params.width));
  if (out.numel() == 0) return out;
  const DeviceScope device(gate_up);
  params.out = out.mutable_data_ptr();
  launch_swiglu(params, device.stream());
  return out;
}

Tensor swiglu_oai_backward(const Tensor& grad_out, const Tensor& gate_up, double alpha,
                           double limit) {
  SwigluParams params = swiglu_params(gate_up, alpha, limit);
  STD_TORCH_CHECK(
      grad_out.scalar_type() == gate_up.scalar_type() && 2 * grad_out.numel() == gate_up.numel(),
      "`grad_out` must be half as wide as `gate_up` and of its dtype");
  Tensor grad = torch::stable::new_empty(gate_up, sizes_with_last(gate_up, 2 * params.width));
  if (grad.numel() == 0) return grad;
  const DeviceScope device(gate_up);
  params.grad_out = contiguous_data("grad_out", grad_out);
  params.out = grad.mutable_data_ptr();
  launch_swiglu_backward(params, device.stream());
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def("swiglu_oai(Tensor gate_up, float alpha, float limit) -> Tensor");
  library.def(
      "swiglu_oai_backward(Tensor grad_out, Tensor gate_up, float alpha, float limit) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("swiglu_oai", TORCH_BOX(&swiglu_oai));
  library.impl("swiglu_oai_backward", TORCH_BOX(&swiglu_oai_backward));
}

}  // namespace msa::api

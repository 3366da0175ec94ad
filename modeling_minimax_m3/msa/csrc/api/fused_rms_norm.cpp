// RMS norm of rows, alone or behind a residual addition, and its gradient.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "fused_tensors.h"
#include "smxx/fused/rms_norm.h"

namespace msa::api {

namespace {

// A tensor (..., width) as rows that lie one stride apart; a copy where they do not.
class Rows {
 public:
  Rows(const char* name, const Tensor& tensor) : tensor_(tensor) {
    if (!find_stride()) {
      tensor_ = torch::stable::contiguous(tensor);
      stride_ = tensor.size(tensor.dim() - 1);
    }
    data_ = vector_data(name, tensor_);
  }
  const void* data() const { return data_; }
  int64_t stride() const { return stride_; }

 private:
  bool find_stride() {
    const int64_t last = tensor_.dim() - 1;
    stride_ = tensor_.size(last);
    int64_t rows = 1;  // of the dimensions seen so far, from the innermost on
    for (int64_t dim = last - 1; dim >= 0; --dim) {
      if (tensor_.size(dim) == 1) continue;
      if (rows == 1) {
        stride_ = tensor_.stride(dim);
      } else if (tensor_.stride(dim) != stride_ * rows) {
        return false;
      }
      rows *= tensor_.size(dim);
    }
    return true;
  }

  Tensor tensor_;
  const void* data_;
  int64_t stride_;
};

int width_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1, "`x` must have a dimension");
  const int64_t width = x.size(x.dim() - 1);
  STD_TORCH_CHECK(width >= 8 && width % 8 == 0 && width <= kMaxNormWidth,
                  "the width must be a multiple of 8 up to ", kMaxNormWidth, ", got ", width);
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == width, "`weight` must have ", width,
                  " elements");
  return static_cast<int>(width);
}

void check_like(const char* name, const Tensor& tensor, const Tensor& x) {
  bool is_like = tensor.scalar_type() == x.scalar_type() && tensor.dim() == x.dim();
  for (int64_t dim = 0; is_like && dim < x.dim(); ++dim) is_like = tensor.size(dim) == x.size(dim);
  STD_TORCH_CHECK(is_like, "`", name, "` must have the shape and dtype of `x`");
}

// Contiguous, whatever the strides of `like`.
Tensor new_contiguous(const Tensor& like) {
  return torch::stable::new_empty(like, like.sizes());
}

std::tuple<Tensor, Tensor> normalize(const Tensor& x, const std::optional<Tensor>& residual,
                                     const Tensor& weight, double eps) {
  RmsNormParams params{};
  params.width = width_of(x, weight);
  params.rows = to_int("rows", x.numel() / params.width);
  params.dtype = float_dtype_of("x", x);
  params.weight_is_float = is_float_beside("weight", weight, params.dtype);
  params.eps = static_cast<float>(eps);
  if (residual.has_value()) check_like("residual", *residual, x);
  Tensor normed = new_contiguous(x);
  Tensor sum = residual.has_value() ? new_contiguous(x) : normed;
  if (params.rows == 0) return {normed, sum};

  const Rows x_rows("x", x), residual_rows("residual", residual.value_or(x));
  params.x = x_rows.data();
  params.x_stride = x_rows.stride();
  params.weight = contiguous_data("weight", weight);
  params.normed = normed.mutable_data_ptr();
  if (residual.has_value()) {
    params.residual = residual_rows.data();
    params.residual_stride = residual_rows.stride();
    params.sum = sum.mutable_data_ptr();
  }
  const DeviceScope device(x);
  launch_rms_norm(params, device.stream());
  return {normed, sum};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return std::get<0>(normalize(x, std::nullopt, weight, eps));
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps) {
  return normalize(x, residual, weight, eps);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_normed,
                                             const std::optional<Tensor>& grad_sum, const Tensor& x,
                                             const Tensor& weight, double eps, bool needs_x,
                                             bool needs_weight) {
  RmsNormGradientParams params{};
  params.width = width_of(x, weight);
  params.rows = to_int("rows", x.numel() / params.width);
  params.dtype = float_dtype_of("x", x);
  params.weight_is_float = is_float_beside("weight", weight, params.dtype);
  params.eps = static_cast<float>(eps);
  check_like("grad_normed", grad_normed, x);
  if (grad_sum.has_value()) check_like("grad_sum", *grad_sum, x);
  Tensor grad_x = needs_x ? new_contiguous(x) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(weight, {needs_weight ? params.width : 0});
  if (params.rows == 0) return {grad_x, torch::stable::fill_(grad_weight, 0)};

  const Rows x_rows("x", x), grad_rows("grad_normed", grad_normed);
  const Rows sum_rows("grad_sum", grad_sum.value_or(x));
  params.x = x_rows.data();
  params.x_stride = x_rows.stride();
  params.grad_normed = grad_rows.data();
  params.grad_normed_stride = grad_rows.stride();
  if (grad_sum.has_value()) {
    params.grad_sum = sum_rows.data();
    params.grad_sum_stride = sum_rows.stride();
  }
  params.weight = contiguous_data("weight", weight);
  if (needs_x) params.grad_x = grad_x.mutable_data_ptr();

  const DeviceScope device(x);
  const int thread_blocks = rms_norm_gradient_thread_blocks(params, device.num_sms());
  Tensor partial_sums =
      allocate_workspace(x, needs_weight ? int64_t{thread_blocks} * params.width : 0);
  if (needs_weight) {
    params.grad_weight = grad_weight.mutable_data_ptr();
    params.partial_sums = static_cast<float*>(partial_sums.mutable_data_ptr());
  }
  launch_rms_norm_gradient(params, thread_blocks, device.stream());
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  library.def(
      "rms_norm_backward(Tensor grad_normed, Tensor? grad_sum, Tensor x, Tensor weight, float eps, "
      "bool needs_x, bool needs_weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace msa::api

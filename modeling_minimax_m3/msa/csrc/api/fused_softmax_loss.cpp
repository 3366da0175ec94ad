// The cross-entropy of rows of logits, and its gradient in their place.
#include <torch/csrc/stable/library.h>

#include "fused_tensors.h"
#include "smxx/fused/softmax_loss.h"

namespace msa::api {

namespace {

Tensor softmax_loss_(const Tensor& logits, const Tensor& targets, const Tensor& divisor) {
  STD_TORCH_CHECK(logits.dim() == 2, "`logits` must be 2-D");
  const int64_t rows = logits.size(0), width = logits.size(1);
  STD_TORCH_CHECK(width >= 8 && width % 8 == 0 && width <= kMaxLogits,
                  "the width must be a multiple of 8 up to ", kMaxLogits, ", got ", width);
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.is_contiguous() &&
                      targets.dim() == 1 && targets.size(0) == rows,
                  "`targets` must be contiguous, int64, one for each row");
  STD_TORCH_CHECK(divisor.scalar_type() == ScalarType::Float && divisor.numel() == 1,
                  "`divisor` must be one float32 number");
  SoftmaxLossParams params{};
  params.dtype = float_dtype_of("logits", logits);
  Tensor losses = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  if (rows == 0) return losses;

  const DeviceScope device(logits);
  contiguous_data("logits", logits);  // checks where they lie
  params.logits = logits.mutable_data_ptr();
  params.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  params.divisor = static_cast<const float*>(divisor.const_data_ptr());
  params.losses = static_cast<float*>(losses.mutable_data_ptr());
  params.rows = to_int("rows", rows);
  params.width = static_cast<int>(width);
  launch_softmax_loss(params, device.stream());
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def("softmax_loss_(Tensor(a!) logits, Tensor targets, Tensor divisor) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("softmax_loss_", TORCH_BOX(&softmax_loss_));
}

}  // namespace msa::api

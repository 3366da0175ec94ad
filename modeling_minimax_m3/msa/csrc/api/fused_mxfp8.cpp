// Weights in MXFP8 as bfloat16.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "fused_tensors.h"
#include "smxx/fused/dequantize_mxfp8.h"
#include "smxx/fused/few_token_weights.h"

namespace msa::api {

namespace {

Tensor dequantize_mxfp8(const Tensor& values, const Tensor& scales) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float8_e4m3fn && values.dim() >= 1 &&
                      values.is_contiguous(),
                  "`values` must be contiguous, in float8_e4m3fn");
  const int64_t columns = values.size(values.dim() - 1);
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Byte && scales.is_contiguous() &&
                      columns % kMxfp8Group == 0 && scales.numel() * kMxfp8Group == values.numel(),
                  "`scales` must be contiguous, in uint8, one for ", kMxfp8Group,
                  " values of a row");
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < values.dim(); ++dim) sizes.push_back(values.size(dim));
  Tensor out = torch::stable::new_empty(values, sizes, ScalarType::BFloat16);
  DequantizeMxfp8Params params{};
  params.values = static_cast<const uint8_t*>(contiguous_data("values", values));
  params.scales = static_cast<const uint8_t*>(scales.const_data_ptr());
  params.out = out.mutable_data_ptr();
  params.count = values.numel();
  const DeviceScope device(values);
  launch_dequantize_mxfp8(params, device.stream());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def("dequantize_mxfp8(Tensor values, Tensor scales) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("dequantize_mxfp8", TORCH_BOX(&dequantize_mxfp8));
}

}  // namespace msa::api

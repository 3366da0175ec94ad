// Products of groups of rows with a matrix each. Only Hopper has a kernel.
#include <torch/csrc/stable/library.h>

#include "sm90/grouped_product/grouped_product.h"
#include "tensors.h"

namespace msa::api {

namespace {

Tensor grouped_product(const Tensor& x, const Tensor& weights, const Tensor& group_ends,
                       bool is_gated, double alpha, double limit) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && weights.dim() == 3 &&
                      weights.is_contiguous() && weights.size(2) == x.size(1) &&
                      weights.scalar_type() == x.scalar_type(),
                  "`x` must be (rows, channels) and `weights` (groups, outputs, channels), "
                  "contiguous and of one dtype");
  STD_TORCH_CHECK(group_ends.numel() == weights.size(0),
                  "`group_ends` must have one element per group");
  sm90::GroupedProductParams params{};
  params.dtype = dtype_of("x", x);
  params.x = vector_data("x", x);
  params.weights = vector_data("weights", weights);
  params.group_ends = int32_data("group_ends", group_ends);
  params.num_rows = x.size(0);
  params.num_groups = to_int("groups", weights.size(0));
  params.outputs = to_int("outputs", weights.size(1));
  params.channels = to_int("channels", x.size(1));
  params.is_gated = is_gated;
  params.alpha = static_cast<float>(alpha);
  params.limit = static_cast<float>(limit);
  Tensor out =
      torch::stable::new_empty(x, {x.size(0), is_gated ? weights.size(1) / 2 : weights.size(1)});
  params.out = out.mutable_data_ptr();
  const DeviceScope device(x);
  params.num_sms = device.num_sms();
  sm90::launch_grouped_product(params, device.stream());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def(
      "grouped_product(Tensor x, Tensor weights, Tensor group_ends, bool is_gated, float alpha, "
      "float limit) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("grouped_product", TORCH_BOX(&grouped_product));
}

}  // namespace msa::api

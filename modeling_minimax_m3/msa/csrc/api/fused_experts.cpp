// The way of tokens to their experts and back, around grouped products.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "fused_tensors.h"
#include "smxx/fused/expert_order.h"
#include "smxx/fused/expert_rows.h"

namespace msa::api {

namespace {

std::tuple<Tensor, Tensor> expert_order(const Tensor& expert_ids, int64_t num_experts) {
  STD_TORCH_CHECK(expert_ids.scalar_type() == ScalarType::Long && expert_ids.dim() == 2 &&
                      expert_ids.is_contiguous(),
                  "`expert_ids` must be 2-D, int64 and contiguous");
  Tensor rows = torch::stable::new_empty(expert_ids, {expert_ids.size(0), expert_ids.size(1)},
                                         ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(expert_ids, {num_experts}, ScalarType::Int);
  STD_TORCH_CHECK(rows.numel() > 0, "`expert_ids` must not be empty");

  const DeviceScope device(expert_ids);
  ExpertOrderParams params{};
  params.expert_ids = static_cast<const int64_t*>(expert_ids.const_data_ptr());
  params.rows = static_cast<int32_t*>(rows.mutable_data_ptr());
  params.offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
  params.num_pairs = to_int("expert_ids", expert_ids.numel());
  params.num_experts = to_int("num_experts", num_experts);
  Tensor workspace =
      torch::stable::new_empty(expert_ids, {expert_order_workspace(params)}, ScalarType::Int);
  params.workspace = static_cast<int32_t*>(workspace.mutable_data_ptr());
  launch_expert_order(params, device.stream());
  return {rows, offsets};
}

ExpertRows expert_rows_of(const Tensor& rows, const Tensor& offsets, const Tensor& states) {
  STD_TORCH_CHECK(rows.dim() == 2, "`rows` must have a row for each token");
  STD_TORCH_CHECK(offsets.numel() > 0, "`offsets` must have an element for each expert");
  STD_TORCH_CHECK(states.dim() == 2, "the states must be 2-D");
  const int64_t width = states.size(1);
  STD_TORCH_CHECK(width % 8 == 0, "the states must be a multiple of 8 wide, got ", width);
  ExpertRows order{};
  order.rows = int32_data("rows", rows);
  order.num_rows = int32_data("offsets", offsets) + offsets.numel() - 1;
  order.tokens = to_int("tokens", rows.size(0));
  order.top_k = to_int("top_k", rows.size(1));
  order.width = to_int("width", width);
  order.dtype = float_dtype_of("states", states);
  return order;
}

// The address of states (count, width) of the dtype of the others.
const void* states_data(const char* name, const Tensor& states, int64_t count,
                        const ExpertRows& order) {
  STD_TORCH_CHECK(states.dim() == 2 && states.size(0) == count && states.size(1) == order.width &&
                      float_dtype_of(name, states) == order.dtype,
                  "`", name, "` must be (", count, ", ", order.width,
                  ") and of the dtype of the other states");
  return contiguous_data(name, states);
}

const float* weights_data(const Tensor& weights, const Tensor& rows) {
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.is_contiguous() &&
                      weights.numel() == rows.numel(),
                  "`weights` must be contiguous, float32, one for each row");
  return static_cast<const float*>(weights.const_data_ptr());
}

Tensor gather_tokens(const Tensor& x, const Tensor& rows, const Tensor& offsets) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows.size(0), "`x` must have a row for each token");
  GatherTokensParams params{};
  params.order = expert_rows_of(rows, offsets, x);
  Tensor out = torch::stable::new_empty(x, {rows.numel(), x.size(1)});
  if (out.numel() == 0) return out;
  const DeviceScope device(x);
  params.x = vector_data("x", x);
  params.row_stride = x.stride(0);
  params.out = out.mutable_data_ptr();
  launch_gather_tokens(params, device.stream());
  return out;
}

Tensor sum_expert_rows(const Tensor& expert_rows, const std::optional<Tensor>& weights,
                       double scale, const Tensor& rows, const Tensor& offsets,
                       const std::optional<Tensor>& base) {
  SumExpertRowsParams params{};
  params.order = expert_rows_of(rows, offsets, expert_rows);
  Tensor out = torch::stable::new_empty(expert_rows, {rows.size(0), expert_rows.size(1)});
  if (out.numel() == 0) return out;
  const DeviceScope device(expert_rows);
  params.expert_rows = states_data("expert_rows", expert_rows, rows.numel(), params.order);
  params.weights = weights.has_value() ? weights_data(*weights, rows) : nullptr;
  params.base = base.has_value() ? states_data("base", *base, rows.size(0), params.order) : nullptr;
  params.out = out.mutable_data_ptr();
  params.scale = static_cast<float>(scale);
  launch_sum_expert_rows(params, device.stream());
  return out;
}

std::tuple<Tensor, Tensor> sum_expert_rows_backward(const Tensor& grad_out,
                                                    const std::optional<Tensor>& expert_rows,
                                                    const Tensor& weights, double scale,
                                                    const Tensor& rows, const Tensor& offsets,
                                                    bool needs_rows, bool needs_weights) {
  SumExpertRowsBackwardParams params{};
  params.order = expert_rows_of(rows, offsets, grad_out);
  Tensor grad_rows =
      torch::stable::new_empty(grad_out, {needs_rows ? rows.numel() : 0, grad_out.size(1)});
  Tensor grad_weights =
      torch::stable::new_empty(weights, {needs_weights ? rows.size(0) : 0, rows.size(1)});
  if (rows.numel() == 0 || !(needs_rows || needs_weights)) return {grad_rows, grad_weights};
  const DeviceScope device(grad_out);
  params.grad_out = states_data("grad_out", grad_out, rows.size(0), params.order);
  params.weights = weights_data(weights, rows);
  if (needs_weights) {
    STD_TORCH_CHECK(expert_rows.has_value(), "the gradient of the weights needs `expert_rows`");
    params.expert_rows = states_data("expert_rows", *expert_rows, rows.numel(), params.order);
    params.grad_weights = static_cast<float*>(grad_weights.mutable_data_ptr());
  }
  if (needs_rows) params.grad_rows = grad_rows.mutable_data_ptr();
  params.scale = static_cast<float>(scale);
  launch_sum_expert_rows_backward(params, device.stream());
  return {grad_rows, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def("expert_order(Tensor expert_ids, int num_experts) -> (Tensor, Tensor)");
  library.def("gather_tokens(Tensor x, Tensor rows, Tensor offsets) -> Tensor");
  library.def(
      "sum_expert_rows(Tensor expert_rows, Tensor? weights, float scale, Tensor rows, "
      "Tensor offsets, Tensor? base) -> Tensor");
  library.def(
      "sum_expert_rows_backward(Tensor grad_out, Tensor? expert_rows, Tensor weights, float scale, "
      "Tensor rows, Tensor offsets, bool needs_rows, bool needs_weights) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("expert_order", TORCH_BOX(&expert_order));
  library.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  library.impl("sum_expert_rows", TORCH_BOX(&sum_expert_rows));
  library.impl("sum_expert_rows_backward", TORCH_BOX(&sum_expert_rows_backward));
}

}  // namespace msa::api

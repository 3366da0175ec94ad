// Linear layers, MLPs and attention inputs of a few tokens.
#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <optional>
#include <tuple>

#include "fused_tensors.h"
#include "smxx/fused/attention_input.h"
#include "smxx/fused/few_token_linear.h"
#include "smxx/fused/few_token_mlp.h"

namespace msa::api {

namespace {

const void* optional_data(const char* name, const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? contiguous_data(name, *tensor) : nullptr;
}

// The weight of a linear layer of `channels` inputs: in the dtype of `x`, or MXFP8 with scales.
FewTokenWeights weights_of(const char* name, const Tensor& weight,
                           const std::optional<Tensor>& scales, const Tensor& x, int64_t channels) {
  const ScalarType dtype = scales ? ScalarType::Float8_e4m3fn : x.scalar_type();
  STD_TORCH_CHECK(weight.scalar_type() == dtype && weight.dim() >= 2 &&
                      weight.size(weight.dim() - 1) == channels,
                  "`", name, "` must have the dtype of `x`, or float8_e4m3fn with scales, and ",
                  channels, " inputs");
  FewTokenWeights weights{};
  weights.values = contiguous_data(name, weight);
  if (scales) {
    STD_TORCH_CHECK(scales->scalar_type() == ScalarType::Byte && scales->is_contiguous() &&
                        scales->numel() * kMxfp8Group == weight.numel() &&
                        scales->size(scales->dim() - 1) * kMxfp8Group == channels,
                    "the scales of `", name, "` must be uint8, one for ", kMxfp8Group,
                    " values of a row");
    weights.scales = static_cast<const uint8_t*>(scales->const_data_ptr());
  }
  return weights;
}

Tensor few_token_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& second,
                        const std::optional<Tensor>& third, const std::optional<Tensor>& fourth,
                        const std::optional<Tensor>& fifth, const std::optional<Tensor>& scales,
                        const std::optional<Tensor>& second_scales,
                        const std::optional<Tensor>& third_scales,
                        const std::optional<Tensor>& fourth_scales,
                        const std::optional<Tensor>& fifth_scales, bool weights_are_constant) {
  STD_TORCH_CHECK(x.dim() == 2, "`x` must be (tokens, channels)");
  FewTokenLinearParams params{};
  params.weights_are_constant = weights_are_constant;
  params.dtype = dtype_of("x", x);
  params.x = contiguous_data("x", x);
  params.num_tokens = to_int("tokens", x.size(0));
  params.channels = to_int("channels", x.size(1));
  int64_t rows = 0;
  const std::optional<Tensor> first(weight);
  const std::optional<Tensor>* matrices[] = {&first, &second, &third, &fourth, &fifth};
  const std::optional<Tensor>* scales_of[] = {&scales, &second_scales, &third_scales,
                                              &fourth_scales, &fifth_scales};
  for (int i = 0; i < kMaxLinearWeights && matrices[i]->has_value(); ++i) {
    const Tensor& matrix = **matrices[i];
    STD_TORCH_CHECK(scales_of[i]->has_value() == scales.has_value(),
                    "all weights or none must have scales");
    params.weights[i] = weights_of("weight", matrix, *scales_of[i], x, x.size(1));
    params.first_rows[i] = to_int("rows", rows);
    params.num_weights = i + 1;
    rows += matrix.size(0);
  }
  params.num_rows = to_int("rows", rows);
  Tensor out = torch::stable::new_empty(x, {x.size(0), rows});
  params.out = out.mutable_data_ptr();
  const DeviceScope device(x);
  launch_few_token_linear(params, device.stream());
  return out;
}

Tensor few_token_mlp(const Tensor& x, const std::optional<Tensor>& gate_up,
                     const std::optional<Tensor>& down, const std::optional<Tensor>& expert_gate_up,
                     const std::optional<Tensor>& expert_down,
                     const std::optional<Tensor>& gate_up_scales,
                     const std::optional<Tensor>& down_scales,
                     const std::optional<Tensor>& expert_gate_up_scales,
                     const std::optional<Tensor>& expert_down_scales,
                     const std::optional<Tensor>& expert_ids,
                     const std::optional<Tensor>& expert_weights, double expert_scale, double alpha,
                     double limit, bool weights_are_constant) {
  STD_TORCH_CHECK(x.dim() == 2, "`x` must be (tokens, hidden)");
  FewTokenMlpParams params{};
  params.weights_are_constant = weights_are_constant;
  params.dtype = dtype_of("x", x);
  params.x = contiguous_data("x", x);
  params.num_tokens = to_int("tokens", x.size(0));
  params.hidden = to_int("hidden", x.size(1));
  params.alpha = static_cast<float>(alpha);
  params.limit = static_cast<float>(limit);
  params.expert_scale = static_cast<float>(expert_scale);
  if (gate_up.has_value()) {
    STD_TORCH_CHECK(
        down.has_value() && down->size(0) == x.size(1) && gate_up->size(0) == 2 * down->size(1),
        "`gate_up` and `down` must belong together");
    params.width = to_int("width", down->size(1));
    params.gate_up = weights_of("gate_up", *gate_up, gate_up_scales, x, x.size(1));
    params.down = weights_of("down", *down, down_scales, x, params.width);
  }
  if (expert_gate_up.has_value()) {
    STD_TORCH_CHECK(expert_down.has_value() && expert_ids.has_value() &&
                        expert_weights.has_value() && expert_down->dim() == 3 &&
                        expert_down->size(0) == expert_gate_up->size(0) &&
                        expert_down->size(1) == x.size(1) &&
                        expert_gate_up->size(1) == 2 * expert_down->size(2),
                    "the experts' weights must belong together");
    params.num_experts = to_int("experts", expert_gate_up->size(0));
    params.expert_width = to_int("expert_width", expert_down->size(2));
    params.expert_gate_up =
        weights_of("expert_gate_up", *expert_gate_up, expert_gate_up_scales, x, x.size(1));
    params.expert_down =
        weights_of("expert_down", *expert_down, expert_down_scales, x, params.expert_width);
    STD_TORCH_CHECK(expert_ids->scalar_type() == ScalarType::Long &&
                        expert_weights->scalar_type() == ScalarType::Float &&
                        expert_ids->is_contiguous() && expert_weights->is_contiguous() &&
                        expert_ids->dim() == 2 && expert_ids->size(0) == x.size(0) &&
                        expert_weights->numel() == expert_ids->numel(),
                    "`expert_ids` must be int64 and `expert_weights` float32, (tokens, choices)");
    params.num_choices = to_int("choices", expert_ids->size(1));
    params.expert_ids = static_cast<const int64_t*>(expert_ids->const_data_ptr());
    params.expert_weights = static_cast<const float*>(expert_weights->const_data_ptr());
  }
  const bool has_scales = gate_up_scales.has_value() || expert_gate_up_scales.has_value();
  for (const FewTokenWeights* weights :
       {&params.gate_up, &params.down, &params.expert_gate_up, &params.expert_down}) {
    STD_TORCH_CHECK(weights->values == nullptr || (weights->scales != nullptr) == has_scales,
                    "all weights or none must have scales");
  }
  const int64_t pairs = x.size(0) * params.num_choices;
  const Tensor activations =
      torch::stable::new_empty(x, {pairs * params.expert_width + x.size(0) * params.width});
  params.activations = activations.mutable_data_ptr();
  const Tensor lists = allocate_workspace_bytes(x, few_token_mlp_lists_bytes());
  params.experts = lists.mutable_data_ptr();
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  params.out = out.mutable_data_ptr();
  const DeviceScope device(x);
  launch_few_token_mlp(params, device.stream());
  return out;
}

CacheSlots cache_slots(const char* name, const Tensor& cache, const Tensor& projected,
                       int64_t slots_of_keys, int64_t heads, int64_t head_dim) {
  STD_TORCH_CHECK(cache.scalar_type() == projected.scalar_type() && cache.dim() == 4 &&
                      cache.size(0) == projected.size(0) && cache.size(1) == slots_of_keys &&
                      cache.size(2) == heads && cache.size(3) == head_dim,
                  "`", name, "` must be (batch, slots, heads, head_dim) in the projections' dtype");
  CacheSlots slots{};
  slots.data = const_cast<void*>(vector_data(name, cache));
  slots.row_stride = cache.stride(0);
  slots.slot_stride = cache.stride(1);
  slots.head_stride = cache.stride(2);
  return slots;
}

std::tuple<Tensor, Tensor> attention_input(
    const Tensor& projected, const Tensor& query_norm, const Tensor& key_norm,
    const std::optional<Tensor>& index_query_norm, const std::optional<Tensor>& index_key_norm,
    const Tensor& cos, const Tensor& sin, double eps, const Tensor& length, const Tensor& key_cache,
    const Tensor& value_cache, const std::optional<Tensor>& index_key_cache,
    bool norms_are_constant) {
  STD_TORCH_CHECK(projected.dim() == 3 && key_cache.dim() == 4,
                  "`projected` must have 3 dimensions and `key_cache` 4");
  for (const Tensor* norm :
       {&query_norm, &key_norm, index_query_norm ? &*index_query_norm : nullptr,
        index_key_norm ? &*index_key_norm : nullptr}) {
    STD_TORCH_CHECK(norm == nullptr || (norm->scalar_type() == projected.scalar_type() &&
                                        norm->numel() == query_norm.numel()),
                    "the norms must have one size, and the projections' dtype");
  }
  AttentionInputParams params{};
  params.norms_are_constant = norms_are_constant;
  params.dtype = dtype_of("projected", projected);
  params.projected = contiguous_data("projected", projected);
  params.query_norm = contiguous_data("query_norm", query_norm);
  params.key_norm = contiguous_data("key_norm", key_norm);
  params.index_query_norm = optional_data("index_query_norm", index_query_norm);
  params.index_key_norm = optional_data("index_key_norm", index_key_norm);
  params.cos = contiguous_data("cos", cos);
  params.sin = contiguous_data("sin", sin);
  const bool has_index = index_key_cache.has_value();
  const int64_t head_dim = query_norm.size(0), batch = projected.size(0);
  const int64_t num_new = projected.size(1), num_kv_heads = key_cache.size(2);
  // Query heads, and the index heads, which are as many as key/value heads.
  const int64_t heads = projected.size(2) / head_dim;
  const int64_t num_index_heads = has_index ? num_kv_heads : 0;
  const int64_t num_heads = heads - 2 * num_kv_heads - (has_index ? num_index_heads + 1 : 0);
  STD_TORCH_CHECK(heads * head_dim == projected.size(2) && num_heads > 0,
                  "`projected` must hold heads of ", head_dim, " channels");
  const bool is_float = cos.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK((is_float || cos.scalar_type() == projected.scalar_type()) &&
                      sin.scalar_type() == cos.scalar_type() && cos.numel() == sin.numel() &&
                      cos.dim() == 3 && cos.size(1) == num_new &&
                      (cos.size(0) == 1 || cos.size(0) == batch),
                  "`cos` and `sin` must be (batch or 1, new tokens, channels)");
  STD_TORCH_CHECK(length.scalar_type() == ScalarType::Long && length.numel() == 1,
                  "`length` must be one int64");
  params.rotary_is_float = is_float;
  params.rotary_channels = to_int("rotary channels", cos.size(2));
  params.rotary_row_stride = cos.size(0) == 1 ? 0 : cos.size(1) * cos.size(2);
  params.length = static_cast<const int64_t*>(length.const_data_ptr());
  params.eps = static_cast<float>(eps);
  params.batch = to_int("batch", batch);
  params.num_new = to_int("new tokens", num_new);
  params.num_heads = to_int("heads", num_heads);
  params.num_kv_heads = to_int("key/value heads", num_kv_heads);
  params.num_index_heads = to_int("index heads", num_index_heads);
  params.head_dim = to_int("head_dim", head_dim);
  params.slots = to_int("slots", key_cache.size(1));
  params.key =
      cache_slots("key_cache", key_cache, projected, key_cache.size(1), num_kv_heads, head_dim);
  params.value =
      cache_slots("value_cache", value_cache, projected, key_cache.size(1), num_kv_heads, head_dim);
  if (has_index) {
    params.index_key =
        cache_slots("index_key_cache", *index_key_cache, projected, key_cache.size(1), 1, head_dim);
  }
  Tensor query = torch::stable::new_empty(projected, {batch, num_new, num_heads, head_dim});
  Tensor index_query =
      torch::stable::new_empty(projected, {batch, num_new, num_index_heads, head_dim});
  params.query = query.mutable_data_ptr();
  params.index_query = index_query.mutable_data_ptr();
  const DeviceScope device(projected);
  launch_attention_input(params, device.stream());
  return {query, index_query};
}

std::tuple<Tensor, Tensor> rotary_table(const Tensor& positions, const Tensor& frequencies,
                                        double scaling, const Tensor& like) {
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Long && positions.is_contiguous() &&
                      frequencies.scalar_type() == ScalarType::Float &&
                      frequencies.is_contiguous() && positions.dim() == 2,
                  "`positions` must be int64 (batch, tokens) and `frequencies` float32");
  RotaryTableParams params{};
  params.dtype = dtype_of("like", like);
  const int64_t channels = 2 * frequencies.numel();
  Tensor cos = torch::stable::new_empty(like, {positions.size(0), positions.size(1), channels});
  Tensor sin = torch::stable::new_empty(like, {positions.size(0), positions.size(1), channels});
  params.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  params.frequencies = static_cast<const float*>(frequencies.const_data_ptr());
  params.cos = cos.mutable_data_ptr();
  params.sin = sin.mutable_data_ptr();
  params.scaling = static_cast<float>(scaling);
  params.num_positions = to_int("positions", positions.numel());
  params.channels = to_int("channels", channels);
  const DeviceScope device(positions);
  launch_rotary_table(params, device.stream());
  return {cos, sin};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def(
      "few_token_linear(Tensor x, Tensor weight, Tensor? second, Tensor? third, Tensor? fourth, "
      "Tensor? fifth, Tensor? scales, Tensor? second_scales, Tensor? third_scales, "
      "Tensor? fourth_scales, Tensor? fifth_scales, bool weights_are_constant) -> Tensor");
  library.def(
      "few_token_mlp(Tensor x, Tensor? gate_up, Tensor? down, Tensor? expert_gate_up, "
      "Tensor? expert_down, Tensor? gate_up_scales, Tensor? down_scales, "
      "Tensor? expert_gate_up_scales, Tensor? expert_down_scales, Tensor? expert_ids, "
      "Tensor? expert_weights, float expert_scale, float alpha, float limit, "
      "bool weights_are_constant) -> Tensor");
  library.def(
      "attention_input(Tensor projected, Tensor query_norm, Tensor key_norm, "
      "Tensor? index_query_norm, Tensor? index_key_norm, Tensor cos, Tensor sin, float eps, "
      "Tensor length, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor(c!)? index_key_cache, bool norms_are_constant) -> (Tensor, Tensor)");
  library.def(
      "rotary_table(Tensor positions, Tensor frequencies, float scaling, Tensor like) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("few_token_linear", TORCH_BOX(&few_token_linear));
  library.impl("few_token_mlp", TORCH_BOX(&few_token_mlp));
  library.impl("attention_input", TORCH_BOX(&attention_input));
  library.impl("rotary_table", TORCH_BOX(&rotary_table));
}

}  // namespace msa::api

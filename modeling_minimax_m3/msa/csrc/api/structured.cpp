// Block lists by position alone.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "smxx/structured/structured_blocks.h"
#include "tensors.h"

namespace msa::api {

namespace {

Tensor structured_blocks_of(const Tensor& own_block, int64_t num_kv_heads, int64_t layer_idx,
                            int64_t local_blocks, int64_t anchor_blocks, int64_t anchor_stride,
                            int64_t random_blocks, int64_t seed) {
  const int64_t width = local_blocks + anchor_blocks + random_blocks;
  STD_TORCH_CHECK(own_block.scalar_type() == ScalarType::Long, "`own_block` must be int64, got ",
                  torch::headeronly::toString(own_block.scalar_type()));
  STD_TORCH_CHECK(own_block.dim() == 1 && own_block.is_contiguous(),
                  "`own_block` must be 1-D and contiguous");
  Tensor block_indices = torch::stable::new_empty(
      own_block, {own_block.size(0), num_kv_heads, width}, ScalarType::Int);
  if (block_indices.numel() == 0) return block_indices;

  const DeviceScope device(own_block);
  StructuredParams params{};
  params.own_block = static_cast<const int64_t*>(own_block.const_data_ptr());
  params.block_indices = static_cast<int32_t*>(block_indices.mutable_data_ptr());
  params.num_queries = to_int("own_block", own_block.size(0));
  params.num_kv_heads = to_int("num_kv_heads", num_kv_heads);
  params.width = to_int("width", width);
  params.local_blocks = to_int("local_blocks", local_blocks);
  params.anchor_blocks = to_int("anchor_blocks", anchor_blocks);
  params.anchor_stride = std::min(anchor_stride, int64_t{1} << 31);
  params.layer = static_cast<uint32_t>(layer_idx);
  params.seed_low = static_cast<uint32_t>(static_cast<uint64_t>(seed));
  params.seed_high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  params.num_sms = device.num_sms();
  launch_structured_blocks(params, device.stream());
  return block_indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def(
      "structured_blocks_of(Tensor own_block, int num_kv_heads, int layer_idx, int local_blocks, "
      "int anchor_blocks, int anchor_stride, int random_blocks, int seed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("structured_blocks_of", TORCH_BOX(&structured_blocks_of));
}

}  // namespace msa::api

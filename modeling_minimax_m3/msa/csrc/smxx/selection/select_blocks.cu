#include "select_blocks.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "config.h"
#include "schedule.h"
#include "smxx/common/cuda_check.h"
#include "smxx/common/supported.h"
#include "top_blocks_warp.cuh"

namespace msa {

namespace {

void check_supported(const SelectParams& params) {
  if (params.num_heads < 1 || params.num_heads > kScoreRows) {
    throw std::runtime_error("number of index heads must be 1 to " + std::to_string(kScoreRows) +
                             ", got " + std::to_string(params.num_heads));
  }
  check_topk(params.topk);
  check_block_size(params.block_size);
}

int64_t max_blocks(const SelectParams& params) {
  return (static_cast<int64_t>(params.total_k) + params.block_size - 1) / params.block_size;
}

// Floats between rows: room for the blocks of one sequence over all keys, in whole float4.
int64_t workspace_row_stride(const SelectParams& params) {
  return std::max<int64_t>((max_blocks(params) + 3) / 4 * 4, 4);
}

int tokens_per_tile(const SelectParams& params) {
  return kScoreRows / params.num_heads;
}

void launch_top_blocks(const SelectParams& params, const ScoreSchedule& schedule,
                       cudaStream_t stream) {
  const int64_t rows =
      static_cast<int64_t>(schedule.token_end - schedule.token_begin) * params.num_heads;
  const auto grid = static_cast<unsigned>((rows + kTopkWarps - 1) / kTopkWarps);
  auto* kernel = params.topk <= 32 ? top_blocks_kernel<1> : top_blocks_kernel<2>;
  kernel<<<grid, 32 * kTopkWarps, 0, stream>>>(params, schedule);
  MSA_CHECK_LAUNCH();
}

}  // namespace

int64_t select_blocks_workspace(const SelectParams& params) {
  check_supported(params);
  const int64_t token_elements = params.num_heads * workspace_row_stride(params);
  const int64_t wanted = std::min<int64_t>(params.total_q * token_elements, kWorkspaceElements);
  const int64_t one_tile = std::min(tokens_per_tile(params), std::max(params.total_q, 1));
  return std::max(wanted, one_tile * token_elements);
}

void launch_select_blocks(const SelectParams& params, const ScoreKernel& kernel,
                          cudaStream_t stream) {
  check_supported(params);
  if (params.total_q == 0) return;
  const int64_t num_blocks = max_blocks(params);
  ScoreSchedule schedule;
  schedule.row_stride = workspace_row_stride(params);
  schedule.tokens_per_tile = tokens_per_tile(params);
  const int64_t token_elements = params.num_heads * schedule.row_stride;
  int64_t chunk = std::min<int64_t>(params.workspace_elements / token_elements, params.total_q);
  if (chunk < params.total_q) chunk = chunk / schedule.tokens_per_tile * schedule.tokens_per_tile;
  if (chunk < 1) {
    throw std::runtime_error("workspace holds " + std::to_string(params.workspace_elements) +
                             " floats, block selection needs " +
                             std::to_string(select_blocks_workspace(params)));
  }
  for (int64_t begin = 0; begin < params.total_q; begin += chunk) {
    const int64_t end = std::min<int64_t>(begin + chunk, params.total_q);
    schedule.token_begin = static_cast<int>(begin);
    schedule.token_end = static_cast<int>(end);
    schedule.num_tiles =
        static_cast<int>((end - begin + schedule.tokens_per_tile - 1) / schedule.tokens_per_tile);
    // Large units load queries less often; but with few units the last ones leave most of the
    // device idle.
    schedule.blocks_per_unit = kernel.max_blocks_per_unit;
    auto num_units = [&] {
      return (num_blocks + schedule.blocks_per_unit - 1) / schedule.blocks_per_unit;
    };
    while (schedule.blocks_per_unit > 4 && schedule.num_tiles * num_units() < kernel.wanted_units) {
      schedule.blocks_per_unit /= 2;
    }
    schedule.num_units = static_cast<int>(num_units());
    // Queries that see at most topk blocks take them all, without scores.
    if (num_blocks > params.topk) kernel.launch(params, schedule, stream);
    launch_top_blocks(params, schedule, stream);
  }
}

}  // namespace msa

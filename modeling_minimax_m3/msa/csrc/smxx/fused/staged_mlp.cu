#include "staged_mlp.h"

#include <algorithm>

#include "few_token_experts.cuh"
#include "launch_staged.h"
#include "staged_products.cuh"

namespace msa {

namespace {

using namespace few_tokens;

constexpr int64_t kMostTileStride = int64_t{1} << 31;

// As few_token_gate_up_kernel.
__global__ void __launch_bounds__(kThreads, kStagedBlocksPerSm)
    staged_gate_up_kernel(const FewTokenMlpParams params) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ WarpSums<1, kStagedTiles> warp_sums;
  const int hidden = params.hidden, num_tokens = params.num_tokens;
  const int shared_tiles = params.width / kRows, expert_tiles = params.expert_width / kRows;
  const bool is_routed = blockIdx.x >= static_cast<unsigned>(shared_tiles);
  const int width = is_routed ? params.expert_width : params.width;
  const FewTokenWeights& matrix = is_routed ? params.expert_gate_up : params.gate_up;
  const bool starts_early = !is_routed && params.weights_are_constant;
  if (!starts_early) wait_for_kernels_before();
  // The down projection reads the experts' ids before it waits, so it may start only after the
  // kernels that wrote them: behind a wait.
  if (!starts_early) let_next_kernel_start();

  int tile = blockIdx.x, place = 0;
  int64_t row = 0;
  if (is_routed) {
    tile = (blockIdx.x - shared_tiles) % expert_tiles;
    place = (blockIdx.x - shared_tiles) / expert_tiles;
    const int expert = expert_at(params, place);
    if (expert < 0) return;
    row = int64_t{expert} * 2 * width;
  }
  row += tile * kRows;
  const int lane_token = threadIdx.x % 32 / 4;
  const bool has_token =
      lane_token < num_tokens && (!is_routed || pair_at(params, place, lane_token) >= 0);
  const int scales = 2 * num_tokens * hidden;
  const auto rows_at = [&](int) { return TileRows(matrix, row, width * hidden, hidden); };
  const auto factors_at = [&](int) {
    return Factors(scales, has_token ? 2 * lane_token * hidden : -1, hidden);
  };
  auto stream = weight_stream<4>(memory, 1, rows_at, factors_at);
  stream.start();
  for (int i = 0; i < kStagedTiles; ++i) {
    copy_scales(memory + scales + i * kRows * scale_stride(hidden), matrix, row + i * width,
                hidden);
  }
  if (starts_early) {
    wait_for_kernels_before();
    let_next_kernel_start();
  }
  copy_states(memory, params.x, num_tokens * hidden);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  float sums[kStagedTiles][4] = {};
  stream.add_all(sums);
  warp_sums.store(sums);
  __syncthreads();
  if (threadIdx.x < num_tokens * kRows) {
    const int token = threadIdx.x / kRows, column = threadIdx.x % kRows;
    float value = swiglu_oai(warp_sums.total(token, column), warp_sums.total(token, kRows + column),
                             params.alpha, params.limit);
    auto* out = static_cast<__nv_bfloat16*>(params.activations);
    if (is_routed) {
      const int pair = pair_at(params, place, token);
      if (pair < 0) return;
      value *= load_fresh(params.expert_weights + pair) * params.expert_scale;
      out += int64_t{pair} * width;
    } else {
      out += int64_t{num_tokens} * params.num_choices * params.expert_width + token * width;
    }
    out[tile * kRows + column] = __float2bfloat16_rn(value);
  }
}

// As few_token_down_kernel. Each MLP is a segment: that of every token, then the experts.
__global__ void __launch_bounds__(kThreads, kStagedBlocksPerSm)
    staged_down_kernel(const FewTokenMlpParams params) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ WarpSums<1, kStagedTiles> warp_sums;
  __shared__ int num_experts;
  __shared__ int experts[kMaxPairs];
  __shared__ int16_t pairs[kMaxPairs][kMaxStagedTokens];
  const int hidden = params.hidden, num_tokens = params.num_tokens;
  const int width = params.width, expert_width = params.expert_width;
  const int num_pairs = num_tokens * params.num_choices;
  const bool has_shared = width > 0;
  if (!params.weights_are_constant) wait_for_kernels_before();

  if (threadIdx.x < 32) {  // those that are ours, in the order of the list
    int count = 0;
    for (int begin = 0; begin < num_pairs; begin += 32) {
      const int place = begin + threadIdx.x;
      const int expert = place < num_pairs ? expert_at(params, place) : -1;
      const unsigned chosen = __ballot_sync(0xffffffff, expert >= 0);
      if (expert >= 0) {
        const int target = count + __popc(chosen & ((1u << threadIdx.x) - 1));
        experts[target] = expert;
        for (int token = 0; token < num_tokens; ++token) {
          pairs[target][token] = static_cast<int16_t>(pair_at(params, place, token));
        }
      }
      count += __popc(chosen);
    }
    if (threadIdx.x == 0) num_experts = count;
  }
  __syncthreads();

  const int expert_states = num_pairs * expert_width,
            all_states = expert_states + num_tokens * width;
  const int scales = 2 * all_states, expert_scales = scales + (has_shared ? scale_bytes(width) : 0);
  const int first_row = blockIdx.x * kRows * kStagedTiles, lane_token = threadIdx.x % 32 / 4;
  const auto rows_at = [&](int number) {
    const int place = number - has_shared;
    if (place < 0) return TileRows(params.down, first_row, kRows * width, width);
    return TileRows(params.expert_down, int64_t{experts[place]} * hidden + first_row,
                    kRows * expert_width, expert_width);
  };
  const auto factors_at = [&](int number) {
    const int place = number - has_shared;
    if (place < 0) {
      const int states = 2 * (expert_states + lane_token * width);
      return Factors(scales, lane_token < num_tokens ? states : -1, width);
    }
    const int pair = lane_token < num_tokens ? pairs[place][lane_token] : -1;
    return Factors(expert_scales + place * scale_bytes(expert_width),
                   pair >= 0 ? 2 * pair * expert_width : -1, expert_width);
  };
  auto stream = weight_stream<3>(memory, has_shared + num_experts, rows_at, factors_at);
  stream.start();
  for (int tile = 0; tile < kStagedTiles; ++tile) {
    const int64_t row = first_row + tile * kRows;
    if (has_shared) {
      copy_scales(memory + scales + tile * kRows * scale_stride(width), params.down, row, width);
    }
    for (int place = 0; place < num_experts; ++place) {
      copy_scales(memory + expert_scales + place * scale_bytes(expert_width) +
                      tile * kRows * scale_stride(expert_width),
                  params.expert_down, int64_t{experts[place]} * hidden + row, expert_width);
    }
  }
  wait_for_kernels_before();
  let_next_kernel_start();
  copy_states(memory, params.activations, all_states);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  float sums[kStagedTiles][4] = {};
  stream.add_all(sums);
  warp_sums.store(sums);
  __syncthreads();
  constexpr int kColumns = kRows * kStagedTiles;
  if (threadIdx.x < num_tokens * kColumns) {
    const int token = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
    static_cast<__nv_bfloat16*>(params.out)[token * hidden + first_row + column] =
        __float2bfloat16_rn(warp_sums.total(token, column));
  }
}

int gate_up_bytes(const FewTokenMlpParams& params) {
  return 2 * params.num_tokens * params.hidden + scale_bytes(params.hidden);
}

int down_bytes(const FewTokenMlpParams& params) {
  const int pairs = params.num_tokens * params.num_choices;
  return 2 * (pairs * params.expert_width + params.num_tokens * params.width) +
         (params.width > 0 ? scale_bytes(params.width) : 0) +
         pairs * (params.expert_width > 0 ? scale_bytes(params.expert_width) : 0);
}

}  // namespace

bool supports_staged_mlp(const FewTokenMlpParams& params) {
  return params.num_tokens <= kMaxStagedTokens && params.hidden % kStagedMultiple == 0 &&
         params.width % kStagedMultiple == 0 && params.expert_width % kStagedMultiple == 0 &&
         int64_t{std::max(params.width, params.expert_width)} * params.hidden < kMostTileStride &&
         std::max(gate_up_bytes(params), down_bytes(params)) <= kMostStagedBytes;
}

void launch_staged_mlp(const FewTokenMlpParams& params, cudaStream_t stream) {
  const int pairs = params.num_tokens * params.num_choices;
  const int tiles = params.width / kRows + pairs * (params.expert_width / kRows);
  launch_staged<staged_gate_up_kernel>(tiles, gate_up_bytes(params), stream, params);
  launch_staged<staged_down_kernel>(params.hidden / (kStagedTiles * kRows), down_bytes(params),
                                    stream, params);
}

}  // namespace msa

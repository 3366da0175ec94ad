#include "staged_linear.h"

#include "launch_staged.h"
#include "staged_products.cuh"

namespace msa {

namespace {

using namespace few_tokens;

constexpr int kTileRows = kStagedTiles * kRows;

// A thread block computes 16 outputs of one weight for all tokens.
__global__ void __launch_bounds__(kThreads, kStagedBlocksPerSm)
    staged_linear_kernel(const FewTokenLinearParams params) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ WarpSums<1, kStagedTiles> warp_sums;
  let_next_kernel_start();
  if (!params.weights_are_constant) wait_for_kernels_before();

  const int channels = params.channels, num_tokens = params.num_tokens;
  const int first_row = blockIdx.x * kTileRows, token = threadIdx.x % 32 / 4;
  FewTokenWeights matrix = params.weights[0];
  int row = first_row;
#pragma unroll
  for (int i = 1; i < kMaxLinearWeights; ++i) {
    if (i < params.num_weights && first_row >= params.first_rows[i]) {
      matrix = params.weights[i];
      row = first_row - params.first_rows[i];
    }
  }
  const int scales = 2 * num_tokens * channels;
  const auto rows_at = [&](int) { return TileRows(matrix, row, kRows * channels, channels); };
  const auto factors_at = [&](int) {
    return Factors(scales, token < num_tokens ? 2 * token * channels : -1, channels);
  };
  auto stream = weight_stream<4>(memory, 1, rows_at, factors_at);
  stream.start();
  for (int tile = 0; tile < kStagedTiles; ++tile) {
    copy_scales(memory + scales + tile * kRows * scale_stride(channels), matrix, row + tile * kRows,
                channels);
  }
  wait_for_kernels_before();
  copy_states(memory, params.x, num_tokens * channels);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  float sums[kStagedTiles][4] = {};
  stream.add_all(sums);
  warp_sums.store(sums);
  __syncthreads();
  if (threadIdx.x < num_tokens * kTileRows) {
    const int out_token = threadIdx.x / kTileRows, column = threadIdx.x % kTileRows;
    static_cast<__nv_bfloat16*>(
        params.out)[int64_t{out_token} * params.num_rows + first_row + column] =
        __float2bfloat16_rn(warp_sums.total(out_token, column));
  }
}

int shared_bytes(const FewTokenLinearParams& params) {
  return 2 * params.num_tokens * params.channels + scale_bytes(params.channels);
}

}  // namespace

bool supports_staged_linear(const FewTokenLinearParams& params) {
  for (int i = 0; i < params.num_weights; ++i) {
    if (params.first_rows[i] % kTileRows != 0) return false;
  }
  return params.num_tokens <= kMaxStagedTokens && params.num_rows % kTileRows == 0 &&
         params.channels % kStagedMultiple == 0 && shared_bytes(params) <= kMostStagedBytes;
}

void launch_staged_linear(const FewTokenLinearParams& params, cudaStream_t stream) {
  launch_staged<staged_linear_kernel>(params.num_rows / kTileRows, shared_bytes(params), stream,
                                      params);
}

}  // namespace msa

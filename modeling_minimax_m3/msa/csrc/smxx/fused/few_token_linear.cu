#include "few_token_linear.h"

#include <stdexcept>

#include "few_tokens.cuh"
#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/device.h"
#include "smxx/common/dispatch.h"

namespace msa {

namespace {

using namespace few_tokens;

// A thread block computes kTiles tiles of eight outputs for all tokens.
template <typename Weights, int kHalves, int kTiles>
__global__ void __launch_bounds__(kThreads, Weights::thread_blocks_per_sm(kHalves, kTiles))
    few_token_linear_kernel(const FewTokenLinearParams params) {
  using Element = typename Weights::Element;
  constexpr int kChannels = Weights::kChannels;
  constexpr int kSteps = Weights::loads(kHalves, kTiles) / kTiles;
  __shared__ WarpSums<kHalves, kTiles> warp_sums;
  let_next_kernel_start();
  if (!params.weights_are_constant) wait_for_kernels_before();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4;
  const int channels = params.channels, num_tokens = params.num_tokens;
  const int num_rows = params.num_rows;
  const int lane_channel = warp * kChannels + lane % 4 * 8 * Weights::kUnits;
  const int first_row = blockIdx.x * kRows * kTiles;

  Weights weights[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int row = min(first_row + tile * kRows + group, num_rows - 1);
    FewTokenWeights matrix = params.weights[0];
    int matrix_row = row;
#pragma unroll
    for (int i = 1; i < kMaxLinearWeights; ++i) {
      if (i < params.num_weights && row >= params.first_rows[i]) {
        matrix = params.weights[i];
        matrix_row = row - params.first_rows[i];
      }
    }
    weights[tile] = Weights(matrix, int64_t{matrix_row} * channels + lane_channel);
  }
  const Element* x = static_cast<const Element*>(params.x) + lane_channel;
  const bool has_low = group < num_tokens;
  const bool has_high = kHalves == 2 && group + 8 < num_tokens;

  float sums[kTiles][4] = {};
  constexpr int kStride = kWarps * kChannels;
  bool is_first = true;
  for (int begin = 0; begin + warp * kChannels < channels; begin += kSteps * kStride) {
    typename Weights::Loaded loaded[kSteps][kTiles];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int channel = begin + step * kStride;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const bool is_inside = channel + warp * kChannels < channels;
        loaded[step][tile] = is_inside ? weights[tile].load(channel) : typename Weights::Loaded{};
      }
    }
    if (is_first) wait_for_kernels_before();
    is_first = false;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int channel = begin + step * kStride;
      const bool is_inside = channel + warp * kChannels < channels;
      States<Weights> low, high;
      if (is_inside && has_low) low.load(x + int64_t{group} * channels + channel);
      if (is_inside && has_high) high.load(x + int64_t{group + 8} * channels + channel);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        add_products<Weights>(sums[tile], low, high, loaded[step][tile]);
      }
    }
  }
  if (is_first) wait_for_kernels_before();  // a warp without channels

  warp_sums.store(sums);
  __syncthreads();
  constexpr int kColumns = WarpSums<kHalves, kTiles>::kColumns;
  for (int i = threadIdx.x; i < num_tokens * kColumns; i += kThreads) {
    const int token = i / kColumns, column = i % kColumns;
    if (first_row + column < num_rows) {
      static_cast<Element*>(params.out)[int64_t{token} * num_rows + first_row + column] =
          to_element<Element>(warp_sums.total(token, column));
    }
  }
}

template <typename Weights, int kHalves, int kTiles>
void launch(const FewTokenLinearParams& params, cudaStream_t stream) {
  const int rows = params.num_rows;
  const unsigned grid = (rows + kRows * kTiles - 1) / (kRows * kTiles);
  launch_dependent<few_token_linear_kernel<Weights, kHalves, kTiles>>(dim3(grid), kThreads, stream,
                                                                      params);
}

template <typename Weights>
void launch_for_tokens(const FewTokenLinearParams& params, cudaStream_t stream) {
  if (params.channels % Weights::kChannels != 0) {
    throw std::runtime_error(
        "few_token_linear takes channels that are a multiple of 32, of 64 for MXFP8 weights");
  }
  // The more tokens, the more weight rows must share what is read of them. For few, what counts is
  // that the last round of thread blocks leaves few places empty.
  const auto filled = [&](int tiles) {
    const int blocks = (params.num_rows + kRows * tiles - 1) / (kRows * tiles);
    const int places = num_multiprocessors() * Weights::thread_blocks_per_sm(1, tiles);
    const int rounds = (blocks + places - 1) / places;
    return static_cast<float>(blocks) / (static_cast<float>(rounds) * places);
  };
  if (params.num_tokens <= 2 && filled(1) >= filled(2)) {
    launch<Weights, 1, 1>(params, stream);
  } else if (params.num_tokens <= 8) {
    launch<Weights, 1, 2>(params, stream);
  } else {
    launch<Weights, 2, 4>(params, stream);
  }
}

}  // namespace

void launch_few_token_linear(const FewTokenLinearParams& params, cudaStream_t stream) {
  if (params.num_tokens < 1 || params.num_tokens > 16 || params.num_weights < 1 ||
      params.num_weights > kMaxLinearWeights) {
    throw std::runtime_error("few_token_linear takes 1 to 16 tokens and 1 to 5 weights");
  }
  if (params.num_rows == 0) return;
  dispatch_weights(params.dtype, params.weights[0], [&](auto form) {
    launch_for_tokens<typename decltype(form)::Type>(params, stream);
  });
}

}  // namespace msa

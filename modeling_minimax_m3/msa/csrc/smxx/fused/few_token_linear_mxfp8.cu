// spills: 80 registers leave room for 24 warps; what does not fit is read once for a unit
#include "few_token_linear_mxfp8.h"

#include <algorithm>

#include "few_tokens_mxfp8.cuh"
#include "smxx/common/device.h"

namespace msa {

namespace {

using namespace few_tokens;
using Element = __nv_bfloat16;

template <int kWarps>
struct Linear {
  const FewTokenLinearParams& params;
  const int num_tokens, tiles, units;

  explicit __device__ Linear(const FewTokenLinearParams& params)
      : params(params),
        num_tokens(params.num_tokens),
        tiles(params.num_rows / kTileRows),
        units(params.channels / kUnitChannels) {}

  __device__ int first_tile() const { return blockIdx.x; }
  __device__ int next_tile(int tile) const { return tile + gridDim.x; }
  __device__ int first_unit() const { return threadIdx.x / 32; }
  __device__ int next_unit(int unit) const { return unit + kWarps; }

  __device__ UnitPlace place(int tile, int unit) const {
    FewTokenWeights matrix = params.weights[0];
    int64_t row = tile * kTileRows;
#pragma unroll
    for (int i = 1; i < kMaxLinearWeights; ++i) {
      if (i < params.num_weights && tile * kTileRows >= params.first_rows[i]) {
        matrix = params.weights[i];
        row = tile * kTileRows - params.first_rows[i];
      }
    }
    row += threadIdx.x % 32 / 4;
    return {matrix, row * params.channels + unit * kUnitChannels, 8 * params.channels};
  }

  __device__ void prepare() const {
    extern __shared__ UnitStates unit_states[];
    wait_for_kernels_before();
    const auto* x = static_cast<const Element*>(params.x);
    for (int unit = first_unit(); unit < units; unit = next_unit(unit)) {
      for (int token = 0; token < num_tokens; ++token) {
        convert_states(unit_states[states(unit, token)],
                       x + int64_t{token} * params.channels + unit * kUnitChannels);
      }
    }
  }

  // (tokens, units)
  __device__ int states(int unit, int token) const { return kFirstStates + token * units + unit; }

  __device__ void store(int tile, int row, int token, const RowSums& sums) const {
    auto* out = static_cast<Element*>(params.out) + int64_t{token} * params.num_rows;
    out[tile * kTileRows + row] = to_element<Element>(sums.upper);
    out[tile * kTileRows + row + 8] = to_element<Element>(sums.lower);
  }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    linear_kernel(const FewTokenLinearParams params) {
  let_next_kernel_start();
  if (!params.weights_are_constant) wait_for_kernels_before();
  Linear<Shape::kWarps> source(params);
  multiply_tiles<Shape>(source);
}

int64_t shared_bytes(const FewTokenLinearParams& params) {
  return states_bytes(int64_t{params.num_tokens} * (params.channels / kUnitChannels));
}

// The share of its warps that a stream keeps busy.
template <typename Shape>
float busy_share(const FewTokenLinearParams& params) {
  const auto share = [](int work, int places) {
    return static_cast<float>(work) / ((work + places - 1) / places * places);
  };
  return share(params.num_rows / kTileRows, num_multiprocessors() * Shape::kBlocks) *
         share(params.channels / kUnitChannels, Shape::kWarps);
}

}  // namespace

bool supports_few_token_linear_mxfp8(const FewTokenLinearParams& params) {
  for (int i = 0; i < params.num_weights; ++i) {
    if (params.first_rows[i] % kTileRows != 0) return false;
  }
  return params.weights[0].scales != nullptr && params.dtype == Dtype::kBFloat16 &&
         params.num_tokens <= kStreamedTokens && params.num_rows % kTileRows == 0 &&
         params.channels % kUnitChannels == 0 && fits_shared_memory(shared_bytes(params));
}

void launch_few_token_linear_mxfp8(const FewTokenLinearParams& params, cudaStream_t stream) {
  const int tiles = params.num_rows / kTileRows;
  if (busy_share<NarrowStream>(params) >= busy_share<WideStream>(params)) {
    launch_stream<linear_kernel<NarrowStream>, NarrowStream>(params, tiles, shared_bytes(params),
                                                             stream);
  } else {
    launch_stream<linear_kernel<WideStream>, WideStream>(params, tiles, shared_bytes(params),
                                                         stream);
  }
}

}  // namespace msa

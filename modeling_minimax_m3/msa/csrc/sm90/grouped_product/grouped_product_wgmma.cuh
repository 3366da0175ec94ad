// The grouped product with wgmma: persistent thread blocks, in each one thread that copies and
// three warpgroups that multiply.
#pragma once

#include <cuda_runtime.h>

#include "config.h"
#include "grouped_product.h"
#include "sm90/ptx/mbarrier.cuh"
#include "sm90/ptx/tensor_copy.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "smxx/common/async_copy.cuh"
#include "smxx/common/matrix.cuh"

namespace msa::sm90 {

struct GroupedProductArguments {
  CUtensorMap x;        // boxes of 64 rows
  CUtensorMap weights;  // boxes of 128 outputs
  GroupedProductParams params;
};

// What a thread block computes at a time.
struct GroupedTile {
  int group;
  int row;  // first row
  int row_end;
  int output;  // first output
};

// Tiles are numbered group by group, within a group by outputs, and within these by rows, so that
// the thread blocks at work share weights and rows. A thread block takes every gridDim.x-th.
template <int kStep>  // outputs of a tile
class GroupedTiles {
 public:
  __device__ GroupedTiles(const GroupedProductParams& params, int num_outputs)
      : params_(params), output_tiles_((num_outputs + kStep - 1) / kStep), place_(blockIdx.x) {
    next_group();
  }

  // False behind the last.
  __device__ bool next(GroupedTile& tile) {
    while (group_ < params_.num_groups && place_ >= output_tiles_ * row_tiles()) {
      place_ -= output_tiles_ * row_tiles();
      next_group();
    }
    if (group_ >= params_.num_groups) return false;
    // As few tiles as possible, of rows as equal as possible.
    const int tiles = row_tiles();
    const int rows = (parts() + tiles - 1) / tiles * GroupedProductConfig::kPartRows;
    tile.group = group_;
    tile.row = begin_ + place_ % tiles * rows;
    tile.row_end = min(tile.row + rows, end_);
    tile.output = place_ / tiles * kStep;
    place_ += gridDim.x;
    return true;
  }

 private:
  __device__ int parts() const {
    constexpr int kPartRows = GroupedProductConfig::kPartRows;
    return (end_ - begin_ + kPartRows - 1) / kPartRows;
  }
  __device__ int row_tiles() const {
    constexpr int kParts = GroupedProductConfig::kParts;
    return (parts() + kParts - 1) / kParts;
  }
  __device__ void next_group() {
    ++group_;
    begin_ = end_;
    if (group_ < params_.num_groups) {
      end_ =
          max(min(__ldg(params_.group_ends + group_), static_cast<int>(params_.num_rows)), begin_);
    }
  }

  const GroupedProductParams& params_;
  int output_tiles_;
  int place_;  // of the next tile, from the group's first on
  int group_ = -1;
  int begin_ = 0;  // rows of the group
  int end_ = 0;
};

template <bool kGated>
using GroupedTilesOf =
    GroupedTiles<kGated ? GroupedProductConfig::kHalfOutputs : GroupedProductConfig::kOutputs>;

// The place in the ring of stages.
struct StageTurn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ int previous() const {
    return (stage == 0 ? GroupedProductConfig::kStages : stage) - 1;
  }
  __device__ void advance() {
    if (++stage == GroupedProductConfig::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One thread copies what all tiles of the thread block need, stage by stage.
template <bool kGated>
__device__ void copy_tiles(const GroupedProductArguments& arguments,
                           GroupedProductStorage& storage) {
  using Config = GroupedProductConfig;
  const GroupedProductParams& params = arguments.params;
  const int num_outputs = kGated ? params.outputs / 2 : params.outputs;
  const int second = kGated ? num_outputs : Config::kHalfOutputs;
  GroupedTilesOf<kGated> tiles(params, num_outputs);
  StageTurn turn;
  for (GroupedTile tile; tiles.next(tile);) {
    // As many parts as warpgroups have rows.
    const int parts = (tile.row_end - tile.row + Config::kPartRows - 1) / Config::kPartRows;
    const int bytes = parts * Config::kPartBytes + 2 * Config::kHalfOutputBytes;
    for (int channel = 0; channel < params.channels; channel += Config::kChannels) {
      barrier_wait(shared_address(&storage.emptied[turn.stage]), turn.parity ^ 1);
      const uint32_t filled = shared_address(&storage.filled[turn.stage]);
      barrier_arrive_expecting(filled, bytes);
      const uint32_t x = shared_address(storage.stages[turn.stage].x);
      const uint32_t weights = shared_address(storage.stages[turn.stage].weights);
      for (int part = 0; part < parts; ++part) {
        copy_box(x + part * Config::kPartBytes, arguments.x, filled, channel,
                 tile.row + part * Config::kPartRows, 0);
      }
      copy_box(weights, arguments.weights, filled, channel, tile.output, tile.group);
      copy_box(weights + Config::kHalfOutputBytes, arguments.weights, filled, channel,
               tile.output + second, tile.group);
      turn.advance();
    }
  }
}

// gate * sigmoid(alpha * gate) * (up + 1), both clamped. As in PyTorch, a NaN passes the clamps.
__device__ __forceinline__ float grouped_swiglu(float gate, float up, float alpha, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : (up < -limit ? -limit : up);
  return (up + 1.f) * (gate / (1.f + __expf(-alpha * gate)));
}

// Writes two neighbouring outputs of a row.
template <typename Element>
__device__ __forceinline__ void store_pair(Element* row, int column, int num_columns, float first,
                                           float second) {
  if (column + 1 < num_columns) {
    *reinterpret_cast<uint32_t*>(row + column) = pack<Element>(first, second);
  } else if (column < num_columns) {
    const uint32_t both = pack<Element>(first, second);
    *reinterpret_cast<uint16_t*>(row + column) = static_cast<uint16_t>(both);
  }
}

// This warpgroup needs a stage no more.
__device__ __forceinline__ void release_stage(GroupedProductStorage& storage, int stage) {
  if (threadIdx.x % 128 == 0) barrier_arrive(shared_address(&storage.emptied[stage]));
}

// Writes the sums of a warpgroup's 64 rows, from `row` on: of columns i / 4 * 8 and so on in
// accumulators i to i + 3. Gates and what they gate are 48 accumulators each.
template <typename Element, bool kGated>
__device__ __forceinline__ void store_rows(const GroupedProductParams& params,
                                           const GroupedTile& tile, int row,
                                           const float (&sums)[96]) {
  const int lane = threadIdx.x % 32;
  const int num_columns = kGated ? params.outputs / 2 : params.outputs;
  const int first = tile.output + 2 * (lane % 4);
  row += threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= tile.row_end) continue;
    auto* out = static_cast<Element*>(params.out) + int64_t{row + 8 * half} * num_columns;
#pragma unroll
    for (int i = 2 * half; i < (kGated ? 48 : 96); i += 4) {
      const int column = first + i / 4 * 8;
      if constexpr (kGated) {
        store_pair(out, column, num_columns,
                   grouped_swiglu(sums[i], sums[48 + i], params.alpha, params.limit),
                   grouped_swiglu(sums[i + 1], sums[49 + i], params.alpha, params.limit));
      } else {
        store_pair(out, column, num_columns, sums[i], sums[i + 1]);
      }
    }
  }
}

template <typename Element, bool kGated>
__device__ void multiply_tiles(const GroupedProductArguments& arguments,
                               GroupedProductStorage& storage) {
  using Config = GroupedProductConfig;
  const GroupedProductParams& params = arguments.params;
  const int num_stages = (params.channels + Config::kChannels - 1) / Config::kChannels;
  const int warpgroup = threadIdx.x / 128;
  GroupedTilesOf<kGated> tiles(params, kGated ? params.outputs / 2 : params.outputs);
  StageTurn turn;
  float sums[96];
  for (GroupedTile tile; tiles.next(tile);) {
    const int row = tile.row + warpgroup * Config::kPartRows;
    if (row >= tile.row_end) {  // nothing for this warpgroup
      for (int i = 0; i < num_stages; ++i) {
        barrier_wait(shared_address(&storage.filled[turn.stage]), turn.parity);
        release_stage(storage, turn.stage);
        turn.advance();
      }
      continue;
    }
    for (int i = 0; i < num_stages; ++i) {
      barrier_wait(shared_address(&storage.filled[turn.stage]), turn.parity);
      const GroupedProductStage& stage = storage.stages[turn.stage];
      const uint64_t x =
          swizzled_descriptor(shared_address(stage.x) + warpgroup * Config::kPartBytes);
      const uint64_t weights = swizzled_descriptor(shared_address(stage.weights));
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Config::kChannels / 16; ++step) {
        wgmma_m64n192k16<Element>(sums, advanced(x, 32 * step), advanced(weights, 32 * step),
                                  i > 0 || step > 0);
      }
      wgmma_commit();
      if (i > 0) {
        wgmma_wait<1>();
        release_stage(storage, turn.previous());
      }
      turn.advance();
    }
    wgmma_wait<0>();
    release_stage(storage, turn.previous());
    accumulators_ready(sums);
    store_rows<Element, kGated>(params, tile, row, sums);
  }
}

template <typename Element, bool kGated>
__global__ void __launch_bounds__(GroupedProductConfig::kThreads, 1)
    grouped_product_kernel(const __grid_constant__ GroupedProductArguments arguments) {
  using Config = GroupedProductConfig;
  extern __shared__ unsigned char shared[];
  // The swizzle repeats every 1024 bytes.
  auto& storage = *reinterpret_cast<GroupedProductStorage*>(
      shared + (1024 - shared_address(shared) % 1024) % 1024);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(arguments.x);
    prefetch_tensor_map(arguments.weights);
    for (int i = 0; i < Config::kStages; ++i) {
      barrier_init(shared_address(&storage.filled[i]), 1);
      barrier_init(shared_address(&storage.emptied[i]), Config::kConsumers / 128);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= Config::kConsumers) {
    if (threadIdx.x == Config::kConsumers) copy_tiles<kGated>(arguments, storage);
  } else {
    multiply_tiles<Element, kGated>(arguments, storage);
  }
}

}  // namespace msa::sm90

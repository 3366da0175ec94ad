// The grouped product with wgmma: persistent clusters of two thread blocks, in each one thread that
// copies and two warpgroups that multiply.
#pragma once

#include <cuda_runtime.h>

#include "config.h"
#include "grouped_product.h"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/mbarrier.cuh"
#include "sm90/ptx/registers.cuh"
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

// What a cluster of two thread blocks computes at a time. Either both read the same weights and
// have 128 rows each, or both read the same rows (128, or at most 64 at the end of a group) and
// have weights of their own. What both read is copied once, to both.
struct GroupedTile {
  int group;
  int row;  // first row of this thread block
  int row_end;
  int output;  // first output of this thread block
  bool shares_weights;
  bool is_half;  // at most 64 rows
};

// The tiles of all groups stand in one line: all those of some outputs of a group come before those
// of the next, so that the clusters at work read the same weights and the same rows. A cluster
// takes every (gridDim.x / 2)-th.
template <int kStep>  // outputs of a thread block
class GroupedTiles {
 public:
  __device__ GroupedTiles(const GroupedProductParams& params, int num_outputs)
      : params_(params),
        blocks_((num_outputs + 2 * kStep - 1) / (2 * kStep)),
        place_(blockIdx.x / 2) {
    next_group();
  }

  // False behind the last.
  __device__ bool next(GroupedTile& tile) {
    while (group_ < params_.num_groups && place_ >= blocks_ * tiles_) {
      place_ -= blocks_ * tiles_;
      next_group();
    }
    if (group_ >= params_.num_groups) return false;
    const int block = static_cast<int>(place_ / tiles_);
    const int i = static_cast<int>(place_ % tiles_);
    const int rank = static_cast<int>(cluster_rank());
    constexpr int kRows = GroupedProductConfig::kRows;
    tile.group = group_;
    tile.row_end = end_;
    tile.shares_weights = i < 2 * pairs_;
    if (tile.shares_weights) {
      tile.row = begin_ + (i % pairs_ * 2 + rank) * kRows;
      tile.output = (2 * block + i / pairs_) * kStep;
    } else {
      tile.row = begin_ + i * kRows;
      tile.output = (2 * block + rank) * kStep;
    }
    tile.is_half = end_ - tile.row <= GroupedProductConfig::kHalfRows;
    place_ += gridDim.x / 2;
    return true;
  }

 private:
  __device__ void next_group() {
    constexpr int kRows = GroupedProductConfig::kRows;
    ++group_;
    begin_ = end_;
    if (group_ < params_.num_groups) {
      end_ =
          max(min(__ldg(params_.group_ends + group_), static_cast<int>(params_.num_rows)), begin_);
    }
    const int rows = end_ - begin_, rest = rows % (2 * kRows);
    // A last pair must leave neither thread block with half of its rows or less.
    const bool has_last_pair = rest > kRows + GroupedProductConfig::kHalfRows;
    pairs_ = rows / (2 * kRows) + (has_last_pair ? 1 : 0);
    tiles_ = 2 * pairs_ + (has_last_pair ? 0 : (rest + kRows - 1) / kRows);
  }

  const GroupedProductParams& params_;
  int64_t blocks_;  // of outputs
  int64_t place_;   // of the next tile, from the group's first on
  int group_ = -1;
  int begin_ = 0;  // rows of the group
  int end_ = 0;
  int pairs_ = 0;  // tiles of 256 rows that share their weights
  int tiles_ = 0;  // for each block of outputs
};

template <bool kGated>
using GroupedTilesOf =
    GroupedTiles<kGated ? GroupedProductConfig::kHalfOutputs : GroupedProductConfig::kOutputs>;

// The place in the ring of stages.
struct StageTurn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == GroupedProductConfig::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One thread copies what all tiles of the thread block need, stage by stage, and its part of what
// the cluster shares.
template <bool kGated>
__device__ void copy_tiles(const GroupedProductArguments& arguments,
                           GroupedProductStorage& storage) {
  using Config = GroupedProductConfig;
  constexpr uint16_t kBoth = 3;
  const GroupedProductParams& params = arguments.params;
  const int rank = static_cast<int>(cluster_rank());
  const int num_outputs = kGated ? params.outputs / 2 : params.outputs;
  const int second = kGated ? num_outputs : Config::kHalfOutputs;
  GroupedTilesOf<kGated> tiles(params, num_outputs);
  StageTurn turn;
  for (GroupedTile tile; tiles.next(tile);) {
    const int bytes = (tile.is_half ? 1 : 2) * Config::kHalfRowBytes + 2 * Config::kHalfOutputBytes;
    for (int channel = 0; channel < params.channels; channel += Config::kChannels) {
      barrier_wait(shared_address(&storage.emptied[turn.stage]), turn.parity ^ 1);
      const uint32_t filled = shared_address(&storage.filled[turn.stage]);
      barrier_arrive_expecting(filled, bytes);
      const uint32_t x = shared_address(storage.stages[turn.stage].x);
      const uint32_t weights = shared_address(storage.stages[turn.stage].weights);
      const auto copy_rows = [&](int half, auto copy) {
        copy(x + half * Config::kHalfRowBytes, arguments.x, tile.row + half * Config::kHalfRows, 0);
      };
      const auto copy_outputs = [&](int half, auto copy) {
        copy(weights + half * Config::kHalfOutputBytes, arguments.weights,
             tile.output + half * second, tile.group);
      };
      const auto to_self = [&](uint32_t target, const CUtensorMap& map, int y, int z) {
        copy_box(target, map, filled, channel, y, z);
      };
      const auto to_both = [&](uint32_t target, const CUtensorMap& map, int y, int z) {
        copy_box_to(kBoth, target, map, filled, channel, y, z);
      };
      if (tile.shares_weights) {
        copy_rows(0, to_self);
        copy_rows(1, to_self);
        copy_outputs(rank, to_both);
      } else {
        if (!tile.is_half) {
          copy_rows(rank, to_both);
        } else if (rank == 0) {
          copy_rows(0, to_both);
        }
        copy_outputs(0, to_self);
        copy_outputs(1, to_self);
      }
      turn.advance();
    }
  }
}

// gate * sigmoid(alpha * gate) * (up + 1), both clamped. As in PyTorch, a NaN passes the clamps.
__device__ __forceinline__ float grouped_swiglu(float gate, float up, float alpha, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : (up < -limit ? -limit : up);
  return (up + 1.f) * gate * __frcp_rn(1.f + __expf(-alpha * gate));
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

// Tells both thread blocks of the cluster that this warpgroup needs a stage no more.
__device__ __forceinline__ void release_stage(GroupedProductStorage& storage, StageTurn& turn) {
  if (threadIdx.x % 128 < 2) {
    barrier_arrive_at(shared_address(&storage.emptied[turn.stage]), threadIdx.x % 128);
  }
  turn.advance();
}

// The sums of one tile. `multiply` starts the products of a stage, whose first sums are new where
// its last argument says so; the warpgroup releases each stage when its products are done.
template <typename Multiply>
__device__ __forceinline__ void sum_stages(int num_stages, GroupedProductStorage& storage,
                                           StageTurn& turn, const Multiply& multiply) {
  StageTurn done = turn;
  for (int i = 0; i < num_stages; ++i) {
    barrier_wait(shared_address(&storage.filled[turn.stage]), turn.parity);
    wgmma_fence();
    multiply(storage.stages[turn.stage], i > 0);
    wgmma_commit();
    if (i > 0) {
      wgmma_wait<1>();
      release_stage(storage, done);
    }
    turn.advance();
  }
  wgmma_wait<0>();
  release_stage(storage, done);
}

// Where a warpgroup's outputs go: its rows, and its first column.
struct GroupedOutput {
  int row;
  int row_end;
  int column;
  int num_columns;
};

// Calls `value(i)` for the value in accumulator i, of columns i / 4 * 8 from the first column on.
template <typename Element, int kCount, typename Value>
__device__ __forceinline__ void store_rows(void* base, const GroupedOutput& output,
                                           const Value& value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = output.row + threadIdx.x / 32 % 4 * 16 + lane / 4 + 8 * half;
    if (row >= output.row_end) continue;
    auto* out = static_cast<Element*>(base) + int64_t{row} * output.num_columns;
    const int column = output.column + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      store_pair(out, column + 2 * i, output.num_columns, value(i + 2 * half),
                 value(i + 2 * half + 1));
    }
  }
}

template <typename Element, bool kGated>
__device__ void multiply_tiles(const GroupedProductArguments& arguments,
                               GroupedProductStorage& storage) {
  using Config = GroupedProductConfig;
  constexpr int kSteps = Config::kChannels / 16;
  const GroupedProductParams& params = arguments.params;
  const int num_stages = (params.channels + Config::kChannels - 1) / Config::kChannels;
  const int num_columns = kGated ? params.outputs / 2 : params.outputs;
  const int warpgroup = threadIdx.x / 128;
  GroupedTilesOf<kGated> tiles(params, num_columns);
  StageTurn turn;
  for (GroupedTile tile; tiles.next(tile);) {
    GroupedOutput output{tile.row, tile.row_end, tile.output, num_columns};
    if (!tile.is_half) {
      output.row += warpgroup * Config::kHalfRows;
      float sums[128];
      sum_stages(num_stages, storage, turn, [&](const GroupedProductStage& stage, bool adds) {
        const uint64_t x =
            swizzled_descriptor(shared_address(stage.x) + warpgroup * Config::kHalfRowBytes);
        const uint64_t weights = swizzled_descriptor(shared_address(stage.weights));
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          wgmma_m64n256k16<Element>(sums, advanced(x, 32 * step), advanced(weights, 32 * step),
                                    adds || step > 0);
        }
      });
      accumulators_ready(sums);
      if constexpr (kGated) {
        store_rows<Element, 64>(params.out, output, [&](int i) {
          return grouped_swiglu(sums[i], sums[64 + i], params.alpha, params.limit);
        });
      } else {
        store_rows<Element, 128>(params.out, output, [&](int i) { return sums[i]; });
      }
    } else if constexpr (kGated) {
      output.column += warpgroup * (Config::kHalfOutputs / 2);
      float gates[32], ups[32];
      sum_stages(num_stages, storage, turn, [&](const GroupedProductStage& stage, bool adds) {
        const uint64_t x = swizzled_descriptor(shared_address(stage.x));
        const uint64_t weights = swizzled_descriptor(shared_address(stage.weights) +
                                                     warpgroup * (Config::kHalfOutputBytes / 2));
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          wgmma_m64n64k16<Element, false, false>(gates, advanced(x, 32 * step),
                                                 advanced(weights, 32 * step), adds || step > 0);
          wgmma_m64n64k16<Element, false, false>(
              ups, advanced(x, 32 * step), advanced(weights, Config::kHalfOutputBytes + 32 * step),
              adds || step > 0);
        }
      });
      accumulators_ready(gates);
      accumulators_ready(ups);
      store_rows<Element, 32>(params.out, output, [&](int i) {
        return grouped_swiglu(gates[i], ups[i], params.alpha, params.limit);
      });
    } else {
      output.column += warpgroup * Config::kHalfOutputs;
      float sums[64];
      sum_stages(num_stages, storage, turn, [&](const GroupedProductStage& stage, bool adds) {
        const uint64_t x = swizzled_descriptor(shared_address(stage.x));
        const uint64_t weights = swizzled_descriptor(shared_address(stage.weights) +
                                                     warpgroup * Config::kHalfOutputBytes);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          wgmma_m64n128k16<Element>(sums, advanced(x, 32 * step), advanced(weights, 32 * step),
                                    adds || step > 0);
        }
      });
      accumulators_ready(sums);
      store_rows<Element, 64>(params.out, output, [&](int i) { return sums[i]; });
    }
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
      barrier_init(shared_address(&storage.emptied[i]), 2 * Config::kConsumers / 128);
    }
    fence_barrier_init();
  }
  sync_cluster();
  if (threadIdx.x >= Config::kConsumers) {
    give_registers<40>();
    if (threadIdx.x == Config::kConsumers) copy_tiles<kGated>(arguments, storage);
  } else {
    take_registers<232>();
    multiply_tiles<Element, kGated>(arguments, storage);
  }
  __syncwarp();
  sync_cluster();  // the other thread block may still copy and arrive here
}

}  // namespace msa::sm90

#include "expert_order.h"

#include <stdexcept>
#include <string>

#include "smxx/common/dependent_launch.cuh"

namespace msa {

namespace {

// A counting sort in three kernels: tiles of pairs are counted by expert, the counts of an expert
// are summed over the tiles before, and each tile gives its pairs their places. A group is what the
// pairs of one expert form; the last group has the pairs of no expert.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPairsOfThread = 8;
constexpr int kPairsOfWarp = 32 * kPairsOfThread;
constexpr int kTile = kThreads * kPairsOfThread;
constexpr int kMaxGroups = kMaxOrderedExperts + 1;
constexpr int kGroupsOfThread = (kMaxGroups + kThreads - 1) / kThreads;
constexpr unsigned kWholeWarp = 0xffffffff;

__host__ __device__ __forceinline__ int num_groups(const ExpertOrderParams& params) {
  return params.num_experts + 1;
}

__host__ __device__ __forceinline__ int num_tiles(const ExpertOrderParams& params) {
  return params.num_pairs / kTile + (params.num_pairs % kTile != 0);
}

// (groups, tiles): pairs of a tile, then those of the tiles before.
__device__ __forceinline__ int32_t* counts_of_tiles(const ExpertOrderParams& params) {
  return params.workspace;
}

// (groups): pairs of all tiles.
__device__ __forceinline__ int32_t* counts_of_groups(const ExpertOrderParams& params) {
  return params.workspace + static_cast<int64_t>(num_groups(params)) * num_tiles(params);
}

__device__ __forceinline__ int group_of(const ExpertOrderParams& params, int64_t pair) {
  const int64_t id = params.expert_ids[pair];
  return id >= 0 && id < params.num_experts ? static_cast<int>(id) : params.num_experts;
}

// Sum over the lanes before.
__device__ __forceinline__ int sum_before(int value, int lane) {
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kWholeWarp, sum, distance);
    if (lane >= distance) sum += other;
  }
  return sum - value;
}

// A thread block counts a tile.
__global__ void __launch_bounds__(kThreads) count_tiles_kernel(const ExpertOrderParams params) {
  wait_for_previous_kernel(params.expert_ids, params.workspace);
  __shared__ int counts[kMaxGroups];
  const int groups = num_groups(params);
  for (int group = threadIdx.x; group < groups; group += kThreads) counts[group] = 0;
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * kTile;
#pragma unroll
  for (int i = 0; i < kPairsOfThread; ++i) {
    const int64_t pair = first + i * kThreads + threadIdx.x;
    if (pair < params.num_pairs) atomicAdd(counts + group_of(params, pair), 1);
  }
  __syncthreads();
  for (int group = threadIdx.x; group < groups; group += kThreads) {
    counts_of_tiles(params)[static_cast<int64_t>(group) * gridDim.x + blockIdx.x] = counts[group];
  }
}

// A warp sums the counts of a group.
__global__ void __launch_bounds__(kThreads) sum_tiles_kernel(const ExpertOrderParams params) {
  wait_for_previous_kernel(params.workspace);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int group = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x / 32);
  if (group >= num_groups(params)) return;
  const int tiles = num_tiles(params);
  int32_t* counts = counts_of_tiles(params) + static_cast<int64_t>(group) * tiles;
  int total = 0;
  for (int first = 0; first < tiles; first += 32) {
    const int tile = first + lane;
    const int count = tile < tiles ? counts[tile] : 0;
    const int before = sum_before(count, lane);
    if (tile < tiles) counts[tile] = total + before;
    total += __shfl_sync(kWholeWarp, before + count, 31);
  }
  if (lane == 0) counts_of_groups(params)[group] = total;
}

// A thread block gives the pairs of a tile their places; the first one also writes the offsets.
__global__ void __launch_bounds__(kThreads) place_pairs_kernel(const ExpertOrderParams params) {
  wait_for_previous_kernel(params.expert_ids, params.workspace);
  // Pairs of each warp by group, then the place of the warp's next pair of that group.
  __shared__ int places[kWarps][kMaxGroups];
  __shared__ int sums_of_warps[kWarps];
  const int groups = num_groups(params);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  for (int group = lane; group < groups; group += 32) places[warp][group] = 0;
  __syncwarp();

  // A warp goes through neighbouring pairs in their order.
  const int64_t first = int64_t{blockIdx.x} * kTile + warp * kPairsOfWarp + lane;
  int group_of_pair[kPairsOfThread], rank_in_warp[kPairsOfThread];
#pragma unroll
  for (int i = 0; i < kPairsOfThread; ++i) {
    const int64_t pair = first + 32 * i;
    const bool exists = pair < params.num_pairs;
    // Those behind the last pair are lanes and rounds behind all others: they move no pair.
    const int group = exists ? group_of(params, pair) : params.num_experts;
    const unsigned same = __match_any_sync(kWholeWarp, group);
    const int before = __popc(same & ((1u << lane) - 1));
    group_of_pair[i] = group;
    rank_in_warp[i] = places[warp][group] + before;
    __syncwarp();
    if (before == 0) places[warp][group] += __popc(same);
    __syncwarp();
  }

  // Where the groups start: a sum over the threads before, each of which has neighbouring groups.
  int starts[kGroupsOfThread];
  int own = 0;
#pragma unroll
  for (int i = 0; i < kGroupsOfThread; ++i) {
    const int group = static_cast<int>(threadIdx.x) * kGroupsOfThread + i;
    starts[i] = own;
    if (group < groups) own += counts_of_groups(params)[group];
  }
  const int before = sum_before(own, lane);
  if (lane == 31) sums_of_warps[warp] = before + own;
  __syncthreads();
  int start = before;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) start += sums_of_warps[i];
  }
#pragma unroll
  for (int i = 0; i < kGroupsOfThread; ++i) {
    const int group = static_cast<int>(threadIdx.x) * kGroupsOfThread + i;
    if (group >= groups) break;
    int place = start + starts[i];
    if (blockIdx.x == 0 && group > 0) params.offsets[group - 1] = place;
    place += counts_of_tiles(params)[static_cast<int64_t>(group) * gridDim.x + blockIdx.x];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int count = places[w][group];
      places[w][group] = place;
      place += count;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPairsOfThread; ++i) {
    const int64_t pair = first + 32 * i;
    if (pair < params.num_pairs) {
      params.rows[pair] = places[warp][group_of_pair[i]] + rank_in_warp[i];
    }
  }
}

}  // namespace

int64_t expert_order_workspace(const ExpertOrderParams& params) {
  return static_cast<int64_t>(num_groups(params)) * (num_tiles(params) + 1);
}

void launch_expert_order(const ExpertOrderParams& params, cudaStream_t stream) {
  if (params.num_experts < 1 || params.num_experts > kMaxOrderedExperts) {
    throw std::runtime_error("1 to " + std::to_string(kMaxOrderedExperts) +
                             " experts can be sorted by, got " +
                             std::to_string(params.num_experts));
  }
  const unsigned tiles = num_tiles(params);
  launch_dependent<count_tiles_kernel>(tiles, kThreads, stream, params);
  launch_dependent<sum_tiles_kernel>((num_groups(params) + kWarps - 1) / kWarps, kThreads, stream,
                                     params);
  launch_dependent<place_pairs_kernel>(tiles, kThreads, stream, params);
}

}  // namespace msa

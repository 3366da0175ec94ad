#include "structured_blocks.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "block_list.cuh"
#include "smxx/common/cuda_check.h"

namespace msa {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxWidth = 64;
constexpr int kMaxHeads = 64;
constexpr int kMaxTile = 128;          // queries of a thread block
constexpr int kThreadBlocksPerSm = 8;  // to aim at before tiles grow

// A thread block takes a tile of queries. Each run of queries in the same block has its lists
// worked out once, a warp a head, and written for all of them.
template <int kPlaces>
__global__ void __launch_bounds__(kThreads)
    structured_blocks_kernel(const StructuredParams params, int tile) {
  extern __shared__ int lists[];  // (num_kv_heads, width)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int entries = params.num_kv_heads * params.width;
  const int64_t begin = int64_t{blockIdx.x} * tile;
  const int64_t end = min(begin + tile, int64_t{params.num_queries});

  for (int64_t query = begin, run_end; query < end; query = run_end) {
    const int64_t own_block = __ldg(params.own_block + query);
    for (run_end = query + 1; run_end < end; run_end += 32) {
      const int64_t other = run_end + lane;
      const unsigned stops = __ballot_sync(
          structured::kWholeWarp, other >= end || __ldg(params.own_block + other) != own_block);
      if (stops != 0) {
        run_end += __ffs(stops) - 1;
        break;
      }
    }
    const int block =
        static_cast<int>(min(max(own_block, int64_t{-1}), int64_t{INT32_MAX - kMaxWidth}));
    for (int head = warp; head < params.num_kv_heads; head += kWarps) {
      structured::write_block_list<kPlaces>(params, block, head, lists + head * params.width);
    }
    __syncthreads();
    int32_t* out = params.block_indices + query * entries;
    const int count = static_cast<int>(run_end - query) * entries;
    int entry = threadIdx.x % entries;
    const int step = kThreads % entries;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      out[i] = lists[entry];
      entry += step;
      if (entry >= entries) entry -= entries;
    }
    __syncthreads();
  }
}

void check_range(const char* name, int value, int lowest, int highest) {
  if (value < lowest || value > highest) {
    throw std::runtime_error(std::string(name) + " must be " + std::to_string(lowest) + " to " +
                             std::to_string(highest) + ", got " + std::to_string(value));
  }
}

}  // namespace

void launch_structured_blocks(const StructuredParams& params, cudaStream_t stream) {
  check_range("width", params.width, 1, kMaxWidth);
  check_range("num_kv_heads", params.num_kv_heads, 1, kMaxHeads);
  check_range("local_blocks", params.local_blocks, 1, params.width);
  check_range("anchor_blocks", params.anchor_blocks, 0, params.width - params.local_blocks);
  if (params.anchor_stride < 1) throw std::runtime_error("anchor_stride must be at least 1");
  const int tile =
      std::clamp(params.num_queries / (kThreadBlocksPerSm * params.num_sms), 1, kMaxTile);
  const auto grid = static_cast<unsigned>((int64_t{params.num_queries} + tile - 1) / tile);
  const size_t shared_bytes = sizeof(int) * params.num_kv_heads * params.width;
  auto* kernel = params.width <= 32 ? structured_blocks_kernel<1> : structured_blocks_kernel<2>;
  kernel<<<grid, kThreads, shared_bytes, stream>>>(params, tile);
  MSA_CHECK_LAUNCH();
}

}  // namespace msa

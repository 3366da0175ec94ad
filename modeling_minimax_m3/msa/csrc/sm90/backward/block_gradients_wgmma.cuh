// Gradients of attention over one key block, KV-major, with wgmma: dK and dV of the block, and what
// the block gives to dQ of every query that chose it.
//
// With S the scores, P = exp(S - lse) and dS = P (dO V^T - delta), there are five products a step
// of four query tokens: S^T = K Q^T and dP^T = V dO^T, transposed so that P^T and dS^T are register
// operands of dV += P^T dO and dK += dS^T Q; and dQ = dS K, for which dS passes through shared
// memory, because it sums over the keys of both warpgroups. A warpgroup owns 64 keys in the first
// four and 64 channels in the last.
//
// dQ is one step late: its product runs while the next dS are formed, so that the matrix units have
// work in every phase and the warpgroups need not keep in step.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>

#include "config.h"
#include "params.h"
#include "sm90/ptx/mbarrier.cuh"
#include "sm90/ptx/named_barrier.cuh"
#include "sm90/ptx/registers.cuh"
#include "sm90/ptx/stmatrix.cuh"
#include "sm90/ptx/tensor_copy.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "smxx/backward/tile_turns.cuh"
#include "smxx/common/async_copy.cuh"
#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/logarithms.h"
#include "smxx/common/matrix.cuh"
#include "smxx/common/turns.cuh"

namespace msa::sm90 {

// A place in the ring of stages, and the parity of its present use.
template <int kStages>
struct RingPosition {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// As msa::unpack, which takes an instruction more for a pair of bfloat16.
__device__ __forceinline__ float2 unpack(uint32_t pair, __half) {
  return msa::unpack<__half>(pair);
}
__device__ __forceinline__ float2 unpack(uint32_t pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// In the order of the code, so that no more registers are taken than a few loads need.
__device__ __forceinline__ int load_shared(uint32_t address) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n"
               : "=f"(value.x), "=f"(value.y)
               : "r"(address)
               : "memory");
  return value;
}

// Adds to two neighbouring floats in global memory.
__device__ __forceinline__ void add_pair(float* target, float first, float second) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};\n" ::"l"(target), "f"(first),
               "f"(second)
               : "memory");
}

// Keeps the compiler from computing any of these later, from accumulators that are in use again.
__device__ __forceinline__ void operands_ready(uint32_t (&a)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(a[i][j])::"memory");
  }
}

// Addresses of the barriers in BackwardStorage.
template <typename Config>
struct BackwardBarriers {
  uint32_t full;
  uint32_t empty;
  uint32_t work_full;
  uint32_t work_empty;
  uint32_t scores;

  __device__ __forceinline__ explicit BackwardBarriers(uint32_t shared)
      : full(shared + offsetof(BackwardStorage, full)),
        empty(shared + offsetof(BackwardStorage, empty)),
        work_full(shared + offsetof(BackwardStorage, work_full)),
        work_empty(shared + offsetof(BackwardStorage, work_empty)),
        scores(shared + offsetof(BackwardStorage, scores)) {}

  __device__ __forceinline__ void init() const {
    constexpr int kWarps = 4 * Config::kWarpgroups;
    for (int stage = 0; stage < Config::kStages; ++stage) {
      barrier_init(full + stage * 8, 1);
      barrier_init(empty + stage * 8, kWarps);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(work_full + i * 8, 1);
      barrier_init(work_empty + i * 8, kWarps);
      barrier_init(scores + i * 8, kWarps);
    }
    fence_barrier_init();
  }
};

// The copying warp: takes tiles, reads their lists and fills the ring, ahead of the others.
template <typename Config>
__device__ __forceinline__ void copy_queries(const BackwardParams& params,
                                             const BackwardSchedule& schedule,
                                             const CUtensorMap& query_map,
                                             const CUtensorMap& grad_out_map,
                                             unsigned char* shared_bytes, int lane) {
  const ForwardParams& forward = params.forward;
  const uint32_t shared = shared_address(shared_bytes);
  const BackwardBarriers<Config> barriers(shared);
  auto* work = reinterpret_cast<BackwardWork*>(shared_bytes + offsetof(BackwardStorage, work));
  auto* infos = reinterpret_cast<TokenInfo*>(shared_bytes + offsetof(BackwardStorage, token_infos));
  const int pairs_per_token = forward.num_kv_heads * forward.topk;
  RingPosition<Config::kStages> ring;
  for (int count = 0;; ++count) {
    const int ticket = __shfl_sync(0xffffffffu, lane == 0 ? take_tile(schedule) : 0, 0);
    const KvTile tile = find_tile(forward, schedule.lists, ticket);
    barrier_wait(barriers.work_empty + count % 2 * 8, count / 2 % 2 ^ 1);
    if (lane == 0) {
      BackwardWork& next = work[count % 2];
      next.num_queries = tile.num_queries;
      if (tile.num_queries > 0) {
        next.kv_head = tile.kv_head;
        next.first_key = tile.sequence.key_begin + tile.first_key;
        next.num_keys = min(tile.sequence.len_k - tile.first_key, Config::kBlockSize);
        next.bucket = tile.bucket;
        next.turn = turn_of(schedule, tile);
      }
      barrier_arrive(barriers.work_full + count % 2 * 8);
    }
    if (tile.num_queries == 0) return;

    const int first_head = tile.kv_head * Config::kQHeadsPerKv;
    const int first_position =
        tile.sequence.first_position - tile.sequence.query_begin - tile.first_key;
    for (int begin = 0; begin < tile.num_queries; begin += Config::kTokens) {
      // Past the end of the list its last query stands in; it sees no key.
      const int index = begin + lane % Config::kTokens;
      const bool exists = index < tile.num_queries;
      const int pair = schedule.lists.pair_list[tile.list_begin + min(index, tile.num_queries - 1)];
      const int token = schedule.lists.token_begin + pair / pairs_per_token;
      const uint32_t full = barriers.full + ring.stage * 8;
      barrier_wait(barriers.empty + ring.stage * 8, ring.parity ^ 1);
      if (lane < Config::kTokens) {
        infos[ring.stage * Config::kTokens + lane] = {exists ? pair : -1,
                                                      exists ? first_position + token : -1};
      }
      __syncwarp();
      if (lane == 0) {
        barrier_arrive_expecting(full, Config::kStageBytes + 2 * Config::kRows * 4);
      }
      __syncwarp();
      if (lane < Config::kTokens) {
        const uint32_t rows = shared + offsetof(BackwardStorage, stages) +
                              ring.stage * Config::kStageBytes +
                              lane * (Config::kQHeadsPerKv * 128);
        const uint32_t sums = shared + offsetof(BackwardStorage, log_sums) +
                              (ring.stage * Config::kRows + lane * Config::kQHeadsPerKv) * 4;
        const int64_t row = static_cast<int64_t>(token) * forward.num_heads + first_head;
#pragma unroll
        for (int panel = 0; panel < Config::kPanels; ++panel) {
          copy_box(rows + panel * Config::kRowPanelBytes, query_map, full, panel * 64, first_head,
                   token);
        }
        copy_bulk(sums, forward.lse + row, Config::kQHeadsPerKv * 4, full);
#pragma unroll
        for (int panel = 0; panel < Config::kPanels; ++panel) {
          copy_box(rows + Config::kRowBytes + panel * Config::kRowPanelBytes, grad_out_map, full,
                   panel * 64, first_head, token);
        }
        copy_bulk(sums + offsetof(BackwardStorage, deltas) - offsetof(BackwardStorage, log_sums),
                  schedule.delta + row, Config::kQHeadsPerKv * 4, full);
      }
      ring.advance();
    }
  }
}

// Keys and values of a block; zeros past its end, so that what lies there cannot matter.
template <typename Element, typename Config>
__device__ __forceinline__ void load_keys(const ForwardParams& params, const BackwardWork& work,
                                          uint32_t shared) {
  constexpr int kRowChunks = Config::kHeadDim / 8;  // 16-byte chunks of a row
  constexpr int kCopyRows = 128 * Config::kWarpgroups / kRowChunks;
  const int chunk = threadIdx.x % kRowChunks;
  const Element* keys =
      static_cast<const Element*>(params.key) + work.kv_head * params.key_head_stride + chunk * 8;
  const Element* values = static_cast<const Element*>(params.value) +
                          work.kv_head * params.value_head_stride + chunk * 8;
  for (int row = threadIdx.x / kRowChunks; row < Config::kBlockSize; row += kCopyRows) {
    const bool valid = row < work.num_keys;
    const int64_t token = work.first_key + (valid ? row : 0);
    const uint32_t offset = chunk / 8 * Config::kKeyPanelBytes + swizzled_offset<8>(row, chunk % 8);
    copy_async_16(shared + offset, keys + token * params.key_token_stride, valid);
    copy_async_16(shared + offsetof(BackwardStorage, values) + offset,
                  values + token * params.value_token_stride, valid);
  }
  commit_copies();
  wait_copies<0>();
  fence_async_proxy();
}

template <typename Element, typename Config>
__device__ __forceinline__ void multiply(const BackwardParams& params,
                                         const BackwardSchedule& schedule,
                                         unsigned char* shared_bytes, int warpgroup, int warp,
                                         int lane) {
  constexpr int kHeadSteps = Config::kHeadDim / 16;
  const ForwardParams& forward = params.forward;
  const uint32_t shared = shared_address(shared_bytes);
  const BackwardBarriers<Config> barriers(shared);
  const uint64_t own_keys = swizzled_descriptor(shared + warpgroup * (64 * 128));
  const uint64_t own_channels =
      transposed_descriptor(shared + warpgroup * Config::kKeyPanelBytes, Config::kKeyPanelBytes);
  const uint64_t score_gradients_descriptor = transposed_descriptor(
      shared + offsetof(BackwardStorage, score_gradients), Config::kRowPanelBytes);
  const uint64_t rows = swizzled_descriptor(shared + offsetof(BackwardStorage, stages));
  const uint64_t summed_rows =
      transposed_descriptor(shared + offsetof(BackwardStorage, stages), Config::kRowPanelBytes);
  const int own_key = warpgroup * 64 + warp * 16 + lane / 4;
  const uint32_t score_rows = shared + offsetof(BackwardStorage, score_gradients) +
                              (warpgroup * 64 + warp * 16 + lane / 8 % 2 * 8 + lane % 8) * 128;

  float grad_key[64], grad_value[64];
  float scores[32], grad_weights[32], grad_query[32];

  // S^T or dP^T of this warpgroup's keys.
  auto start_scores = [&](float (&sums)[32], uint64_t keys, uint64_t rows) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadSteps; ++step) {
      wgmma_m64n64k16<Element, false, false>(
          sums, advanced(keys, step / 4 * Config::kKeyPanelBytes + step % 4 * 32),
          advanced(rows, step / 4 * Config::kRowPanelBytes + step % 4 * 32), step > 0);
    }
    wgmma_commit();
  };
  auto start_grad_query = [&](int buffer) {
    const uint64_t rows = advanced(score_gradients_descriptor, buffer * Config::kScoreBytes);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kBlockSize / 16; ++step) {
      wgmma_m64n64k16<Element, true, true>(grad_query, advanced(rows, step * 2048),
                                           advanced(own_channels, step * 2048), step > 0);
    }
    wgmma_commit();
  };
  auto start_grad_key = [&](float (&sums)[64], const uint32_t (&a)[4][4], uint64_t rows) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kRows / 16; ++step) {
      wgmma_m64n128k16<Element, true>(sums, a[step], advanced(rows, step * 2048), true);
    }
    wgmma_commit();
  };
  // A warp's rows are the heads of one token.
  auto store_grad_query = [&](int pair) {
    if (pair < 0) return;
    Element* target =
        static_cast<Element*>(schedule.partial_grad_query) +
        (static_cast<int64_t>(pair) * Config::kQHeadsPerKv + lane / 4) * Config::kHeadDim +
        warpgroup * 64 + lane % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t words[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float* sums = grad_query + (i * 4 + n) * 4 + half * 2;
          words[n] =
              pack<Element>(sums[0] * forward.softmax_scale, sums[1] * forward.softmax_scale);
        }
        *reinterpret_cast<uint4*>(target + half * 8 * Config::kHeadDim + i * 32) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  };

  // Of the multiplying warpgroups.
  auto sync_warpgroups = [] { sync_threads<128 * Config::kWarpgroups>(kMultiplyingBarrier); };
  RingPosition<Config::kStages> ring;
  int num_scores = 0;  // dS written so far, alternately to two buffers
  for (int count = 0;; ++count) {
    const BackwardWork& work = reinterpret_cast<const BackwardWork*>(
        shared_bytes + offsetof(BackwardStorage, work))[count % 2];
    barrier_wait(barriers.work_full + count % 2 * 8, count / 2 % 2);
    const int num_steps = (work.num_queries + Config::kTokens - 1) / Config::kTokens;
    if (num_steps == 0) return;
    load_keys<Element, Config>(forward, work, shared);
    sync_warpgroups();

#pragma unroll
    for (int i = 0; i < 64; ++i) grad_key[i] = grad_value[i] = 0;
    int previous_pair = -1;
    for (int step = 0; step < num_steps; ++step) {
      const int stage_bytes = ring.stage * Config::kStageBytes;
      const uint32_t infos = shared + offsetof(BackwardStorage, token_infos) +
                             ring.stage * (Config::kTokens * sizeof(TokenInfo));
      const uint32_t log_sums = shared + offsetof(BackwardStorage, log_sums) +
                                ring.stage * (Config::kRows * 4) + lane % 4 * 8;

      barrier_wait(barriers.full + ring.stage * 8, ring.parity);
      start_scores(scores, own_keys, advanced(rows, stage_bytes));
      start_scores(grad_weights, advanced(own_keys, offsetof(BackwardStorage, values)),
                   advanced(rows, stage_bytes + Config::kRowBytes));
      wgmma_wait<1>();
      accumulators_ready(scores);

      uint32_t weights[Config::kTokens][4];
      const int pair = load_shared(infos + warp * sizeof(TokenInfo));
#pragma unroll
      for (int token = 0; token < Config::kTokens; ++token) {
        const int last_key = load_shared(infos + token * sizeof(TokenInfo) + 4);
        const float2 log_sum[2] = {load_shared_pair(log_sums + token * 64),
                                   load_shared_pair(log_sums + token * 64 + 32)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair_scores = scores + token * 8 + 2 * i;
          float first = fmaf(pair_scores[0], schedule.lists.scale_log2, -kLog2E * log_sum[i / 2].x);
          float second =
              fmaf(pair_scores[1], schedule.lists.scale_log2, -kLog2E * log_sum[i / 2].y);
          if (own_key + i % 2 * 8 > last_key) first = second = -INFINITY;
          weights[token][i] = pack<Element>(exp2_approx(first), exp2_approx(second));
        }
      }

      operands_ready(weights);

      // The first dQ of a tile repeats what lies in the buffer, and is not stored.
      barrier_wait(barriers.scores + (num_scores + 1) % 2 * 8, num_scores / 2 % 2);
      start_grad_query((num_scores + 1) % 2);
      start_grad_key(grad_value, weights, advanced(summed_rows, stage_bytes + Config::kRowBytes));
      wgmma_wait<2>();
      accumulators_ready(grad_weights);

      uint32_t score_gradients[Config::kTokens][4];
#pragma unroll
      for (int token = 0; token < Config::kTokens; ++token) {
        const uint32_t deltas =
            log_sums + offsetof(BackwardStorage, deltas) - offsetof(BackwardStorage, log_sums);
        const float2 delta[2] = {load_shared_pair(deltas + token * 64),
                                 load_shared_pair(deltas + token * 64 + 32)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 weight = unpack(weights[token][i], Element{});
          const float* pair_gradients = grad_weights + token * 8 + 2 * i;
          score_gradients[token][i] =
              pack<Element>(weight.x * (pair_gradients[0] - delta[i / 2].x),
                            weight.y * (pair_gradients[1] - delta[i / 2].y));
        }
        store_matrix_x4(score_rows + num_scores % 2 * Config::kScoreBytes +
                            ((token * 2 + lane / 16) ^ (lane % 8)) * 16,
                        score_gradients[token]);
      }
      fence_async_proxy();
      start_grad_key(grad_key, score_gradients, advanced(summed_rows, stage_bytes));
      wgmma_wait<2>();
      accumulators_ready(grad_query);
      __syncwarp();
      if (lane == 0) barrier_arrive(barriers.scores + num_scores % 2 * 8);
      store_grad_query(previous_pair);
      previous_pair = pair;
      ++num_scores;

      wgmma_wait<0>();
      accumulators_ready(grad_key);
      accumulators_ready(grad_value);
      __syncwarp();
      if (lane == 0) barrier_arrive(barriers.empty + ring.stage * 8);
      ring.advance();
    }
    barrier_wait(barriers.scores + (num_scores + 1) % 2 * 8, num_scores / 2 % 2);
    start_grad_query((num_scores + 1) % 2);
    wgmma_wait<0>();
    accumulators_ready(grad_query);
    store_grad_query(previous_pair);

    if (threadIdx.x == 0) await_turn(schedule.bucket_turn + work.bucket, work.turn);
    sync_warpgroups();
    const int64_t row =
        static_cast<int64_t>(work.first_key + own_key) * forward.num_kv_heads + work.kv_head;
    float* key_target = schedule.grad_key + row * Config::kHeadDim + lane % 4 * 2;
    float* value_target = schedule.grad_value + row * Config::kHeadDim + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t offset =
          static_cast<int64_t>(half * 8) * forward.num_kv_heads * Config::kHeadDim;
      if (own_key + half * 8 < work.num_keys) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const float* key_sums = grad_key + i * 4 + half * 2;
          const float* value_sums = grad_value + i * 4 + half * 2;
          add_pair(key_target + offset + i * 8, key_sums[0] * forward.softmax_scale,
                   key_sums[1] * forward.softmax_scale);
          add_pair(value_target + offset + i * 8, value_sums[0], value_sums[1]);
        }
      }
    }
    __threadfence();
    sync_warpgroups();
    if (threadIdx.x == 0) pass_turn(schedule.bucket_turn + work.bucket, work.turn);
    if (threadIdx.x % 32 == 0) barrier_arrive(barriers.work_empty + count % 2 * 8);
  }
}

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    block_gradients_kernel(const BackwardParams params, const BackwardSchedule schedule,
                           const __grid_constant__ CUtensorMap query_map,
                           const __grid_constant__ CUtensorMap grad_out_map) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) BackwardBarriers<Config>(shared_address(shared_bytes)).init();
  __syncthreads();
  // dS of the step before the first.
  if (lane == 0 && warpgroup < Config::kWarpgroups) {
    barrier_arrive(BackwardBarriers<Config>(shared_address(shared_bytes)).scores + 8);
  }

  if (warpgroup == Config::kWarpgroups) {
    give_registers<Config::kCopyingRegisters>();
    if (warp == 0) {
      copy_queries<Config>(params, schedule, query_map, grad_out_map, shared_bytes, lane);
    }
  } else {
    take_registers<Config::kMultiplyingRegisters>();
    multiply<Element, Config>(params, schedule, shared_bytes, warpgroup, warp, lane);
  }
  wait_for_kernels_before();  // the sums beside it, see launch_block_gradients.cuh
}

}  // namespace msa::sm90

// Attention of every query over the blocks listed for it, query-major, with wgmma.
//
// A thread block takes tiles of eight query tokens of one key/value head, one after the other, and
// walks the union of their blocks. One warp makes the list of the next tile's union, one thread
// copies its queries and, into a ring of stages (`slots` in the code), keys and values; two
// warpgroups attend, four tokens each. They share nothing but the stages, and pass over blocks that
// none of their tokens chose. The product of one block's weights and values runs while the softmax
// of the next block is computed.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "config.h"
#include "params.h"
#include "sm90/ptx/mbarrier.cuh"
#include "sm90/ptx/named_barrier.cuh"
#include "sm90/ptx/registers.cuh"
#include "sm90/ptx/tensor_copy.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/row_scores.cuh"
#include "smxx/common/async_copy.cuh"
#include "smxx/common/logarithms.h"
#include "smxx/common/matrix.cuh"
#include "smxx/common/quads.cuh"
#include "smxx/forward_query_major/tile_union.cuh"

namespace msa::sm90 {

struct QueryMajorArguments {
  ForwardParams params;
  CUtensorMap query, key, value;
  float scale_log2;  // softmax_scale * log2(e)
  int num_tiles;     // of all key/value heads
  int entry_count;   // power of two, at least the tokens of a tile times topk
  int num_slots;
  const int32_t* tiles = nullptr;       // tiles to take (nullptr: all)
  const int32_t* num_listed = nullptr;  // number of entries of `tiles`
  int32_t* next_listed = nullptr;       // next entry of `tiles` to take; 0 at launch
};

// A stage of the ring, and the parity of its present use.
struct RingPlace {
  uint32_t slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ RingPlace next(uint32_t num_slots) const {
    return slot + 1 == num_slots ? RingPlace{0, parity ^ 1} : RingPlace{slot + 1, parity};
  }
};

// Where everything lies in shared memory.
struct QueryMajorMemory {
  TilePlan* plans;
  unsigned char* bytes;  // start of shared memory
  uint32_t queries;      // address of the first query buffer
  uint32_t slots;        // address of the first stage of the ring: keys or values of a block
  uint32_t* lists;       // for each buffer, the union of a tile
  uint32_t planned;      // barriers, see QueryMajorBarriers
  uint32_t queried;
  uint32_t finished;
  uint32_t full;
  uint32_t empty;

  __device__ __forceinline__ QueryMajorMemory(unsigned char* shared, TilePlan* plans,
                                              QueryMajorBarriers& barriers, uint32_t num_slots)
      : plans(plans),
        bytes(shared),
        queries(shared_address(shared)),
        slots(queries + QueryMajorConfig::kBuffers * QueryMajorConfig::kQueryBytes),
        lists(reinterpret_cast<uint32_t*>(
            shared + QueryMajorConfig::kBuffers * QueryMajorConfig::kQueryBytes +
            num_slots * QueryMajorConfig::kKeyBytes)),
        planned(shared_address(barriers.planned)),
        queried(shared_address(barriers.queried)),
        finished(shared_address(barriers.finished)),
        full(shared_address(barriers.full)),
        empty(shared_address(barriers.empty)) {}

  __device__ __forceinline__ void init_barriers() const {
    constexpr int kConsumerWarps = QueryMajorConfig::kConsumerWarps;
    for (int i = 0; i < QueryMajorConfig::kBuffers; ++i) {
      barrier_init(planned + 8 * i, 32);
      barrier_init(queried + 8 * i, 1);
      barrier_init(finished + 8 * i, 32 * kConsumerWarps + 1);
    }
    for (int i = 0; i < QueryMajorConfig::kMaxSlots; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kConsumerWarps);
    }
    fence_barrier_init();
  }
};

// Makes the lists of the tiles' unions; one warp.
template <typename Config>
__device__ __forceinline__ void plan_tiles(const QueryMajorArguments& arguments,
                                           const QueryMajorMemory& memory, int lane) {
  const int listed = arguments.tiles == nullptr ? 0 : *arguments.num_listed;
  for (unsigned turn = 0;; ++turn) {
    const unsigned buffer = turn % Config::kBuffers;
    int number = -1;
    if (arguments.tiles == nullptr) {
      const int64_t own = blockIdx.x + static_cast<int64_t>(turn) * gridDim.x;
      if (own < arguments.num_tiles) number = static_cast<int>(own);
    } else {
      int place = 0;
      if (lane == 0) place = atomicAdd(arguments.next_listed, 1);
      place = __shfl_sync(0xffffffffu, place, 0);
      if (place < listed) number = arguments.tiles[place];
    }
    barrier_wait(memory.finished + 8 * buffer, turn / Config::kBuffers % 2 ^ 1);
    TilePlan& plan = memory.plans[buffer];
    int num_blocks = 0;
    if (number >= 0) {
      num_blocks = build_tile_union(arguments.params, number / arguments.params.num_kv_heads,
                                    number % arguments.params.num_kv_heads, plan.tokens,
                                    memory.lists + buffer * arguments.entry_count,
                                    arguments.entry_count, lane);
    }
    if (lane == 0) {
      plan.number = number;
      plan.num_blocks = num_blocks;
    }
    // Each lane for what it wrote itself: racecheck does not see the warp's own barrier.
    barrier_arrive(memory.planned + 8 * buffer);
    if (number < 0) break;
  }
}

// Copies queries, and keys and values to the ring of stages; one thread.
template <typename Config>
__device__ __forceinline__ void copy_tiles(const QueryMajorArguments& arguments,
                                           const QueryMajorMemory& memory) {
  prefetch_tensor_map(arguments.query);
  prefetch_tensor_map(arguments.key);
  prefetch_tensor_map(arguments.value);
  RingPlace place;
  for (unsigned turn = 0;; ++turn) {
    const unsigned buffer = turn % Config::kBuffers;
    barrier_wait(memory.planned + 8 * buffer, turn / Config::kBuffers % 2);
    const TilePlan& plan = memory.plans[buffer];
    if (plan.number < 0) break;
    const int head = plan.number % arguments.params.num_kv_heads;
    barrier_arrive_expecting(memory.queried + 8 * buffer, Config::kQueryBytes);
    copy_box(memory.queries + buffer * Config::kQueryBytes, arguments.query,
             memory.queried + 8 * buffer, 0, head * kQHeadsPerKv,
             plan.number / arguments.params.num_kv_heads * kTileTokens, 0);
    const uint32_t* list = memory.lists + buffer * arguments.entry_count;
    for (int i = 0; i < plan.num_blocks; ++i) {
      const uint32_t entry = list[i];
      const int token = __ffs(union_tokens(entry)) - 1;
      const int row = plan.tokens.key_begin[token] + union_block(entry) * Config::kBlockSize;
#pragma unroll
      for (int is_value = 0; is_value < 2; ++is_value) {
        barrier_wait(memory.empty + 8 * place.slot, place.parity ^ 1);
        barrier_arrive_expecting(memory.full + 8 * place.slot, Config::kKeyBytes);
        copy_box(memory.slots + place.slot * Config::kKeyBytes,
                 is_value ? arguments.value : arguments.key, memory.full + 8 * place.slot, 0, row,
                 0, head);
        place = place.next(arguments.num_slots);
      }
    }
    barrier_arrive(memory.finished + 8 * buffer);
  }
}

// The outputs of a warp's token, which pass through `staged`: the queries' memory, which nothing
// reads any more.
template <typename Element, typename Config>
__device__ __forceinline__ void store_outputs(const QueryMajorArguments& arguments,
                                              const TilePlan& plan, unsigned char* staged,
                                              int own_token, int warp, int lane,
                                              const float (&out)[64], const float (&largest)[2],
                                              float (&sum)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = quad_sum(sum[half]);
    const float inverse = sum[half] == 0 ? 0 : 1 / sum[half];
    const int row = warp * kQHeadsPerKv + half * 8 + lane / 4;
#pragma unroll
    for (int chunk = 0; chunk < Config::kHeadDim / 8; ++chunk) {
      *reinterpret_cast<uint32_t*>(staged + chunk / 8 * Config::kQueryPanelBytes +
                                   swizzled_offset<8>(row, chunk % 8) + lane % 4 * 4) =
          pack<Element>(out[chunk * 4 + half * 2] * inverse,
                        out[chunk * 4 + half * 2 + 1] * inverse);
    }
  }
  __syncwarp();
  const int token = plan.number / arguments.params.num_kv_heads * kTileTokens + own_token;
  if (token < arguments.params.total_q) {
    const int64_t head = static_cast<int64_t>(token) * arguments.params.num_heads +
                         plan.number % arguments.params.num_kv_heads * kQHeadsPerKv;
    uint4* target = static_cast<uint4*>(arguments.params.out) + head * (Config::kHeadDim / 8);
#pragma unroll
    for (int i = 0; i < kQHeadsPerKv * Config::kHeadDim / 8 / 32; ++i) {
      const int row = i * 2 + lane / 16, chunk = lane % 16;
      target[i * 32 + lane] =
          *reinterpret_cast<const uint4*>(staged + chunk / 8 * Config::kQueryPanelBytes +
                                          swizzled_offset<8>(warp * kQHeadsPerKv + row, chunk % 8));
    }
    if (lane % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        arguments.params.lse[head + half * 8 + lane / 4] =
            sum[half] == 0 ? -INFINITY : (largest[half] + log2f(sum[half])) * kLn2;
      }
    }
  }
}

// Attends to the tiles' blocks; two warpgroups, four tokens each.
template <typename Element, typename Config>
__device__ __forceinline__ void attend_tiles(const QueryMajorArguments& arguments,
                                             const QueryMajorMemory& memory, int warp, int lane) {
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1;
  const int own_token = warpgroup * Config::kTokens + warp;
  RingPlace key_place;
  for (unsigned turn = 0;; ++turn) {
    const unsigned buffer = turn % Config::kBuffers;
    const uint32_t turn_parity = turn / Config::kBuffers % 2;
    barrier_wait(memory.planned + 8 * buffer, turn_parity);
    const TilePlan& plan = memory.plans[buffer];
    if (plan.number < 0) break;
    const int num_blocks = __shfl_sync(0xffffffffu, plan.num_blocks, 0);
    const uint32_t* list = memory.lists + buffer * arguments.entry_count;
    const int position = plan.tokens.position[own_token];
    const uint32_t query_address = memory.queries + buffer * Config::kQueryBytes +
                                   warpgroup * Config::kTokens * kQHeadsPerKv * 128;
    barrier_wait(memory.queried + 8 * buffer, turn_parity);

    float out[64];
    uint32_t weights[8][4];
    float largest[2] = {-INFINITY, -INFINITY};  // exponents are taken against these
    float sum[2] = {0, 0};                      // of this thread's columns
#pragma unroll
    for (int i = 0; i < 64; ++i) out[i] = 0;

    auto wait_full = [&](RingPlace place) {
      barrier_wait(memory.full + 8 * place.slot, place.parity);
    };
    auto release = [&](RingPlace place) {
      if (lane == 0) barrier_arrive(memory.empty + 8 * place.slot);
    };
    auto multiply_keys = [&](float (&scores)[64], RingPlace place) {
      start_scores<Element, Config>(scores, query_address,
                                    memory.slots + place.slot * Config::kKeyBytes);
    };
    auto multiply_values = [&](RingPlace place) {
      start_outputs<Element, Config, true>(out, weights,
                                           memory.slots + place.slot * Config::kKeyBytes);
    };
    // Scores become weights; `factor` is by how much what was summed up before shrinks. All rows
    // of a warp belong to one token; where it did not choose the block, all weights are 0.
    auto softmax = [&](float (&scores)[64], float (&factor)[2], bool attends, int last_key) {
      mask_scores<Config>(scores, last_key);
      float reference[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float value = largest_of_row(scores, half, scores[2 * half]) * arguments.scale_log2;
        // The reference moves only when a score passes it by 2^8, hardly ever after a row's first
        // block; a weight of 2^8 is far from the largest float16.
        constexpr float kSlack = 8;
        const bool moves = attends && value > largest[half] + kSlack;
        factor[half] = moves ? exp2_approx(largest[half] - value) : 1.0f;
        largest[half] = moves ? value : largest[half];
        reference[half] = attends ? largest[half] : INFINITY;
        sum[half] *= factor[half];
      }
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        scores[i] = exp2_approx(fmaf(scores[i], arguments.scale_log2, -reference[i / 2 % 2]));
        sum[i / 2 % 2] += scores[i];
      }
    };
    auto round_weights = [&](const float (&scores)[64]) {
#pragma unroll
      for (int i = 0; i < 64; i += 2) {
        weights[i / 8][i % 8 / 2] = pack<Element>(scores[i], scores[i + 1]);
      }
    };
    auto rescale = [&](const float (&factor)[2]) {
      if (__any_sync(0xffffffffu, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
        for (int i = 0; i < 64; ++i) out[i] *= factor[i / 2 % 2];
      }
    };

    bool pending = false;   // the product of `weights` and the values before is still to be done
    int pending_rows = 0;   // how many of these values are the sequence's
    RingPlace value_place;  // where they are
    // One turn more than there are blocks, for the last values.
    for (int i = 0; i <= num_blocks; ++i) {
      const uint32_t entry = __shfl_sync(0xffffffffu, i < num_blocks ? list[i] : 0, 0);
      const uint32_t chosen = union_tokens(entry);
      const uint32_t own = chosen >> warpgroup * Config::kTokens & ((1u << Config::kTokens) - 1);
      const int first_key = union_block(entry) * Config::kBlockSize;
      const bool attends = chosen >> own_token & 1;
      const int last_key = attends ? position - first_key : -1;
      if (pending && pending_rows < Config::kBlockSize) {
        // Past the end of the sequence lies anything, which a weight of 0 does not make harmless.
        wait_full(value_place);
        unsigned char* values =
            memory.bytes + (memory.slots - memory.queries) + value_place.slot * Config::kKeyBytes;
        for (int chunk = threadIdx.x % 128 + pending_rows * 8; chunk < Config::kBlockSize * 8;
             chunk += 128) {
          for (int panel = 0; panel < Config::kPanels; ++panel) {
            *reinterpret_cast<uint4*>(values + panel * Config::kKeyPanelBytes + chunk * 16) =
                make_uint4(0, 0, 0, 0);
          }
        }
        fence_async_proxy();
        sync_warpgroup(warpgroup);
      }
      if (own != 0 && pending) {
        float scores[64], factor[2];
        wait_full(key_place);
        wgmma_fence();
        multiply_keys(scores, key_place);
        wait_full(value_place);
        wgmma_fence();
        multiply_values(value_place);
        wgmma_wait<1>();
        accumulators_ready(scores);
        release(key_place);
        softmax(scores, factor, attends, last_key);
        // Never true; but without something that depends on the weights before it, the assembler
        // moves the wait before the softmax.
        if (sum[0] + sum[1] < 0) {
          asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(memory.planned), "r"(0) : "memory");
        }
        wgmma_wait<0>();
        accumulators_ready(out);
        release(value_place);
        rescale(factor);
        round_weights(scores);
      } else if (own != 0) {
        float scores[64], factor[2];
        wait_full(key_place);
        wgmma_fence();
        multiply_keys(scores, key_place);
        wgmma_wait<0>();
        accumulators_ready(scores);
        release(key_place);
        softmax(scores, factor, attends, last_key);
        round_weights(scores);
        rescale(factor);
      } else {
        if (pending) {
          wait_full(value_place);
          wgmma_fence();
          multiply_values(value_place);
          wgmma_wait<0>();
          accumulators_ready(out);
          release(value_place);
        }
        if (i < num_blocks) {
          wait_full(key_place);
          release(key_place);
          const RingPlace passed = key_place.next(arguments.num_slots);
          wait_full(passed);
          release(passed);
        }
      }
      if (i < num_blocks) {
        pending = own != 0;
        if (pending) {
          pending_rows =
              plan.tokens.len_k[warpgroup * Config::kTokens + __ffs(own) - 1] - first_key;
        }
        value_place = key_place.next(arguments.num_slots);
        key_place = value_place.next(arguments.num_slots);
      }
    }

    store_outputs<Element, Config>(arguments, plan, memory.bytes + (query_address - memory.queries),
                                   own_token, warp, lane, out, largest, sum);
    fence_async_proxy();
    barrier_arrive(memory.finished + 8 * buffer);  // each lane for what it read itself
  }
}

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    query_major_kernel(const __grid_constant__ QueryMajorArguments arguments) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ TilePlan plans[Config::kBuffers];
  __shared__ QueryMajorBarriers barriers;
  const QueryMajorMemory memory(shared, plans, barriers, arguments.num_slots);
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) memory.init_barriers();
  __syncthreads();

  if (threadIdx.x < 128) {
    give_registers<Config::kProducerRegisters>();
    if (warp == 0) {
      plan_tiles<Config>(arguments, memory, lane);
    } else if (warp == 1 && lane == 0) {
      copy_tiles<Config>(arguments, memory);
    }
  } else {
    take_registers<Config::kConsumerRegisters>();
    attend_tiles<Element, Config>(arguments, memory, warp, lane);
  }
}

}  // namespace msa::sm90

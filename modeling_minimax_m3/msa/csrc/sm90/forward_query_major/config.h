// Tiles and shared memory of the query-major attention on Hopper: head dimension 128, blocks of 128
// keys, 16 query heads per key/value head.
#pragma once

#include <cstdint>

#include "smxx/forward_kv_major/config.h"
#include "smxx/forward_query_major/tile_union.cuh"

namespace msa::sm90 {

// Eight query tokens x 16 heads are the 128 rows of a thread block, 64 for each of two warpgroups,
// a token for each of their warps. A third warpgroup feeds them.
struct QueryMajorConfig {
  static constexpr int kHeadDim = 128;
  static constexpr int kBlockSize = 128;
  static constexpr int kWarpgroups = 2;
  static constexpr int kTokens = kTileTokens / kWarpgroups;  // of a warpgroup
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kConsumerRegisters = 224;
  static constexpr int kProducerRegisters = 56;
  // Operands lie as panels of 64 channels, the width of the 128-byte swizzle.
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kRows = kTileTokens * kQHeadsPerKv;
  static constexpr int kQueryPanelBytes = kRows * 128;
  static constexpr int kQueryBytes = kPanels * kQueryPanelBytes;
  static constexpr int kKeyPanelBytes = kBlockSize * 128;
  static constexpr int kKeyBytes = kPanels * kKeyPanelBytes;  // a stage of the ring: keys or values
  static constexpr int kBuffers = 2;                          // of queries and their block lists
  static constexpr int kMaxSlots = 5;
  static constexpr int kSharedLimit = 227 * 1024 - 1024;  // less what is allocated statically

  static constexpr int shared_bytes(int slots, int entry_count) {
    return kBuffers * kQueryBytes + slots * kKeyBytes + kBuffers * entry_count * 4;
  }
  static constexpr int slots(int entry_count) {
    return shared_bytes(kMaxSlots, entry_count) <= kSharedLimit ? kMaxSlots : kMaxSlots - 1;
  }
};
static_assert(QueryMajorConfig::shared_bytes(QueryMajorConfig::slots(512), 512) <=
              QueryMajorConfig::kSharedLimit);

// A tile's work, beside its list of blocks.
struct TilePlan {
  int number;      // token / 8 * num_kv_heads + head; negative: no tile is left
  int num_blocks;  // of the union
  TileTokens tokens;
};

// The barriers between the warps.
struct QueryMajorBarriers {
  uint64_t planned[QueryMajorConfig::kBuffers];   // a tile's list is there
  uint64_t queried[QueryMajorConfig::kBuffers];   // its queries are
  uint64_t finished[QueryMajorConfig::kBuffers];  // its buffer may be used again
  uint64_t full[QueryMajorConfig::kMaxSlots];     // a stage has been filled
  uint64_t empty[QueryMajorConfig::kMaxSlots];    // a stage may be filled
};
static_assert(QueryMajorConfig::kBuffers * sizeof(TilePlan) + sizeof(QueryMajorBarriers) <= 1024,
              "kSharedLimit leaves as much");

}  // namespace msa::sm90

// Tiles and shared memory of the query-major attention forward.
#pragma once

#include "smxx/common/supported.h"

namespace msa::sm80 {

// A warp owns 32 query rows (tokens x heads of one key/value head), with its queries and outputs in
// registers; tiles of 64 keys and values stream through shared memory.
template <int kHeadDim_>
struct ForwardConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = 2;  // m16 tiles of a warp
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kTileKeys = 64;
  static constexpr int kStages = 2;
  static constexpr int kRowChunks = kHeadDim / 8;  // 16-byte chunks of a row
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kTileBytes = kTileKeys * kRowBytes;  // of keys; as much again of values
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kMaxEntries = kRows * kMaxTopk;  // one query head per key/value head
  // Queries and outputs pass through the stages on their way from and to global memory.
  static_assert(kRows * kRowBytes <= kStages * kStageBytes);
  static_assert(kStages * kStageBytes + kMaxEntries * 4 <= 99 * 1024);
};

}  // namespace msa::sm80

// Tiles and shared memory of the block-score kernel.
#pragma once

#include "smxx/selection/score_storage.h"

namespace msa::sm80 {

// Block scores: 256 query rows (tokens x index heads) stay in registers, 64 a warp, while tiles of
// 64 keys stream through shared memory.
template <int kHeadDim_>
struct ScoreConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = 4;  // m16 tiles of a warp
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kTileKeys = 64;
  static constexpr int kStages = 4;
  static constexpr int kRowChunks = kHeadDim / 8;  // 16-byte chunks of a row
  static constexpr int kTileBytes = kTileKeys * kHeadDim * 2;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  // The queries pass through the key stages on their way to registers.
  static constexpr int kBlocksPerSm = 2;
  static_assert(kRows == kScoreRows);
  static_assert(kQueryBytes <= kStages * kTileBytes);
};

static_assert(sizeof(ScoreStorage<ScoreConfig<128>>) <= 99 * 1024);

}  // namespace msa::sm80

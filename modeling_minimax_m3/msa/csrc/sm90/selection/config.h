// Tiles and shared memory of the Hopper block-score kernel.
#pragma once

#include "smxx/selection/score_storage.h"

namespace msa::sm90 {

// 256 query rows (tokens x index heads) stay in registers, 128 a warpgroup in two halves of 64,
// while tiles of 128 keys stream through shared memory.
template <int kHeadDim_>
struct ScoreConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarpgroups = 2;
  static constexpr int kThreads = 128 * kWarpgroups;
  static constexpr int kHalves = 2;
  static constexpr int kRows = 64 * kHalves * kWarpgroups;
  static constexpr int kTileKeys = 128;
  static constexpr int kStages = 6;                // three pairs
  static constexpr int kRowChunks = kHeadDim / 8;  // 16-byte chunks of a row
  // Keys lie as panels of 64 channels, the width of the 128-byte swizzle.
  static constexpr int kPanelBytes = kTileKeys * 128;
  static constexpr int kTileBytes = kHeadDim / 64 * kPanelBytes;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static_assert(kQueryBytes <= 2 * kTileBytes);
  static_assert(kRows == kScoreRows);
};

static_assert(sizeof(ScoreStorage<ScoreConfig<128>>) <= 227 * 1024);

}  // namespace msa::sm90

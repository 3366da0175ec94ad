// Tiles and shared memory of the attention backward on Hopper: head dimension 128, blocks of 128
// keys, 16 query heads a key/value head.
#pragma once

namespace msa::sm90 {

// A thread block keeps the keys and values of one block in shared memory and their gradients in
// registers: two warpgroups of 64 keys each. The queries that chose the block and their output
// gradients pass through a ring of stages, four tokens (64 rows) each, filled by a third warpgroup.
struct BackwardConfig {
  static constexpr int kHeadDim = 128;
  static constexpr int kBlockSize = 128;
  static constexpr int kGroup = 16;
  static constexpr int kTokens = 4;
  static constexpr int kRows = kTokens * kGroup;
  static constexpr int kWarpgroups = 2;  // that multiply
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kStages = 3;
  static constexpr int kMultiplyingRegisters = 240;  // of a thread
  static constexpr int kCopyingRegisters = 24;

  // Operands lie as panels of 64 channels, the width of the 128-byte swizzle.
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kKeyPanelBytes = kBlockSize * 128;
  static constexpr int kKeyBytes = kPanels * kKeyPanelBytes;
  static constexpr int kRowPanelBytes = kRows * 128;
  static constexpr int kRowBytes = kPanels * kRowPanelBytes;
  static constexpr int kStageBytes = 2 * kRowBytes;  // queries, output gradients
  static constexpr int kScoreBytes = kBlockSize * kRows * 2;

  static constexpr int kValues = kKeyBytes;
  static constexpr int kStage = 2 * kKeyBytes;
  static constexpr int kScoreGradients = kStage + kStages * kStageBytes;  // two buffers
  static constexpr int kLogSums = kScoreGradients + 2 * kScoreBytes;
  static constexpr int kDeltas = kLogSums + kStages * kRows * 4;
  static constexpr int kTokenInfos = kDeltas + kStages * kRows * 4;
  static constexpr int kWork = kTokenInfos + kStages * kTokens * 8;  // two
  static constexpr int kBarriers = kWork + 2 * 32;
  static constexpr int kSharedBytes = kBarriers + (2 * kStages + 6) * 8;
  static_assert(kSharedBytes + 1024 <= 228 * 1024);
};

}  // namespace msa::sm90

// Tiles and shared memory of the attention backward on Hopper: head dimension 128, blocks of 128
// keys, 16 query heads a key/value head.
#pragma once

#include <cstdint>

namespace msa::sm90 {

// A thread block keeps the keys and values of one block in shared memory and their gradients in
// registers: two warpgroups of 64 keys each. The queries that chose the block and their output
// gradients pass through a ring of stages, four tokens (64 rows) each, filled by a third warpgroup.
struct BackwardConfig {
  static constexpr int kHeadDim = 128;
  static constexpr int kBlockSize = 128;
  static constexpr int kQHeadsPerKv = 16;
  static constexpr int kTokens = 4;
  static constexpr int kRows = kTokens * kQHeadsPerKv;
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
};

// What the copying warp tells the others about a tile of the schedule.
struct BackwardWork {
  int num_queries;  // 0: there is no more work
  int kv_head;
  int first_key;  // of the block, among all keys
  int num_keys;   // of the block
  int bucket;
  int turn;
};

// And about a query token.
struct TokenInfo {
  int pair;      // -1: stands in past the end of the list, its dQ is not stored
  int last_key;  // that it sees, counted from the block's first
};

// Shared memory of a thread block, which starts at a multiple of 1024.
struct BackwardStorage {
  using Config = BackwardConfig;
  unsigned char keys[Config::kKeyBytes];
  unsigned char values[Config::kKeyBytes];
  unsigned char stages[Config::kStages][Config::kStageBytes];
  unsigned char score_gradients[2][Config::kScoreBytes];
  float log_sums[Config::kStages][Config::kRows];
  float deltas[Config::kStages][Config::kRows];
  TokenInfo token_infos[Config::kStages][Config::kTokens];
  BackwardWork work[2];
  // Barriers.
  uint64_t full[Config::kStages];   // the rows of a stage have landed
  uint64_t empty[Config::kStages];  // they have been used
  uint64_t work_full[2];
  uint64_t work_empty[2];
  uint64_t scores[2];  // a buffer of dS is written, and the other one has been used
};
static_assert(sizeof(BackwardStorage) + 1024 <= 228 * 1024);

// The named barrier of the multiplying warpgroups.
constexpr int kMultiplyingBarrier = 1;

}  // namespace msa::sm90

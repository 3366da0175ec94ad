// Tiles and shared memory of the attention backward.
#pragma once

namespace msa::sm80 {

// A warp owns 16 keys: their keys and values are operands in its registers, and so are the sums of
// their gradients. Query rows pass through shared memory, kRows at a time.
template <int kHeadDim_, int kBlockSize_>
struct BackwardConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockSize = kBlockSize_;
  static constexpr int kWarps = kBlockSize / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowChunks = kHeadDim / 8;  // 16-byte chunks of a row
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kRows =
      4096 / kHeadDim;  // query rows of a step: tokens x heads of a key/value head
  static constexpr int kRowsBytes = kRows * kRowBytes;  // of queries; as much of output gradients
  static constexpr int kCopyRows = kThreads / kRowChunks;  // rows that all threads copy at once
  static constexpr int kCopies = kRows / kCopyRows;
  static_assert(kCopyRows % 8 == 0, "the rows of a thread must share one swizzle");
  static constexpr int kStages = 2;
  static constexpr int kStageBytes = 2 * kRowsBytes;
  static constexpr int kKeyBytes = kBlockSize * kRowBytes;
  static constexpr int kScoreBytes = kRows * kBlockSize * 2;  // gradients of a step's scores
  static constexpr int kScoreTileBytes = kBlockSize * 32;     // of 16 rows
  static constexpr int kInfoSteps = 4;  // steps whose row infos exist at a time, a power of two
  static_assert(kKeyBytes <= kStages * kStageBytes, "values pass through the stages");
};

// What a step's rows carry beside queries and output gradients.
template <int kRows>
struct RowInfo {
  float lse[kRows];
  float delta[kRows];
  int last_key[kRows];  // that the row sees, counted from the block's first
  int pair[kRows];      // of schedule.h; comes a step before the others
};

// Shared memory of a thread block.
template <typename Config>
struct BackwardStorage {
  unsigned char stages[Config::kStages][Config::kStageBytes];
  unsigned char keys[Config::kKeyBytes];
  unsigned char score_gradients[2][Config::kScoreBytes];
  RowInfo<Config::kRows> infos[Config::kInfoSteps];
};
static_assert(sizeof(BackwardStorage<BackwardConfig<128, 128>>) + 1024 <= 99 * 1024);
static_assert(sizeof(BackwardStorage<BackwardConfig<64, 128>>) + 1024 <= 99 * 1024);

}  // namespace msa::sm80

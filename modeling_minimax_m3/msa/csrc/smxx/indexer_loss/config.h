// Tiles, shared memory and workspace of the indexer's loss.
#pragma once

#include <cstdint>

namespace msa {

// A thread block keeps the keys and the index keys of one block in shared memory. Each warp takes
// eight pairs at a time through them: their heads are the rows of the teacher's products, the pairs
// themselves the columns of the student's.
struct IndexerLossConfig {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpPairs = 8;
  static constexpr int kPassPairs = kWarps * kWarpPairs;
  static constexpr int kTilePairs = 512;  // of a thread block at most
  static constexpr int kMaxBlockSize = 128;
  static constexpr int kMaxIndexDim = 128;
  // Floats between the teacher's probabilities of two pairs: 4 modulo 32, so that four pairs and
  // eight keys lie in different banks.
  static constexpr int row_floats(int block_size) { return block_size + 4; }
  static constexpr int probability_bytes(int block_size) {
    return kPassPairs * row_floats(block_size) * 4;
  }
  static constexpr int shared_bytes(int block_size, int head_dim, int index_dim) {
    return block_size * (head_dim + index_dim) * 2 + probability_bytes(block_size);
  }
};
static_assert(IndexerLossConfig::shared_bytes(128, 128, 128) + 1024 <= 99 * 1024);

// A thread block of the second step of the gradient keeps the index keys of one block in shared
// memory and passes the score gradients, or saved probabilities, and the index queries of its pairs
// through two stages.
template <int kIndexDim_>
struct IndexGradientConfig {
  static constexpr int kIndexDim = kIndexDim_;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPassPairs = 64;
  static constexpr int kStages = 2;
  static constexpr int kQueryBytes = kPassPairs * kIndexDim * 2;
  static constexpr int stage_bytes(int block_size) {
    return kPassPairs * block_size * 2 + kQueryBytes;
  }
  static constexpr int shared_bytes(int block_size) {
    return block_size * kIndexDim * 2 + kStages * stage_bytes(block_size) +
           IndexerLossConfig::kTilePairs * 4;
  }
};
static_assert(IndexGradientConfig<128>::shared_bytes(128) + 1024 <= 99 * 1024);

// Probabilities up to 1 come to at most half the range of float16, and keep 11 bits down to 2^-29.
constexpr float kSavedProbsScale = 1 << 15;

constexpr int kCombineRowWarps = 8;  // (query token, head) rows of a combining thread block

// Most bytes of workspace that grow with the query tokens of a part; for the released model, 32k
// tokens whose probabilities were saved are one.
constexpr int64_t kIndexerLossBytes = 5ll << 28;

// Most query tokens of a part of the gradient: a bit each in shared memory, when lists are sorted.
constexpr int64_t kMaxSortedTokens = 1ll << 17;

}  // namespace msa

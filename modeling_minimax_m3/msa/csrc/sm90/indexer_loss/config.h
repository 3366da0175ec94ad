// The shape that the Hopper kernels of the indexer's loss are for; tiles and shared memory are
// those of smxx/indexer_loss/config.h.
#pragma once

#include "smxx/indexer_loss/config.h"

namespace msa::sm90 {

struct IndexerLossShape {
  static constexpr int kHeadDim = 128;  // of the main heads and the index heads
  static constexpr int kBlockSize = 128;
  static constexpr int kQHeadsPerKv = 16;
  static constexpr int kSharedBytes =
      IndexerLossConfig::shared_bytes(kBlockSize, kHeadDim, kHeadDim);
  static_assert(2 * (kSharedBytes + 1024) <= 228 * 1024, "two thread blocks a multiprocessor");
};

}  // namespace msa::sm90

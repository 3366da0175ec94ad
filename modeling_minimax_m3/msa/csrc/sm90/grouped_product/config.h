// Tiles and shared memory of the grouped product.
#pragma once

#include <cstdint>

namespace msa::sm90 {

// 128 rows x 256 outputs: two warpgroups own 64 rows each. The last rows of a group, if they are at
// most 64, are a tile of their own, whose outputs the warpgroups share. A third warpgroup copies.
struct GroupedProductConfig {
  static constexpr int kHalfRows = 64;
  static constexpr int kRows = 2 * kHalfRows;
  static constexpr int kHalfOutputs = 128;
  static constexpr int kOutputs = 2 * kHalfOutputs;
  static constexpr int kChannels = 64;  // of a stage: the width of the 128-byte swizzle
  static constexpr int kStages = 4;
  static constexpr int kConsumers = 256;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kHalfRowBytes = kHalfRows * 128;
  static constexpr int kHalfOutputBytes = kHalfOutputs * 128;
};

struct GroupedProductStage {
  unsigned char x[2 * GroupedProductConfig::kHalfRowBytes];
  unsigned char weights[2 * GroupedProductConfig::kHalfOutputBytes];
};

struct GroupedProductStorage {
  GroupedProductStage stages[GroupedProductConfig::kStages];
  uint64_t filled[GroupedProductConfig::kStages];
  uint64_t emptied[GroupedProductConfig::kStages];
};

static_assert(sizeof(GroupedProductStage) % 1024 == 0);
static_assert(sizeof(GroupedProductStorage) + 1024 <= 227 * 1024);

}  // namespace msa::sm90

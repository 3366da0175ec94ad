// Tiles and shared memory of the grouped product.
#pragma once

#include <cstdint>

namespace msa::sm90 {

// 192 rows x 192 outputs: three warpgroups own 64 rows each, and do nothing where a group has no
// rows for them. A fourth warpgroup copies.
struct GroupedProductConfig {
  static constexpr int kPartRows = 64;  // of a warpgroup
  static constexpr int kParts = 3;
  static constexpr int kRows = kParts * kPartRows;
  static constexpr int kHalfOutputs = 96;
  static constexpr int kOutputs = 2 * kHalfOutputs;
  static constexpr int kChannels = 64;  // of a stage: the width of the 128-byte swizzle
  static constexpr int kStages = 4;
  static constexpr int kConsumers = 128 * kParts;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kPartBytes = kPartRows * 128;
  static constexpr int kHalfOutputBytes = kHalfOutputs * 128;
};

struct GroupedProductStage {
  unsigned char x[GroupedProductConfig::kParts * GroupedProductConfig::kPartBytes];
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

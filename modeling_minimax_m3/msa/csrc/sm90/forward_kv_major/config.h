// Tiles and shared memory of the KV-major attention on Hopper: head dimension 128, blocks of 128
// keys.
#pragma once

#include "smxx/forward_kv_major/config.h"

namespace msa::sm90 {

// A thread block keeps the keys and values of one block in shared memory; each warpgroup takes four
// query tokens at a time (16 heads each, one warp a token) through them on its own.
struct ForwardKvConfig {
  static constexpr int kHeadDim = 128;
  static constexpr int kBlockSize = 128;
  static constexpr int kWarpgroups = 2;
  static constexpr int kThreads = 128 * kWarpgroups;
  static constexpr int kTokens = 4;  // of a warpgroup at a time
  static constexpr int kBlocksPerSm = 2;
  // Operands lie as panels of 64 channels, the width of the 128-byte swizzle.
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kKeyPanelBytes = kBlockSize * 128;
  static constexpr int kKeyBytes = kPanels * kKeyPanelBytes;
  static constexpr int kQueryPanelBytes = kTokens * kQHeadsPerKv * 128;
  static constexpr int kQueryBytes = kPanels * kQueryPanelBytes;  // of a warpgroup
};

// Shared memory of a thread block.
struct KvMajorStorage {
  unsigned char keys[ForwardKvConfig::kKeyBytes];
  unsigned char values[ForwardKvConfig::kKeyBytes];
  unsigned char queries[ForwardKvConfig::kWarpgroups][ForwardKvConfig::kQueryBytes];
};
static_assert(ForwardKvConfig::kBlocksPerSm * (sizeof(KvMajorStorage) + 1024) <= 228 * 1024);

}  // namespace msa::sm90

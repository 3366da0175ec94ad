// Tiles and shared memory of the KV-major attention.
#pragma once

namespace msa::sm80 {

// A thread block keeps the keys and values of one block in shared memory; each warp takes pairs of
// query tokens (two m16 tiles: 16 heads each) through them on its own.
template <int kHeadDim_>
struct ForwardKvConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = 2;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRowChunks = kHeadDim / 8;  // 16-byte chunks of a row
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kMaxBlockSize = 128;
  static constexpr int kQueryBytes = kWarpRows * kRowBytes;  // of a warp
  static constexpr int kBlocksPerSm = 2;
  static constexpr int shared_bytes(int block_size) {
    return 2 * block_size * kRowBytes + kWarps * kQueryBytes;
  }
};
static_assert(ForwardKvConfig<128>::shared_bytes(128) + 1024 <= 99 * 1024);

}  // namespace msa::sm80

// Products of one or two tokens with MXFP8 weights, whose loads never wait for anything else.
//
// States and scales lie in shared memory, so that a warp loads nothing but weights, and the next
// ones before it multiplies. With the loads of few_tokens.cuh, three per 16 bytes of weights, a
// warp had too few bytes on their way: four experts took 80 us in place of the 56 of their bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "few_tokens.cuh"
#include "smxx/common/async_copy.cuh"

namespace msa::few_tokens {

constexpr int kMaxStagedTokens = 2;
constexpr int kStagedTiles = 2;  // of eight rows
constexpr int kStagedBlocksPerSm = 3;
constexpr int kStagedMultiple = 128;  // of channels: the scales of a row are whole words
constexpr int kStagedStride = kWarps * Mxfp8Weights::kChannels;  // channels of a step of all warps

// Bytes from the scales of one row to those of the next: an odd number of words, so that the lanes
// of a warp read different banks.
__host__ __device__ constexpr int scale_stride(int channels) {
  return (channels / kStagedMultiple | 1) * 4;
}

__host__ __device__ constexpr int scale_bytes(int channels) {
  return kStagedTiles * kRows * scale_stride(channels);
}

// Starts to copy the scales of eight rows from `row` on of a matrix. Called by all threads.
__device__ __forceinline__ void copy_scales(unsigned char* target, const FewTokenWeights& matrix,
                                            int64_t row, int channels) {
  const int words = channels / kStagedMultiple;  // of a row
  const uint8_t* source = matrix.scales + row * (channels / kMxfp8Group);
  for (int i = threadIdx.x; i < kRows * words; i += kThreads) {
    copy_async_4(shared_address(target + i / words * scale_stride(channels) + i % words * 4),
                 source + 4 * i, true);
  }
}

// Starts to copy states, a multiple of eight. Called by all threads.
__device__ __forceinline__ void copy_states(unsigned char* target, const void* states, int count) {
  for (int i = threadIdx.x; i < count / 8; i += kThreads) {
    copy_async_16(shared_address(target + 16 * i),
                  static_cast<const unsigned char*>(states) + 16 * int64_t{i}, true);
  }
}

// Tiles of weight rows, at a lane's place.
struct TileRows {
  const uint8_t* values;  // of the first tile
  int tile_stride;        // values
  int channels;

  __device__ __forceinline__ TileRows() {}
  __device__ __forceinline__ TileRows(const FewTokenWeights& matrix, int64_t row, int tile_stride,
                                      int channels)
      : values(static_cast<const uint8_t*>(matrix.values) +
               (row + threadIdx.x % 32 / 4) * channels + lane_channel()),
        tile_stride(tile_stride),
        channels(channels) {}

  static __device__ __forceinline__ int lane_channel() {
    return threadIdx.x / 32 * Mxfp8Weights::kChannels + threadIdx.x % 4 * 16;
  }
};

// What tiles of weight rows are multiplied by, at a lane's place in the thread block's shared
// memory.
struct Factors {
  int scales;
  int states;  // negative for a lane without a token
  int channels;

  __device__ __forceinline__ Factors() {}
  // `scales` is where those of the first row begin, `states` where the lane's token's do.
  __device__ __forceinline__ Factors(int scales, int states, int channels)
      : scales(scales + threadIdx.x % 32 / 4 * scale_stride(channels) +
               TileRows::lane_channel() / kMxfp8Group),
        states(states < 0 ? -1 : states + 2 * TileRows::lane_channel()),
        channels(channels) {}
};

// All weights of a thread block, segment after segment. `rows_at(i)` and `factors_at(i)` give the
// lane's places of segment i. A lane has kSteps loads of each tile on their way.
template <int kSteps, typename RowsAt, typename FactorsAt>
class WeightStream {
 public:
  __device__ WeightStream(const unsigned char* memory, int num_segments, const RowsAt& rows_at,
                          const FactorsAt& factors_at)
      : memory_(memory), num_segments_(num_segments), rows_at_(rows_at), factors_at_(factors_at) {}

  // Starts the first loads.
  __device__ __forceinline__ void start() {
    if (num_segments_ > 0) rows_ = rows_at_(0);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) load(loaded_[i]);
  }

  // Adds the products of all segments. States and scales are there.
  __device__ __forceinline__ void add_all(float (&sums)[kStagedTiles][4]) {
    if (num_segments_ > 0) factors_ = factors_at_(0);
    while (segment_ < num_segments_) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (segment_ < num_segments_) {  // the same in all threads
          add(sums, loaded_[i]);
          load(loaded_[i]);
          channel_ += kStagedStride;
          if (channel_ >= factors_.channels) {
            channel_ = 0;
            if (++segment_ < num_segments_) factors_ = factors_at_(segment_);
          }
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ bool is_inside(int channel, int channels) {
    return channel + static_cast<int>(threadIdx.x) / 32 * Mxfp8Weights::kChannels < channels;
  }

  __device__ __forceinline__ void load(uint4 (&loaded)[kStagedTiles]) {
    if (load_segment_ >= num_segments_) return;
    const bool has_weights = is_inside(load_channel_, rows_.channels);
#pragma unroll
    for (int tile = 0; tile < kStagedTiles; ++tile) {
      if (has_weights) {
        loaded[tile] = load_weights(rows_.values + tile * rows_.tile_stride + load_channel_);
      }
    }
    load_channel_ += kStagedStride;
    if (load_channel_ >= rows_.channels) {
      load_channel_ = 0;
      if (++load_segment_ < num_segments_) rows_ = rows_at_(load_segment_);
    }
  }

  __device__ __forceinline__ void add(float (&sums)[kStagedTiles][4],
                                      const uint4 (&loaded)[kStagedTiles]) const {
    if (!is_inside(channel_, factors_.channels)) return;
    States<Mxfp8Weights> low, high;
    if (factors_.states >= 0) {
      const auto* states = reinterpret_cast<const uint4*>(memory_ + factors_.states + 2 * channel_);
      low.units[0] = states[0];
      low.units[1] = states[1];
    }
#pragma unroll
    for (int tile = 0; tile < kStagedTiles; ++tile) {
      const uint8_t scale =
          memory_[factors_.scales + tile * kRows * scale_stride(factors_.channels) +
                  channel_ / kMxfp8Group];
      add_products<Mxfp8Weights>(sums[tile], low, high, {loaded[tile], scale});
    }
  }

  const unsigned char* memory_;
  int num_segments_;
  const RowsAt& rows_at_;
  const FactorsAt& factors_at_;
  TileRows rows_;
  Factors factors_;
  int load_segment_ = 0, load_channel_ = 0;
  int segment_ = 0, channel_ = 0;
  uint4 loaded_[kSteps][kStagedTiles];
};

template <int kSteps, typename RowsAt, typename FactorsAt>
__device__ __forceinline__ WeightStream<kSteps, RowsAt, FactorsAt> weight_stream(
    const unsigned char* memory, int num_segments, const RowsAt& rows_at,
    const FactorsAt& factors_at) {
  return {memory, num_segments, rows_at, factors_at};
}

}  // namespace msa::few_tokens

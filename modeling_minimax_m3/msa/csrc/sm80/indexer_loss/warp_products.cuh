// The products of smxx/indexer_loss/index_gradients.cuh with mma.sync.
#pragma once

#include <cuda_runtime.h>

#include "smxx/common/matrix.cuh"
#include "smxx/indexer_loss/index_gradients.cuh"

namespace msa::sm80 {

// Eight warps. Each sums the gradients of 16 keys, and computes those of 16 queries for half of the
// channels.
template <typename Element, int kIndexDim>
class WarpProducts {
 public:
  // Makes what this thread wrote or copied, which has landed, visible to the products; before a
  // barrier.
  __device__ __forceinline__ static void publish_writes() {}

  // Gives the index scores of 64 pairs to `take`(half, row, key, scores of this key and the next):
  // a lane's rows are own_row(half), in both classes of products. Operands in panels.
  template <typename Take>
  __device__ __forceinline__ static void scores(uint32_t queries, uint32_t keys, int block_size,
                                                Take take) {
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x / 32 % 4 * 16;
    const int half_keys = block_size / 2;
    const uint32_t rows = queries + row * 128 + swizzled_offset<8>(lane & 15, lane >> 4);
    const uint32_t columns =
        keys + swizzled_offset<8>((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
    int key = threadIdx.x / 128 * half_keys;
#pragma unroll 1
    for (const int end = key + half_keys; key < end; key += 16) {
      float sums[2][4] = {};
#pragma unroll 2
      for (int step = 0; step < kIndexDim / 16; ++step) {
        uint32_t a[4];
        load_matrix_x4(a, (rows + step / 4 * 8192) ^ (step % 4 * 32));
#pragma unroll
        for (int n = 0; n < 2; n += 2) {
          uint32_t b[4];
          load_matrix_x4(
              b, (columns + (key + n * 8) * 128 + step / 4 * block_size * 128) ^ (step % 4 * 32));
          multiply_add<Element>(sums[n], a, b[0], b[1]);
          multiply_add<Element>(sums[n + 1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          take(half, own_row(half), key + n * 8 + lane % 4 * 2,
               make_float2(sums[n][2 * half], sums[n][2 * half + 1]));
        }
      }
    }
  }

  // Of 64 pairs: adds to the sums of the index keys' gradients, and gives those of their index
  // queries to `store`(row, channel, values of this channel and the next). Operands in panels.
  template <typename Store>
  __device__ __forceinline__ void pass(uint32_t gradients, uint32_t queries, uint32_t keys,
                                       int block_size, Store store) {
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    // Of the 8x8 matrices that a lane addresses, those of 16 rows and 16 columns at the origin.
    const uint32_t lane_offset = swizzled_offset<8>(lane & 15, lane >> 4);
    if (warp * 16 < block_size) {  // a warp sums the gradients of 16 keys
      const uint32_t transposed =
          gradients + panel_offset((lane & 7) + (lane >> 4) * 8, warp * 2 + ((lane >> 3) & 1), 64);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t a[4];
        load_matrix_x4_transposed(a, transposed + step * 2048);
#pragma unroll
        for (int chunk = 0; chunk < kRowChunks; chunk += 2) {
          uint32_t b[4];
          load_matrix_x4_transposed(
              b, (queries + lane_offset + step * 2048 + chunk / 8 * 8192) ^ (chunk % 8 * 16));
          multiply_add<Element>(key_sums_[chunk], a, b[0], b[1]);
          multiply_add<Element>(key_sums_[chunk + 1], a, b[2], b[3]);
        }
      }
    }

    // And computes those of 16 queries, half of the channels; four chunks at a time, for want of
    // registers.
    const int row = warp % 4 * 16;
    const int first_chunk = warp / 4 * (kRowChunks / 2);
#pragma unroll 1
    for (int begin = first_chunk; begin < first_chunk + kRowChunks / 2; begin += 4) {
      float sums[4][4] = {};
      const uint32_t rows = gradients + row * 128 + lane_offset;
      const uint32_t columns = keys + begin / 8 * block_size * 128 + lane_offset;
#pragma unroll 4
      for (int key = 0; key < block_size; key += 16) {
        uint32_t a[4];
        load_matrix_x4(a, (rows + key / 64 * 8192) ^ (key % 64 * 2));
#pragma unroll
        for (int chunk = 0; chunk < 4; chunk += 2) {
          uint32_t b[4];
          load_matrix_x4_transposed(b, (columns + key * 128) ^ ((begin % 8 + chunk) * 16));
          multiply_add<Element>(sums[chunk], a, b[0], b[1]);
          multiply_add<Element>(sums[chunk + 1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int chunk = 0; chunk < 4; ++chunk) {
          store(row + half * 8 + lane / 4, (begin + chunk) * 8 + lane % 4 * 2,
                make_float2(sums[chunk][2 * half], sums[chunk][2 * half + 1]));
        }
      }
    }
  }

  // Gives the sums of the index keys' gradients to `add`, as to `store`.
  template <typename Add>
  __device__ __forceinline__ void finish(Add add) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int chunk = 0; chunk < kRowChunks; ++chunk) {
        add(static_cast<int>(threadIdx.x) / 32 * 16 + half * 8 + lane / 4, chunk * 8 + lane % 4 * 2,
            make_float2(key_sums_[chunk][2 * half], key_sums_[chunk][2 * half + 1]));
      }
    }
  }

 private:
  static constexpr int kRowChunks = kIndexDim / 8;
  float key_sums_[kRowChunks][4] = {};
};

}  // namespace msa::sm80

// Attention of a warp's query rows over 16 keys, folded into running softmax sums.
#pragma once

#include <cmath>
#include <cstdint>

#include "smxx/common/matrix.cuh"
#include "smxx/common/quads.cuh"

namespace msa::sm80 {

// Running state of a warp's rows. A lane holds rows lane / 4 and lane / 4 + 8 of each m16 tile; its
// sums cover only its own columns until the end. Scores count in units of log2.
template <typename Config>
struct RunningSoftmax {
  float out[Config::kRowTiles][Config::kHeadDim / 8][4];
  float reference[Config::kRowTiles][2];  // exponents are taken against this
  float sum[Config::kRowTiles][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
      for (int tile = 0; tile < Config::kHeadDim / 8; ++tile) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[i][tile][j] = 0;
      }
      reference[i][0] = reference[i][1] = -INFINITY;
      sum[i][0] = sum[i][1] = 0;
    }
  }
};

// How far, in powers of two, a score may pass its row's reference before the row is rescaled. The
// result is the same for any value; a weight of 2^8 is far from the largest float16, and rows are
// rescaled at their first keys and hardly ever again.
constexpr float kRescaleSlack = 8.0f;

// Row tiles [kBegin, kEnd) of the warp attend to 16 keys. `key_address` and `value_address` are the
// lane's ldmatrix addresses of channel 0, `first_key` the first of the keys. With
// `masks`, row r sees the keys up to visible.limit(r).
template <typename Element, typename Config, int kBegin, int kEnd, typename VisibleKeys>
__device__ __forceinline__ void attend_16_keys(
    RunningSoftmax<Config>& running,
    const uint32_t (&query)[Config::kRowTiles][Config::kHeadDim / 16][4], uint32_t key_address,
    uint32_t value_address, float scale_log2, bool masks, int first_key,
    const VisibleKeys& visible) {
  constexpr int kSteps = Config::kHeadDim / 16;
  float scores[Config::kRowTiles][2][4] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t key[4];
    load_matrix_x4(key, key_address ^ (step * 32));
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      multiply_add<Element>(scores[i][0], query[i][step], key[0], key[1]);
      multiply_add<Element>(scores[i][1], query[i][step], key[2], key[3]);
    }
  }

#pragma unroll
  for (int i = kBegin; i < kEnd; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) scores[i][j / 4][j % 4] *= scale_log2;
  }
  if (masks) {
    const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int limit = visible.limit(i * 16 + half * 8 + threadIdx.x % 32 / 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (column + j / 2 * 8 + j % 2 > limit) scores[i][j / 2][2 * half + j % 2] = -INFINITY;
        }
      }
    }
  }

  float largest[Config::kRowTiles][2];
  bool grows = false;
#pragma unroll
  for (int i = kBegin; i < kEnd; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[i][half] = fmaxf(fmaxf(scores[i][0][2 * half], scores[i][0][2 * half + 1]),
                               fmaxf(scores[i][1][2 * half], scores[i][1][2 * half + 1]));
      grows |= largest[i][half] > running.reference[i][half] + kRescaleSlack;
    }
  }
  if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float score = largest[i][half];
        score = quad_max(score);
        // Each row decides for itself, so that its result does not depend on the warp's other rows.
        const float old = running.reference[i][half];
        const float reference = score > old + kRescaleSlack ? score : old;
        const float factor = reference == old ? 1.0f : exp2_approx(old - reference);
        running.reference[i][half] = reference;
        running.sum[i][half] *= factor;
#pragma unroll
        for (int tile = 0; tile < Config::kHeadDim / 8; ++tile) {
          running.out[i][tile][2 * half] *= factor;
          running.out[i][tile][2 * half + 1] *= factor;
        }
      }
    }
  }

  uint32_t weights[Config::kRowTiles][4];
#pragma unroll
  for (int i = kBegin; i < kEnd; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float reference =
          running.reference[i][half] == -INFINITY ? 0.0f : running.reference[i][half];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const float first = exp2_approx(scores[i][tile][2 * half] - reference);
        const float second = exp2_approx(scores[i][tile][2 * half + 1] - reference);
        running.sum[i][half] += first + second;
        weights[i][2 * tile + half] = pack<Element>(first, second);
      }
    }
  }
#pragma unroll
  for (int pair = 0; pair < Config::kHeadDim / 16; ++pair) {
    uint32_t value[4];
    load_matrix_x4_transposed(value, value_address ^ (pair * 32));
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      multiply_add<Element>(running.out[i][2 * pair], weights[i], value[0], value[1]);
      multiply_add<Element>(running.out[i][2 * pair + 1], weights[i], value[2], value[3]);
    }
  }
}

}  // namespace msa::sm80

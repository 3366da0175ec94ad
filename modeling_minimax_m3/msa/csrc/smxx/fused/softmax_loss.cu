#include "softmax_loss.h"

#include <cmath>

#include "eight_elements.cuh"
#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/logarithms.h"
#include "smxx/common/ordered_bits.cuh"

namespace msa {

namespace {

using namespace fused;

constexpr int kThreads = 512;
constexpr int kThreadBlocksPerSm = 2;
constexpr int kWarps = kThreads / 32;
// Units of eight elements whose loads a thread has in flight together.
constexpr int kUnits = 4;
constexpr int kStep = 8 * kThreads * kUnits;

// The column of unit `i` of the calling thread, from the step that begins at `start` on.
__device__ __forceinline__ int column_of(int start, int i) {
  return start + (i * kThreads + static_cast<int>(threadIdx.x)) * 8;
}

// The sum of exp(x - largest) over the elements x that it has seen. Without any but -inf, it is 0.
struct ExponentialSum {
  float largest = -INFINITY;
  float sum = 0.0f;

  // The factor that makes the sum one of exp(x - now_largest). The exponent -inf - -inf would be
  // NaN.
  __device__ __forceinline__ float factor(float now_largest) const {
    return exp2_approx((largest - finite_shift(now_largest)) * kLog2E);
  }

  __device__ __forceinline__ static float finite_shift(float largest) {
    return largest == -INFINITY ? 0.0f : largest;
  }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&values)[kCount][8]) {
    float now_largest = largest;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) now_largest = max_or_nan(now_largest, values[i][j]);
    }
    sum *= factor(now_largest);
    largest = now_largest;
    const float shift = finite_shift(largest);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float part = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) part += exp2_approx((values[i][j] - shift) * kLog2E);
      sum += part;
    }
  }

  // That of all lanes of the warp, in each of them.
  __device__ __forceinline__ void join_lanes() {
    float now_largest = largest;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      now_largest = max_or_nan(now_largest, __shfl_xor_sync(0xffffffffu, now_largest, distance));
    }
    sum = lane_sum<32>(sum * factor(now_largest));
    largest = now_largest;
  }
};

// A thread block takes one row. Nobody but the thread that overwrites a unit reads it, except for
// the target's logit, which every thread reads before the barrier.
template <typename Element>
__global__ void __launch_bounds__(kThreads, kThreadBlocksPerSm)
    softmax_loss_kernel(const SoftmaxLossParams params) {
  __shared__ float warp_largest[kWarps], warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row_index = blockIdx.x;
  Element* row = static_cast<Element*>(params.logits) + row_index * params.width;
  wait_for_previous_kernel(row);

  const int64_t target = params.targets[row_index];
  const bool has_target = target >= 0 && target < params.width;
  const float target_logit = has_target ? static_cast<float>(row[target]) : NAN;
  const float divisor = *params.divisor;

  float lowest[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) lowest[j] = -INFINITY;
  const Eight<Element> nothing = pack_eight<Element>(lowest);
  ExponentialSum total;
  for (int start = 0; start < params.width; start += kStep) {
    Eight<Element> units[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int column = column_of(start, i);
      units[i] = column < params.width ? load_eight(row + column) : nothing;
    }
    float values[kUnits][8];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) unpack_eight(units[i], values[i]);
    total.add(values);
  }

  total.join_lanes();
  if (lane == 0) {
    warp_largest[warp] = total.largest;
    warp_sums[warp] = total.sum;
  }
  __syncthreads();
  total = ExponentialSum{};
  if (lane < kWarps) {
    total.largest = warp_largest[lane];
    total.sum = warp_sums[lane];
  }
  total.join_lanes();
  // As torch.logsumexp has it; inf - inf has made the sum NaN.
  if (total.largest == INFINITY) total.sum = INFINITY;

  if (threadIdx.x == 0) {
    params.losses[row_index] = total.largest - target_logit + logf(total.sum);
  }
  const float inverse_sum = 1.0f / total.sum;
  const float scale = has_target ? inverse_sum / divisor : NAN;
  // From the end, because the cache still holds what was read last.
  for (int start = (params.width - 1) / kStep * kStep; start >= 0; start -= kStep) {
    Eight<Element> units[kUnits] = {};
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int column = column_of(start, i);
      if (column < params.width) units[i] = load_eight(row + column);
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int column = column_of(start, i);
      float values[8];
      unpack_eight(units[i], values);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        values[j] = exp2_approx((values[j] - total.largest) * kLog2E) * scale;
      }
      if (column < params.width) store_eight(row + column, pack_eight<Element>(values));
    }
  }

  // The thread that has just written the target's unit.
  if (has_target && static_cast<int>(target) / 8 % kThreads == static_cast<int>(threadIdx.x)) {
    const float share = exp2_approx((target_logit - total.largest) * kLog2E) * inverse_sum;
    row[target] = static_cast<Element>((share - 1.0f) / divisor);
  }
}

}  // namespace

void launch_softmax_loss(const SoftmaxLossParams& params, cudaStream_t stream) {
  dispatch_float_dtype(params.dtype, [&](auto element) {
    launch_dependent<softmax_loss_kernel<decltype(element)>>(dim3(params.rows), kThreads, stream,
                                                             params);
  });
}

}  // namespace msa

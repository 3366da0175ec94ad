#include "rms_norm.h"

#include <algorithm>
#include <type_traits>

#include "column_sums.h"
#include "eight_elements.cuh"
#include "smxx/common/dependent_launch.cuh"

namespace msa {

namespace {

using namespace fused;

// A thread block holds a row in registers, in units of eight elements: thread t has the units
// t, t + threads, ... With few rows the latency counts, so each thread has one unit. With many, the
// bytes in flight do, so each has four.
constexpr int kFewRows = 256;
constexpr int kMostUnits = 4;

constexpr int max_threads(int units) {
  return units == 1 ? 1024 : kMaxNormWidth / 8 / units;
}

int num_threads(int width, int units) {
  const int threads = (width / 8 + units - 1) / units;
  return (threads + 31) / 32 * 32;
}

// Sums over the thread block, in each of its threads, behind one barrier. `warp_sums` must not be
// written again before the next barrier.
template <int kSums>
__device__ __forceinline__ void block_sums(float (&sums)[kSums], float (&warp_sums)[kSums][32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = lane_sum<32>(sums[i]);
    if (lane == 0) warp_sums[i][warp] = sums[i];
  }
  __syncthreads();
  const bool has_warp = lane < static_cast<int>(blockDim.x / 32);
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = lane_sum<32>(has_warp ? warp_sums[i][lane] : 0.0f);
}

template <typename Element, int kUnits, bool kAdds>
__global__ void __launch_bounds__(max_threads(kUnits)) rms_norm_kernel(const RmsNormParams params) {
  __shared__ float warp_sums[1][32];
  const int step = blockDim.x * 8;
  const int first = threadIdx.x * 8;
  const int64_t row = blockIdx.x;
  const Element* x = static_cast<const Element*>(params.x) + row * params.x_stride + first;
  const Element* residual = nullptr;
  if constexpr (kAdds) {
    residual = static_cast<const Element*>(params.residual) + row * params.residual_stride + first;
    wait_for_previous_kernel(x, residual);
  } else {
    wait_for_previous_kernel(x);
  }

  Eight<Element> states[kUnits] = {};
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (first + i * step < params.width) states[i] = load_eight(x + i * step);
  }
  float gains[8];
  if constexpr (kUnits == 1) {  // under way together with the row
    if (first < params.width) {
      load_eight_floats<Element>(params.weight, params.weight_is_float, first, gains);
    }
  }
  if constexpr (kAdds) {
    Eight<Element> others[kUnits] = {};
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (first + i * step < params.width) others[i] = load_eight(residual + i * step);
    }
    Element* sum = static_cast<Element*>(params.sum) + row * params.width + first;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      float a[8], b[8];
      unpack_eight(states[i], a);
      unpack_eight(others[i], b);
#pragma unroll
      for (int j = 0; j < 8; ++j) a[j] += b[j];
      states[i] = pack_eight<Element>(a);
      if (first + i * step < params.width) store_eight(sum + i * step, states[i]);
    }
  }

  float sums[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    float values[8];
    unpack_eight(states[i], values);
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[0] += values[j] * values[j];
  }
  block_sums(sums, warp_sums);
  const float inverse_rms = rsqrtf(sums[0] / params.width + params.eps);

  Element* normed = static_cast<Element*>(params.normed) + row * params.width + first;
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (first + i * step >= params.width) break;
    if constexpr (kUnits > 1) {
      load_eight_floats<Element>(params.weight, params.weight_is_float, first + i * step, gains);
    }
    float values[8];
    unpack_eight(states[i], values);
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = values[j] * inverse_rms * (1.0f + gains[j]);
    store_eight(normed + i * step, pack_eight<Element>(values));
  }
}

// A thread block takes every gridDim.x-th row, and sums its share of the weight's gradient in
// registers.
template <typename Element>
__global__ void __launch_bounds__(max_threads(kMostUnits))
    rms_norm_gradient_kernel(const RmsNormGradientParams params) {
  __shared__ float warp_sums[2][2][32];  // of this row and of the one before
  const int step = blockDim.x * 8;
  const int first = threadIdx.x * 8;
  const auto* x_rows = static_cast<const Element*>(params.x) + first;
  const auto* grad_rows = static_cast<const Element*>(params.grad_normed) + first;
  wait_for_previous_kernel(x_rows, grad_rows);

  float weight_sums[kMostUnits][8] = {};
  int parity = 0;
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x, parity ^= 1) {
    const Element* x = x_rows + row * params.x_stride;
    const Element* grad = grad_rows + row * params.grad_normed_stride;
    Eight<Element> states[kMostUnits] = {}, grads[kMostUnits] = {};
#pragma unroll
    for (int i = 0; i < kMostUnits; ++i) {
      if (first + i * step < params.width) {
        states[i] = load_eight(x + i * step);
        grads[i] = load_eight(grad + i * step);
      }
    }
    float sums[2] = {0.0f, 0.0f};  // of x * x, and of x * the gradient of x / rms(x)
#pragma unroll
    for (int i = 0; i < kMostUnits; ++i) {
      if (first + i * step >= params.width) break;
      float values[8], upstream[8], gains[8];
      load_eight_floats<Element>(params.weight, params.weight_is_float, first + i * step, gains);
      unpack_eight(states[i], values);
      unpack_eight(grads[i], upstream);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sums[0] += values[j] * values[j];
        sums[1] += values[j] * (upstream[j] * (1.0f + gains[j]));
      }
    }
    block_sums(sums, warp_sums[parity]);
    const float inverse_rms = rsqrtf(sums[0] / params.width + params.eps);
    const float mean_product = sums[1] * inverse_rms / params.width;

#pragma unroll
    for (int i = 0; i < kMostUnits; ++i) {
      if (first + i * step >= params.width) break;
      float values[8], upstream[8];
      unpack_eight(states[i], values);
      // The registers do not hold two rows of float and the sums: the second is read again.
      if constexpr (std::is_same_v<Element, float>) grads[i] = load_eight(grad + i * step);
      unpack_eight(grads[i], upstream);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        values[j] *= inverse_rms;
        weight_sums[i][j] += upstream[j] * values[j];
      }
      if (params.grad_x != nullptr) {
        float gains[8];
        load_eight_floats<Element>(params.weight, params.weight_is_float, first + i * step, gains);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          values[j] = inverse_rms * (upstream[j] * (1.0f + gains[j]) - values[j] * mean_product);
        }
        if (params.grad_sum != nullptr) {
          float added[8];
          load_eight_floats<Element>(params.grad_sum, false,
                                     row * params.grad_sum_stride + first + i * step, added);
#pragma unroll
          for (int j = 0; j < 8; ++j) values[j] += added[j];
        }
        store_eight(static_cast<Element*>(params.grad_x) + row * params.width + first + i * step,
                    pack_eight<Element>(values));
      }
    }
  }

  if (params.partial_sums != nullptr) {
    float* partial_sums = params.partial_sums + int64_t{blockIdx.x} * params.width + first;
#pragma unroll
    for (int i = 0; i < kMostUnits; ++i) {
      if (first + i * step < params.width) {
        store_eight(partial_sums + i * step, pack_eight<float>(weight_sums[i]));
      }
    }
  }
}

}  // namespace

void launch_rms_norm(const RmsNormParams& params, cudaStream_t stream) {
  dispatch_float_dtype(params.dtype, [&](auto element) {
    using Element = decltype(element);
    const bool is_one_unit = params.rows <= kFewRows && params.width <= 8 * max_threads(1);
    const int threads = num_threads(params.width, is_one_unit ? 1 : kMostUnits);
    const dim3 grid(params.rows);
    if (is_one_unit && params.residual == nullptr) {
      launch_dependent<rms_norm_kernel<Element, 1, false>>(grid, threads, stream, params);
    } else if (is_one_unit) {
      launch_dependent<rms_norm_kernel<Element, 1, true>>(grid, threads, stream, params);
    } else if (params.residual == nullptr) {
      launch_dependent<rms_norm_kernel<Element, kMostUnits, false>>(grid, threads, stream, params);
    } else {
      launch_dependent<rms_norm_kernel<Element, kMostUnits, true>>(grid, threads, stream, params);
    }
  });
}

int rms_norm_gradient_thread_blocks(const RmsNormGradientParams& params, int num_sms) {
  int per_sm = 0;
  dispatch_float_dtype(params.dtype, [&](auto element) {
    MSA_CHECK_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &per_sm, rms_norm_gradient_kernel<decltype(element)>, num_threads(params.width, kMostUnits),
        0));
  });
  return std::min(params.rows, num_sms * std::max(per_sm, 1));
}

void launch_rms_norm_gradient(const RmsNormGradientParams& params, int thread_blocks,
                              cudaStream_t stream) {
  dispatch_float_dtype(params.dtype, [&](auto element) {
    launch_dependent<rms_norm_gradient_kernel<decltype(element)>>(
        dim3(thread_blocks), num_threads(params.width, kMostUnits), stream, params);
  });
  if (params.grad_weight != nullptr) {
    launch_column_sums(params.partial_sums, thread_blocks, params.width,
                       params.weight_is_float ? FloatDtype::kFloat32 : params.dtype,
                       params.grad_weight, stream);
  }
}

}  // namespace msa

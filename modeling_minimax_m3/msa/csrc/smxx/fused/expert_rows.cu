#include "expert_rows.h"

#include <stdexcept>
#include <string>

#include "eight_elements.cuh"
#include "smxx/common/dependent_launch.cuh"

namespace msa {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsAtATime = 4;  // whose loads are in flight together
static_assert(kMaxRowsOfToken % kRowsAtATime == 0);

// The rows of a thread block's token and their weights, filled up with rows that count as zero.
struct RowsOfToken {
  int rows[kMaxRowsOfToken];  // -1: of no expert
  float weights[kMaxRowsOfToken];

  // Ends with a barrier.
  __device__ __forceinline__ void load(const ExpertRows& order, const float* all_weights) {
    const int k = static_cast<int>(threadIdx.x);
    if (k < kMaxRowsOfToken) {
      int row = -1;
      float weight = 0.0f;
      if (k < order.top_k) {
        const int64_t pair = int64_t{blockIdx.x} * order.top_k + k;
        const int place = order.rows[pair];
        if (place < *order.num_rows) {
          row = place;
          weight = all_weights == nullptr ? 1.0f : all_weights[pair];
        }
      }
      rows[k] = row;
      weights[k] = weight;
    }
    __syncthreads();
  }
};

// A thread block copies a token to its rows.
__global__ void __launch_bounds__(kThreads)
    gather_tokens_kernel(const GatherTokensParams params, int words, int64_t word_stride) {
  wait_for_previous_kernel(params.x, params.order.rows, params.order.num_rows);
  __shared__ RowsOfToken token;
  token.load(params.order, nullptr);
  const uint4* source = static_cast<const uint4*>(params.x) + blockIdx.x * word_stride;
  uint4* target = static_cast<uint4*>(params.out);
  for (int i = threadIdx.x; i < words; i += kThreads) {
    const uint4 word = source[i];
    for (int k = 0; k < params.order.top_k; ++k) {
      if (token.rows[k] >= 0) target[static_cast<int64_t>(token.rows[k]) * words + i] = word;
    }
  }
}

// Elements column .. column + 7 of kRowsAtATime rows, zeros for rows of no expert.
template <typename Element>
__device__ __forceinline__ void load_rows(const Element* all_rows, const int* rows, int width,
                                          int column,
                                          fused::Eight<Element> (&loaded)[kRowsAtATime]) {
#pragma unroll
  for (int j = 0; j < kRowsAtATime; ++j) {
    loaded[j] = fused::Eight<Element>{};
    if (rows[j] >= 0) {
      loaded[j] = fused::load_eight(all_rows + static_cast<int64_t>(rows[j]) * width + column);
    }
  }
}

// A thread block sums the rows of a token.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    sum_expert_rows_kernel(const SumExpertRowsParams params) {
  wait_for_previous_kernel(params.expert_rows, params.order.rows, params.order.num_rows);
  __shared__ RowsOfToken token;
  token.load(params.order, params.weights);
  const int width = params.order.width;
  const int64_t own_row = int64_t{blockIdx.x} * width;
  const Element* expert_rows = static_cast<const Element*>(params.expert_rows);
  for (int column = threadIdx.x * 8; column < width; column += 8 * kThreads) {
    float base[8] = {}, sums[8] = {};
    if (params.base != nullptr) {
      fused::unpack_eight(
          fused::load_eight(static_cast<const Element*>(params.base) + own_row + column), base);
    }
    for (int first = 0; first < params.order.top_k; first += kRowsAtATime) {
      fused::Eight<Element> loaded[kRowsAtATime];
      load_rows(expert_rows, token.rows + first, width, column, loaded);
#pragma unroll
      for (int j = 0; j < kRowsAtATime; ++j) {
        float values[8];
        fused::unpack_eight(loaded[j], values);
        const float weight = token.weights[first + j];
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i] = fmaf(weight, values[i], sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = fmaf(params.scale, sums[i], base[i]);
    fused::store_eight(static_cast<Element*>(params.out) + own_row + column,
                       fused::pack_eight<Element>(sums));
  }
}

// A thread block writes the gradients of a token's rows, scale * weight * grad_out, and of its
// weights, scale * (product of the row and grad_out).
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    sum_expert_rows_backward_kernel(const SumExpertRowsBackwardParams params) {
  wait_for_previous_kernel(params.grad_out, params.order.rows, params.order.num_rows);
  __shared__ RowsOfToken token;
  __shared__ float products[kMaxRowsOfToken][kWarps];
  token.load(params.order, params.weights);
  const int width = params.order.width;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const Element* grad_out =
      static_cast<const Element*>(params.grad_out) + int64_t{blockIdx.x} * width;
  const Element* expert_rows = static_cast<const Element*>(params.expert_rows);
  Element* grad_rows = static_cast<Element*>(params.grad_rows);
  for (int first = 0; first < params.order.top_k; first += kRowsAtATime) {
    float sums[kRowsAtATime] = {};
    for (int column = threadIdx.x * 8; column < width; column += 8 * kThreads) {
      float grads[8];
      fused::Eight<Element> loaded[kRowsAtATime];
      if (params.grad_weights != nullptr) {
        load_rows(expert_rows, token.rows + first, width, column, loaded);
      }
      fused::unpack_eight(fused::load_eight(grad_out + column), grads);
#pragma unroll
      for (int j = 0; j < kRowsAtATime; ++j) {
        const int row = token.rows[first + j];
        if (row < 0) continue;
        if (params.grad_weights != nullptr) {
          float values[8];
          fused::unpack_eight(loaded[j], values);
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[j] = fmaf(grads[i], values[i], sums[j]);
        }
        if (grad_rows != nullptr) {
          const float factor = params.scale * token.weights[first + j];
          float scaled[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) scaled[i] = factor * grads[i];
          fused::store_eight(grad_rows + static_cast<int64_t>(row) * width + column,
                             fused::pack_eight<Element>(scaled));
        }
      }
    }
    if (params.grad_weights != nullptr) {
#pragma unroll
      for (int j = 0; j < kRowsAtATime; ++j) {
        const float sum = fused::lane_sum<32>(sums[j]);
        if (lane == 0) products[first + j][warp] = sum;
      }
    }
  }
  if (params.grad_weights == nullptr) return;
  __syncthreads();
  const int k = static_cast<int>(threadIdx.x);
  if (k < params.order.top_k) {
    float product = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) product += products[k][w];
    params.grad_weights[int64_t{blockIdx.x} * params.order.top_k + k] = params.scale * product;
  }
}

void check_sizes(const ExpertRows& order) {
  if (order.top_k < 1 || order.top_k > kMaxRowsOfToken) {
    throw std::runtime_error("a token may have 1 to " + std::to_string(kMaxRowsOfToken) +
                             " experts, got " + std::to_string(order.top_k));
  }
}

}  // namespace

void launch_gather_tokens(const GatherTokensParams& params, cudaStream_t stream) {
  check_sizes(params.order);
  dispatch_float_dtype(params.order.dtype, [&](auto element) {
    constexpr int kElements = sizeof(uint4) / sizeof(decltype(element));
    launch_dependent<gather_tokens_kernel>(params.order.tokens, kThreads, stream, params,
                                           params.order.width / kElements,
                                           params.row_stride / kElements);
  });
}

void launch_sum_expert_rows(const SumExpertRowsParams& params, cudaStream_t stream) {
  check_sizes(params.order);
  dispatch_float_dtype(params.order.dtype, [&](auto element) {
    launch_dependent<sum_expert_rows_kernel<decltype(element)>>(params.order.tokens, kThreads,
                                                                stream, params);
  });
}

void launch_sum_expert_rows_backward(const SumExpertRowsBackwardParams& params,
                                     cudaStream_t stream) {
  check_sizes(params.order);
  dispatch_float_dtype(params.order.dtype, [&](auto element) {
    launch_dependent<sum_expert_rows_backward_kernel<decltype(element)>>(params.order.tokens,
                                                                         kThreads, stream, params);
  });
}

}  // namespace msa

#include "router.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/ordered_bits.cuh"

namespace msa {

namespace {

constexpr int kThreads = 128;
constexpr int kTokens = kThreads / 32;  // of a thread block, a warp each
constexpr int kVectorBytes = 16;
constexpr unsigned kWholeWarp = 0xffffffff;

// As torch.sigmoid computes it, so that both choose the same experts.
__device__ __forceinline__ float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}

__device__ __forceinline__ float to_float(float value) {
  return value;
}
__device__ __forceinline__ float to_float(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

// Elements that one instruction moves.
template <typename Element, int kCount>
struct alignas(kCount * sizeof(Element)) Vector {
  static_assert(kCount * sizeof(Element) <= kVectorBytes);
  Element values[kCount];
};

// Elements first .. first + kCount - 1 of a row as floats, those past its end as 0. `is_aligned`
// says that a lane's elements start at a multiple of a vector and lie all in the row, or none.
template <int kCount, typename Element>
__device__ __forceinline__ void load_floats(const Element* row, int first, int length,
                                            bool is_aligned, float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = 0.0f;
  if (is_aligned) {
    constexpr int kWidest = kVectorBytes / static_cast<int>(sizeof(Element));
    constexpr int kWidth = kCount < kWidest ? kCount : kWidest;
    if (first >= length) return;
#pragma unroll
    for (int i = 0; i < kCount; i += kWidth) {
      const auto vector = *reinterpret_cast<const Vector<Element, kWidth>*>(row + first + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[i + j] = to_float(vector.values[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i < length) values[i] = to_float(row[first + i]);
    }
  }
}

// A warp routes a token. Lane l holds the experts l * kPerLane to (l + 1) * kPerLane - 1, so that
// of equal ranks the first lane and its first expert have the lowest id.
template <typename Element, int kPerLane>
__global__ void __launch_bounds__(kThreads)
    router_kernel(const RouterParams params, bool is_aligned) {
  wait_for_previous_kernel(params.logits, params.bias);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t token = int64_t{blockIdx.x} * kTokens + threadIdx.x / 32;
  if (token >= params.tokens) return;
  const int first = lane * kPerLane;
  const Element* row = static_cast<const Element*>(params.logits) + token * params.row_stride;
  float scores[kPerLane];
  load_floats(row, first, params.num_experts, is_aligned, scores);
  uint32_t ranks[kPerLane];  // 0 for experts that are taken or do not exist, more for all others
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    scores[i] = sigmoid(scores[i]);
    ranks[i] = 0;
    if (first + i < params.num_experts) {
      const float bias = params.bias_is_float
                             ? static_cast<const float*>(params.bias)[first + i]
                             : to_float(static_cast<const Element*>(params.bias)[first + i]);
      ranks[i] = ordered_bits(scores[i] + bias);
    }
  }

  float sum = 0.0f, own_score = 0.0f;  // lane k keeps the k-th expert
  int own_id = 0;
  for (int k = 0; k < params.top_k; ++k) {
    uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = max(best, ranks[i]);
    const uint32_t top = __reduce_max_sync(kWholeWarp, best);
    const int owner = __ffs(__ballot_sync(kWholeWarp, best == top)) - 1;
    int place = 0;
    float score = 0.0f;
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i) {
      place = ranks[i] == top ? i : place;
      score = ranks[i] == top ? scores[i] : score;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane == owner && place == i) ranks[i] = 0;
    }
    const int id = __shfl_sync(kWholeWarp, first + place, owner);
    score = __shfl_sync(kWholeWarp, score, owner);
    sum += score;
    if (lane == k) {
      own_id = id;
      own_score = score;
    }
  }
  if (lane < params.top_k) {
    params.weights[token * params.top_k + lane] = own_score / sum;
    params.indices[token * params.top_k + lane] = own_id;
  }
}

// A warp writes the gradient of a token's logits. With s the chosen scores and w = s / sum(s):
// d w_j / d s_k = ((j == k) - w_j) / sum(s), and d s_k / d logit_k = s_k * (1 - s_k).
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    router_backward_kernel(const RouterBackwardParams params, bool is_aligned) {
  wait_for_previous_kernel(params.grad_weights, params.logits, params.weights, params.indices);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t token = int64_t{blockIdx.x} * kTokens + threadIdx.x / 32;
  if (token >= params.tokens) return;
  const bool has_expert = lane < params.top_k;
  int64_t id = 0;
  float weight = 0.0f, grad_weight = 0.0f, complement = 0.0f;
  if (has_expert) {
    const int64_t place = token * params.top_k + lane;
    id = params.indices[place];
    weight = params.weights[place];
    grad_weight = params.grad_weights[place];
    const Element* row = static_cast<const Element*>(params.logits) + token * params.row_stride;
    complement = sigmoid(-to_float(row[id]));
  }
  float mean = weight * grad_weight;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) mean += __shfl_xor_sync(kWholeWarp, mean, step);

  Element* grad_row = static_cast<Element*>(params.grad_logits) + token * params.num_experts;
  if (is_aligned) {  // all bits of a zero are 0
    const int vectors = params.num_experts * static_cast<int>(sizeof(Element)) / kVectorBytes;
    for (int i = lane; i < vectors; i += 32) reinterpret_cast<uint4*>(grad_row)[i] = uint4{};
  } else {
    for (int i = lane; i < params.num_experts; i += 32) grad_row[i] = Element(0.0f);
  }
  __syncwarp();  // orders the zeros before what replaces them
  if (has_expert) grad_row[id] = Element(weight * (grad_weight - mean) * complement);
}

void check_sizes(int num_experts, int top_k) {
  const int most = std::min(kMaxExpertsPerToken, num_experts);
  if (num_experts < 1 || num_experts > kMaxExperts || top_k < 1 || top_k > most) {
    throw std::runtime_error("the router takes 1 to " + std::to_string(kMaxExperts) +
                             " experts and at most " + std::to_string(kMaxExpertsPerToken) +
                             " of them for a token, got " + std::to_string(top_k) + " of " +
                             std::to_string(num_experts));
  }
}

template <typename Element>
bool rows_are_aligned(const void* data, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
         row_stride * static_cast<int64_t>(sizeof(Element)) % kVectorBytes == 0;
}

unsigned grid_size(int tokens) {
  return static_cast<unsigned>((int64_t{tokens} + kTokens - 1) / kTokens);
}

template <typename Element, int kPerLane>
void launch_router_of(const RouterParams& params, cudaStream_t stream) {
  const bool is_aligned = params.num_experts % kPerLane == 0 &&
                          rows_are_aligned<Element>(params.logits, params.row_stride);
  launch_dependent<router_kernel<Element, kPerLane>>(grid_size(params.tokens), kThreads, stream,
                                                     params, is_aligned);
}

}  // namespace

void launch_router(const RouterParams& params, cudaStream_t stream) {
  check_sizes(params.num_experts, params.top_k);
  dispatch_float_dtype(params.dtype, [&](auto element) {
    using Element = decltype(element);
    if (params.num_experts <= 128) {
      launch_router_of<Element, 4>(params, stream);
    } else if (params.num_experts <= 256) {
      launch_router_of<Element, 8>(params, stream);
    } else {
      launch_router_of<Element, 16>(params, stream);
    }
  });
}

void launch_router_backward(const RouterBackwardParams& params, cudaStream_t stream) {
  check_sizes(params.num_experts, params.top_k);
  dispatch_float_dtype(params.dtype, [&](auto element) {
    using Element = decltype(element);
    const bool is_aligned = rows_are_aligned<Element>(params.grad_logits, params.num_experts);
    launch_dependent<router_backward_kernel<Element>>(grid_size(params.tokens), kThreads, stream,
                                                      params, is_aligned);
  });
}

}  // namespace msa

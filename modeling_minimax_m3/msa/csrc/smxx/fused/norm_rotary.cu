#include "norm_rotary.h"

#include <algorithm>
#include <type_traits>

#include "column_sums.h"
#include "eight_elements.cuh"
#include "smxx/common/dependent_launch.cuh"

namespace msa {

namespace {

using namespace fused;

// `kLanes` neighbouring lanes hold the channels of one head of one token, eight a lane. Lanes past
// the head dimension hold zeros.
constexpr int kThreads = 128;
constexpr int64_t kManyHeads = 1 << 16;  // from here on a thread has several heads in flight
constexpr int kHeadsInFlight = 4;        // of the forward
constexpr int kGradientHeads = 2;        // of the gradient

// Where one head of one token lies.
struct Place {
  int64_t batch;
  int64_t token;
  int64_t head;

  __device__ __forceinline__ Place(const NormRotaryParams& params, unsigned index) {
    const unsigned heads = params.heads, tokens = params.tokens;
    const unsigned row = index / heads;
    head = index - row * heads;
    batch = row / tokens;
    token = row - static_cast<unsigned>(batch) * tokens;
  }
  __device__ __forceinline__ int64_t offset(const HeadStrides& strides) const {
    return batch * strides.batch + token * strides.token + head * strides.head;
  }
  __device__ __forceinline__ int64_t angle_offset(const NormRotaryParams& params) const {
    return batch * params.angle_batch_stride + token * params.rotary_dim;
  }
};

// The part of a lane in the rotation: its channels turn together with those of another lane.
template <typename Element, int kLanes>
struct Rotation {
  int channel;   // the lane's first
  int partner;   // lane of the channels that turn with these, or this lane
  bool rotates;  // whether the lane's channels turn
  float sign;    // of the partner's term: -1 in the first half

  __device__ __forceinline__ explicit Rotation(const NormRotaryParams& params) {
    const int lane = threadIdx.x % kLanes, half = params.rotary_dim / 16;
    channel = lane * 8;
    rotates = channel < params.rotary_dim;
    sign = lane < half ? -1.0f : 1.0f;
    partner = !rotates ? lane : lane < half ? lane + half : lane - half;
  }

  __device__ __forceinline__ void load(const NormRotaryParams& params, int64_t offset,
                                       float (&cos)[8], float (&sin)[8]) const {
    if (!rotates) return;
    load_eight_floats<Element>(params.cos, params.angles_are_float, offset + channel, cos);
    load_eight_floats<Element>(params.sin, params.angles_are_float, offset + channel, sin);
  }

  // All lanes of the warp take part.
  __device__ __forceinline__ void apply(float (&values)[8], const float (&cos)[8],
                                        const float (&sin)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float other = __shfl_sync(0xffffffffu, values[j], partner, kLanes);
      if (rotates) values[j] = values[j] * cos[j] + sign * other * sin[j];
    }
  }

  // Gradients of the values before, from those of the values after.
  __device__ __forceinline__ void apply_transposed(float (&grads)[8], const float (&cos)[8],
                                                   const float (&sin)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float product = rotates ? grads[j] * sin[j] : 0.0f;
      const float other = __shfl_sync(0xffffffffu, product, partner, kLanes);
      if (rotates) grads[j] = grads[j] * cos[j] - sign * other;
    }
  }
};

__device__ __forceinline__ unsigned num_heads_of_all_tokens(const NormRotaryParams& params) {
  return static_cast<unsigned>(params.batch) * params.tokens * params.heads;
}

template <typename Element, int kLanes, int kHeads>
__global__ void __launch_bounds__(kThreads) norm_rotary_kernel(const NormRotaryParams params) {
  constexpr int kGroups = kThreads / kLanes;
  const Rotation<Element, kLanes> rotation(params);
  const int channel = rotation.channel;
  const bool has_channels = channel < params.head_dim;
  const unsigned first = blockIdx.x * (kGroups * kHeads) + threadIdx.x / kLanes;
  const unsigned count = num_heads_of_all_tokens(params);
  const Element* sources[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const Place place(params, min(first + i * kGroups, count - 1));
    sources[i] =
        static_cast<const Element*>(params.states) + place.offset(params.strides) + channel;
  }
  wait_for_previous_kernel(sources[0], sources[kHeads - 1]);

  Eight<Element> states[kHeads] = {};
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (has_channels && first + i * kGroups < count) states[i] = load_eight(sources[i]);
  }
  float gains[8] = {};
  if (has_channels) {
    load_eight_floats<Element>(params.weight, params.weight_is_float, channel, gains);
  }
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const unsigned index = first + i * kGroups;
    float cos[8], sin[8];
    const Place place(params, min(index, count - 1));
    rotation.load(params, place.angle_offset(params), cos, sin);
    float values[8];
    unpack_eight(states[i], values);
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += values[j] * values[j];
    const float inverse_rms = rsqrtf(lane_sum<kLanes>(squares) / params.head_dim + params.eps);
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = values[j] * inverse_rms * (1.0f + gains[j]);
    rotation.apply(values, cos, sin);
    if (has_channels && index < count) {
      store_eight(static_cast<Element*>(params.out) + int64_t{index} * params.head_dim + channel,
                  pack_eight<Element>(values));
    }
  }
}

// A thread block takes every gridDim.x-th tile of heads, and sums its share of the weight's
// gradient in registers.
template <typename Element, int kLanes>
__global__ void __launch_bounds__(kThreads)
    norm_rotary_gradient_kernel(const NormRotaryGradientParams params) {
  constexpr int kGroups = kThreads / kLanes, kTile = kGroups * kGradientHeads;
  __shared__ float group_sums[kGroups][kLanes * 8];
  const NormRotaryParams& forward = params.forward;
  const Rotation<Element, kLanes> rotation(forward);
  const int channel = rotation.channel, group = threadIdx.x / kLanes;
  const bool has_channels = channel < forward.head_dim;
  const unsigned count = num_heads_of_all_tokens(forward);
  const Element* states = static_cast<const Element*>(forward.states) + channel;
  const Element* grad_out = static_cast<const Element*>(params.grad_out) + channel;
  wait_for_previous_kernel(states, grad_out);

  float gains[8] = {};
  if (has_channels) {
    load_eight_floats<Element>(forward.weight, forward.weight_is_float, channel, gains);
  }
  float weight_sums[8] = {};
  for (unsigned begin = blockIdx.x * kTile; begin < count; begin += gridDim.x * kTile) {
    Eight<Element> packed_states[kGradientHeads] = {}, packed_grads[kGradientHeads] = {};
    int64_t angle_offsets[kGradientHeads];
#pragma unroll
    for (int i = 0; i < kGradientHeads; ++i) {
      const unsigned index = begin + i * kGroups + group;
      const Place place(forward, min(index, count - 1));
      angle_offsets[i] = place.angle_offset(forward);
      if (has_channels && index < count) {
        packed_states[i] = load_eight(states + place.offset(forward.strides));
        packed_grads[i] = load_eight(grad_out + place.offset(params.grad_strides));
      }
    }
#pragma unroll
    for (int i = 0; i < kGradientHeads; ++i) {
      const unsigned index = begin + i * kGroups + group;
      float cos[8], sin[8], values[8], grads[8];
      rotation.load(forward, angle_offsets[i], cos, sin);
      unpack_eight(packed_states[i], values);
      unpack_eight(packed_grads[i], grads);
      rotation.apply_transposed(grads, cos, sin);
      float squares = 0.0f, products = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        squares += values[j] * values[j];
        products += values[j] * (grads[j] * (1.0f + gains[j]));
      }
      const float inverse_rms = rsqrtf(lane_sum<kLanes>(squares) / forward.head_dim + forward.eps);
      const float mean_product = lane_sum<kLanes>(products) * inverse_rms / forward.head_dim;
      if (!has_channels || index >= count) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        values[j] *= inverse_rms;
        weight_sums[j] += grads[j] * values[j];
        values[j] = inverse_rms * (grads[j] * (1.0f + gains[j]) - values[j] * mean_product);
      }
      if (params.grad_states != nullptr) {
        store_eight(
            static_cast<Element*>(params.grad_states) + int64_t{index} * forward.head_dim + channel,
            pack_eight<Element>(values));
      }
    }
  }

  if (params.partial_sums == nullptr) return;
#pragma unroll
  for (int j = 0; j < 8; ++j) group_sums[group][channel + j] = weight_sums[j];
  __syncthreads();
  for (int i = threadIdx.x; i < forward.head_dim; i += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < kGroups; ++other) sum += group_sums[other][i];
    params.partial_sums[int64_t{blockIdx.x} * forward.head_dim + i] = sum;
  }
}

// Calls `function` with a value of the element type and std::integral_constant<int, lanes>.
template <typename Function>
void dispatch_lanes(const NormRotaryParams& params, Function&& function) {
  dispatch_float_dtype(params.dtype, [&](auto element) {
    if (params.head_dim <= 64) {
      function(element, std::integral_constant<int, 8>{});
    } else if (params.head_dim <= 128) {
      function(element, std::integral_constant<int, 16>{});
    } else {
      function(element, std::integral_constant<int, 32>{});
    }
  });
}

int64_t num_heads(const NormRotaryParams& params) {
  return int64_t{params.batch} * params.tokens * params.heads;
}

int num_tiles(int64_t heads, int tile) {
  return static_cast<int>((heads + tile - 1) / tile);
}

}  // namespace

void launch_norm_rotary(const NormRotaryParams& params, cudaStream_t stream) {
  const int64_t heads = num_heads(params);
  dispatch_lanes(params, [&](auto element, auto lanes) {
    using Element = decltype(element);
    constexpr int kGroups = kThreads / lanes.value;
    if (heads >= kManyHeads) {
      launch_dependent<norm_rotary_kernel<Element, lanes.value, kHeadsInFlight>>(
          dim3(num_tiles(heads, kGroups * kHeadsInFlight)), kThreads, stream, params);
    } else {
      launch_dependent<norm_rotary_kernel<Element, lanes.value, 1>>(dim3(num_tiles(heads, kGroups)),
                                                                    kThreads, stream, params);
    }
  });
}

int norm_rotary_gradient_thread_blocks(const NormRotaryGradientParams& params, int num_sms) {
  int per_sm = 0, tiles = 0;
  dispatch_lanes(params.forward, [&](auto element, auto lanes) {
    MSA_CHECK_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &per_sm, norm_rotary_gradient_kernel<decltype(element), lanes.value>, kThreads, 0));
    tiles = num_tiles(num_heads(params.forward), kThreads / lanes.value * kGradientHeads);
  });
  return std::min(tiles, num_sms * std::max(per_sm, 1));
}

void launch_norm_rotary_gradient(const NormRotaryGradientParams& params, int thread_blocks,
                                 cudaStream_t stream) {
  dispatch_lanes(params.forward, [&](auto element, auto lanes) {
    launch_dependent<norm_rotary_gradient_kernel<decltype(element), lanes.value>>(
        dim3(thread_blocks), kThreads, stream, params);
  });
  if (params.grad_weight != nullptr) {
    launch_column_sums(params.partial_sums, thread_blocks, params.forward.head_dim,
                       params.forward.weight_is_float ? FloatDtype::kFloat32 : params.forward.dtype,
                       params.grad_weight, stream);
  }
}

}  // namespace msa

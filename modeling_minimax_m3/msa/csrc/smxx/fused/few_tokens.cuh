// Products of a few tokens with the rows of a weight matrix, at the rate at which the weights can
// be read. Everything here streams weights from global memory into the operands of mma.m16n8k16.
//
// The order of the k channels of an mma is free as long as both operands agree. So a lane reads 16
// contiguous bytes of weight row g (g = lane / 4), and the same channels of token g. Eight channels
// are its part of `b` and of `a` in two mma: 16 bytes are eight weights of 16 bits, or 16 of eight.
// Eight weight rows are the n columns, up to 16 tokens the m rows. The warps of a thread block
// share the channels out and add up their sums at the end.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "few_token_weights.h"
#include "mxfp8_numbers.cuh"
#include "smxx/common/dispatch.h"
#include "smxx/common/matrix.cuh"

namespace msa::few_tokens {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 8;  // weight rows of an mma

// 16 bytes of weights, which are read once.
__device__ __forceinline__ uint4 load_weights(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// 16 bytes that a kernel before has written. Each thread block reads them once, so that they need
// no place in the first-level cache.
__device__ __forceinline__ uint4 load_states(const void* address) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

// A place in a matrix of weights of the dtype of the states.
template <typename Element_>
class PlainWeights {
 public:
  using Element = Element_;
  using Loaded = uint4;
  static constexpr int kUnits = 1;      // of eight channels, that a lane reads by one load
  static constexpr int kChannels = 32;  // that a group of four lanes reads by one load a lane

  static constexpr int loads(int halves, int tiles) { return 8; }  // in flight in a lane

  // Thread blocks that fit a multiprocessor: enough for the bytes in flight, few enough for the
  // registers.
  static constexpr int thread_blocks_per_sm(int halves, int tiles) {
    return halves * tiles == 1 ? 4 : 3;
  }

  __device__ PlainWeights() = default;
  __device__ PlainWeights(const FewTokenWeights& matrix, int64_t place)
      : values_(static_cast<const Element*>(matrix.values) + place) {}

  __device__ Loaded load(int64_t offset) const { return load_weights(values_ + offset); }
  __device__ static void decode(const Loaded& loaded, uint4 (&units)[kUnits]) { units[0] = loaded; }

 private:
  const Element* values_ = nullptr;
};

// A place in a matrix of MXFP8 weights: E4M3 values, and for 32 of a row the byte e of a scale
// 2^(e - 127). They become bfloat16, which holds their product.
class Mxfp8Weights {
 public:
  using Element = __nv_bfloat16;
  struct Loaded {
    uint4 values;
    uint32_t scale;
  };
  static constexpr int kUnits = 2;
  static constexpr int kChannels = 64;

  static constexpr int loads(int halves, int tiles) { return halves == 2 ? 8 : tiles == 2 ? 6 : 4; }
  static constexpr int thread_blocks_per_sm(int halves, int tiles) {
    return halves * tiles == 1 ? 4 : halves == 1 ? 3 : 2;
  }

  __device__ Mxfp8Weights() = default;
  __device__ Mxfp8Weights(const FewTokenWeights& matrix, int64_t place)
      : values_(static_cast<const uint8_t*>(matrix.values) + place),
        scales_(matrix.scales + place / kMxfp8Group) {}

  // `offset` is a multiple of kMxfp8Group.
  __device__ Loaded load(int64_t offset) const {
    return {load_weights(values_ + offset), __ldg(scales_ + offset / kMxfp8Group)};
  }

  __device__ static void decode(const Loaded& loaded, uint4 (&units)[kUnits]) {
    const uint32_t factor = mxfp8_factor(loaded.scale);
    units[0] = mxfp8_numbers(loaded.values.x, loaded.values.y, factor);
    units[1] = mxfp8_numbers(loaded.values.z, loaded.values.w, factor);
  }

 private:
  const uint8_t* values_ = nullptr;
  const uint8_t* scales_ = nullptr;
};

template <typename Weights>
struct Form {
  using Type = Weights;
};

// Calls `function` with the Form of the weights.
template <typename Function>
void dispatch_weights(Dtype dtype, const FewTokenWeights& weights, Function&& function) {
  if (weights.scales == nullptr) {
    dispatch_dtype(dtype, [&](auto element) { function(Form<PlainWeights<decltype(element)>>{}); });
  } else if (dtype == Dtype::kBFloat16) {
    function(Form<Mxfp8Weights>{});
  } else {
    throw std::runtime_error("MXFP8 weights go with states in bfloat16");
  }
}

// The channels of a token that go with one load of weights; zeros for none.
template <typename Weights>
struct States {
  uint4 units[Weights::kUnits] = {};

  __device__ void load(const typename Weights::Element* address) {
#pragma unroll
    for (int i = 0; i < Weights::kUnits; ++i) units[i] = load_states(address + 8 * i);
  }
};

// sums += tokens * weights over the channels of one load: tokens g and g + 8, weight row g.
template <typename Weights>
__device__ __forceinline__ void add_products(float (&sums)[4], const States<Weights>& low,
                                             const States<Weights>& high,
                                             const typename Weights::Loaded& loaded) {
  using Element = typename Weights::Element;
  uint4 weights[Weights::kUnits];
  Weights::decode(loaded, weights);
#pragma unroll
  for (int i = 0; i < Weights::kUnits; ++i) {
    const uint4 &a = low.units[i], &b = high.units[i];
    const uint32_t first[4] = {a.x, b.x, a.y, b.y};
    const uint32_t second[4] = {a.z, b.z, a.w, b.w};
    multiply_add<Element>(sums, first, weights[i].x, weights[i].y);
    multiply_add<Element>(sums, second, weights[i].z, weights[i].w);
  }
}

// The sums of all warps for kTiles tiles of eight weight rows and kHalves halves of eight tokens.
template <int kHalves, int kTiles>
struct WarpSums {
  static constexpr int kTokens = 8 * kHalves;
  static constexpr int kColumns = kRows * kTiles;
  float values[kWarps][kTokens][kColumns];

  __device__ void store(const float (&sums)[kTiles][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int token = lane / 4, column = 2 * (lane % 4);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        float* row = &values[warp][token + 8 * half][kRows * tile + column];
        row[0] = sums[tile][2 * half];
        row[1] = sums[tile][2 * half + 1];
      }
    }
  }

  __device__ float total(int token, int column) const {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += values[warp][token][column];
    return sum;
  }
};

template <typename Element>
__device__ __forceinline__ Element to_element(float value) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

}  // namespace msa::few_tokens

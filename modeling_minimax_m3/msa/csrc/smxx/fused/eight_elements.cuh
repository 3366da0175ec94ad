// Eight neighbouring elements of a row: one 16-byte access for 16-bit elements, two for float.
//
// The loads are ordinary ones: the compiler may move loads of constant data (__ldg) to before the
// wait for the previous kernel.
#pragma once

#include <cstdint>
#include <type_traits>

#include "smxx/common/matrix.cuh"

namespace msa::fused {

template <typename Element>
struct Eight {
  uint4 words[sizeof(Element) / 2];
};

// `source` is a multiple of 16 bytes.
template <typename Element>
__device__ __forceinline__ Eight<Element> load_eight(const Element* source) {
  Eight<Element> eight;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Element) / 2); ++i) {
    eight.words[i] = reinterpret_cast<const uint4*>(source)[i];
  }
  return eight;
}

template <typename Element>
__device__ __forceinline__ void store_eight(Element* target, const Eight<Element>& eight) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Element) / 2); ++i) {
    reinterpret_cast<uint4*>(target)[i] = eight.words[i];
  }
}

template <typename Element>
__device__ __forceinline__ void unpack_eight(const Eight<Element>& eight, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Element) / 2); ++i) {
    const uint32_t words[4] = {eight.words[i].x, eight.words[i].y, eight.words[i].z,
                               eight.words[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (std::is_same_v<Element, float>) {
        values[4 * i + j] = __uint_as_float(words[j]);
      } else {
        const float2 pair = unpack<Element>(words[j]);
        values[2 * j] = pair.x;
        values[2 * j + 1] = pair.y;
      }
    }
  }
}

// Rounds to the element type.
template <typename Element>
__device__ __forceinline__ Eight<Element> pack_eight(const float (&values)[8]) {
  Eight<Element> eight;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Element) / 2); ++i) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (std::is_same_v<Element, float>) {
        words[j] = __float_as_uint(values[4 * i + j]);
      } else {
        words[j] = pack<Element>(values[2 * j], values[2 * j + 1]);
      }
    }
    eight.words[i] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  return eight;
}

// Elements `offset` to `offset + 7` of a tensor of Element, or of float where `is_float`.
template <typename Element>
__device__ __forceinline__ void load_eight_floats(const void* source, bool is_float, int64_t offset,
                                                  float (&values)[8]) {
  if (is_float) {
    unpack_eight(load_eight(static_cast<const float*>(source) + offset), values);
  } else {
    unpack_eight(load_eight(static_cast<const Element*>(source) + offset), values);
  }
}

// Sum over `kLanes` neighbouring lanes, in each of them; all lanes of the warp take part.
template <int kLanes>
__device__ __forceinline__ float lane_sum(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

}  // namespace msa::fused

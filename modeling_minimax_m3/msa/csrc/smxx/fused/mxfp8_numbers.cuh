// Numbers in MXFP8 as bfloat16, which holds them: E4M3 values times a power of two.
//
// The bits of an E4M3 number, moved into the fields of a bfloat16, stand for 2^-120 times it,
// subnormal ones too. One product with 2^(e - 7), for a scale of the byte e, gives the number.
//
// `mxfp8_numbers` makes no more than that. It is right for the weights that there are: not for
// values that mean NaN (0x7f and 0xff), nor for scales above kLargestMxfp8Scale, which is 2^7.
// `any_mxfp8_numbers` is right for all.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace msa {

constexpr uint32_t kLargestMxfp8Scale = 134;

// Two bfloat16 that the numbers of a group are multiplied by.
__device__ __forceinline__ uint32_t mxfp8_factor(uint32_t scale) {
  return scale * 0x00800080 + 120 * 0x00800080;
}

// Two bytes of a word, each widened with its sign, as bfloat16.
template <uint32_t kBytes>
__device__ __forceinline__ uint32_t mxfp8_pair(uint32_t word, uint32_t factor) {
  uint32_t widened, product;
  asm("prmt.b32 %0, %1, %1, %2;\n" : "=r"(widened) : "r"(word), "n"(kBytes));
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n"
      : "=r"(product)
      : "r"(widened << 4 & 0x87f087f0), "r"(factor), "r"(0x80008000));
  return product;
}

// The eight numbers of two words.
__device__ __forceinline__ uint4 mxfp8_numbers(uint32_t low, uint32_t high, uint32_t factor) {
  // The selectors' highest bit stands for eight times the sign of the byte.
  constexpr uint32_t kFirst = 0x9180, kSecond = 0xb3a2;
  return {mxfp8_pair<kFirst>(low, factor), mxfp8_pair<kSecond>(low, factor),
          mxfp8_pair<kFirst>(high, factor), mxfp8_pair<kSecond>(high, factor)};
}

// The highest bit of each byte that means NaN.
__device__ __forceinline__ uint32_t mxfp8_nan_bytes(uint32_t word) {
  return ((word & 0x7f7f7f7f) + 0x01010101) & 0x80808080;
}

__device__ __forceinline__ uint4 any_mxfp8_numbers(uint32_t low, uint32_t high, uint32_t scale) {
  const uint32_t fast_scale = min(scale, kLargestMxfp8Scale);
  uint4 numbers = mxfp8_numbers(low, high, mxfp8_factor(fast_scale));
  const uint32_t is_nan[2] = {mxfp8_nan_bytes(low), mxfp8_nan_bytes(high)};
  if (scale == fast_scale && (is_nan[0] | is_nan[1]) == 0) return numbers;
  // The rest of a large scale is at most 2^120; the byte 255 means NaN.
  const uint32_t rest = scale == 255 ? 0x7fff7fff : (127 + scale - fast_scale) * 0x00800080;
  uint32_t* pairs = &numbers.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("fma.rn.bf16x2 %0, %0, %1, %2;\n" : "+r"(pairs[i]) : "r"(rest), "r"(0x80008000));
    const uint32_t bytes = __byte_perm(is_nan[i / 2], 0, i % 2 == 0 ? 0x1404 : 0x3424);
    pairs[i] |= (bytes >> 15) * 0x7fff;
  }
  return numbers;
}

}  // namespace msa

// Warp-level matrix products of 16-bit operands: ldmatrix and mma.m16n8k16 (sm_80).
//
// Fragment layout of a lane, with row = lane / 4 and pair = 2 * (lane % 4):
//   accumulator  [0], [1]: (row, pair), (row, pair + 1);  [2], [3]: the same in row + 8
//   a            [0]: (row, pair..), [1]: (row + 8, pair..), [2], [3]: the same, k + 8
//   b            [0]: (k = pair.., n = row), [1]: the same, k + 8
// So the accumulators of two neighbouring n8 tiles, rounded, are the `a` of a k16 step.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace msa {

// Four 8x8 matrices of 16-bit elements; lanes 8i..8i+7 give the row addresses of matrix i.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&fragment)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&fragment)[4],
                                                          uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

// The `a` fragments of kTiles m16 tiles, `tile_bytes` apart, for all k16 steps. `address` is the
// lane's of the first: rows of at most 256 bytes, swizzled, so that a step enters by an exclusive
// or.
template <int kTiles, int kSteps>
__device__ __forceinline__ void load_fragments(uint32_t (&a)[kTiles][kSteps][4], uint32_t address,
                                               int tile_bytes) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      load_matrix_x4(a[i][step], (address + i * tile_bytes) ^ (step * 32));
    }
  }
}

// accumulator += a * b, one 16 x 8 tile over 16 channels.
template <typename Element>
__device__ __forceinline__ void multiply_add(float (&accumulator)[4], const uint32_t (&a)[4],
                                             uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two floats rounded to 16 bits; the first lands in the lower half.
template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// And back.
template <typename Element>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
}

// 2^x; 2^-inf is 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Where a 16-byte chunk of a row lies in a shared-memory tile of `kRowChunks` chunks a row (8 or
// more). The chunks of a row are permuted by the row, so that the eight rows of an 8x8 matrix lie
// in eight different bank groups.
template <int kRowChunks>
__device__ __forceinline__ int swizzled_offset(int row, int chunk) {
  static_assert(kRowChunks % 8 == 0, "the permutation needs rows of 128 bytes or a multiple");
  return (row * kRowChunks + (chunk ^ (row & 7))) * 16;
}

}  // namespace msa

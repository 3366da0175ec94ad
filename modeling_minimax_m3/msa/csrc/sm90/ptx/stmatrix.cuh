// Register fragments of 8x8 matrices to shared memory (stmatrix, sm_90).
#pragma once

#include <cstdint>

namespace msa::sm90 {

// Four 8x8 matrices of 16-bit elements; lanes 8i..8i+7 give the row addresses of matrix i. The
// layout of a matrix over the lanes is that of ldmatrix.
__device__ __forceinline__ void store_matrix_x4(uint32_t address, const uint32_t (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

}  // namespace msa::sm90

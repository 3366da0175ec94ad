// Elements as floats and back, and as vectors of up to 16 bytes, which one instruction moves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace msa::fused {

constexpr int kVectorBytes = 16;

// Elements of a vector of 16 bytes.
template <typename T>
constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  static_assert(kCount * sizeof(T) <= kVectorBytes);
  T values[kCount];
};

__device__ __forceinline__ float to_float(float value) {
  return value;
}
__device__ __forceinline__ float to_float(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

// The nearest element.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// From an address that is a multiple of the vector's size.
template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T, kCount>*>(address);
}

template <int kCount, typename T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T, kCount>& vector) {
  *reinterpret_cast<Vector<T, kCount>*>(address) = vector;
}

}  // namespace msa::fused

#include "swiglu.h"

#include <limits>
#include <stdexcept>
#include <type_traits>

#include "smxx/common/dependent_launch.cuh"
#include "vectors.cuh"

namespace msa::fused {

namespace {

constexpr int kThreads = 128;

// In half precision the special functions' own accuracy is enough: the rounding of the result hides
// their error.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return 1.0f / (1.0f + expf(-x));
  } else {
    return __fdividef(1.0f, 1.0f + __expf(-x));
  }
}

// Comparisons that leave NaN as it is.
__device__ __forceinline__ float at_most(float value, float limit) {
  return value > limit ? limit : value;
}
__device__ __forceinline__ float at_least(float value, float limit) {
  return value < limit ? limit : value;
}

// The elements of one row that a thread computes: a vector of each half.
template <typename T>
struct Place {
  __device__ __forceinline__ Place(const SwigluParams& params, int slices)
      : row(blockIdx.x / slices),
        column((static_cast<int>(blockIdx.x % slices) * kThreads + static_cast<int>(threadIdx.x)) *
               kVectorElements<T>) {}

  int64_t row;
  int column;
};

// A thread block computes a slice of one row. The bounds are rounded to the element type, as the
// bounds of torch.clamp are where its gradient compares with them.
template <typename T>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const SwigluParams params, int slices) {
  constexpr int kCount = kVectorElements<T>;
  wait_for_previous_kernel(params.gate_up);
  const Place<T> place(params, slices);
  if (place.column >= params.width) return;
  const T* gate_address =
      static_cast<const T*>(params.gate_up) + place.row * params.row_stride + place.column;
  const auto gates = load_vector<kCount>(gate_address);
  const auto ups = load_vector<kCount>(gate_address + params.width);
  const float limit = to_float(from_float<T>(params.limit));
  Vector<T, kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float gate = at_most(to_float(gates.values[i]), limit);
    const float up = at_least(at_most(to_float(ups.values[i]), limit), -limit);
    out.values[i] = from_float<T>((up + 1.0f) * (gate * sigmoid<T>(params.alpha * gate)));
  }
  store_vector(static_cast<T*>(params.out) + place.row * params.width + place.column, out);
}

// A clamp passes the gradient strictly within its bounds: at a bound, PyTorch's releases differ.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const SwigluParams params, int slices) {
  constexpr int kCount = kVectorElements<T>;
  wait_for_previous_kernel(params.gate_up, params.grad_out);
  const Place<T> place(params, slices);
  if (place.column >= params.width) return;
  const T* gate_address =
      static_cast<const T*>(params.gate_up) + place.row * params.row_stride + place.column;
  const auto gates = load_vector<kCount>(gate_address);
  const auto ups = load_vector<kCount>(gate_address + params.width);
  const auto grads = load_vector<kCount>(static_cast<const T*>(params.grad_out) +
                                         place.row * params.width + place.column);
  const float limit = to_float(from_float<T>(params.limit));
  Vector<T, kCount> grad_gates, grad_ups;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float raw_gate = to_float(gates.values[i]), raw_up = to_float(ups.values[i]);
    const float grad = to_float(grads.values[i]);
    const float gate = at_most(raw_gate, limit);
    const float up = at_least(at_most(raw_up, limit), -limit);
    const float share = sigmoid<T>(params.alpha * gate);
    const float slope = share + params.alpha * (gate * (share * (1.0f - share)));
    grad_gates.values[i] = from_float<T>(raw_gate < limit ? grad * (up + 1.0f) * slope : 0.0f);
    const bool up_passes = raw_up > -limit && raw_up < limit;
    grad_ups.values[i] = from_float<T>(up_passes ? grad * (gate * share) : 0.0f);
  }
  T* out = static_cast<T*>(params.out) + place.row * (2 * int64_t{params.width}) + place.column;
  store_vector(out, grad_gates);
  store_vector(out + params.width, grad_ups);
}

int slices_of_row(const SwigluParams& params) {
  const int elements = kThreads * kVectorBytes / element_bytes(params.type);
  return (params.width + elements - 1) / elements;
}

unsigned grid_size(const SwigluParams& params, int slices) {
  const int64_t blocks = int64_t{params.rows} * slices;
  if (blocks > std::numeric_limits<int>::max()) {
    throw std::runtime_error("the activation has too many elements for one launch");
  }
  return static_cast<unsigned>(blocks);
}

}  // namespace

void launch_swiglu(const SwigluParams& params, cudaStream_t stream) {
  const int slices = slices_of_row(params);
  dispatch_element_type(params.type, [&](auto element) {
    launch_dependent<swiglu_kernel<decltype(element)>>(grid_size(params, slices), kThreads, stream,
                                                       params, slices);
  });
}

void launch_swiglu_backward(const SwigluParams& params, cudaStream_t stream) {
  const int slices = slices_of_row(params);
  dispatch_element_type(params.type, [&](auto element) {
    launch_dependent<swiglu_backward_kernel<decltype(element)>>(grid_size(params, slices), kThreads,
                                                                stream, params, slices);
  });
}

}  // namespace msa::fused

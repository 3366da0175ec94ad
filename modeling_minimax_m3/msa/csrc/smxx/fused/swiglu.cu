#include "swiglu.h"

#include <limits>
#include <stdexcept>
#include <type_traits>

#include "eight_elements.cuh"
#include "smxx/common/dependent_launch.cuh"

namespace msa {

namespace {

constexpr int kThreads = 128;

// In half precision the special functions' own accuracy is enough: the rounding of the result hides
// their error.
template <typename Element>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (std::is_same_v<Element, float>) {
    return 1.0f / (1.0f + expf(-x));
  } else {
    return __fdividef(1.0f, 1.0f + __expf(-x));
  }
}

// The eight elements of each half of a row that a thread reads, as they are and clamped. A NaN
// stays a NaN. The limit is rounded to the element type, as PyTorch rounds it.
template <typename Element>
struct GateUp {
  float raw_gates[8], raw_ups[8], limit;
  int64_t row;
  int column;

  // Whether the thread has any; a thread block computes a slice of one row.
  __device__ __forceinline__ bool load(const SwigluParams& params, int slices) {
    row = blockIdx.x / slices;
    column = (static_cast<int>(blockIdx.x % slices) * kThreads + static_cast<int>(threadIdx.x)) * 8;
    if (column >= params.width) return false;
    const Element* gates =
        static_cast<const Element*>(params.gate_up) + row * params.row_stride + column;
    const auto gate_words = fused::load_eight(gates);
    const auto up_words = fused::load_eight(gates + params.width);
    fused::unpack_eight(gate_words, raw_gates);
    fused::unpack_eight(up_words, raw_ups);
    limit = params.limit;
    if constexpr (!std::is_same_v<Element, float>) {
      limit = unpack<Element>(pack<Element>(limit, limit)).x;
    }
    return true;
  }

  __device__ __forceinline__ float gate(int i) const {
    return raw_gates[i] > limit ? limit : raw_gates[i];
  }
  __device__ __forceinline__ float up(int i) const {
    const float bounded = raw_ups[i] > limit ? limit : raw_ups[i];
    return bounded < -limit ? -limit : bounded;
  }
};

template <typename Element>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const SwigluParams params, int slices) {
  wait_for_previous_kernel(params.gate_up);
  GateUp<Element> in;
  if (!in.load(params, slices)) return;
  float out[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float gate = in.gate(i);
    out[i] = (in.up(i) + 1.0f) * (gate * sigmoid<Element>(params.alpha * gate));
  }
  fused::store_eight(static_cast<Element*>(params.out) + in.row * params.width + in.column,
                     fused::pack_eight<Element>(out));
}

// A clamp passes the gradient strictly within its bounds: at a bound, PyTorch's releases differ.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const SwigluParams params, int slices) {
  wait_for_previous_kernel(params.gate_up, params.grad_out);
  GateUp<Element> in;
  if (!in.load(params, slices)) return;
  float grads[8], grad_gates[8], grad_ups[8];
  fused::unpack_eight(fused::load_eight(static_cast<const Element*>(params.grad_out) +
                                        in.row * params.width + in.column),
                      grads);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float gate = in.gate(i);
    const float share = sigmoid<Element>(params.alpha * gate);
    const float slope = share + params.alpha * (gate * (share * (1.0f - share)));
    const bool gate_passes = in.raw_gates[i] < in.limit;
    const bool up_passes = in.raw_ups[i] > -in.limit && in.raw_ups[i] < in.limit;
    grad_gates[i] = gate_passes ? grads[i] * (in.up(i) + 1.0f) * slope : 0.0f;
    grad_ups[i] = up_passes ? grads[i] * (gate * share) : 0.0f;
  }
  Element* out =
      static_cast<Element*>(params.out) + in.row * (2 * int64_t{params.width}) + in.column;
  fused::store_eight(out, fused::pack_eight<Element>(grad_gates));
  fused::store_eight(out + params.width, fused::pack_eight<Element>(grad_ups));
}

int slices_of_row(const SwigluParams& params) {
  constexpr int kElements = 8 * kThreads;
  return (params.width + kElements - 1) / kElements;
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
  dispatch_float_dtype(params.dtype, [&](auto element) {
    launch_dependent<swiglu_kernel<decltype(element)>>(grid_size(params, slices), kThreads, stream,
                                                       params, slices);
  });
}

void launch_swiglu_backward(const SwigluParams& params, cudaStream_t stream) {
  const int slices = slices_of_row(params);
  dispatch_float_dtype(params.dtype, [&](auto element) {
    launch_dependent<swiglu_backward_kernel<decltype(element)>>(grid_size(params, slices), kThreads,
                                                                stream, params, slices);
  });
}

}  // namespace msa

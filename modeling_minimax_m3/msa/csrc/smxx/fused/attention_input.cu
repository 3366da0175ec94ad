#include "attention_input.h"

#include <cstdio>
#include <stdexcept>

#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/dispatch.h"
#include "smxx/common/matrix.cuh"

namespace msa {

namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;  // channels of a lane
constexpr unsigned kWholeWarp = 0xffffffff;

template <typename Element>
__device__ __forceinline__ void load(float (&values)[kVector], const Element* address) {
  uint4 raw;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(address)
               : "memory");
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<Element>(words[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ void load(float (&values)[kVector], const float* address) {
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                 : "=f"(values[i]), "=f"(values[i + 1]), "=f"(values[i + 2]), "=f"(values[i + 3])
                 : "l"(address + i)
                 : "memory");
  }
}

template <typename Element>
__device__ __forceinline__ void store(Element* address, const float (&values)[kVector]) {
  uint4 raw;
  raw.x = pack<Element>(values[0], values[1]);
  raw.y = pack<Element>(values[2], values[3]);
  raw.z = pack<Element>(values[4], values[5]);
  raw.w = pack<Element>(values[6], values[7]);
  *reinterpret_cast<uint4*>(address) = raw;
}

// kHeadDim / 8 lanes take one head of one token.
template <typename Element, typename Rotary, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    attention_input_kernel(const AttentionInputParams params) {
  constexpr int kLanes = kHeadDim / kVector;
  const int q_end = params.num_heads;
  const int key_end = q_end + params.num_kv_heads, value_end = key_end + params.num_kv_heads;
  const int index_end = value_end + params.num_index_heads;
  const int heads = index_end + (params.num_index_heads > 0 ? 1 : 0);
  const int64_t item = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  const int tokens = params.batch * params.num_new;
  const int channel = threadIdx.x % kLanes * kVector;
  const bool is_inside = item < int64_t{tokens} * heads;
  const int token = is_inside ? static_cast<int>(item / heads) : 0;
  const int head = is_inside ? static_cast<int>(item % heads) : 0;
  const int row = token / params.num_new, place = token % params.num_new;
  const bool is_query = head < q_end, is_key = !is_query && head < key_end;
  const bool is_value = !is_query && !is_key && head < value_end;
  const bool is_index_query = head >= value_end && head < index_end;

  if (!params.norms_are_constant) wait_for_kernels_before();
  const void* norm = is_query         ? params.query_norm
                     : is_key         ? params.key_norm
                     : is_index_query ? params.index_query_norm
                                      : params.index_key_norm;
  float factors[kVector];
  if (!is_value) load(factors, static_cast<const Element*>(norm) + channel);
  wait_for_kernels_before();
  let_next_kernel_start();

  float values[kVector];
  load(values, static_cast<const Element*>(params.projected) +
                   (int64_t{token} * heads + head) * kHeadDim + channel);
  // All lanes take part in both exchanges: a warp may hold a value and another head.
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) squares += values[i] * values[i];
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    squares += __shfl_xor_sync(kWholeWarp, squares, offset);
  }
  if (!is_value) {
    const float scale = rsqrtf(squares / kHeadDim + params.eps);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = values[i] * scale * (1.f + factors[i]);
  }
  // The first half of the rotary channels and the second half are partners.
  const int half = params.rotary_channels / 2;
  const int shift = half / kVector;
  const bool is_first = channel < half;
  const bool rotates = !is_value && channel < params.rotary_channels;
  const int lane = threadIdx.x % 32;
  const int partner =
      channel < params.rotary_channels ? (is_first ? lane + shift : lane - shift) : lane;
  float partners[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    partners[i] = __shfl_sync(kWholeWarp, values[i], partner);
  }
  if (rotates) {
    const int64_t offset =
        row * params.rotary_row_stride + int64_t{place} * params.rotary_channels + channel;
    float cos[kVector], sin[kVector];
    load(cos, static_cast<const Rotary*>(params.cos) + offset);
    load(sin, static_cast<const Rotary*>(params.sin) + offset);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = values[i] * cos[i] + (is_first ? -partners[i] : partners[i]) * sin[i];
    }
  }
  if (!is_inside) return;

  if (is_query || is_index_query) {
    const int count = is_query ? params.num_heads : params.num_index_heads;
    const int first = is_query ? 0 : value_end;
    auto* out = static_cast<Element*>(is_query ? params.query : params.index_query);
    store(out + (int64_t{token} * count + head - first) * kHeadDim + channel, values);
    return;
  }
  const CacheSlots& cache = is_key ? params.key : is_value ? params.value : params.index_key;
  const int first = is_key ? q_end : is_value ? key_end : index_end;
  const int64_t slot = *params.length + place;
  if (slot < 0 || slot >= params.slots) {
    // As in PyTorch's own writes to a cache, an error that ends the process's use of the device.
    printf("the static cache has %d slots, got a token for slot %lld\n", params.slots,
           static_cast<long long>(slot));
    __trap();
  }
  store(static_cast<Element*>(cache.data) + row * cache.row_stride + slot * cache.slot_stride +
            (head - first) * cache.head_stride + channel,
        values);
}

// A thread computes one angle, which two channels share.
template <typename Element>
__global__ void __launch_bounds__(kThreads) rotary_table_kernel(const RotaryTableParams params) {
  wait_for_previous_kernel(params.positions, params.frequencies);
  const int half = params.channels / 2;
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= int64_t{params.num_positions} * half) return;
  const int64_t row = item / half, channel = item % half;
  const float angle = static_cast<float>(params.positions[row]) * params.frequencies[channel];
  float sine, cosine;
  sincosf(angle, &sine, &cosine);
  const int64_t first = row * params.channels + channel;
  auto* cos = static_cast<Element*>(params.cos);
  auto* sin = static_cast<Element*>(params.sin);
  cos[first] = cos[first + half] = Element(cosine * params.scaling);
  sin[first] = sin[first + half] = Element(sine * params.scaling);
}

}  // namespace

void launch_rotary_table(const RotaryTableParams& params, cudaStream_t stream) {
  const int64_t angles = int64_t{params.num_positions} * (params.channels / 2);
  if (angles == 0) return;
  const dim3 grid(static_cast<unsigned>((angles + kThreads - 1) / kThreads));
  dispatch_dtype(params.dtype, [&](auto element) {
    launch_dependent<rotary_table_kernel<decltype(element)>>(grid, kThreads, stream, params);
  });
}

void launch_attention_input(const AttentionInputParams& params, cudaStream_t stream) {
  if (params.rotary_channels % (2 * kVector) != 0 || params.rotary_channels > params.head_dim) {
    throw std::runtime_error("rotary_channels must be a multiple of 16 within head_dim");
  }
  const int heads = params.num_heads + 2 * params.num_kv_heads +
                    (params.num_index_heads > 0 ? params.num_index_heads + 1 : 0);
  const int64_t threads =
      int64_t{params.batch} * params.num_new * heads * (params.head_dim / kVector);
  if (threads == 0) return;
  const dim3 grid(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  dispatch(params.dtype, params.head_dim, [&](auto element, auto head_dim) {
    using Element = decltype(element);
    constexpr int kHeadDim = decltype(head_dim)::value;
    if (params.rotary_is_float) {
      launch_dependent<attention_input_kernel<Element, float, kHeadDim>>(grid, kThreads, stream,
                                                                         params);
    } else {
      launch_dependent<attention_input_kernel<Element, Element, kHeadDim>>(grid, kThreads, stream,
                                                                           params);
    }
  });
}

}  // namespace msa

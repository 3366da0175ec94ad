// Products of up to four tokens with rows of MXFP8 weights, at the rate at which memory is read.
//
// The work of a warp is a unit: 16 rows of weights by 256 channels. It multiplies by mma.m16n8k16
// in float16, which holds every E4M3 number: one instruction converts two of them.
//
// The products leave the scales of the weights out. Four lanes read 64 channels of a row at a time,
// lanes 0 and 1 those of one scale, lanes 2 and 3 those of the next, and an mma takes channels from
// all four. So a token has two of the eight columns of `b`. In each of them the states of one scale
// stand beside zeros in place of the other's. Each of the two sums is then multiplied by its scale.
//
// A thread block stays on its multiprocessor and takes one tile of 16 rows after the other. Its
// warps share the units of a tile. While a warp multiplies a unit, it loads the next one, which may
// be of the next tile. So memory is busy from the first unit to the last.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "few_tokens.cuh"
#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/device.h"

namespace msa::few_tokens {

constexpr int kStreamedTokens = 4;
constexpr int kTileRows = 16;
constexpr int kUnitChannels = 256;
constexpr int kUnitLoads = 4;  // by four lanes in a row, 64 channels each

// The states of a token for a unit, in shared memory: as float16, divided by 2^exponent. The
// exponent follows from the largest of them, so that none overflows. Only those below
// 2^-31 times the largest, or below 2^-118, can lose bits.
struct __align__(16) UnitStates {
  __half values[kUnitChannels];
  float factor;  // 2^exponent
  float padding[3];
};

// Places in an array of UnitStates, which is the dynamic shared memory of a thread block. The first
// holds zeros, for a token without states.
constexpr int kNoStates = 0, kFirstStates = 1;

// Converts the states from `x` on. Called by a whole warp.
__device__ __forceinline__ void convert_states(UnitStates& states, const __nv_bfloat16* x) {
  constexpr int kLargest = 14;  // exponent of the largest state afterwards; float16 ends below 2^16
  // Least exponent of the largest state that we reckon with: both powers of two stay normal floats.
  constexpr int kSmallest = 40 - 127;
  const int lane = threadIdx.x % 32;
  const uint4 loaded = load_states(x + 8 * lane);
  const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    most = max(most, max(pairs[i] & 0x7fff, pairs[i] >> 16 & 0x7fff));
  }
  most = __reduce_max_sync(0xffffffff, most);
  const int exponent = max(static_cast<int>(most >> 7) - 127, kSmallest) - kLargest;
  const float shrink = __int_as_float((127 - exponent) << 23);
  uint32_t halves[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<__nv_bfloat16>(pairs[i]);
    halves[i] = pack<__half>(pair.x * shrink, pair.y * shrink);
  }
  *reinterpret_cast<uint4*>(states.values + 8 * lane) = {halves[0], halves[1], halves[2],
                                                         halves[3]};
  if (lane == 0) states.factor = __int_as_float((127 + exponent) << 23);
}

// The upper or the lower two of the four E4M3 numbers of a word, as float16. None may mean NaN.
template <bool kUpper>
__device__ __forceinline__ uint32_t halves_of(uint32_t word) {
  uint32_t pair;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if constexpr (kUpper) {
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high;}\n"
        : "=r"(pair)
        : "r"(word));
  } else {
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low;}\n"
        : "=r"(pair)
        : "r"(word));
  }
#else
  // As in mxfp8_numbers.cuh. The bits, moved into the fields of a float16, stand for 2^-8 times the
  // number.
  uint32_t widened;
  asm("prmt.b32 %0, %1, %1, %2;\n" : "=r"(widened) : "r"(word), "n"(kUpper ? 0xb3a2 : 0x9180));
  asm("mul.rn.f16x2 %0, %1, %2;\n" : "=r"(pair) : "r"(widened << 7 & 0xbf80bf80), "r"(0x5c005c00));
#endif
  return pair;
}

// 2^(e - 127) for the byte e of `scales`, which is at most kLargestMxfp8Scale. For e = 0 that is a
// subnormal float.
template <int kByte>
__device__ __forceinline__ float scale_at(uint32_t scales) {
  const uint32_t moved = kByte == 3 ? scales >> 1 : scales << (23 - 8 * kByte);
  return __uint_as_float(max(moved & 0x7f800000u, 0x00400000u));
}

// Where a lane reads a unit. It reads two rows, one in the upper half of the tile and one in the
// lower half.
struct UnitPlace {
  const uint8_t* values = nullptr;  // the lane's first channel in the upper row
  const uint8_t* scales = nullptr;  // of all channels of the unit in the upper row
  int to_lower = 0;                 // from a value in the upper row to that in the lower row

  UnitPlace() = default;

  // `first` is the value at which the unit begins in the upper row.
  __device__ UnitPlace(const FewTokenWeights& weights, int64_t first, int to_lower)
      : values(static_cast<const uint8_t*>(weights.values) + first + threadIdx.x % 4 * 16),
        scales(weights.scales + first / kMxfp8Group),
        to_lower(to_lower) {}
};

// Whether the scales of a unit, of any row, can be read at once.
inline bool can_load_scales(const FewTokenWeights& weights) {
  return reinterpret_cast<uintptr_t>(weights.scales) % sizeof(uint2) == 0;
}

struct LoadedUnit {
  uint4 upper[kUnitLoads], lower[kUnitLoads];
  uint2 upper_scales, lower_scales;

  __device__ void load_values(const UnitPlace& place, int i) {
    upper[i] = load_weights(place.values + 64 * i);
    lower[i] = load_weights(place.values + place.to_lower + 64 * i);
  }

  __device__ void load_scales(const UnitPlace& place) {
    upper_scales = __ldg(reinterpret_cast<const uint2*>(place.scales));
    lower_scales =
        __ldg(reinterpret_cast<const uint2*>(place.scales + place.to_lower / kMxfp8Group));
  }
};

// Sums of a lane for token lane % 4: of the lane's row in the upper half of a tile, and of that in
// the lower half.
struct RowSums {
  float upper, lower;
};

// sums += unit * states. `states` are those of the lane's column of `b`, and `factor` is that of
// the token of its sums. Afterwards `unit` holds the next unit if there is one.
__device__ __forceinline__ void multiply_unit(RowSums& sums, LoadedUnit& unit, const __half* states,
                                              float factor, bool has_next, const UnitPlace& next) {
  const uint32_t upper_scales[2] = {unit.upper_scales.x, unit.upper_scales.y};
  const uint32_t lower_scales[2] = {unit.lower_scales.x, unit.lower_scales.y};
  if (has_next) unit.load_scales(next);
  RowSums part = {};
#pragma unroll
  for (int i = 0; i < kUnitLoads; ++i) {
    const uint4 x[2] = {*reinterpret_cast<const uint4*>(states + 64 * i),
                        *reinterpret_cast<const uint4*>(states + 64 * i + 8)};
    const uint32_t b[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
    const uint32_t upper[4] = {unit.upper[i].x, unit.upper[i].y, unit.upper[i].z, unit.upper[i].w};
    const uint32_t lower[4] = {unit.lower[i].x, unit.lower[i].y, unit.lower[i].z, unit.lower[i].w};
    float product[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t a[4] = {halves_of<false>(upper[j]), halves_of<false>(lower[j]),
                             halves_of<true>(upper[j]), halves_of<true>(lower[j])};
      multiply_add<__half>(product, a, b[2 * j], b[2 * j + 1]);
    }
    if (has_next) unit.load_values(next, i);
    const uint32_t above = upper_scales[i / 2], below = lower_scales[i / 2];
    if (i % 2 == 0) {
      part.upper += product[0] * scale_at<0>(above) + product[1] * scale_at<1>(above);
      part.lower += product[2] * scale_at<0>(below) + product[3] * scale_at<1>(below);
    } else {
      part.upper += product[0] * scale_at<2>(above) + product[1] * scale_at<3>(above);
      part.lower += product[2] * scale_at<2>(below) + product[3] * scale_at<3>(below);
    }
  }
  sums.upper += part.upper * factor;
  sums.lower += part.lower * factor;
}

// Multiplies the tiles of this thread block, whose warps share the units of a tile.
//
// A Source has:
//   num_tokens, tiles, units        a tile has `units` units
//   first_tile(), next_tile(tile)   of this thread block; `tiles` or more after the last
//   first_unit(), next_unit(unit)   of this warp, in every tile; `units` or more after the last
//   place(tile, unit)               the UnitPlace of this lane
//   prepare()                       waits for the kernels before and converts the states. Until
//                                   then only weights are read
//   states(unit, token)             place among the UnitStates, kNoStates for a token without them
//   store(tile, row, token, sums)   takes the sums of a row of the upper half and of the row eight
//                                   below it
template <typename Shape, typename Source>
__device__ __forceinline__ void multiply_tiles(Source& source) {
  constexpr int kWarps = Shape::kWarps;
  __shared__ RowSums warp_sums[2][kWarps][32];
  extern __shared__ UnitStates unit_states[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = lane / 4, part = lane % 4;
  auto* no_states = reinterpret_cast<uint32_t*>(unit_states + kNoStates);
  for (int i = threadIdx.x; i < sizeof(UnitStates) / 4; i += Shape::kThreads) no_states[i] = 0;

  // The unit to load next.
  int tile_ahead = source.first_tile(), unit_ahead = source.first_unit();
  if (unit_ahead >= source.units) tile_ahead = source.tiles;
  LoadedUnit loaded;
  if (tile_ahead < source.tiles) {
    const UnitPlace place = source.place(tile_ahead, unit_ahead);
    loaded.load_scales(place);
#pragma unroll
    for (int i = 0; i < kUnitLoads; ++i) loaded.load_values(place, i);
  }
  source.prepare();
  __syncthreads();

  // Column 2 * token + i of `b` has the states of the channels with scale i of two.
  const int column_token = row / 2;
  const bool has_column = column_token < source.num_tokens && part / 2 == row % 2;
  const bool has_sums = part < source.num_tokens;
  int turn = 0;
  for (int tile = source.first_tile(); tile < source.tiles; tile = source.next_tile(tile)) {
    RowSums sums = {};
    for (int unit = source.first_unit(); unit < source.units; unit = source.next_unit(unit)) {
      unit_ahead = source.next_unit(unit_ahead);
      if (unit_ahead >= source.units) {
        unit_ahead = source.first_unit();
        tile_ahead = source.next_tile(tile_ahead);
      }
      const int column = has_column ? source.states(unit, column_token) : kNoStates;
      const __half* states = unit_states[column].values + 16 * part;
      const float factor = unit_states[has_sums ? source.states(unit, part) : kNoStates].factor;
      UnitPlace next;
      const bool has_next = tile_ahead < source.tiles;
      if (has_next) next = source.place(tile_ahead, unit_ahead);
      multiply_unit(sums, loaded, states, factor, has_next, next);
    }
    // With two buffers in turn, one barrier for a tile is enough: when a warp reaches the barrier
    // of the next tile, it no longer reads this buffer.
    RowSums(&tile_sums)[kWarps][32] = warp_sums[turn % 2];
    tile_sums[warp][lane] = sums;
    __syncthreads();
    if (warp == turn % kWarps && has_sums) {
      RowSums total = {};
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        total.upper += tile_sums[i][lane].upper;
        total.lower += tile_sums[i][lane].lower;
      }
      source.store(tile, row, part, total);
    }
    ++turn;
  }
}

// Thread blocks that stay on their multiprocessors. A warp has eight loads of 512 bytes in flight.
template <int kWarps_, int kBlocks_>
struct StreamShape {
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps_;
  static constexpr int kBlocks = kBlocks_;  // of a multiprocessor
};

using NarrowStream = StreamShape<8, 3>;  // many tiles with few units each
using WideStream = StreamShape<24, 1>;   // few tiles with many units

// Dynamic shared memory for the states of so many units.
inline int64_t states_bytes(int64_t units) {
  return (kFirstStates + units) * sizeof(UnitStates);
}

// Dynamic shared memory that a thread block of any kernel here may have beside `kStatic` bytes.
template <int kStatic>
int most_shared_bytes() {
  int device = 0, most = 0;
  MSA_CHECK_CUDA(cudaGetDevice(&device));
  MSA_CHECK_CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return most - kStatic;
}

// Launches as many thread blocks as run at the same time, and no more than there are tiles.
template <auto kKernel, typename Shape, int kStatic, typename Params>
void launch_stream(const Params& params, int64_t tiles, int64_t shared_bytes, cudaStream_t stream) {
  // The same for every size: threads share this limit, and one must not lower it for another.
  MSA_CHECK_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      most_shared_bytes<kStatic>()));
  const int64_t resident = int64_t{num_multiprocessors()} * Shape::kBlocks;
  launch_beside(kKernel, supports_early_launch<kKernel>(),
                dim3(static_cast<unsigned>(std::min(tiles, resident))), Shape::kThreads,
                static_cast<int>(shared_bytes), stream, params);
}

}  // namespace msa::few_tokens

// spills: 80 registers leave room for 24 warps; what does not fit is read once for a unit
#include "few_token_mlp_mxfp8.h"

#include <algorithm>
#include <cstdint>

#include "few_token_experts.cuh"
#include "few_tokens_mxfp8.cuh"
#include "smxx/common/device.h"

namespace msa {

namespace {

using namespace few_tokens;
using Element = __nv_bfloat16;

// The list of the experts that the tokens chose, in shared memory.
struct ChosenExperts {
  int count;
  int ids[kMaxPairs];  // -1: none of ours
  int16_t pairs[kMaxPairs][kStreamedTokens];

  // By the whole thread block.
  __device__ void read(const FewTokenMlpParams& params) {
    const int num_places = params.num_tokens * params.num_choices;
    for (int place = threadIdx.x; place < num_places; place += blockDim.x) {
      ids[place] = expert_at(params, place);
      for (int token = 0; token < params.num_tokens; ++token) {
        pairs[place][token] = static_cast<int16_t>(pair_at(params, place, token));
      }
    }
    if (threadIdx.x == 0) count = num_places > 0 ? num_chosen(params) : 0;
    __syncthreads();
  }
};

// Numbers of the parts of the work: `shared` parts of the MLP of every token, then `of_expert`
// parts of each chosen expert.
struct Parts {
  const ChosenExperts& chosen;
  int shared, of_expert, count;
  float per_expert;  // 1 / of_expert, because a quotient of integers takes many instructions

  __device__ Parts(const ChosenExperts& chosen, int shared, int of_expert)
      : chosen(chosen),
        shared(shared),
        of_expert(of_expert),
        count(shared + chosen.count * of_expert),
        per_expert(1.f / of_expert) {}

  __device__ bool is_routed(int part) const { return part >= shared; }
  // The place of a part's expert in the list. The half keeps rounding away from whole numbers, so
  // that this is exact for up to 2^20 parts.
  __device__ int place(int part) const {
    return static_cast<int>((part - shared + 0.5f) * per_expert);
  }
  // The part's number within its expert, or within the MLP of every token.
  __device__ int within(int part) const {
    return is_routed(part) ? part - shared - place(part) * of_expert : part;
  }

  // The first of part, part + step, ... whose weights we have. Experts with id -1 are elsewhere.
  __device__ int skip(int part, int step) const {
    while (part >= shared && part < count && chosen.ids[place(part)] < 0) part += step;
    return part;
  }
};

// Gate and up projection: a tile has eight rows of each, so that a lane has both sums.
struct GateUp {
  using Stream = NarrowStream;
  const FewTokenMlpParams& params;
  const ChosenExperts& chosen;
  const Parts parts;  // are tiles
  const int num_tokens, tiles, units;

  __device__ GateUp(const FewTokenMlpParams& params, const ChosenExperts& chosen)
      : params(params),
        chosen(chosen),
        parts(chosen, params.width / kRows, params.expert_width / kRows),
        num_tokens(params.num_tokens),
        tiles(parts.count),
        units(params.hidden / kUnitChannels) {}

  __device__ int first_tile() const { return parts.skip(blockIdx.x, gridDim.x); }
  __device__ int next_tile(int tile) const { return parts.skip(tile + gridDim.x, gridDim.x); }
  __device__ int first_unit() const { return threadIdx.x / 32; }
  __device__ int next_unit(int unit) const { return unit + Stream::kWarps; }

  __device__ UnitPlace place(int tile, int unit) const {
    const bool is_routed = parts.is_routed(tile);
    const int width = is_routed ? params.expert_width : params.width;
    int64_t row = parts.within(tile) * kRows + threadIdx.x % 32 / 4;
    if (is_routed) row += int64_t{chosen.ids[parts.place(tile)]} * 2 * width;
    return {is_routed ? params.expert_gate_up : params.gate_up,
            row * params.hidden + unit * kUnitChannels, width * params.hidden};
  }

  __device__ void prepare() const {
    extern __shared__ UnitStates unit_states[];
    const auto* x = static_cast<const Element*>(params.x);
    for (int unit = first_unit(); unit < units; unit = next_unit(unit)) {
      for (int token = 0; token < num_tokens; ++token) {
        convert_states(unit_states[states(unit, token)],
                       x + int64_t{token} * params.hidden + unit * kUnitChannels);
      }
    }
  }

  // (tokens, units)
  __device__ int states(int unit, int token) const { return kFirstStates + token * units + unit; }

  __device__ void store(int tile, int row, int token, const RowSums& sums) const {
    float value = swiglu_oai(sums.upper, sums.lower, params.alpha, params.limit);
    auto* out = static_cast<Element*>(params.activations);
    if (parts.is_routed(tile)) {
      const int pair = chosen.pairs[parts.place(tile)][token];
      if (pair < 0) return;
      value *= load_fresh(params.expert_weights + pair) * params.expert_scale;
      out += int64_t{pair} * params.expert_width;
    } else {
      out += int64_t{num_tokens} * params.num_choices * params.expert_width + token * params.width;
    }
    out[parts.within(tile) * kRows + row] = to_element<Element>(value);
  }
};

__global__ void __launch_bounds__(NarrowStream::kThreads, NarrowStream::kBlocks)
    gate_up_kernel(const FewTokenMlpParams params) {
  __shared__ ChosenExperts chosen;
  wait_for_kernels_before();
  // Not earlier: the next kernel reads the list of experts before it waits for this kernel, so the
  // list must be complete when it starts.
  let_next_kernel_start();
  chosen.read(params);
  GateUp source(params, chosen);
  multiply_tiles<NarrowStream>(source);
}

// Down projection: a tile is 16 rows of `out`. Its sums run over the units of the MLP of every
// token, then over those of the experts. The activations have been multiplied by the tokens'
// weights of the experts.
struct Down {
  using Stream = WideStream;
  const FewTokenMlpParams& params;
  const ChosenExperts& chosen;
  const Parts parts;  // are units
  const int num_tokens, tiles, units;
  int first;

  __device__ Down(const FewTokenMlpParams& params, const ChosenExperts& chosen)
      : params(params),
        chosen(chosen),
        parts(chosen, params.width / kUnitChannels, params.expert_width / kUnitChannels),
        num_tokens(params.num_tokens),
        tiles(params.hidden / kTileRows),
        units(parts.count),
        first(parts.skip(threadIdx.x / 32, Stream::kWarps)) {}

  __device__ int first_tile() const { return blockIdx.x; }
  __device__ int next_tile(int tile) const { return tile + gridDim.x; }
  __device__ int first_unit() const { return first; }
  __device__ int next_unit(int unit) const {
    return parts.skip(unit + Stream::kWarps, Stream::kWarps);
  }

  __device__ UnitPlace place(int tile, int unit) const {
    const bool is_routed = parts.is_routed(unit);
    const int width = is_routed ? params.expert_width : params.width;
    int64_t row = tile * kTileRows + threadIdx.x % 32 / 4;
    if (is_routed) row += int64_t{chosen.ids[parts.place(unit)]} * params.hidden;
    return {is_routed ? params.expert_down : params.down,
            row * width + parts.within(unit) * kUnitChannels, 8 * width};
  }

  __device__ void prepare() const {
    extern __shared__ UnitStates unit_states[];
    wait_for_kernels_before();
    let_next_kernel_start();
    const auto* activations = static_cast<const Element*>(params.activations);
    const int num_pairs = num_tokens * params.num_choices;
    for (int unit = first; unit < units; unit = next_unit(unit)) {
      const bool is_routed = parts.is_routed(unit);
      for (int token = 0; token < num_tokens; ++token) {
        const int converted = states(unit, token);
        if (converted == kNoStates) continue;
        const int64_t row =
            is_routed ? int64_t{chosen.pairs[parts.place(unit)][token]} * params.expert_width
                      : int64_t{num_pairs} * params.expert_width + token * params.width;
        convert_states(unit_states[converted],
                       activations + row + parts.within(unit) * kUnitChannels);
      }
    }
  }

  // (pairs, units of an expert), then (tokens, units of the MLP)
  __device__ int states(int unit, int token) const {
    if (!parts.is_routed(unit)) {
      const int expert_units = num_tokens * params.num_choices * parts.of_expert;
      return kFirstStates + expert_units + token * parts.shared + unit;
    }
    const int pair = chosen.pairs[parts.place(unit)][token];
    return pair < 0 ? kNoStates : kFirstStates + pair * parts.of_expert + parts.within(unit);
  }

  __device__ void store(int tile, int row, int token, const RowSums& sums) const {
    auto* out = static_cast<Element*>(params.out) + int64_t{token} * params.hidden;
    out[tile * kTileRows + row] = to_element<Element>(sums.upper);
    out[tile * kTileRows + row + 8] = to_element<Element>(sums.lower);
  }
};

__global__ void __launch_bounds__(WideStream::kThreads, WideStream::kBlocks)
    down_kernel(const FewTokenMlpParams params) {
  __shared__ ChosenExperts chosen;
  if (!params.weights_are_constant) wait_for_kernels_before();
  chosen.read(params);
  Down source(params, chosen);
  multiply_tiles<WideStream>(source);
}

// Static shared memory of a thread block, at most: the list of experts, the sums of its warps,
// gaps.
constexpr int kStaticBytes =
    sizeof(ChosenExperts) + 2 * WideStream::kThreads * sizeof(RowSums) + 256;

int64_t gate_up_bytes(const FewTokenMlpParams& params) {
  return states_bytes(int64_t{params.num_tokens} * (params.hidden / kUnitChannels));
}

int64_t down_bytes(const FewTokenMlpParams& params) {
  const int64_t widths = int64_t{params.num_choices} * params.expert_width + params.width;
  return states_bytes(params.num_tokens * (widths / kUnitChannels));
}

}  // namespace

bool supports_few_token_mlp_mxfp8(const FewTokenMlpParams& params) {
  const FewTokenWeights& weights = params.width > 0 ? params.gate_up : params.expert_gate_up;
  return weights.scales != nullptr && params.dtype == Dtype::kBFloat16 &&
         params.num_tokens <= kStreamedTokens && params.hidden % kUnitChannels == 0 &&
         params.width % kUnitChannels == 0 && params.expert_width % kUnitChannels == 0 &&
         can_load_scales(params.gate_up) && can_load_scales(params.down) &&
         can_load_scales(params.expert_gate_up) && can_load_scales(params.expert_down) &&
         int64_t{std::max(params.width, params.expert_width)} * params.hidden <= INT32_MAX &&
         std::max(gate_up_bytes(params), down_bytes(params)) <= most_shared_bytes<kStaticBytes>();
}

void launch_few_token_mlp_mxfp8(const FewTokenMlpParams& params, cudaStream_t stream) {
  const int64_t pairs = int64_t{params.num_tokens} * params.num_choices;
  const int64_t most_tiles = (params.width + pairs * params.expert_width) / kRows;
  launch_stream<gate_up_kernel, NarrowStream, kStaticBytes>(params, most_tiles,
                                                            gate_up_bytes(params), stream);
  launch_stream<down_kernel, WideStream, kStaticBytes>(params, params.hidden / kTileRows,
                                                       down_bytes(params), stream);
}

}  // namespace msa

#include "few_token_mlp.h"

#include <stdexcept>

#include "few_token_experts.cuh"
#include "few_token_mlp_mxfp8.h"
#include "few_tokens.cuh"
#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/dispatch.h"

namespace msa {

namespace {

using namespace few_tokens;

constexpr unsigned kWholeWarp = 0xffffffff;

// Lists the experts of several tokens. One thread block, a thread a pair.
__global__ void __launch_bounds__(kMaxPairs) list_experts_kernel(const FewTokenMlpParams params) {
  __shared__ int wanted[kMaxPairs];  // expert of a pair, -1 where it is none of ours
  __shared__ int places[kMaxPairs];  // of an expert, at the pair that names it first
  __shared__ int firsts[kMaxPairs / 32];
  auto* experts = static_cast<Experts*>(params.experts);
  const int num_pairs = params.num_tokens * params.num_choices;
  const int pair = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  wait_for_kernels_before();
  let_next_kernel_start();
  int expert = -1;
  if (pair < num_pairs) {
    const int64_t id = load_fresh(params.expert_ids + pair);
    if (id >= 0 && id < params.num_experts) expert = static_cast<int>(id);
    wanted[pair] = expert;
  }
  for (int i = threadIdx.x; i < num_pairs * kMaxTokens; i += kMaxPairs) {
    experts->pairs[i / kMaxTokens][i % kMaxTokens] = -1;
  }
  __syncthreads();
  int first = expert < 0 ? -1 : pair;
  for (int other = 0; other < first; ++other) {
    if (wanted[other] == expert) first = other;
  }
  const bool is_first = expert >= 0 && first == pair;
  const unsigned named_first = __ballot_sync(kWholeWarp, is_first);
  if (lane == 0) firsts[warp] = __popc(named_first);
  __syncthreads();
  int place = __popc(named_first & ((1u << lane) - 1)), count = 0;
  for (int i = 0; i < kMaxPairs / 32; ++i) {
    if (i < warp) place += firsts[i];
    count += firsts[i];
  }
  if (is_first) {
    experts->ids[place] = expert;
    places[pair] = place;
  }
  if (pair == 0) experts->count = count;
  __syncthreads();
  if (expert >= 0) {
    experts->pairs[places[first]][pair / params.num_choices] = static_cast<int16_t>(pair);
  }
}

// Gate and up projection and the activation, times the token's weight of the expert. A thread block
// computes eight channels: first those of the MLP of every token, whose weights are known before
// the kernels before have ended, then those of one expert after the other.
template <typename Weights, int kHalves>
__global__ void __launch_bounds__(kThreads, Weights::thread_blocks_per_sm(kHalves, 2))
    few_token_gate_up_kernel(const FewTokenMlpParams params) {
  using Element = typename Weights::Element;
  constexpr int kChannels = Weights::kChannels;
  constexpr int kSteps = Weights::loads(kHalves, 2) / 2;
  constexpr int kStride = kWarps * kChannels;
  __shared__ WarpSums<kHalves, 2> warp_sums;
  let_next_kernel_start();
  if (!params.weights_are_constant) wait_for_kernels_before();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4;
  const int hidden = params.hidden, num_tokens = params.num_tokens;
  const int shared_tiles = params.width / kRows;
  const bool is_routed = blockIdx.x >= static_cast<unsigned>(shared_tiles);
  const int width = is_routed ? params.expert_width : params.width;
  int tile = blockIdx.x, place = 0;
  FewTokenWeights gate_up = params.gate_up;
  int64_t first = 0;  // value of the expert
  bool has_low = group < num_tokens;
  bool has_high = kHalves == 2 && group + 8 < num_tokens;
  if (is_routed) {
    const int expert_tiles = params.expert_width / kRows;
    tile = (blockIdx.x - shared_tiles) % expert_tiles;
    place = (blockIdx.x - shared_tiles) / expert_tiles;
    wait_for_kernels_before();
    const int expert = expert_at(params, place);
    if (expert < 0) return;
    has_low = has_low && pair_at(params, place, group) >= 0;
    has_high = has_high && pair_at(params, place, group + 8) >= 0;
    gate_up = params.expert_gate_up;
    first = int64_t{expert} * 2 * width * hidden;
  }
  const int lane_channel = warp * kChannels + lane % 4 * 8 * Weights::kUnits;
  first += int64_t{tile * kRows + group} * hidden + lane_channel;
  const Weights gate(gate_up, first), up(gate_up, first + int64_t{width} * hidden);
  const Element* x = static_cast<const Element*>(params.x) + group * hidden + lane_channel;

  float sums[2][4] = {};
  bool waits = !is_routed;
  for (int begin = 0; begin + warp * kChannels < hidden; begin += kSteps * kStride) {
    typename Weights::Loaded loaded[kSteps][2];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int channel = begin + step * kStride;
      const bool is_inside = channel + warp * kChannels < hidden;
      loaded[step][0] = is_inside ? gate.load(channel) : typename Weights::Loaded{};
      loaded[step][1] = is_inside ? up.load(channel) : typename Weights::Loaded{};
    }
    if (waits) wait_for_kernels_before();
    waits = false;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int channel = begin + step * kStride;
      const bool is_inside = channel + warp * kChannels < hidden;
      States<Weights> low, high;
      if (is_inside && has_low) low.load(x + channel);
      if (is_inside && has_high) high.load(x + 8 * hidden + channel);
      add_products<Weights>(sums[0], low, high, loaded[step][0]);
      add_products<Weights>(sums[1], low, high, loaded[step][1]);
    }
  }
  if (waits) wait_for_kernels_before();  // a warp without channels

  warp_sums.store(sums);
  __syncthreads();
  if (threadIdx.x < num_tokens * kRows) {
    const int token = threadIdx.x / kRows, column = threadIdx.x % kRows;
    float value = swiglu_oai(warp_sums.total(token, column), warp_sums.total(token, kRows + column),
                             params.alpha, params.limit);
    Element* out = static_cast<Element*>(params.activations);
    if (is_routed) {
      const int pair = pair_at(params, place, token);
      if (pair < 0) return;
      value *= load_fresh(params.expert_weights + pair) * params.expert_scale;
      out += int64_t{pair} * width;
    } else {
      out += int64_t{num_tokens} * params.num_choices * params.expert_width + token * width;
    }
    out[tile * kRows + column] = to_element<Element>(value);
  }
}

// Down projection: the sum over the MLP of every token and the experts, whose weights are in the
// activations. A thread block computes 16 channels of all tokens.
template <typename Weights, int kHalves>
__global__ void __launch_bounds__(kThreads, Weights::thread_blocks_per_sm(kHalves, 2))
    few_token_down_kernel(const FewTokenMlpParams params) {
  using Element = typename Weights::Element;
  constexpr int kChannels = Weights::kChannels;
  constexpr int kTiles = 2;
  constexpr int kSteps = Weights::loads(kHalves, kTiles) / kTiles;
  constexpr int kStride = kWarps * kChannels;
  __shared__ WarpSums<kHalves, kTiles> warp_sums;
  __shared__ Experts experts;
  let_next_kernel_start();
  if (!params.weights_are_constant) wait_for_kernels_before();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4;
  const int num_tokens = params.num_tokens, hidden = params.hidden;
  const int width = params.width, expert_width = params.expert_width;
  const int lane_channel = warp * kChannels + lane % 4 * 8 * Weights::kUnits;
  const int64_t row = blockIdx.x * kRows * kTiles + group;
  const Weights down(params.down, row * width + lane_channel);
  const Weights expert_down(params.expert_down, row * expert_width + lane_channel);
  const auto* expert_activations = static_cast<const Element*>(params.activations) + lane_channel;
  const auto* activations =
      expert_activations + int64_t{num_tokens} * params.num_choices * expert_width;
  // Channels of this warp, from its first on.
  const int end = width - warp * kChannels, expert_end = expert_width - warp * kChannels;
  float sums[kTiles][4] = {};
  typename Weights::Loaded loaded[kSteps][kTiles];

  // The MLP of every token.
  const auto load = [&](int begin) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int channel = begin + step * kStride;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        loaded[step][tile] =
            channel < end ? down.load(tile * kRows * width + channel) : typename Weights::Loaded{};
      }
    }
  };
  load(0);
  wait_for_kernels_before();
  if (params.num_choices > 0) {
    const int num_pairs = num_tokens * params.num_choices;
    if (threadIdx.x < num_pairs) experts.ids[threadIdx.x] = expert_at(params, threadIdx.x);
    for (int i = threadIdx.x; i < num_pairs * kMaxTokens; i += kThreads) {
      const int place = i / kMaxTokens, token = i % kMaxTokens;
      experts.pairs[place][token] = token < num_tokens ? pair_at(params, place, token) : -1;
    }
    if (threadIdx.x == 0) {
      experts.count = num_tokens == 1
                          ? num_pairs
                          : load_fresh(&static_cast<const Experts*>(params.experts)->count);
    }
    __syncthreads();
  }
  for (int begin = 0; begin < end; begin += kSteps * kStride) {
    if (begin > 0) load(begin);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int channel = begin + step * kStride;
      States<Weights> low, high;
      if (channel < end && group < num_tokens) {
        low.load(activations + group * width + channel);
      }
      if (kHalves == 2 && channel < end && group + 8 < num_tokens) {
        high.load(activations + (group + 8) * width + channel);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        add_products<Weights>(sums[tile], low, high, loaded[step][tile]);
      }
    }
  }

  // The experts, without a break between one and the next.
  struct Position {
    int place = 0;
    int channel = 0;
    __device__ void advance(int end) {
      channel += kStride;
      if (channel >= end) {
        channel = 0;
        ++place;
      }
    }
  };
  const int count = params.num_choices > 0 && expert_end > 0 ? experts.count : 0;
  Position next, current;
  while (current.place < count) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int expert = next.place < count ? experts.ids[next.place] : -1;
      const int64_t offset = int64_t{expert} * hidden * expert_width + next.channel;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        loaded[step][tile] = expert >= 0 ? expert_down.load(offset + tile * kRows * expert_width)
                                         : typename Weights::Loaded{};
      }
      next.advance(expert_end);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      States<Weights> low, high;
      if (current.place < count && experts.ids[current.place] >= 0) {
        const auto load_token = [&](States<Weights>& states, int token) {
          const int pair = experts.pairs[current.place][token];
          if (pair >= 0) states.load(expert_activations + pair * expert_width + current.channel);
        };
        load_token(low, group);
        if constexpr (kHalves == 2) load_token(high, group + 8);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        add_products<Weights>(sums[tile], low, high, loaded[step][tile]);
      }
      current.advance(expert_end);
    }
  }

  warp_sums.store(sums);
  __syncthreads();
  constexpr int kColumns = kRows * kTiles;
  for (int i = threadIdx.x; i < num_tokens * kColumns; i += kThreads) {
    const int token = i / kColumns, column = i % kColumns;
    static_cast<Element*>(params.out)[token * hidden + blockIdx.x * kColumns + column] =
        to_element<Element>(warp_sums.total(token, column));
  }
}

template <typename Weights, int kHalves>
void launch(const FewTokenMlpParams& params, cudaStream_t stream) {
  const int64_t pairs = int64_t{params.num_tokens} * params.num_choices;
  const int64_t tiles = params.width / kRows + pairs * (params.expert_width / kRows);
  launch_dependent<few_token_gate_up_kernel<Weights, kHalves>>(dim3(static_cast<unsigned>(tiles)),
                                                               kThreads, stream, params);
  launch_dependent<few_token_down_kernel<Weights, kHalves>>(dim3(params.hidden / (2 * kRows)),
                                                            kThreads, stream, params);
}

}  // namespace

int64_t few_token_mlp_lists_bytes() {
  return sizeof(Experts);
}

void launch_few_token_mlp(const FewTokenMlpParams& params, cudaStream_t stream) {
  const int64_t pairs = int64_t{params.num_tokens} * params.num_choices;
  if (params.num_tokens < 1 || params.num_tokens > kMaxTokens || pairs > kMaxPairs) {
    throw std::runtime_error("few_token_mlp takes 1 to 16 tokens and up to 256 choices of experts");
  }
  if (params.width + params.expert_width == 0) {
    throw std::runtime_error("few_token_mlp takes an MLP, experts or both");
  }
  if (params.num_tokens > 1 && pairs > 0) {
    launch_dependent<list_experts_kernel>(dim3(1), kMaxPairs, stream, params);
  }
  if (supports_few_token_mlp_mxfp8(params)) {
    launch_few_token_mlp_mxfp8(params, stream);
    return;
  }
  const FewTokenWeights& weights = params.width > 0 ? params.gate_up : params.expert_gate_up;
  dispatch_weights(params.dtype, weights, [&](auto form) {
    using Weights = typename decltype(form)::Type;
    constexpr int kChannels = Weights::kChannels;
    if (params.hidden % kChannels != 0 || params.width % kChannels != 0 ||
        params.expert_width % kChannels != 0) {
      throw std::runtime_error(
          "few_token_mlp takes sizes that are multiples of 32, of 64 for MXFP8 weights");
    }
    if (params.num_tokens <= 8) {
      launch<Weights, 1>(params, stream);
    } else {
      launch<Weights, 2>(params, stream);
    }
  });
}

}  // namespace msa

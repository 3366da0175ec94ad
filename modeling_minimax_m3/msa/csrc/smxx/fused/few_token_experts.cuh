// What the kernels for MLPs of a few tokens share: the list of chosen experts, the activation.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "few_token_mlp.h"

namespace msa::few_tokens {

constexpr int kMaxPairs = 256;  // (token, choice), in the order of `expert_ids`
constexpr int kMaxTokens = 16;

// The chosen experts, ordered by the first pair that names each.
struct Experts {
  int count;
  int ids[kMaxPairs];                    // -1: none of ours
  int16_t pairs[kMaxPairs][kMaxTokens];  // of an expert and a token, -1 where it was not chosen
};

template <typename Value>
__device__ __forceinline__ Value load_fresh(const Value* address) {
  return __ldcg(address);  // as `load_states`
}

// The expert in a place of the list; a single token's choices are its list. Every thread calls it.
__device__ __forceinline__ int expert_at(const FewTokenMlpParams& params, int place) {
  if (params.num_tokens == 1) {
    const int64_t id = load_fresh(params.expert_ids + place);
    return id >= 0 && id < params.num_experts ? static_cast<int>(id) : -1;
  }
  const auto* experts = static_cast<const Experts*>(params.experts);
  return place < load_fresh(&experts->count) ? load_fresh(experts->ids + place) : -1;
}

__device__ __forceinline__ int pair_at(const FewTokenMlpParams& params, int place, int token) {
  if (params.num_tokens == 1) return token == 0 ? place : -1;
  return load_fresh(&static_cast<const Experts*>(params.experts)->pairs[place][token]);
}

__device__ __forceinline__ int num_chosen(const FewTokenMlpParams& params) {
  if (params.num_tokens == 1) return params.num_choices;
  return load_fresh(&static_cast<const Experts*>(params.experts)->count);
}

// gate * sigmoid(alpha * gate) * (up + 1), both clamped. As in PyTorch, a NaN passes the clamps.
__device__ __forceinline__ float swiglu_oai(float gate, float up, float alpha, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : (up < -limit ? -limit : up);
  return (up + 1.f) * (gate / (1.f + __expf(-alpha * gate)));
}

}  // namespace msa::few_tokens

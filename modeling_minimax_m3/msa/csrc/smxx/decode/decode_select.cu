// Block selection for decoding: two kernels, block scores and the best of them.
#include <type_traits>

#include "check.h"
#include "config.h"
#include "decode.h"
#include "top_blocks_cta.cuh"

namespace msa {

namespace {

void check(const DecodeSelectParams& params) {
  const CallCheck call("decode_select");
  call.check_sizes(params.block_size, params.topk, params.cache);
  call.require(params.init_blocks + params.local_blocks <= params.topk,
               "init_blocks + local_blocks must not exceed topk");
  call.require(params.key_slot_stride <= kMaxSlotStride, "slot stride of the keys too large");
  call.require(params.workspace_elements >= decode_select_workspace(params), "workspace too small");
}

}  // namespace

int64_t decode_select_workspace(const DecodeSelectParams& params) {
  return int64_t{params.batch} * params.num_new * params.num_heads * score_row_stride(params);
}

void launch_decode_select(const DecodeSelectParams& params, IndexScoresLauncher launch_index_scores,
                          cudaStream_t stream) {
  check(params);
  if (int64_t{params.batch} * params.num_new * params.num_heads == 0) return;
  launch_index_scores(params, stream);
  const int64_t stride = score_row_stride(params);
  const dim3 grid(params.batch * params.num_new, params.num_heads);
  const auto launch_top_blocks = [&](auto threads, auto kept) {
    launch_dependent<top_blocks_kernel<threads.value, kept.value>>(grid, threads.value, stream,
                                                                   params, stride);
  };
  constexpr std::integral_constant<int, kTopThreads> kThreads{};
  constexpr std::integral_constant<int, kTopKept> kKept{};
  constexpr std::integral_constant<int, kTopKeptShort> kKeptShort{};
  if (stride <= kThreads * kKeptShort) {
    launch_top_blocks(kThreads, kKeptShort);
  } else if (stride <= kThreads * kKept) {
    launch_top_blocks(kThreads, kKept);
  } else {
    launch_top_blocks(std::integral_constant<int, kTopThreadsLong>{}, kKept);
  }
}

}  // namespace msa

// Block selection for decoding: two kernels, block scores and the best of them.
#include <stdexcept>
#include <string>
#include <type_traits>

#include "config.h"
#include "decode.h"
#include "smxx/common/supported.h"
#include "top_blocks_cta.cuh"

namespace msa {

namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("decode_select: " + message);
}

void check(const DecodeSelectParams& params) {
  require(params.block_size == 64 || params.block_size == 128,
          "block_size must be 64 or 128, got " + std::to_string(params.block_size));
  require(params.topk >= 1 && params.topk <= kMaxTopk,
          "topk must be 1 to 64, got " + std::to_string(params.topk));
  require(params.init_blocks + params.local_blocks <= params.topk,
          "init_blocks + local_blocks must not exceed topk");
  require(params.cache.block_table == nullptr || params.cache.page_size % kGroupKeys == 0,
          "page_size must be a multiple of 16, got " + std::to_string(params.cache.page_size));
  require(params.key_slot_stride <= kMaxSlotStride, "slot stride of the keys too large");
  require(params.workspace_elements >= decode_select_workspace(params), "workspace too small");
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

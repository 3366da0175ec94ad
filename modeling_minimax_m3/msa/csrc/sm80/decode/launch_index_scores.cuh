// Definition of launch_index_scores, for the instantiation files.
#pragma once

#include <algorithm>
#include <type_traits>

#include "index_scores.cuh"
#include "kernels.h"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
void launch_index_scores(const DecodeSelectParams& params, cudaStream_t stream) {
  const int64_t slabs = std::max<int64_t>(ceil_div(params.cache.max_slots, kSlabKeys), 1);
  const int batch = std::min(params.batch, kBatchChunk);
  const int num_rows = params.num_new * params.num_heads;
  const auto launch = [&](auto row_tiles, auto whole_lines) {
    constexpr int kRows = ScoreShared<kHeadDim, row_tiles.value, whole_lines.value>::kRows;
    const dim3 grid(
        static_cast<unsigned>(std::min<int64_t>(kScoreCtasPerSm * params.num_sms, slabs * batch)),
        static_cast<unsigned>(ceil_div(num_rows, kRows)),
        static_cast<unsigned>(ceil_div(params.batch, kBatchChunk)));
    launch_dependent<index_scores_kernel<Element, kHeadDim, row_tiles.value, whole_lines.value>>(
        grid, kScoreThreads, stream, params, score_row_stride(params));
  };
  constexpr std::integral_constant<int, 1> kOne{};
  constexpr std::integral_constant<int, 2> kTwo{};
  constexpr std::integral_constant<int, kMaxRowTiles> kMost{};
  if (num_rows <= kRowTile / 2) {
    launch(kOne, std::true_type{});
  } else if (num_rows <= kRowTile) {
    launch(kOne, std::false_type{});
  } else if (num_rows <= 2 * kRowTile) {
    launch(kTwo, std::false_type{});
  } else {
    launch(kMost, std::false_type{});
  }
}

}  // namespace msa::sm80

// How block selection is cut into launches and thread blocks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../params.h"

namespace msa::sm80 {

// One launch: query tokens [token_begin, token_end), whose scores fit the workspace. A thread block
// scores one tile of query tokens against `blocks_per_unit` key blocks.
struct ScoreSchedule {
  int token_begin;
  int token_end;
  int tokens_per_tile;
  int num_tiles;
  int blocks_per_unit;  // a multiple of 4
  int num_units;
  int64_t row_stride;  // floats between rows of the workspace
};

// Rows (tokens x index heads) of a query tile, the same for every score kernel.
constexpr int kScoreRows = 256;

using ScoreLauncher = void (*)(const SelectParams&, const ScoreSchedule&, cudaStream_t);

// Block selection around a score kernel: cuts the queries to fit the workspace, then scores and
// top-k for each part. `max_blocks_per_unit` is a power of two, 4 or more; `wanted_units` is how
// many thread blocks a launch should have before they grow to it.
void launch_selection(const SelectParams& params, ScoreLauncher launch_scores,
                      int max_blocks_per_unit, int wanted_units, cudaStream_t stream);

}  // namespace msa::sm80

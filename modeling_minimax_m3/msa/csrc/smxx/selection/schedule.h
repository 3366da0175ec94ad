// How block selection is cut into launches and thread blocks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace msa {

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

// A score kernel, and how work for it is cut.
struct ScoreKernel {
  void (*launch)(const SelectParams&, const ScoreSchedule&, cudaStream_t);
  int max_blocks_per_unit;  // a power of two, 4 or more
  int wanted_units;         // thread blocks that a launch should have before their units grow
};

}  // namespace msa

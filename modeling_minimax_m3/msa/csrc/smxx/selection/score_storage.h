// Shared memory of a score kernel.
#pragma once

#include "schedule.h"

namespace msa {

template <typename Config>
struct ScoreStorage {
  unsigned char stages[Config::kStages][Config::kTileBytes];
  int row_position[Config::kRows];  // of the query among its sequence's keys
};

}  // namespace msa

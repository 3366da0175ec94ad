// One launch of a score kernel.
#pragma once

#include "score_storage.h"
#include "smxx/common/launch.h"

namespace msa {

template <typename Config>
void launch_score_kernel(void (*kernel)(SelectParams, ScoreSchedule), const SelectParams& params,
                         const ScoreSchedule& schedule, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(schedule.num_units) * schedule.num_tiles;
  launch_kernel(kernel, grid, Config::kThreads, sizeof(ScoreStorage<Config>), stream, params,
                schedule);
}

}  // namespace msa

// Definition of launch_block_gradients, for the instantiation files.
#pragma once

#include <type_traits>

#include "block_gradients.h"
#include "block_gradients_mma.cuh"
#include "smxx/common/launch.h"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
void launch_block_gradients(const BackwardParams& params, const BackwardSchedule& schedule,
                            cudaStream_t stream) {
  const auto launch = [&](auto block_size) {
    using Config = BackwardConfig<kHeadDim, block_size.value>;
    launch_kernel(block_gradients_kernel<Element, Config>, schedule.max_tiles, Config::kThreads,
                  sizeof(BackwardStorage<Config>), stream, params, schedule);
  };
  if (params.forward.block_size == 64) {
    launch(std::integral_constant<int, 64>{});
  } else {
    launch(std::integral_constant<int, 128>{});
  }
}

}  // namespace msa::sm80

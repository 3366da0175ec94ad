#include <cuda_runtime.h>

#include "combine_partials.cuh"
#include "kv_major.h"
#include "smxx/common/cuda_check.h"
#include "smxx/common/dispatch.h"

namespace msa {

void launch_combine_partials(const ForwardParams& params, const KvSchedule& schedule,
                             cudaStream_t stream) {
  const auto grid =
      static_cast<unsigned>((combine_pieces(params, schedule) + kCombineWarps - 1) / kCombineWarps);
  dispatch(params.dtype, params.head_dim, [&](auto element, auto head_dim) {
    combine_partials_kernel<decltype(element), head_dim.value>
        <<<grid, 32 * kCombineWarps, 0, stream>>>(params, schedule);
  });
  MSA_CHECK_LAUNCH();
}

}  // namespace msa

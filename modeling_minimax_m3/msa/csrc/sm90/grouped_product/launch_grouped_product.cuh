// Definition of launch_grouped_product_kernel, for the instantiation files.
#pragma once

#include "grouped_product_wgmma.cuh"
#include "sm90/ptx/tensor_map.h"
#include "smxx/common/launch.h"

namespace msa::sm90 {

template <typename Element, bool kGated>
void launch_grouped_product_kernel(const GroupedProductParams& params, cudaStream_t stream) {
  using Config = GroupedProductConfig;
  const auto channels = static_cast<uint64_t>(params.channels);
  const auto outputs = static_cast<uint64_t>(params.outputs);
  const TensorTiles<3> x{params.x,
                         {channels, static_cast<uint64_t>(params.num_rows), 1},
                         {params.channels, params.channels * params.num_rows},
                         {Config::kChannels, Config::kPartRows, 1}};
  const TensorTiles<3> weights{params.weights,
                               {channels, outputs, static_cast<uint64_t>(params.num_groups)},
                               {params.channels, int64_t{params.channels} * params.outputs},
                               {Config::kChannels, Config::kHalfOutputs, 1}};
  const GroupedProductArguments arguments{make_tensor_map(x, params.dtype),
                                          make_tensor_map(weights, params.dtype), params};
  launch_kernel(grouped_product_kernel<Element, kGated>, dim3(params.num_sms), Config::kThreads,
                static_cast<int>(sizeof(GroupedProductStorage)) + 1024, stream, arguments);
}

}  // namespace msa::sm90

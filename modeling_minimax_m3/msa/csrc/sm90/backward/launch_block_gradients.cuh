// Definition of launch_block_gradients, for the instantiation files.
#pragma once

#include <algorithm>

#include "block_gradients.h"
#include "block_gradients_wgmma.cuh"
#include "sm90/ptx/tensor_map.h"
#include "smxx/backward/row_kernels.cuh"
#include "smxx/common/cuda_check.h"
#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/device.h"

namespace msa::sm90 {

constexpr int kAddingBlocks = 32;
constexpr int kAddingThreads = 512;

// Adds up the partial dQ of a part while the next kernel runs: each thread block fills a
// multiprocessor, and stays on it.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kAddingThreads, 1)
    add_beside_kernel(const BackwardParams params, const BackwardSchedule schedule) {
  let_next_kernel_start();
  const int rows = query_gradient_rows(params, schedule);
  for (int row = (blockIdx.x * kAddingThreads + threadIdx.x) / 32; row < rows;
       row += gridDim.x * (kAddingThreads / 32)) {
    add_query_gradients<Element, kHeadDim>(params, schedule, row, threadIdx.x % 32);
  }
}

template <typename Element>
void launch_block_gradients(const BackwardParams& params, const BackwardSchedule& schedule,
                            const BackwardSchedule* before, cudaStream_t stream) {
  using Config = BackwardConfig;
  auto* kernel = block_gradients_kernel<Element, Config>;
  MSA_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      sizeof(BackwardStorage)));

  const ForwardParams& forward = params.forward;
  // Channels, heads, tokens; a box is 64 channels of a token's heads of one key/value head.
  auto row_map = [&](const void* base, int64_t token_stride, int64_t head_stride) {
    return make_tensor_map<3>(
        {base,
         {static_cast<uint64_t>(forward.head_dim), static_cast<uint64_t>(forward.num_heads),
          static_cast<uint64_t>(forward.total_q)},
         {head_stride, token_stride},
         {64, Config::kQHeadsPerKv, 1}},
        forward.dtype);
  };
  const CUtensorMap query_map =
      row_map(forward.query, forward.query_token_stride, forward.query_head_stride);
  const CUtensorMap grad_out_map =
      row_map(params.grad_out, params.grad_out_token_stride, params.grad_out_head_stride);
  const int grid = std::min(schedule.max_tiles, num_multiprocessors());
  // The sums are all memory: a few multiprocessors do them while the others multiply. They are
  // launched normally, so that what the main kernel reads is complete before it can start.
  if (before != nullptr) {
    add_beside_kernel<Element, Config::kHeadDim>
        <<<kAddingBlocks, kAddingThreads, 0, stream>>>(params, *before);
    MSA_CHECK_LAUNCH();
  }
  launch_beside(kernel, before != nullptr, grid, Config::kThreads, sizeof(BackwardStorage), stream,
                params, schedule, query_map, grad_out_map);
}

}  // namespace msa::sm90

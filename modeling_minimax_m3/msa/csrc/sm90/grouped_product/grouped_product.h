// Products of groups of rows with a matrix each: the experts of a layer, for many tokens.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace msa::sm90 {

struct GroupedProductParams {
  const void* x;        // (num_rows, channels), contiguous; the rows of a group are neighbours
  const void* weights;  // (num_groups, outputs, channels), contiguous
  const int32_t* group_ends;  // (num_groups), one past the last row of each group, ascending
  void* out;  // (num_rows, outputs, or half of them), contiguous output; rows past the
              // last group are not written
  int64_t num_rows;
  int num_groups;
  int outputs;
  int channels;  // a multiple of 8
  // SwiGLU-OAI of the outputs: the first half are gates, the second half is what they gate.
  bool is_gated;
  float alpha;
  float limit;
  int num_sms;
  Dtype dtype;
};

// Throws std::runtime_error for sizes that the kernel does not take.
void launch_grouped_product(const GroupedProductParams& params, cudaStream_t stream);

}  // namespace msa::sm90

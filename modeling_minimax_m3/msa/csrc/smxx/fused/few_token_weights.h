// A matrix of weights that the kernels for few tokens read.
#pragma once

#include <cstdint>

namespace msa {

constexpr int kMxfp8Group = 32;  // values of a row that share a scale

struct FewTokenWeights {
  const void* values;     // contiguous, of the dtype of the states, or E4M3
  const uint8_t* scales;  // of E4M3 values: (rows, channels / 32), contiguous; else null
};

}  // namespace msa

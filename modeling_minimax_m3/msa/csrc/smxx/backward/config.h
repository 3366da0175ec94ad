// Workspace of the attention backward.
#pragma once

#include <cstdint>

namespace msa {

// Most bytes of partial query gradients that exist at a time, half of them of the part that is
// worked on, half of the one before it, which is added up meanwhile.
constexpr int64_t kPartialGradBytes = 4ll << 30;
constexpr int kBuffers = 2;

}  // namespace msa

// Scores count in units of log2 inside the kernels, because their exponentials are powers of two.
#pragma once

namespace msa {

constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2E = 1.44269504088896340736f;

// The factor that makes such a score of a product, where `scale` makes a natural one.
inline float scale_log2(float scale) {
  return static_cast<float>(scale * 1.44269504088896340736);
}

}  // namespace msa

// Sizes that kernels are made for, as exceptions that name what came.
#pragma once

#include <stdexcept>
#include <string>

namespace msa {

inline void check_block_size(int block_size) {
  if (block_size == 64 || block_size == 128) return;
  throw std::runtime_error("block_size must be 64 or 128, got " + std::to_string(block_size));
}

inline void check_topk(int topk, int most) {
  if (topk >= 1 && topk <= most) return;
  throw std::runtime_error("topk must be 1 to " + std::to_string(most) + ", got " +
                           std::to_string(topk));
}

// Query heads per key/value head.
inline void check_group(int num_heads, int num_kv_heads) {
  const int group = num_kv_heads < 1 ? 0 : num_heads / num_kv_heads;
  const bool is_group = group == 1 || group == 2 || group == 4 || group == 8 || group == 16;
  if (is_group && num_heads == num_kv_heads * group) return;
  throw std::runtime_error("query heads per key/value head must be 1, 2, 4, 8 or 16, got " +
                           std::to_string(num_heads) + " and " + std::to_string(num_kv_heads) +
                           " heads");
}

}  // namespace msa

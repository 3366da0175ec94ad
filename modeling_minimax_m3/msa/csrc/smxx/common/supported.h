// Sizes that kernels are made for, as exceptions that name what came.
#pragma once

#include <stdexcept>
#include <string>

namespace msa {

// Most blocks that a query selects.
constexpr int kMaxTopk = 64;

inline void check_block_size(int block_size) {
  if (block_size == 64 || block_size == 128) return;
  throw std::runtime_error("block_size must be 64 or 128, got " + std::to_string(block_size));
}

inline void check_topk(int topk) {
  if (topk >= 1 && topk <= kMaxTopk) return;
  throw std::runtime_error("topk must be 1 to " + std::to_string(kMaxTopk) + ", got " +
                           std::to_string(topk));
}

inline void check_q_heads_per_kv(int num_heads, int num_kv_heads) {
  const int ratio = num_kv_heads < 1 ? 0 : num_heads / num_kv_heads;
  const bool is_power = ratio == 1 || ratio == 2 || ratio == 4 || ratio == 8 || ratio == 16;
  if (is_power && num_heads == num_kv_heads * ratio) return;
  throw std::runtime_error("query heads per key/value head must be 1, 2, 4, 8 or 16, got " +
                           std::to_string(num_heads) + " and " + std::to_string(num_kv_heads) +
                           " heads");
}

}  // namespace msa

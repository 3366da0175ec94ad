// What both decode operators need of a call.
#pragma once

#include <stdexcept>
#include <string>

#include "config.h"
#include "smxx/common/supported.h"

namespace msa {

// The checks of one operator, whose name its errors begin with.
class CallCheck {
 public:
  explicit CallCheck(const char* operation) : operation_(operation) {}

  void require(bool condition, const std::string& message) const {
    if (!condition) throw std::runtime_error(operation_ + ": " + message);
  }

  void check_sizes(int block_size, int topk, const CacheParams& cache) const {
    require(block_size == 64 || block_size == 128,
            "block_size must be 64 or 128, got " + std::to_string(block_size));
    require(topk >= 1 && topk <= kMaxTopk,
            "topk must be 1 to " + std::to_string(kMaxTopk) + ", got " + std::to_string(topk));
    require(cache.block_table == nullptr || cache.page_size % kGroupKeys == 0,
            "page_size must be a multiple of 16, got " + std::to_string(cache.page_size));
  }

 private:
  std::string operation_;
};

}  // namespace msa

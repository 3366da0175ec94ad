// Scratch memory of a call, handed out piece by piece.
#pragma once

#include <cstdint>

namespace msa {

constexpr int64_t kWorkspaceAlignment = 16;

// What a piece of this size takes.
inline int64_t align(int64_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

// Hands out the memory from `begin` on; whether it is enough, its user knows.
class Workspace {
 public:
  explicit Workspace(void* begin) : next_(static_cast<unsigned char*>(begin)) {}

  unsigned char* take(int64_t bytes) {
    unsigned char* begin = next_;
    next_ += align(bytes);
    return begin;
  }
  int32_t* take_integers(int64_t count) { return reinterpret_cast<int32_t*>(take(count * 4)); }
  float* take_floats(int64_t count) { return reinterpret_cast<float*>(take(count * 4)); }

 private:
  unsigned char* next_;
};

}  // namespace msa

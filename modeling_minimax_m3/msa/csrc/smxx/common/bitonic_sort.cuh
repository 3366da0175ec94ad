// Bitonic sort of integers in shared memory.
#pragma once

#include <cstdint>

namespace msa {

// Sorts `count` entries (a power of two, at least two) in ascending order. `kThreads` threads take
// part, of which this is number `thread`; `sync()` is a barrier of them. Starts and ends with one.
template <int kThreads, typename Sync>
__device__ __forceinline__ void sort_entries(uint32_t* entries, int count, int thread, Sync sync) {
  for (int length = 2; length <= count; length *= 2) {
    for (int distance = length / 2; distance > 0; distance /= 2) {
      sync();
      for (int i = thread; i < count / 2; i += kThreads) {
        const int low = 2 * i - (i & (distance - 1));
        const int high = low + distance;
        const uint32_t a = entries[low], b = entries[high];
        if ((a > b) == ((low & length) == 0)) {
          entries[low] = b;
          entries[high] = a;
        }
      }
    }
  }
  sync();
}

}  // namespace msa

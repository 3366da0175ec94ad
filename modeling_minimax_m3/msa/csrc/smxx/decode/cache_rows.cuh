// Where the keys of a row lie in a contiguous or paged cache.
#pragma once

#include <cstdint>

#include "params.h"

namespace msa {

struct CacheRow {
  int leftpad;  // slot of the row's first key
  int length;   // keys of the row
};

// Lengths are clamped to the cache, so that wrong ones never lead out of it.
__device__ __forceinline__ CacheRow load_cache_row(const CacheParams& cache, int row) {
  const int used = min(max(cache.cache_seqlens[row], 0), cache.max_slots);
  const bool padded = cache.cache_leftpad != nullptr && cache.block_table == nullptr;
  const int leftpad = padded ? min(max(cache.cache_leftpad[row], 0), used) : 0;
  return {leftpad, used - leftpad};
}

// The page that holds slot `slot` of a row (page numbers are clamped to the cache); for a
// contiguous cache the row itself.
__device__ __forceinline__ int load_page(const CacheParams& cache, int row, int slot) {
  if (cache.block_table == nullptr) return row;
  const int page = cache.block_table[row * cache.block_table_stride + slot / cache.page_size];
  return min(max(page, 0), cache.num_pages - 1);
}

__device__ __forceinline__ int slot_in_page(const CacheParams& cache, int slot) {
  return cache.block_table == nullptr ? slot : slot % cache.page_size;
}

// Brings a line into L2. Allowed before the wait for the previous kernel, which may still write it:
// no value is read.
__device__ __forceinline__ void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address));
}

// 16 bytes that this kernel reads once.
__device__ __forceinline__ uint4 load_streamed_16(const void* source) {
  uint4 data;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(data.x), "=r"(data.y), "=r"(data.z), "=r"(data.w)
               : "l"(source));
  return data;
}

}  // namespace msa

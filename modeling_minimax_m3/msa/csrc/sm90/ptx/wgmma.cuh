// Warpgroup matrix products (wgmma, sm_90a): a from registers or shared memory, b from shared
// memory.
//
// The accumulators and `a` of a warp have the layout of smxx/common/matrix.cuh for its 16 of the 64
// rows.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace msa::sm90 {

// Before the first product of a group: orders this thread's register accesses before it.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most `kPending` of the warpgroup's newest groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// After a wait: keeps the compiler from reading the accumulators any earlier.
template <int kCount>
__device__ __forceinline__ void accumulators_ready(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Makes this thread's ordinary and cp.async writes to shared memory visible to wgmma; then a
// barrier.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Descriptor of an operand whose rows are 64 channels (128 bytes) each, one under the other, with
// the 16-byte chunks of row r permuted by r % 8 ("128-byte swizzle"). `address` is a multiple of
// 1024, plus 32 for every 16 channels.
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kEightRows = 1024 / 16;  // stride between groups of eight rows
  return kSwizzle128 | kEightRows << 32 | 1ull << 16 | ((address & 0x3ffff) >> 4);
}

// Descriptor of an operand that is transposed on its way: rows are the summed index (keys of a
// value tile), columns come as panels of 64 of `panel_bytes` each. `address` is a multiple of 1024,
// plus 2048 for every 16 rows.
__device__ __forceinline__ uint64_t transposed_descriptor(uint32_t address, int panel_bytes) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kEightRows = 1024 / 16;
  return kSwizzle128 | kEightRows << 32 | static_cast<uint64_t>(panel_bytes / 16) << 16 |
         ((address & 0x3ffff) >> 4);
}

// The accumulators `d` of a product in assembler: their places, the operands that they are.
#define MSA_PLACES_32                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MSA_PLACES_64                                                                \
  MSA_PLACES_32                                                                      \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MSA_PLACES_96                                                                \
  MSA_PLACES_64                                                                      \
  ", "                                                                               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MSA_OPERANDS_32                                                                           \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define MSA_OPERANDS_64                                                                          \
  MSA_OPERANDS_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), \
      "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), \
      "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), \
      "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), \
      "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define MSA_OPERANDS_96                                                                          \
  MSA_OPERANDS_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), \
      "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), \
      "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), \
      "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), \
      "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])

// d = a * b or d += a * b: 64 rows, 192 columns, 16 channels, asynchronous, both from shared
// memory.
template <typename Element>
__device__ __forceinline__ void wgmma_m64n192k16(float (&d)[96], uint64_t a, uint64_t b,
                                                 bool accumulates) {
#define MSA_MULTIPLY(type)                                                            \
  asm volatile(                                                                       \
      "{\n.reg .pred accumulates;\nsetp.ne.b32 accumulates, %98, 0;\n"                \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type " {" MSA_PLACES_96 \
      "}, %96, %97, accumulates, 1, 1, 0, 0;\n}\n"                                    \
      : MSA_OPERANDS_96                                                               \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)))
  if constexpr (std::is_same_v<Element, __half>) {
    MSA_MULTIPLY("f16");
  } else {
    MSA_MULTIPLY("bf16");
  }
#undef MSA_MULTIPLY
}

// d = a * b or d += a * b: 64 rows, 128 columns, 16 channels, asynchronous. a comes from registers.
template <typename Element, bool kTransposedB = false>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                                 bool accumulates) {
#define MSA_MULTIPLY(type)                                                                      \
  asm volatile(                                                                                 \
      "{\n.reg .pred accumulates;\nsetp.ne.b32 accumulates, %69, 0;\n"                          \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" MSA_PLACES_64           \
      "}, {%64, %65, %66, %67}, %68, accumulates, 1, 1, %70;\n}\n"                              \
      : MSA_OPERANDS_64                                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulates)), \
        "n"(static_cast<int>(kTransposedB)))
  if constexpr (std::is_same_v<Element, __half>) {
    MSA_MULTIPLY("f16");
  } else {
    MSA_MULTIPLY("bf16");
  }
#undef MSA_MULTIPLY
}

// The same with a from shared memory.
template <typename Element>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b,
                                                 bool accumulates) {
#define MSA_MULTIPLY(type)                                                            \
  asm volatile(                                                                       \
      "{\n.reg .pred accumulates;\nsetp.ne.b32 accumulates, %66, 0;\n"                \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" MSA_PLACES_64 \
      "}, %64, %65, accumulates, 1, 1, 0, 0;\n}\n"                                    \
      : MSA_OPERANDS_64                                                               \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)))
  if constexpr (std::is_same_v<Element, __half>) {
    MSA_MULTIPLY("f16");
  } else {
    MSA_MULTIPLY("bf16");
  }
#undef MSA_MULTIPLY
}

// The descriptor of an operand `bytes` further on, a multiple of 16; cheaper than one of its own.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes / 16);
}

// d = a * b or d += a * b: 64 rows, 64 columns, 16 channels, asynchronous, both from shared memory.
// A transposed operand has the summed index as its rows (transposed_descriptor), an ordinary one
// the 64 rows or columns of d (swizzled_descriptor).
template <typename Element, bool kTransposedA, bool kTransposedB>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b,
                                                bool accumulates) {
#define MSA_MULTIPLY(type)                                                                       \
  asm volatile(                                                                                  \
      "{\n.reg .pred accumulates;\nsetp.ne.b32 accumulates, %34, 0;\n"                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" MSA_PLACES_32             \
      "}, %32, %33, accumulates, 1, 1, %35, %36;\n}\n"                                           \
      : MSA_OPERANDS_32                                                                          \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)), "n"(static_cast<int>(kTransposedA)), \
        "n"(static_cast<int>(kTransposedB)))
  if constexpr (std::is_same_v<Element, __half>) {
    MSA_MULTIPLY("f16");
  } else {
    MSA_MULTIPLY("bf16");
  }
#undef MSA_MULTIPLY
}

#undef MSA_OPERANDS_96
#undef MSA_OPERANDS_64
#undef MSA_OPERANDS_32
#undef MSA_PLACES_96
#undef MSA_PLACES_64
#undef MSA_PLACES_32

}  // namespace msa::sm90

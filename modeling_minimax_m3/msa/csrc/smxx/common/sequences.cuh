// Packed sequences: which one a query token belongs to and which keys it has.
//
// Kernels tile the packed query axis without looking at sequences, so that the grid depends on
// total_q alone and the host never reads a length; a tile that spans several sequences visits them
// one after the other.
#pragma once

#include <cstdint>

namespace msa {

struct Sequence {
  int query_begin;  // packed query tokens [query_begin, query_end)
  int query_end;
  int key_begin;  // packed key tokens [key_begin, key_begin + len_k)
  int len_k;
  int first_position;  // position of the first query among the sequence's own keys
};

// Index of the sequence that holds packed query `token`; `batch` when none does. Empty sequences
// are never returned.
__device__ __forceinline__ int find_sequence(const int32_t* cu_seqlens_q, int batch, int token) {
  int low = 0, high = batch + 1;  // first entry greater than token
  while (low < high) {
    const int middle = (low + high) / 2;
    if (__ldg(cu_seqlens_q + middle) > token) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low == 0 ? batch : low - 1;
}

// Lengths are clamped to the tensors, so that wrong ones never lead out of them.
__device__ __forceinline__ Sequence load_sequence(const int32_t* cu_seqlens_q,
                                                  const int32_t* cu_seqlens_k, int index,
                                                  int total_q, int total_k) {
  Sequence sequence;
  sequence.query_begin = __ldg(cu_seqlens_q + index);
  sequence.query_end = min(__ldg(cu_seqlens_q + index + 1), total_q);
  sequence.key_begin = min(max(__ldg(cu_seqlens_k + index), 0), total_k);
  const int key_end = min(__ldg(cu_seqlens_k + index + 1), total_k);
  sequence.len_k = max(key_end - sequence.key_begin, 0);
  sequence.first_position = sequence.len_k - (sequence.query_end - sequence.query_begin);
  return sequence;
}

// Calls visit(sequence, token_begin, token_end) for every sequence that has query tokens in
// [tile_begin, tile_end), with those that it has.
template <typename Params, typename Visit>
__device__ __forceinline__ void for_each_sequence(const Params& params, int tile_begin,
                                                  int tile_end, Visit visit) {
  for (int index = find_sequence(params.cu_seqlens_q, params.batch, tile_begin);
       index < params.batch; ++index) {
    const Sequence sequence = load_sequence(params.cu_seqlens_q, params.cu_seqlens_k, index,
                                            params.total_q, params.total_k);
    if (sequence.query_begin >= tile_end) break;
    const int token_begin = max(tile_begin, sequence.query_begin);
    const int token_end = min(tile_end, sequence.query_end);
    if (token_begin < token_end) visit(sequence, token_begin, token_end);
  }
}

}  // namespace msa

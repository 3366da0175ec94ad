// The parts of a KV-major forward: their queries, and where what belongs to them lies in the
// workspace.
#pragma once

#include <algorithm>
#include <cstdint>

#include "config.h"
#include "params.h"
#include "smxx/common/workspace.h"

namespace msa {

// A "pair" is one place of block_indices: (query token, key/value head, place), counted from the
// first token of the part. A "bucket" is one block of one sequence for one key/value head.
//
// A pair's partial output lies in fragment order, so that a warp writes and combines it in whole
// 512-byte rows: 16-byte vector v of lane l holds channels 16v + 2 (l % 4) and the next, first of
// head l / 4, then of head l / 4 + 8, and the same eight channels on.
struct KvSchedule {
  int token_begin;  // query tokens [token_begin, token_end)
  int token_end;
  int buckets_per_head;  // at least the blocks of all sequences
  int num_buckets;
  int tile_queries;  // query tokens of a tile at most
  float scale_log2;  // softmax_scale * log2(e)

  void* partial_out;      // (pairs, 16, head_dim) in fragment order
  float* partial_lse;     // (pairs, 16), in units of log2
  int32_t* bucket_count;  // (num_buckets), pairs of each bucket
  int32_t* bucket_next;   // (num_buckets), place of the bucket's next pair while they are sorted in
  int32_t* bucket_begin;  // (num_buckets + 1), first pair of each bucket in pair_list
  int32_t* tile_begin;    // (num_buckets + 1), first tile of each bucket
  int32_t* pair_list;     // (pairs), pairs of bucket 0, of bucket 1, ...
  int32_t* tile_bucket = nullptr;  // (max_tiles), bucket of each tile; nullptr: it is searched for

  // Tiles of queries that belong to a query-major kernel, see smxx/forward_order/tile_order.h, and
  // whether the part has any other; nullptr: every query of every part is KV-major.
  const uint8_t* is_query_major = nullptr;
  const int32_t* has_kv = nullptr;
};

// Parts of `part_tokens` query tokens that follow each other, whose lists exist at the same time.
struct KvParts {
  KvSchedule first;
  int count;
  int part_tokens;
  int token_end;  // of the last part
  int part_pairs;
  int part_tiles;  // tiles that a part can have

  // All of them write their partial outputs to the same place.
  __host__ __device__ KvSchedule part(int number) const {
    KvSchedule result = first;
    const int64_t buckets = static_cast<int64_t>(number) * (first.num_buckets + 1);
    result.token_begin += number * part_tokens;
    result.token_end =
        result.token_begin + part_tokens < token_end ? result.token_begin + part_tokens : token_end;
    result.bucket_count += buckets;
    result.bucket_next += buckets;
    result.bucket_begin += buckets;
    result.tile_begin += buckets;
    result.pair_list += static_cast<int64_t>(number) * part_pairs;
    if (first.tile_bucket != nullptr) {
      result.tile_bucket += static_cast<int64_t>(number) * part_tiles;
    }
    if (first.has_kv != nullptr) result.has_kv += number;
    return result;
  }
};

// Pairs of one query token.
inline int64_t token_pairs(const ForwardParams& params) {
  return static_cast<int64_t>(params.num_kv_heads) * params.topk;
}

// Buckets of one key/value head, for any lengths of the sequences.
inline int buckets_per_head(const ForwardParams& params) {
  return params.total_k / params.block_size + params.batch;
}
inline int64_t num_buckets(const ForwardParams& params) {
  return static_cast<int64_t>(buckets_per_head(params)) * params.num_kv_heads;
}

// Most tiles that `tokens` query tokens can have: room for full ones and for a last one of every
// bucket.
inline int64_t max_tiles(const ForwardParams& params, int64_t tokens, int tile_queries) {
  return tokens * token_pairs(params) / tile_queries + num_buckets(params);
}

// Bytes of an array with a place for every bucket and one more, for each part; and of the four of a
// schedule.
inline int64_t bucket_array_bytes(const ForwardParams& params, int64_t parts = 1) {
  return align(parts * (num_buckets(params) + 1) * 4);
}
inline int64_t bucket_bytes(const ForwardParams& params, int64_t parts = 1) {
  return 4 * bucket_array_bytes(params, parts);
}

// Sets what depends on the buckets' number, and takes the room for their arrays.
inline void take_buckets(KvSchedule& schedule, const ForwardParams& params, Workspace& workspace,
                         int64_t parts = 1) {
  schedule.buckets_per_head = buckets_per_head(params);
  schedule.num_buckets = static_cast<int>(num_buckets(params));
  const int64_t places = parts * (schedule.num_buckets + 1ll);
  schedule.bucket_count = workspace.take_integers(places);
  schedule.bucket_next = workspace.take_integers(places);
  schedule.bucket_begin = workspace.take_integers(places);
  schedule.tile_begin = workspace.take_integers(places);
}

// Thread blocks of a launch over the tiles when each takes tiles from grid to grid. Few enough to
// cost little if the part has no tile.
inline unsigned tile_grid(const ForwardParams& params, const KvSchedule& schedule) {
  constexpr int64_t kMost = 4096;
  const int64_t tiles =
      max_tiles(params, schedule.token_end - schedule.token_begin, schedule.tile_queries);
  return static_cast<unsigned>(std::min(tiles, kMost));
}

}  // namespace msa

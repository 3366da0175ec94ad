// The choice of the loop order, tile by tile: eight neighbouring query tokens of one key/value head
// whose blocks overlap enough go query-major, the others KV-major.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace msa {

// Where the choice lies on the device. A tile's number is token / 8 * num_kv_heads + head.
struct TileOrder {
  const uint8_t* is_query_major;  // of each tile
  const int32_t* query_tiles;     // those that are, in any order
  const int32_t* num_query_tiles;
  int32_t* next_query_tile;  // 0: for kernels that take tiles one by one
  const int32_t* has_kv;     // of each part of the queries: whether any of its tiles is KV-major
};

// When a tile goes query-major: where that costs no more than its pairs of a query and a block cost
// KV-major. The query-major kernel loads each block of the tile's union once, and works in steps of
// one block for `step_tokens` tokens (4 or 8).
struct OrderRule {
  int step_tokens;
  float step_cost;  // in units of what a pair costs KV-major
  float load_cost;
};

// Bytes of scratch for the choice, when the KV-major kernels take `part_tokens` tokens at a time.
int64_t tile_order_workspace(const ForwardParams& params, int64_t part_tokens);

// Chooses for every tile. `part_tokens` is a multiple of 8. Asynchronous on `stream`; repeats
// exactly, except for the order of `query_tiles`. Throws std::runtime_error on a CUDA error.
TileOrder launch_choose_order(const ForwardParams& params, OrderRule rule, void* workspace,
                              int64_t part_tokens, cudaStream_t stream);

}  // namespace msa

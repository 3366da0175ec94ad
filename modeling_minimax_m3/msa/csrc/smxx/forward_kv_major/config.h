// Sizes that the KV-major kernels of every architecture share.
#pragma once

#include <cstdint>

namespace msa {

constexpr int kQHeadsPerKv = 16;   // query heads of a key/value head
constexpr int kTileQueries = 128;  // query tokens of a thread block at most

// Bytes of partial outputs that exist at a time. Fewer queries at a time would load every block of
// a long sequence for fewer of them: so where a block has less than kWantedQueries of them, it is
// more, up to the most.
constexpr int64_t kPartialBytes = 3ll << 29;
constexpr int64_t kMostPartialBytes = 2ll << 30;
constexpr int64_t kWantedQueries = 64;

// Bytes of the lists of parts at a time: for the released model those of a million tokens.
constexpr int64_t kListBytes = 512ll << 20;

}  // namespace msa

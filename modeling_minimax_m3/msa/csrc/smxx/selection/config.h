// Top-k and workspace of block selection.
#pragma once

namespace msa {

// Top-k: one warp per (token, index head) row.
constexpr int kTopkWarps = 8;

// Most floats of block scores that exist at a time: 256 MB.
constexpr long long kWorkspaceElements = 64ll << 20;

}  // namespace msa

// Which kernel runs a call: one table per operator, one row per architecture that has a kernel of
// its own. The first row that the device runs and that supports the call wins, so the newest
// architecture comes first, and each table ends with the portable kernels.
//
// A new architecture is a folder beside sm80/ and a row in each table that it serves; README.md has
// the steps.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "params.h"
#include "sm80/backward/block_gradients.h"
#include "sm80/decode/kernels.h"
#include "sm80/forward_kv_major/partial_attention.h"
#include "sm80/forward_query_major/query_major.h"
#include "sm80/indexer_loss/kernels.h"
#include "sm80/selection/block_scores.h"
#include "sm90/backward/block_gradients.h"
#include "sm90/forward_kv_major/partial_attention.h"
#include "sm90/forward_query_major/query_major.h"
#include "sm90/indexer_loss/kernels.h"
#include "sm90/selection/block_scores.h"
#include "smxx/backward/attention_backward.h"
#include "smxx/decode/decode.h"
#include "smxx/forward_order/attention_forward.h"
#include "smxx/indexer_loss/indexer_loss.h"
#include "smxx/selection/select_blocks.h"

namespace msa {

// A compute capability: of a device, or of the code in a folder.
struct Capability {
  int major;
  int minor;
};

// Code of sm80/ runs on every device from 8.0 on. That of a newer folder uses instructions of one
// architecture (its target ends in "a"), so it runs on devices of that capability only.
constexpr Capability kPortable{8, 0};

template <typename Params, typename Kernel>
struct TableRow {
  Capability capability;
  bool (*supports)(const Params&);
  Kernel kernel;
};

// For kernels that take every call of their operator. Sizes that no kernel takes are errors, which
// the launch raises.
template <typename Params>
constexpr bool supports_all(const Params&) {
  return true;
}

// Block selection. The units of wgmma have twice the keys, for it takes them in half the time.
inline constexpr TableRow<SelectParams, ScoreKernel> kScoreKernels[] = {
    {{9, 0}, supports_all, {sm90::launch_block_scores, 64, 4096}},
    {kPortable, supports_all, {sm80::launch_block_scores, 32, 8192}},
};

// Attention forward. A step of the query-major kernel is one product of 64 rows, so of four tokens,
// with wgmma; with mma.sync a warp passes over what its tokens did not choose, and loads are made
// for eight. The READMEs have the figures behind the costs.
inline constexpr TableRow<ForwardParams, ForwardKernels> kForwardKernels[] = {
    {{9, 0},
     sm90::supports_forward,
     {{4, 1.15f, 2.15f}, sm90::launch_query_major, sm90::launch_partial_attention}},
    {kPortable,
     supports_all,
     {{8, 3.36f, 0.f}, sm80::launch_query_major, sm80::launch_partial_attention}},
};

// Attention backward.
inline constexpr TableRow<BackwardParams, BlockGradientsLauncher> kBlockGradientKernels[] = {
    {{9, 0}, sm90::supports_block_gradients, sm90::launch_block_gradients},
    {kPortable, supports_all, sm80::launch_block_gradients},
};

// The indexer's loss: teacher and student, and the second step of the gradient.
inline constexpr TableRow<IndexerLossParams, BlockTermsLauncher> kBlockTermKernels[] = {
    {{9, 0}, sm90::supports_block_terms, sm90::launch_block_terms},
    {kPortable, supports_all, sm80::launch_block_terms},
};
inline constexpr TableRow<IndexerLossParams, IndexGradientsLauncher> kIndexGradientKernels[] = {
    {{9, 0}, sm90::supports_index_gradients, sm90::launch_index_gradients},
    {kPortable, supports_all, sm80::launch_index_gradients},
};

// Decoding.
inline constexpr TableRow<DecodeSelectParams, IndexScoresLauncher> kIndexScoreKernels[] = {
    {kPortable, supports_all, sm80::launch_index_scores},
};
inline constexpr TableRow<DecodeAttentionParams, SplitAttentionLauncher> kSplitAttentionKernels[] =
    {
        {kPortable, supports_all, sm80::launch_split_attention},
};

// The kernel of a table for a call on a device. `portable_only` passes by all rows but the last.
template <typename Params, typename Kernel, size_t kRows>
constexpr const Kernel& choose_kernel(const TableRow<Params, Kernel> (&table)[kRows],
                                      Capability device, bool portable_only, const Params& params) {
  for (const TableRow<Params, Kernel>& row : table) {
    const Capability code = row.capability;
    const bool is_portable = code.major == kPortable.major && code.minor == kPortable.minor;
    const bool runs =
        is_portable ? device.major >= kPortable.major
                    : !portable_only && device.major == code.major && device.minor == code.minor;
    if (runs && row.supports(params)) return row.kernel;
  }
  throw std::runtime_error("no kernel for compute capability " + std::to_string(device.major) +
                           "." + std::to_string(device.minor));
}

}  // namespace msa

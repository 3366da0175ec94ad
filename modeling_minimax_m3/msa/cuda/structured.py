"""`structured_blocks_of` on the compiled kernel."""

import torch

from ..reference import StructuredBlocksArgs
from . import support


def structured_blocks_of(args: StructuredBlocksArgs) -> torch.Tensor:
    """As `reference.structured_blocks_of`."""
    lists = torch.ops.minimax_m3_msa_cuda.structured_blocks_of(
        args.own_block.flatten().contiguous(), args.num_kv_heads, args.layer_idx, args.local_blocks,
        args.anchor_blocks, args.anchor_stride, args.random_blocks, args.seed,
    )  # fmt: skip
    return lists.view(*args.own_block.shape, *lists.shape[1:])


def structured_blocks_of_unsupported(args: StructuredBlocksArgs) -> str | None:
    """Why the kernels cannot run a call of `structured_blocks_of`; None where they can."""
    if args.own_block.device.type != "cuda":
        return support.not_on_cuda(args.own_block)
    if args.width > support.MAX_TOPK:
        return support.too_many_blocks(args.width)
    if args.num_kv_heads > support.MAX_STRUCTURED_HEADS:
        return f"there must be at most {support.MAX_STRUCTURED_HEADS} key/value heads, there are {args.num_kv_heads}"
    return support.device_unsupported(args.own_block.device)

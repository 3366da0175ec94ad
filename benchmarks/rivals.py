"""The Triton kernels of vLLM, to be timed beside ours where they can be found.

`MINIMAX_M3_VLLM` names the directory that holds `vllm/models/minimax_m3`: an installation's site-packages, or where a
vLLM wheel (0.33.0 was used) was unpacked. vLLM itself need not be installed: what the two kernel files import of it is
three small helpers, put in their place here. Nothing of vLLM is part of this repository.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

VARIABLE = "MINIMAX_M3_VLLM"
PAGE = 128  # tokens of a cache page, and of a key block


def load_vllm() -> "VllmKernels | None":
    """vLLM's kernels, or None, which is said, where the environment variable names no place that has them."""
    root = os.environ.get(VARIABLE)
    if not root or not (Path(root) / "vllm/models/minimax_m3/common/ops").is_dir():
        print(f"vLLM's kernels are not timed: {VARIABLE} names no directory with vllm/models/minimax_m3", flush=True)
        return None
    return VllmKernels(Path(root))


class VllmKernels:
    """vLLM's operators over a paged cache whose pages lie in order; one sequence, or a batch of equal lengths."""

    def __init__(self, root: Path):
        self.ops = _import_operators(root / "vllm/models/minimax_m3/common/ops")

    def select(self, index_query: torch.Tensor, index_key: torch.Tensor, topk: int, chunk: int) -> Callable:
        """A call that selects blocks for one sequence's (S, H_idx, D_idx) and (S, D_idx), `chunk` queries at a time.

        It returns ids (H_idx, chunk, topk) for each chunk."""
        tokens = len(index_query)
        pages = index_key.unflatten(0, (-1, PAGE))
        parts = list(_chunks(tokens, chunk, index_query.device))

        def run() -> list[torch.Tensor]:
            blocks = []
            for rows, end, context in parts:
                lengths = (context["seq_lens"], context["prefix_lens"])
                scores = self.ops.minimax_m3_index_score(
                    index_query[rows], pages, context["table"], context["offsets"], *lengths, chunk, end,
                    index_query.shape[1],
                )  # fmt: skip
                blocks.append(
                    self.ops.minimax_m3_index_topk(
                        scores, context["offsets"], context["prefix_lens"], chunk, topk, 0, 1
                    )
                )
            return blocks

        return run

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[torch.Tensor], chunk: int
    ) -> Callable:
        """A call that attends from one sequence's (S, H_q, D) to the listed blocks; it returns (S, H_q, D)."""
        tokens, num_kv_heads = key.shape[:2]
        # (pages, H_kv, PAGE, 2 D): keys and values side by side, as vLLM's cache has them
        cache = torch.cat((key, value), dim=-1).unflatten(0, (-1, PAGE)).transpose(1, 2).contiguous()
        parts = list(_chunks(tokens, chunk, query.device))
        out = torch.empty_like(query)

        def run() -> torch.Tensor:
            for (rows, _, context), ids in zip(parts, blocks):
                self.ops.minimax_m3_sparse_attn(
                    query[rows], cache, ids, context["table"], context["offsets"], context["seq_lens"],
                    context["prefix_lens"], chunk, num_kv_heads, query.shape[-1] ** -0.5, out[rows],
                )  # fmt: skip
            return out

        return run

    def decode(
        self, index_query: torch.Tensor, index_pages: torch.Tensor, query: torch.Tensor, pages: torch.Tensor,
        table: torch.Tensor, seq_lens: torch.Tensor, longest: int, topk: int,
    ) -> torch.Tensor:  # fmt: skip
        """One new token per row: selection, then attention. Queries (B, H, D), index_pages (pages, PAGE, D_idx),
        pages (pages, H_kv, PAGE, 2 D), table (B, pages of a row), seq_lens (B), the new token included."""
        num_kv_heads = pages.shape[1]
        ids = self.ops.minimax_m3_index_decode(
            index_query, index_pages, table, seq_lens, longest, topk, 0, 1, num_kv_heads, 1, 1
        )
        out = torch.empty_like(query)
        self.ops.minimax_m3_sparse_attn_decode(
            query, pages, ids, table, seq_lens, num_kv_heads, query.shape[-1] ** -0.5, out, 1
        )
        return out


def _chunks(tokens: int, chunk: int, device: torch.device):
    """Per chunk of queries: its rows, where its keys end, and the tensors that tell the kernels so."""
    if tokens % chunk or chunk % PAGE:
        raise ValueError(f"`chunk` must divide the {tokens} tokens and be a multiple of {PAGE}, it is {chunk}")
    table = torch.arange(tokens // PAGE, dtype=torch.int32, device=device)[None]
    for start in range(0, tokens, chunk):
        yield (
            slice(start, start + chunk),
            start + chunk,
            {
                "table": table,
                "offsets": torch.tensor([0, chunk], dtype=torch.int32, device=device),
                "seq_lens": torch.tensor([start + chunk], dtype=torch.int32, device=device),
                "prefix_lens": torch.tensor([start], dtype=torch.int32, device=device),
            },
        )


def _import_operators(folder: Path) -> ModuleType:
    """vLLM's two kernel files, with the rest of vLLM replaced by the little that they use of it."""
    import triton
    from triton import language

    platform = SimpleNamespace(
        is_cuda=lambda: True,
        is_device_capability=lambda capability: torch.cuda.get_device_capability() == capability,
        is_arch_support_pdl=lambda: torch.cuda.get_device_capability() >= (9, 0),
    )
    stand_ins = {
        "vllm": {},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"tl": language, "triton": triton},
        "vllm.utils": {},
        "vllm.utils.math_utils": {"round_up": lambda number, multiple: -(-number // multiple) * multiple},
    }
    for name, contents in stand_ins.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)
    sys.path.insert(0, str(folder.parent))
    try:
        return importlib.import_module(folder.name)
    finally:
        sys.path.pop(0)

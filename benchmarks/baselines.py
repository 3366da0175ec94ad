"""Loads the kernels of other projects, which the benchmarks time as baselines.

Each environment variable names a directory: the site-packages of an installation, or a folder with an unpacked wheel.
A baseline whose variable is not set is not timed.

| variable | content of the directory | version used |
| --- | --- | --- |
| `MINIMAX_M3_VLLM` | `vllm/models/minimax_m3` | 0.33.0 |
| `MINIMAX_M3_SGLANG` | `sglang/kernels/ops/attention/minimax_sparse` | 0.5.23 |
| `MINIMAX_M3_FLASH_MSA` | `flash_msa`; its dependencies are installed | 0.1.1 |

The kernels of vLLM and SGLang are Triton code in plain files. The packages around these files need not be installed:
the files import a few small helpers from them, and this module provides stand-ins for these helpers. SGLang's decoding
runs with its Triton top-k, and without its compiled top-k. This repository contains no code of these projects.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from .measure import relative_error

PAGE = 128  # tokens of a cache page, and of a key block
MAX_ERROR = 2e-2  # relative error of a baseline's output in bf16
SAME_ROWS = 0.99  # least share of rows with our selection; rounding decides in the other rows


def _load(variable: str, inside: str, load: Callable[[Path], object]):
    """Calls `load` with the directory that the variable names.

    Returns:
        What `load` returns. None if there is no such directory or `load` fails: then a line says why, and the run goes
        on without the baseline.
    """
    root = os.environ.get(variable)
    if not root or not (Path(root) / inside).is_dir():
        print(f"not timed: {variable} names no directory with {inside}", flush=True)
        return None
    try:
        return load(Path(root))
    except Exception as reason:
        print(f"not timed: {inside} in {variable} cannot be loaded: {type(reason).__name__}: {reason}", flush=True)
        return None


def load_triton_baselines() -> "dict[str, VllmKernels | SglangKernels]":
    """The baselines whose kernels can be loaded, by name."""
    baselines = {
        "vLLM": _load("MINIMAX_M3_VLLM", "vllm/models/minimax_m3/common/ops", VllmKernels),
        "SGLang": _load("MINIMAX_M3_SGLANG", "sglang/kernels/ops/attention/minimax_sparse", SglangKernels),
    }
    return {name: baseline for name, baseline in baselines.items() if baseline is not None}


def load_flash_msa() -> Callable | None:
    """Loads the function of flash-msa.

    The function takes index queries, index keys, queries, keys and values, each (1, heads, S, channels), the number of
    keys to select, and the scale. It returns the output (1, S, H_q * D), and a zero whose gradient is the gradient of
    the indexer's loss.
    """

    def load(root: Path) -> Callable:
        sys.path.insert(0, str(root))
        return importlib.import_module("flash_msa").flash_msa_func

    return _load("MINIMAX_M3_FLASH_MSA", "flash_msa", load)


def check_selection(name: str, blocks: torch.Tensor, ours: torch.Tensor) -> None:
    """Raises RuntimeError unless nearly all rows (..., topk) list the blocks that our rows list."""
    same = (blocks.sort(-1).values == ours.sort(-1).values).all(-1).float().mean().item()
    if not same >= SAME_ROWS:
        raise RuntimeError(f"{name} is not timed: only {same:.1%} of its selections agree with ours")


def check_output(name: str, out: torch.Tensor, ours: torch.Tensor) -> None:
    """Raises RuntimeError if an output differs from ours by more than rounding."""
    error = relative_error(out, ours)
    if not error < MAX_ERROR:
        raise RuntimeError(f"{name} is not timed: its output differs from ours by {error:.1e}")


class VllmKernels:
    """vLLM's operators over a paged cache whose pages lie in order, for one sequence or a batch of equal lengths."""

    def __init__(self, root: Path):
        import triton
        from triton import language

        capability = torch.cuda.get_device_capability()
        platform = SimpleNamespace(
            is_cuda=lambda: True,
            is_device_capability=lambda wanted: capability == wanted,
            is_arch_support_pdl=lambda: capability >= (9, 0),
        )
        _put_in_place("vllm", "vllm.utils")
        _put_in_place("vllm.platforms", current_platform=platform)
        _put_in_place("vllm.triton_utils", tl=language, triton=triton)
        _put_in_place("vllm.utils.math_utils", round_up=lambda number, multiple: -(-number // multiple) * multiple)
        sys.path.insert(0, str(root / "vllm/models/minimax_m3/common"))
        self.ops: ModuleType = importlib.import_module("ops")
        sys.path.pop(0)

    def select(self, index_query: torch.Tensor, index_key: torch.Tensor, topk: int, chunk: int) -> Callable:
        """Makes a call that selects blocks for one sequence, `chunk` queries at a time.

        Args:
            index_query (S, H_idx, D_idx): Index queries.
            index_key (S, D_idx): Index keys.
            topk (int): Blocks of a query.
            chunk (int): Queries of one kernel call.

        Returns:
            The call. It returns ids (H_idx, chunk, topk) for each chunk.
        """
        tokens = len(index_query)
        pages = index_key.unflatten(0, (-1, PAGE))
        parts = list(_chunks(tokens, chunk, index_query.device))

        def run() -> list[torch.Tensor]:
            blocks = []
            for rows, end, where in parts:
                scores = self.ops.minimax_m3_index_score(
                    index_query[rows], pages, where["table"], where["offsets"], where["seq_lens"],
                    where["prefix_lens"], chunk, end, index_query.shape[1],
                )  # fmt: skip
                blocks.append(
                    self.ops.minimax_m3_index_topk(scores, where["offsets"], where["prefix_lens"], chunk, topk, 0, 1)
                )
            return blocks

        return run

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[torch.Tensor], chunk: int
    ) -> Callable:
        """Makes a call that attends to the listed blocks of one sequence, `chunk` queries at a time.

        Args:
            query (S, H_q, D): Queries.
            key (S, H_kv, D): Keys.
            value (S, H_kv, D): Values.
            blocks (list of (H_kv, chunk, topk)): Block ids of each chunk.
            chunk (int): Queries of one kernel call.

        Returns:
            The call. It returns outputs (chunk, H_q, D) for each chunk.
        """
        tokens, num_kv_heads = key.shape[:2]
        # (pages, H_kv, PAGE, 2 D): keys and values side by side, the layout of vLLM's cache
        cache = torch.cat((key, value), dim=-1).unflatten(0, (-1, PAGE)).transpose(1, 2).contiguous()
        parts = list(_chunks(tokens, chunk, query.device))
        out = torch.empty_like(query)

        def run() -> list[torch.Tensor]:
            for (rows, _, where), ids in zip(parts, blocks):
                self.ops.minimax_m3_sparse_attn(
                    query[rows], cache, ids, where["table"], where["offsets"], where["seq_lens"],
                    where["prefix_lens"], chunk, num_kv_heads, query.shape[-1] ** -0.5, out[rows],
                )  # fmt: skip
            return list(out.split(chunk))

        return run

    def decode(
        self, index_query: torch.Tensor, index_pages: torch.Tensor, query: torch.Tensor, key_pages: torch.Tensor,
        value_pages: torch.Tensor, table: torch.Tensor, seq_lens: torch.Tensor, topk: int,
    ) -> Callable:  # fmt: skip
        """Makes a call that selects blocks for T new tokens of each row and attends to them.

        The caller may free the caches: the call keeps what it needs.

        Args:
            index_query (B, T, H_idx, D_idx): Index queries.
            index_pages (pages, PAGE, D_idx): Cache of index keys.
            query (B, T, H_q, D): Queries.
            key_pages (pages, PAGE, H_kv, D): Cache of keys.
            value_pages (pages, PAGE, H_kv, D): Cache of values.
            table (B, pages of a row): Pages of each row.
            seq_lens (B): Tokens of each row, new ones included.
            topk (int): Blocks of a query.

        Returns:
            The call. It returns outputs (B, T, H_q, D).
        """
        new, num_kv_heads, dim = query.shape[1], *key_pages.shape[2:]
        cache = key_pages.new_empty(len(key_pages), num_kv_heads, PAGE, 2 * dim)
        cache[..., :dim].copy_(key_pages.transpose(1, 2))
        cache[..., dim:].copy_(value_pages.transpose(1, 2))
        index_queries, queries = index_query.flatten(0, 1), query.flatten(0, 1)

        def run() -> torch.Tensor:
            ids = self.ops.minimax_m3_index_decode(
                index_queries, index_pages, table, seq_lens, table.shape[1] * PAGE, topk, 0, 1, num_kv_heads, new, new
            )
            out = torch.empty_like(queries)
            self.ops.minimax_m3_sparse_attn_decode(
                queries, cache, ids, table, seq_lens, num_kv_heads, dim**-0.5, out, new
            )
            return out.view_as(query)

        return run


class SglangKernels:
    """SGLang's operators, with the methods of `VllmKernels`. Decoding takes one new token per row."""

    def __init__(self, root: Path):
        _put_in_place("sglang", "sglang.srt", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.attention")
        no = SimpleNamespace(get=lambda: False)
        platform = SimpleNamespace(is_sm90=torch.cuda.get_device_capability()[0] == 9)
        _put_in_place("sglang.srt.utils", is_gfx95_supported=lambda: False, is_xpu=lambda: False)
        _put_in_place("sglang.srt.runtime_context", get_platform=lambda: platform)
        _put_in_place("sglang.srt.environ", envs=SimpleNamespace(SGLANG_OPT_USE_MINIMAX_DECODE_TOPK_RADIX=no))
        package = "sglang.kernels.ops.attention.minimax_sparse"
        sys.modules["sglang.kernels.ops.attention"].__path__ = [str(root / "sglang/kernels/ops/attention")]
        self.prefill_index, self.prefill, self.decode_index, self.decode_attention = (
            importlib.import_module(f"{package}.{stage}.{part}")
            for stage in ("prefill", "decode")
            for part in ("flash_with_topk_idx", "topk_sparse")
        )

    def select(self, index_query: torch.Tensor, index_key: torch.Tensor, topk: int, chunk: int) -> Callable:
        keys = index_key[:, None]
        parts = list(_chunks(len(index_query), chunk, index_query.device))

        def run() -> list[torch.Tensor]:
            return [
                self.prefill_index.flash_prefill_with_topk_index(
                    index_query[rows], keys, None, None, where["slots"], where["slot_ids"], where["offsets"],
                    where["seq_lens"], where["prefix_lens"], chunk, end, 1, PAGE, topk, init_blocks=0, local_blocks=1,
                    disable_index_value=True, cu_seqblocks_q=where["offsets"], max_seqblock_q=chunk,
                    all_seqblock_q=chunk, page_size=PAGE,
                )[1]
                for rows, end, where in parts
            ]  # fmt: skip

        return run

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[torch.Tensor], chunk: int
    ) -> Callable:
        parts = list(_chunks(len(key), chunk, query.device))

        def run() -> list[torch.Tensor]:
            return [
                self.prefill.flash_prefill_with_gqa_share_sparse(
                    query[rows], key, value, None, where["slots"], where["slot_ids"], ids, 1, PAGE, where["offsets"],
                    where["seq_lens"], where["prefix_lens"], chunk, cu_seqblocks_q=where["offsets"],
                    max_seqblock_q=chunk,
                )
                for (rows, _, where), ids in zip(parts, blocks)
            ]  # fmt: skip

        return run

    def decode(
        self, index_query: torch.Tensor, index_pages: torch.Tensor, query: torch.Tensor, key_pages: torch.Tensor,
        value_pages: torch.Tensor, table: torch.Tensor, seq_lens: torch.Tensor, topk: int,
    ) -> Callable:  # fmt: skip
        rows = len(query)
        slots = (table[:, :, None] * PAGE + torch.arange(PAGE, dtype=torch.int32, device=table.device)).flatten(1)
        row_ids = torch.arange(rows, dtype=torch.int32, device=table.device)
        index_keys, keys, values = (
            index_pages.flatten(0, 1)[:, None],
            key_pages.flatten(0, 1),
            value_pages.flatten(0, 1),
        )

        def run() -> torch.Tensor:
            _, ids, _ = self.decode_index.flash_decode_with_topk_idx(
                index_query[:, 0], None, index_keys, None, slots, seq_lens, slots.shape[1], row_ids, PAGE, topk, 0, 1,
                disable_index_value=True, page_size=PAGE,
            )  # fmt: skip
            out = self.decode_attention.flash_decode_with_gqa_share_sparse(
                query[:, 0], None, keys, values, slots, seq_lens, row_ids, PAGE, ids, page_size=PAGE
            )
            return out[:, None]

        return run


def _chunks(tokens: int, chunk: int, device: torch.device):
    """Yields for each chunk of queries: its slice, the end of its keys, and the same as tensors for the kernels."""
    if tokens % chunk or chunk % PAGE:
        raise ValueError(f"`chunk` must divide the {tokens} tokens and be a multiple of {PAGE}, got {chunk}")
    slots = torch.arange(tokens, dtype=torch.int32, device=device)[None]
    table = slots[:, : tokens // PAGE].contiguous()
    for start in range(0, tokens, chunk):
        yield (
            slice(start, start + chunk),
            start + chunk,
            {
                "table": table,
                "slots": slots,
                "slot_ids": torch.zeros(1, dtype=torch.int32, device=device),
                "offsets": torch.tensor([0, chunk], dtype=torch.int32, device=device),
                "seq_lens": torch.tensor([start + chunk], dtype=torch.int32, device=device),
                "prefix_lens": torch.tensor([start], dtype=torch.int32, device=device),
            },
        )


def _put_in_place(*names: str, **contents: object) -> None:
    """Registers modules of these names that hold only `contents`."""
    for name in names:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)

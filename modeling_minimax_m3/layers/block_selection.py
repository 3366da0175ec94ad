"""How a layer selects, for each query and key/value head, the key blocks that it attends to."""

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any

import torch

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from .. import msa
from ..fused.shards import Processes
from ..runtime.sequence_layout import SequenceLayout
from .materialized import select_blocks_under_mask


class BlockSelector(ABC):
    """Selects the key blocks of one layer.

    Args:
        config (`MiniMaxM3VLTextConfig`): The model's text config, read again at every call.
        layer_idx (`int`): Position of the layer in the model.

    Attributes:
        processes (`Processes`, *optional*): Those that share the heads, if keys and index are of this process's own.
    """

    processes: Processes | None = None

    def __init__(self, config: MiniMaxM3VLTextConfig, layer_idx: int):
        self.config = config
        self.layer_idx = layer_idx

    @staticmethod
    @abstractmethod
    def blocks_per_query(config: MiniMaxM3VLTextConfig) -> int:
        """The most blocks that one query attends to, its own block included."""

    def layout_of(self, layout: SequenceLayout) -> SequenceLayout:
        """The sequences whose blocks are selected. Most kinds read them as they are."""
        return layout

    @abstractmethod
    def select(
        self,
        layout: SequenceLayout,
        key: torch.Tensor,
        index: tuple[torch.Tensor, torch.Tensor] | None,
        reads_cache: bool,
    ) -> torch.Tensor:
        """Select blocks for every query of a pass.

        Args:
            layout (`SequenceLayout`): Where the sequences lie.
            key (`torch.Tensor`): (B, S, H_kv, D), the keys (or cache slots) of every row.
            index (`tuple`, *optional*): The indexer's queries (B, T, H_idx, D_idx) and keys (B, S, D_idx), in the
                layout's working order. None for a kind without an indexer.
            reads_cache (`bool`): Whether the keys are read from the cache in place.

        Returns:
            int32 (B, T, H_kv, W) block ids, in the layout's working order. The valid ids come first, each once; -1
            fills the rest.
        """


class LearnedSelector(BlockSelector):
    """Keeps the blocks that an indexer scores highest, and those that the config forces."""

    @staticmethod
    def blocks_per_query(config: MiniMaxM3VLTextConfig) -> int:
        return config.index_topk_blocks

    def select(
        self,
        layout: SequenceLayout,
        key: torch.Tensor,
        index: tuple[torch.Tensor, torch.Tensor] | None,
        reads_cache: bool,
    ) -> torch.Tensor:
        assert index is not None, "a learned selection needs an indexer"
        config = self.config
        options: dict[str, Any] = {
            "block_size": config.index_block_size,
            "topk": config.index_topk_blocks,
            "local_blocks": config.index_local_blocks,
            "init_blocks": config.index_init_blocks,
        }
        if layout.allowed is not None:
            return select_blocks_under_mask(*index, layout, **options)
        options["backend"] = config.msa_backend
        if reads_cache:
            return msa.select_blocks_with_kvcache(
                *index, cache_seqlens=layout.cache_seqlens, cache_leftpad=layout.cache_leftpad, **options
            )
        flat = (states.flatten(0, 1) for states in index)
        block_indices = msa.select_blocks(*flat, **layout.packed_offsets(key.shape[1]), **options)
        return block_indices.view(*index[0].shape[:2], *block_indices.shape[-2:])


class StructuredSelector(BlockSelector):
    """Lists blocks by position alone: local ones, anchors at regular intervals, and random ones."""

    def __init__(self, config: MiniMaxM3VLTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.pattern = structured_pattern(config)

    @staticmethod
    def blocks_per_query(config: MiniMaxM3VLTextConfig) -> int:
        return structured_pattern(config).width

    def layout_of(self, layout: SequenceLayout) -> SequenceLayout:
        return layout.as_one_document() if self.config.structured_cross_document else layout

    def select(
        self,
        layout: SequenceLayout,
        key: torch.Tensor,
        index: tuple[torch.Tensor, torch.Tensor] | None,
        reads_cache: bool,
    ) -> torch.Tensor:
        block_size = self.config.index_block_size
        own_block = torch.div(layout.working_positions(), block_size, rounding_mode="floor")
        longest = key.shape[1] if layout.cu_seqlens is None else layout.max_seqlen
        processes = self.processes
        block_indices = msa.structured_blocks_of(
            own_block,
            key.shape[2] * (1 if processes is None else processes.count),
            self.layer_idx,
            self.pattern,
            num_blocks=-(-longest // block_size),
            backend=self.config.msa_backend,
        )
        # The random blocks of a head depend on its number among all heads.
        return block_indices if processes is None else processes.part_of(block_indices, -2)


def structured_pattern(config: MiniMaxM3VLTextConfig) -> msa.StructuredPattern:
    """The pattern that the `structured_*` fields of a text config describe."""
    names = [field.name for field in fields(msa.StructuredPattern)]
    return msa.StructuredPattern(**{name: getattr(config, f"structured_{name}") for name in names})

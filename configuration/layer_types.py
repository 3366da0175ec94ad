"""The kinds of attention layers: the names that `layer_types` may hold, and the fields that each kind needs.

The configuration knows no more than that, so that it can be read without the model. How a kind selects blocks and what
it keeps in a cache stands in `modeling_minimax_m3/layers/layer_types.py`. `register_attention_type` of that module
adds a kind to both tables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .text import MiniMaxM3VLTextConfig


@dataclass(frozen=True)
class LayerType:
    """One kind of attention layer.

    Args:
        name (`str`): The entry of `layer_types`.
        fields (`tuple[str, ...]`): Fields of the text config that the kind reads. A config without them is refused.
        has_indexer (`bool`): Whether an indexer, with weights of its own, scores the keys.
        check (`Callable`, *optional*): Takes the text config and raises `ValueError` where the fields do not fit
            together.
    """

    name: str
    fields: tuple[str, ...] = ()
    has_indexer: bool = False
    check: "Callable[[MiniMaxM3VLTextConfig], None] | None" = None

    def validate(self, config: "MiniMaxM3VLTextConfig") -> None:
        """Raise `ValueError` unless a layer of this kind can be built from `config`."""
        if missing := [name for name in self.fields if not hasattr(config, name)]:
            raise ValueError(
                f"layers of type {self.name!r} need the field `{missing[0]}` of the text config, got a config without it."
            )
        if self.check is not None:
            self.check(config)


def _check_indexer(config: "MiniMaxM3VLTextConfig") -> None:
    if config.index_n_heads != config.num_key_value_heads:
        raise ValueError(
            "`index_n_heads` must equal `num_key_value_heads`, because each index head selects for one key/value "
            f"head, got index_n_heads={config.index_n_heads} and num_key_value_heads={config.num_key_value_heads}."
        )
    if config.index_init_blocks + config.index_local_blocks > config.index_topk_blocks:
        raise ValueError(
            "`index_init_blocks` + `index_local_blocks` must not exceed `index_topk_blocks`, got "
            f"{config.index_init_blocks} + {config.index_local_blocks} > {config.index_topk_blocks}."
        )
    if config.index_head_dim < config.rotary_width:
        raise ValueError(
            f"`index_head_dim` must be at least the rotary width {config.rotary_width} (`head_dim` = {config.head_dim} "
            "times `rope_parameters['partial_rotary_factor']` = "
            f"{config.rope_parameters.get('partial_rotary_factor', 1.0)}), because the indexer's scores otherwise depend "
            f"on absolute positions, got {config.index_head_dim}."
        )


FULL_ATTENTION = LayerType("full_attention")
LEARNED_SPARSE = LayerType(
    "minimax_m3_sparse",
    fields=(
        "index_n_heads",
        "index_head_dim",
        "index_block_size",
        "index_topk_blocks",
        "index_local_blocks",
        "index_init_blocks",
    ),
    has_indexer=True,
    check=_check_indexer,
)
STRUCTURED = LayerType(
    "minimax_m3_structured",
    fields=(
        "index_block_size",
        "structured_local_blocks",
        "structured_anchor_blocks",
        "structured_anchor_stride",
        "structured_random_blocks",
        "structured_seed",
        "structured_cross_document",
    ),
)

LAYER_TYPES: dict[str, LayerType] = {kind.name: kind for kind in (FULL_ATTENTION, LEARNED_SPARSE, STRUCTURED)}

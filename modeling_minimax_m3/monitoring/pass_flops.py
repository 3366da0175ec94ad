"""Operations of training passes, counted on the device without waiting for it, and what devices can do."""

import itertools
import re

import torch

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from ..flops import matrix_weights, products_per_key, products_per_scored_key
from ..layers.layer_types import attention_type

# Dense operations per second in bfloat16, by a part of the device's name. The first match counts.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that the device reaches at most, or None if that is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = re.split(r"[\s-]+", torch.cuda.get_device_name(device))
    words = [*name, *(f"{one} {other}" for one, other in itertools.pairwise(name))]
    return next((peak for part, peak in PEAK_FLOPS.items() if part in words), None)


def token_positions(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Position (B, T) of each token in its document, by the inputs of a model. It means nothing at padding."""
    if cu_seq_lens is not None:
        token = torch.arange(shape[0] * shape[1], device=cu_seq_lens.device)
        document = torch.searchsorted(cu_seq_lens, token, right=True) - 1
        return (token - cu_seq_lens[document]).view(shape)
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask.ne(0).cumsum(1) - 1
    if position_ids is not None and position_ids.dim() == 2:
        return position_ids
    return torch.arange(shape[1], device=device).expand(shape)


class PassFlops:
    """Counts the operations of training passes.

    A product costs the same in the forward, for the gradient of its input, and for the gradient of its weight. Frozen
    weights have no gradient of their own, so `trained_share` weights the last. The head counts for learned tokens only.
    What activation checkpointing computes again does not count. The vision tower does not either.

    Args:
        config (MiniMaxM3VLTextConfig): Of the language model.
        trained_share (float): Share of the parameters that are trained, from 0 to 1.
    """

    def __init__(self, config: MiniMaxM3VLTextConfig, trained_share: float):
        weights = matrix_weights(config)
        passes = 2 + trained_share  # forward, gradient of the input, gradient of the weight
        is_indexer_trained = config.indexer_loss_coef > 0
        indexer = weights.pop("indexer projections") * (passes if is_indexer_trained else 1)
        self.per_learned_token = 2 * weights.pop("output head") * passes
        self.per_token = 2 * (sum(weights.values()) * passes + indexer)
        self.per_key: dict[str, int] = {}  # by the type of the layers; both factors of a product have gradients
        self.per_scored_key = 0
        for layer_type in config.layer_types:
            self.per_key[layer_type] = self.per_key.get(layer_type, 0) + 2 * 3 * products_per_key(config)
            if attention_type(layer_type).layer_type.has_indexer:
                self.per_scored_key += 2 * (3 if is_indexer_trained else 1) * products_per_scored_key(config)
        self._block_size = config.index_block_size
        self._widths = {
            name: None if (selector := attention_type(name).selector) is None else selector.blocks_per_query(config)
            for name in self.per_key
        }

    def __call__(
        self, positions: torch.Tensor, real: torch.Tensor | None, learned: torch.Tensor | int
    ) -> torch.Tensor:
        """Operations of one pass, as a float32 scalar on the device of `positions`.

        Args:
            positions (int (B, T)): Position of each token in its document.
            real (bool (B, T), optional): False at padding, which does not count.
            learned (int or scalar tensor): Learned tokens.
        """
        position = positions.float()
        all_keys = position + 1
        total = all_keys * self.per_scored_key + self.per_token
        for name, per_key in self.per_key.items():
            total = total + per_key * self._attended(name, position, all_keys)
        if real is not None:
            total = total * real
        return total.sum() + self.per_learned_token * learned

    def _attended(self, layer_type: str, position: torch.Tensor, all_keys: torch.Tensor) -> torch.Tensor:
        """How many keys each token attends to: whole blocks before its own, and its own up to itself."""
        width, size = self._widths[layer_type], self._block_size
        if width is None:
            return all_keys
        return position % size + 1 + size * (position // size).clamp(max=width - 1)

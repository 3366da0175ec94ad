"""Synthetic checkpoints: random weights with the names, shapes, dtypes and files of the released model.

They are for measuring loading, conversion and memory. Nothing was trained, so what such a model says means nothing.
"""

import copy
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from configuration_minimax_m3 import MiniMaxM3VLConfig
from configuration_minimax_m3.serving import obstacles_to_serving

from ..mxfp8 import quantize_mxfp8
from ..version import __version__
from .configs import converted_config, cut_config
from .layouts import SCALE_SUFFIX, is_quantized, released_dtype, released_shapes, scale_of, stored_tensors
from .source import Checkpoint, open_checkpoint
from .writing import Output, write_checkpoint

# Close to the released files: 16.1 GB each.
MAX_SHARD_SIZE = 16_100_000_000

NOTICE = "synthetic: random weights in the layout of MiniMaxAI/MiniMax-M3; nothing was trained"
_README = """# A synthetic checkpoint

The weights in this folder are random numbers. They have the names, shapes and dtypes of MiniMaxAI/MiniMax-M3 (layers: \
{layers}, routed experts: {experts}, precision: {precision}), and nothing was trained. What such a model says means \
nothing. `scripts/make_synthetic_checkpoint.py` wrote them with the seed {seed}.
"""
_STANDARD_DEVIATION = 0.02
_BLOCK_ELEMENTS = 2**20
_REPEATED_BLOCKS = 4
# Keys of the config classes that the released file does not have.
_NOT_RELEASED = (
    *("layer_types", "mlp_layer_types", "rope_parameters", "index_n_heads", "index_head_dim", "index_block_size"),
    *("index_topk_blocks", "index_local_blocks", "index_init_blocks", "model_type"),
)


def make_synthetic_checkpoint(
    folder: Path,
    config: MiniMaxM3VLConfig,
    *,
    layers: int | None = None,
    experts: int | None = None,
    precision: str = "bf16",
    seed: int = 0,
    max_shard_size: int = MAX_SHARD_SIZE,
    repeated: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    show_progress: bool = True,
) -> Checkpoint:
    """Write a synthetic checkpoint in the released layout. A block of values is in memory at a time.

    A weight depends on its name and the seed alone. So the first layers and experts are the same whatever the number
    of layers and experts, and the MXFP8 values are those of the bfloat16 weights.

    Args:
        folder (Path): Where it goes.
        config (MiniMaxM3VLConfig): Geometry, for example `released_config()`.
        layers (int, optional): Only so many of the first layers.
        experts (int, optional): Only so many routed experts.
        precision (str): "bf16" or "mxfp8".
        seed (int): Seed of the weights.
        max_shard_size (int): Bytes of a file.
        repeated (bool): Whether blocks of a weight repeat the same random numbers, which is written faster. To measure
            loading, what the numbers are is all the same.
        overwrite (bool): Whether `folder` may be replaced.
        restart (bool): Whether to throw away what an earlier run left.
        show_progress (bool): Whether to show a bar.

    Returns:
        The checkpoint.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: The engines that read the released layout do not know such a model, or a number is out of range.
    """
    if precision not in ("bf16", "mxfp8"):
        raise ValueError(f"`precision` must be bf16 or mxfp8, got {precision!r}.")
    if obstacles := obstacles_to_serving(config):
        raise ValueError(f"`config` must describe a model as released. {obstacles[0]}")
    content = cut_config(released_content(config), layers, experts)
    config = MiniMaxM3VLConfig.from_dict(copy.deepcopy(content))
    shapes = released_shapes(config)
    quantized = frozenset(n for n, shape in shapes.items() if precision == "mxfp8" and is_quantized(n, shape))
    tensors = []
    for tensor in stored_tensors(config, "released"):
        tensors.append(tensor)
        if scale := scale_of(tensor, quantized.__contains__):
            tensors.append(scale)
    text = config.text_config
    options = {"layers": text.num_hidden_layers, "experts": text.num_local_experts, "precision": precision}
    output = Output(
        folder=folder,
        tensors=tensors,
        values=(_RepeatedValues if repeated else _RandomValues)(shapes, quantized, seed),
        config=converted_config(content, config, "released", precision),
        max_shard_size=max_shard_size,
        metadata={"synthetic": NOTICE},
        made_by={"synthetic": NOTICE, "version": __version__, "seed": seed, "repeated": repeated, **options},
        inputs=hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest(),
        companions=[],
        texts={"README.md": _README.format(seed=seed, **options)},
    )
    write_checkpoint(output, overwrite=overwrite, restart=restart, show_progress=show_progress)
    return open_checkpoint(folder)


def released_content(config: MiniMaxM3VLConfig) -> dict[str, Any]:
    """The content of a `config.json` with the keys of the released one, and a note that the weights are synthetic."""
    content = config.to_diff_dict()
    for key in ("merged_hidden_size", "transformers_version"):
        content.pop(key, None)
    content |= {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "torch_dtype": "bfloat16",
        "multimodal_projector_bias": True,
        "synthetic": NOTICE,
    }
    content = converted_config(content, config, "released", "bf16")
    for part in ("text_config", "vision_config"):
        content[part] = {key: value for key, value in content[part].items() if key not in _NOT_RELEASED}
    return content


class _RandomValues:
    """Random values of weights, and their scales, by released name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], quantized: frozenset[str], seed: int):
        self.shapes = shapes
        self.quantized = quantized
        self.seed = seed

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a weight or its scales."""
        if name.endswith(SCALE_SUFFIX):
            return torch.uint8
        return torch.float8_e4m3fn if name in self.quantized else released_dtype(name)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The values in blocks of rows."""
        weight = name.removesuffix(SCALE_SUFFIX)
        rows, columns = self.shapes[weight][0], math.prod(self.shapes[weight][1:])
        step = max(1, _BLOCK_ELEMENTS // columns)
        for start in range(0, rows, step):
            yield self._block(name, start, (min(step, rows - start), columns))

    def _block(self, name: str, start: int, shape: tuple[int, int]) -> torch.Tensor:
        weight = name.removesuffix(SCALE_SUFFIX)
        numbers = self._numbers(weight, start, shape)
        if weight not in self.quantized:
            return numbers
        values, scales = quantize_mxfp8(numbers)
        return scales if name.endswith(SCALE_SUFFIX) else values

    def _numbers(self, weight: str, start: int, shape: tuple[int, int]) -> torch.Tensor:
        dtype = released_dtype(weight)
        constant = _constant_of(weight)
        if constant is not None:
            return torch.full(shape, constant, dtype=dtype)
        digest = hashlib.sha256(f"{self.seed} {weight} {start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.empty(shape).normal_(0, _STANDARD_DEVIATION, generator=generator).to(dtype)


class _RepeatedValues(_RandomValues):
    """Random values of which a few blocks are made, and written again and again."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}

    def _block(self, name: str, start: int, shape: tuple[int, int]) -> torch.Tensor:
        weight = name.removesuffix(SCALE_SUFFIX)
        if _constant_of(weight) is not None:
            return super()._block(name, start, shape)
        number = start // shape[0] % _REPEATED_BLOCKS
        key = (number, shape, self.dtype(name), weight in self.quantized)
        if key not in self._made:
            self._made[key] = super()._block(name, number, shape)
        return self._made[key]


def _constant_of(weight: str) -> float | None:
    """The value of a weight that is not random: a bias, or a norm that multiplies by its weight."""
    if weight.endswith((".bias", "e_score_correction_bias")):
        return 0.0
    return 1.0 if "layer_norm" in weight or "layrnorm" in weight else None

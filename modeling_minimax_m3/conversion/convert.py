"""From one checkpoint to another: layout, precision, adapters, fewer layers and experts."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configuration_minimax_m3 import MiniMaxM3VLConfig
from configuration_minimax_m3.serving import obstacles_to_serving

from ..mxfp8 import GROUP_SIZE
from ..version import __version__
from .adapters import Adapter, AdapterDeltas, open_adapter
from .configs import converted_config, cut_config
from .layouts import LAYOUTS, TEXT_PREFIX, is_quantized, released_shapes, scale_of, stored_tensors
from .manifest import companions, verify
from .source import CONFIG, INDEX, Checkpoint, open_checkpoint, read_config
from .values import Values
from .writing import Output, write_checkpoint

PRECISIONS = ("bf16", "mxfp8")
MAX_SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class Conversion:
    """What to make of a checkpoint.

    Args:
        layout (str, optional): One of `layouts.LAYOUTS`. None keeps the layout.
        precision (str, optional): "bf16" turns MXFP8 into bfloat16 and leaves plain dtypes. "mxfp8" quantizes what the
            released MXFP8 files hold so. None keeps the precision.
        layers (int, optional): Keep so many of the first layers.
        experts (int, optional): Keep so many of the first routed experts.
        adapters (tuple[Path, ...]): Folders of LoRA adapters of PEFT to add to the weights.
        vision_from (Path, optional): Checkpoint of a whole model whose vision tower completes a language model.
        max_shard_size (int): Bytes of a file.
        check_source (bool): Whether to compare the hashes of a source that has a manifest.
    """

    layout: str | None = None
    precision: str | None = None
    layers: int | None = None
    experts: int | None = None
    adapters: tuple[Path, ...] = ()
    vision_from: Path | None = None
    max_shard_size: int = MAX_SHARD_SIZE
    check_source: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("layout", LAYOUTS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)} or None, got {value!r}.")
        if self.max_shard_size < 1:
            raise ValueError(f"`max_shard_size` must be a positive number of bytes, got {self.max_shard_size}.")


def convert(
    source: Path,
    target: Path,
    conversion: Conversion,
    *,
    overwrite: bool = False,
    restart: bool = False,
    show_progress: bool = True,
    texts: dict[str, str] | None = None,
) -> Checkpoint:
    """Write the converted checkpoint. The memory that this needs does not depend on the size of the checkpoint.

    Args:
        source (Path): Folder of a checkpoint in any of the layouts.
        target (Path): Folder to write.
        conversion (Conversion): What to make of it.
        overwrite (bool): Whether `target` may be replaced.
        restart (bool): Whether to throw away what an earlier run left, instead of going on with it.
        show_progress (bool): Whether to show bars.
        texts (dict[str, str], optional): Other files to write, by name, such as README.md. They take the place of
            those of the source.

    Returns:
        The new checkpoint.

    Raises:
        FileExistsError: `target` exists, or an earlier run with other options left files.
        FileNotFoundError: A file is missing.
        ValueError: The source is not complete and unchanged, or the conversion does not fit it.
    """
    if target.resolve() == source.resolve():
        raise ValueError(f"`target` must be another folder than `source`, got {target} for both.")
    checkpoint, _ = verify(source, hashes=False, show_progress=show_progress)
    if conversion.vision_from is not None:
        checkpoint = _with_vision(checkpoint, conversion.vision_from)
    layout, precision = conversion.layout or checkpoint.layout, conversion.precision or checkpoint.precision
    if checkpoint.layout == "text" and layout != "text":
        raise ValueError(
            f"{source} is a language model without a vision tower, so it cannot become a checkpoint in the layout "
            f"{layout!r}. Name a whole model's checkpoint whose vision tower it gets (--vision_from)."
        )
    content = cut_config(checkpoint.config_file, conversion.layers, conversion.experts)
    config = _config_of(content, checkpoint)
    shapes = released_shapes(config)
    quantized = frozenset(n for n, shape in shapes.items() if precision == "mxfp8" and is_quantized(n, shape))
    for name, shape in shapes.items():
        if name in quantized and shape[-1] % GROUP_SIZE:
            raise ValueError(
                f"{name} has {shape[-1]} columns, but MXFP8 needs a multiple of {GROUP_SIZE}. Keep the model in bf16."
            )
    deltas = AdapterDeltas([open_adapter(folder, checkpoint.config) for folder in conversion.adapters])
    values = Values(checkpoint.tensors, shapes, quantized, deltas)

    tensors = []
    for tensor in stored_tensors(config, layout):
        tensors.append(tensor)
        if scale := scale_of(tensor, quantized.__contains__):
            tensors.append(scale)
    made_by = {
        "version": __version__,
        "layout": layout,
        "precision": precision,
        "layers": conversion.layers,
        "experts": conversion.experts,
        "adapters": [adapter.identity for adapter in deltas.adapters],
    }
    output = Output(
        folder=target,
        tensors=tensors,
        values=values,
        config=converted_config(content, config, layout, precision),
        max_shard_size=conversion.max_shard_size,
        metadata={key: value for key, value in checkpoint.metadata.items() if key == "synthetic"},
        made_by=made_by,
        inputs=_fingerprint(checkpoint, deltas.adapters),
        companions=[file for file in _companions(source, conversion.vision_from) if file.name not in (texts or {})],
        texts=texts or {},
    )

    def check_source() -> None:
        """Takes minutes for hundreds of gigabytes, so all that is checked quickly comes before it."""
        if conversion.check_source:
            verify(source, show_progress=show_progress)

    write_checkpoint(
        output, overwrite=overwrite, restart=restart, show_progress=show_progress, before_writing=check_source
    )
    return open_checkpoint(target)


def _companions(source: Path, vision_from: Path | None) -> list[Path]:
    """Other files to copy. A language model's folder has no processor, so the whole model's completes it."""
    own = companions(source, (CONFIG, INDEX))
    names = {file.name for file in own}
    other = companions(vision_from, (CONFIG, INDEX)) if vision_from is not None else []
    return own + [file for file in other if file.name not in names]


def serving_report(checkpoint: Checkpoint) -> list[str]:
    """What keeps vLLM and SGLang from serving a checkpoint. Empty where nothing does."""
    if checkpoint.layout != "released":
        return [f"Its layout is {checkpoint.layout!r}. The engines read 'released'."]
    return obstacles_to_serving(checkpoint.config)


def _with_vision(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The whole model of a language model and another checkpoint's vision tower."""
    whole = open_checkpoint(folder)
    if checkpoint.layout != "text" or whole.layout == "text":
        raise ValueError(
            "`vision_from` must be a whole model's checkpoint that completes a language model's, got the layouts "
            f"{whole.layout!r} and {checkpoint.layout!r}."
        )
    own, other = checkpoint.config.text_config.hidden_size, whole.config.text_config.hidden_size
    if own != other:
        raise ValueError(f"`vision_from` must have the language model's hidden_size, {own}, got {other} in {folder}.")
    text = {key: value for key, value in checkpoint.config_file.items() if key != "architectures"}
    content = copy.deepcopy(whole.config_file) | {"text_config": text}
    content.pop("quantization_config", None)
    for key in ("synthetic", "quantization_config"):
        if key in text:
            content[key] = text.pop(key)
    vision = {name: region for name, region in whole.tensors.items() if not name.startswith(TEXT_PREFIX)}
    return replace(
        checkpoint,
        config_file=content,
        config=MiniMaxM3VLConfig.from_dict(content),
        layout="modules",  # of a whole model; the files are those of two
        tensors=checkpoint.tensors | vision,
        files=checkpoint.files + whole.files,
    )


def _config_of(content: dict[str, Any], checkpoint: Checkpoint) -> MiniMaxM3VLConfig:
    config, _ = read_config(content, checkpoint.folder)
    return config


def _fingerprint(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> str:
    """Changes when a file of the source changes: by name, size, time and header."""
    digest = hashlib.sha256()
    for file in (checkpoint.folder / CONFIG, *checkpoint.files, *(adapter.file for adapter in adapters)):
        status = file.stat()
        with file.open("rb") as stream:
            start = stream.read(2**16)
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode() + start)
    return digest.hexdigest()

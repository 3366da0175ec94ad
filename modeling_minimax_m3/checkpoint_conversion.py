"""Conversion of checkpoints on disk, without loading a model: `convert(source, target, Conversion(...))`.

docs/conversion.md explains what can be converted, and `scripts/convert_checkpoint.py` is the command.
"""

from .conversion.adapters import ENGINES, export_adapter
from .conversion.convert import MAX_SHARD_SIZE, PRECISIONS, Conversion, convert, serving_report
from .conversion.layouts import LAYOUTS
from .conversion.manifest import MANIFEST, verify
from .conversion.source import Checkpoint, open_checkpoint
from .conversion.synthetic import make_synthetic_checkpoint

__all__ = [
    "Checkpoint",
    "Conversion",
    "ENGINES",
    "LAYOUTS",
    "MANIFEST",
    "MAX_SHARD_SIZE",
    "PRECISIONS",
    "convert",
    "export_adapter",
    "make_synthetic_checkpoint",
    "open_checkpoint",
    "serving_report",
    "verify",
]

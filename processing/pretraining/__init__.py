"""Pretraining data that any machine makes by itself: text, code, recall, tools, images and videos, mixed.

`README.md` of the package above has the role of each file.
"""

from .encoding import RowEncoder, resize_to_drawn_sizes
from .mixture import TASKS, WEIGHTS, iterate_rows, make_row
from .packs import LongRows, Packs, Stage, collate_packs, parse_stages
from .rows import SPLITS

__all__ = [
    "SPLITS",
    "TASKS",
    "WEIGHTS",
    "LongRows",
    "Packs",
    "RowEncoder",
    "Stage",
    "collate_packs",
    "iterate_rows",
    "make_row",
    "parse_stages",
    "resize_to_drawn_sizes",
]

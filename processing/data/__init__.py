"""Data for fine-tuning: rows in the formats that people have, checked, encoded, packed and shown.

`README.md` of the package above has the role of each file.
"""

from .collator import MultimodalChatCollator
from .encoding import Encoded, Encoder
from .faults import Fault, RowFault
from .formats import Example, Reading, read_example
from .sources import Rows, RowSource, open_rows

__all__ = [
    "Encoded",
    "Encoder",
    "Example",
    "Fault",
    "MultimodalChatCollator",
    "Reading",
    "RowFault",
    "RowSource",
    "Rows",
    "open_rows",
    "read_example",
]

"""Batches of rows that are tokens already, padded, put in line or packed; rows with images go to their own collator."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class RowCollator:
    """Makes a batch of rows of tokens, of packs of them, or of rows with images or videos.

    Args:
        tokens (Callable): Makes batches of rows that have `input_ids` and `labels`. Packs are given to it row by row.
        media (Callable, optional): Makes batches in which a row has no `input_ids`.
    """

    tokens: Callable[[list[Any]], dict[str, torch.Tensor]]
    media: Callable[[list[Any]], dict[str, torch.Tensor]] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Makes the batch. See the collators for its tensors."""
        if self.media is not None and any("input_ids" not in row for row in rows):
            return self.media(rows)
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
        if rows and rows[0]["input_ids"] and isinstance(rows[0]["input_ids"][0], list):
            rows = [
                {"input_ids": ids, "labels": labels}
                for pack in rows
                for ids, labels in zip(pack["input_ids"], pack["labels"])
            ]
        return self.tokens(rows)

"""Makes ms-swift train MiniMax-M3 with the classes of this project.

    swift sft --external_plugins ms_swift_plugin.py --model CHECKPOINT --model_type minimax_m3_vl ...

ms-swift 4.6 knows the model type. Importing `modeling_minimax_m3` puts our classes in its place. What is left is the
template: ms-swift looks for reasoning by `<think>`, which MiniMax-M3 writes as `<mm:think>`. So it would put
`</mm:think>`, the mark of an answer without reasoning, before every reasoning, and train the model to write both.
"""

from typing import Any

from swift.template import TEMPLATE_MAPPING

import modeling_minimax_m3  # noqa: F401 - registers the classes

NAME = "minimax_m3_vl"

if NAME not in TEMPLATE_MAPPING:
    raise ImportError(f"this ms-swift has no template {NAME!r}; version 4.6.0 has one")
meta = TEMPLATE_MAPPING[NAME]


class MiniMaxM3Template(meta.template_cls):  # type: ignore[name-defined]
    """The template of ms-swift, which also knows how reasoning begins."""

    def _add_non_thinking_prefix(self, inputs: Any, thinking_prefix: str = meta.thinking_prefix) -> None:
        super()._add_non_thinking_prefix(inputs, thinking_prefix)


meta.template_cls = MiniMaxM3Template
meta.preserve_thinking = True  # the chat template keeps the reasoning of earlier turns

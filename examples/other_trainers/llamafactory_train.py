"""Runs LLaMA-Factory on MiniMax-M3 with the classes, the chat template and the images of this project.

    DISABLE_VERSION_CHECK=1 python llamafactory_train.py config.yaml

LLaMA-Factory imports no files of its users, so this script takes the place of `llamafactory-cli train`. It registers
the template `minimax_m3`. `docs/other_trainers.md` has a complete config.
"""

import itertools
import json
import math
from copy import deepcopy
from typing import Any

from llamafactory.data.mm_plugin import BasePlugin, get_mm_plugin, register_mm_plugin
from llamafactory.data.template import Template, register_template
from llamafactory.extras.constants import IMAGE_PLACEHOLDER
from llamafactory.model.model_utils.visual import _register_composite_model
from llamafactory.train.tuner import run_exp

import modeling_minimax_m3  # noqa: F401 - registers the classes
from processing_minimax_m3.chat_template import load_chat_template
from processing_minimax_m3.special_tokens import END_OF_TURN_TOKEN, IMAGE_TOKEN, VISION_END_TOKEN, VISION_START_TOKEN

NAME = "minimax_m3"


class MiniMaxM3Template(Template):
    """Lets the chat template write the conversation, and cuts its tokens where the model begins and stops to write."""

    def _encode(
        self, tokenizer: Any, messages: list[dict[str, str]], system: str | None, tools: str | None
    ) -> list[list[int]]:
        chat = [{"role": "system", "content": system}] if system else []
        encoded = tokenizer.apply_chat_template(
            chat + [_as_message(message) for message in messages],
            tools=json.loads(tools) if tools else None,
            chat_template=load_chat_template(),
            thinking_mode="adaptive" if self.enable_thinking else "disabled",
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        marked = zip(encoded["assistant_masks"], encoded["input_ids"])
        pieces = [[token for _, token in run] for _, run in itertools.groupby(marked, key=lambda pair: pair[0])]
        if len(pieces) != len(messages) + 1:  # the last piece is the line break behind the last answer
            raise ValueError(
                f"a conversation must have questions and answers in turn, got the roles "
                f"{', '.join(message['role'] for message in messages)}"
            )
        return pieces[:-1]


def _as_message(message: dict[str, str]) -> dict[str, Any]:
    """A message of LLaMA-Factory as the chat template takes it."""
    if message["role"] == "function":
        calls = json.loads(message["content"])
        calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    return {**message, "role": "tool" if message["role"] == "observation" else message["role"]}


class MiniMaxM3Plugin(BasePlugin):
    """Puts as many placeholders into a text as its images have tokens."""

    def process_messages(
        self, messages: list[dict[str, str]], images: list, videos: list, audios: list, processor: Any
    ) -> list[dict[str, str]]:
        self._validate_input(processor, images, videos, audios)
        self._validate_messages(messages, images, videos, audios)
        grids = self._get_mm_inputs(images, [], [], processor)["image_grid_thw"] if images else []
        counts = iter([math.prod(map(int, grid)) // processor.image_processor.merge_size**2 for grid in grids])
        messages = deepcopy(messages)
        for message in messages:
            first, *rest = message["content"].split(IMAGE_PLACEHOLDER)
            message["content"] = first + "".join(
                f"{VISION_START_TOKEN}{IMAGE_TOKEN * next(counts)}{VISION_END_TOKEN}{text}" for text in rest
            )
        return messages


register_mm_plugin(NAME, MiniMaxM3Plugin)
register_template(
    NAME,
    stop_words=[END_OF_TURN_TOKEN],
    mm_plugin=get_mm_plugin(NAME, image_token=IMAGE_TOKEN),
    template_class=MiniMaxM3Template,
)
_register_composite_model(
    "minimax_m3_vl",
    projector_keys=["model.multi_modal_projector"],
    vision_model_keys=["model.vision_tower"],
    language_model_keys=["model.language_model", "lm_head"],
)

if __name__ == "__main__":
    run_exp()

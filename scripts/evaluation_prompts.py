"""Questions on held-out rows, each as a prompt with everything before its answer: made by the workers of a loader."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from processing_minimax_m3 import MiniMaxM3VLProcessor
from processing_minimax_m3.pretraining import RowEncoder, make_row
from processing_minimax_m3.pretraining.recall import key_value_row
from processing_minimax_m3.pretraining.rows import Row, random_numbers
from processing_minimax_m3.pretraining.videos import encode_mp4

# Patches, and grids (chunks, 3). A worker can send any number of arrays, but of tensors only as many as there are files.
Medium = tuple[np.ndarray, np.ndarray]
SPLIT = "heldout"
SHORTEST_SHARE = 0.9  # of the wanted tokens of a recall row
TRIES = 8  # lengths in characters, until a recall row has its tokens
CHARACTERS_PER_TOKEN = 3  # for the first try


@dataclass(frozen=True)
class Job:
    """One row whose questions are asked.

    Args:
        kind (str): "row" for a row of a task, "files" for the same from png and mp4 files through the processor,
            "recall" for numbers of things at given depths of a text of a given length.
        task (str): A name of `TASKS`.
        index (int): Number of the row.
        tokens (int): Most tokens of a prompt with "recall".
        depths (tuple of float): Where the facts stand with "recall", from 0 to 1.
    """

    kind: str
    task: str
    index: int
    tokens: int = 0
    depths: tuple[float, ...] = ()


@dataclass
class Prompt:
    """What the model reads before it answers one question.

    Attributes:
        task, question (str): Task of the row, kind of the question.
        ids (int64 (tokens,)): The chat so far, with the right earlier answers.
        answer (str): The right answer. Of a tool call, its name and arguments as JSON.
        num_tokens (int): Tokens of the right answer as the training data write it, its end included.
        tools (list, optional): The tools on offer.
        images, videos (list of Medium): The media of `ids`, in order.
        depth (float): Depth of the asked fact with "recall", else -1.
    """

    task: str
    question: str
    ids: np.ndarray
    answer: str
    num_tokens: int
    tools: list[Any] | None = None
    images: list[Medium] = field(default_factory=list)
    videos: list[Medium] = field(default_factory=list)
    depth: float = -1.0


class PromptData(Dataset):
    """The prompts of jobs: item i is the list of prompts of job i."""

    def __init__(self, processor: MiniMaxM3VLProcessor, jobs: Sequence[Job], seed: int):
        self.processor, self.jobs, self.seed = processor, jobs, seed
        self.encoder = RowEncoder(processor)

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> list[Prompt]:
        job = self.jobs[index]
        if job.kind == "recall":
            row, prompts = self._recall(job)
            for prompt, depth in zip(prompts, row["scene"]["depths"]):
                prompt.depth = depth
            return prompts
        row = make_row(job.task, SPLIT, job.index, seed=self.seed)
        return file_prompts(self.processor, row) if job.kind == "files" else row_prompts(self.encoder, row)

    def _recall(self, job: Job) -> tuple[Row, list[Prompt]]:
        """A row whose last prompt has at most `job.tokens` tokens, and hardly fewer."""
        characters = job.tokens * CHARACTERS_PER_TOKEN
        best: tuple[Row, list[Prompt]] | None = None
        for _ in range(TRIES):
            numbers = random_numbers(self.seed, SPLIT, "recall by length", job.tokens, job.index)
            row = key_value_row(numbers, SPLIT, characters, job.depths)
            prompts = row_prompts(self.encoder, row)
            length = len(prompts[-1].ids)
            if length <= job.tokens and (best is None or length > len(best[1][-1].ids)):
                best = row, prompts
            if SHORTEST_SHARE * job.tokens <= length <= job.tokens:
                break
            wanted = job.tokens * (1 + SHORTEST_SHARE) / 2
            characters = max(1, characters + int((wanted - length) * characters / length))
        if best is None:
            raise ValueError(f"a recall row needs more than {job.tokens} tokens for its facts and questions alone.")
        return best


def row_prompts(encoder: RowEncoder, row: Row) -> list[Prompt]:
    """A prompt for each answer of a row, by the shortcut that training uses."""
    encoded = encoder.encode(row)
    assert encoded is not None  # there is no limit of tokens
    processor = encoder.processor
    prompts = []
    for place, answer in zip(encoded.answers, row["answers"]):
        ids = encoded.ids[: place.start]
        media: dict[str, Any] = {
            name: _seen(getattr(encoded, name), int((ids == token).sum()), getattr(processor, part).merge_size)
            for name, token, part in (
                ("images", processor.image_token_id, "image_processor"),
                ("videos", processor.video_token_id, "video_processor"),
            )
        }
        prompts.append(
            Prompt(row["task"], place.question, ids, answer, place.end - place.start, row.get("tools"), **media)
        )
    return prompts


def _seen(media: list[tuple[torch.Tensor, torch.Tensor]], placeholders: int, merge_size: int) -> list[Medium]:
    """The first media, as many as have `placeholders` tokens together."""
    seen = []
    for patches, grids in media:
        if placeholders <= 0:
            break
        placeholders -= int(grids.prod(-1).sum()) // merge_size**2
        seen.append((patches.numpy(), grids.numpy()))
    return seen


def file_prompts(processor: MiniMaxM3VLProcessor, row: Row) -> list[Prompt]:
    """A prompt for each answer of a row whose media are files: png for pictures, mp4 for videos. It needs PyAV."""
    prompts: list[Prompt] = []
    with tempfile.TemporaryDirectory() as folder:
        messages = [_with_files(message, Path(folder), number) for number, message in enumerate(row["messages"])]
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            inputs: Any = processor.apply_chat_template(
                messages[:number],
                tools=row.get("tools"),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **row["chat_template_kwargs"],
            )
            media: dict[str, Any] = {
                name: [(inputs[pixels].numpy(), inputs[grids].numpy())] if pixels in inputs else []
                for name, pixels, grids in (
                    ("images", "pixel_values", "image_grid_thw"),
                    ("videos", "pixel_values_videos", "video_grid_thw"),
                )
            }
            kind, answer = row["questions"][len(prompts)], row["answers"][len(prompts)]
            num_tokens = len(processor.tokenizer(answer)["input_ids"]) + 4  # the markers of the turn
            ids = inputs["input_ids"][0].numpy()
            prompts.append(Prompt(row["task"], kind, ids, answer, num_tokens, row.get("tools"), **media))
    return prompts


def _with_files(message: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    if not isinstance(message.get("content"), list):
        return message
    parts = []
    for place, part in enumerate(message["content"]):
        path = folder / f"{number}-{place}"
        if part["type"] == "image":
            part["image"].save(path.with_suffix(".png"))
            part = {"type": "image", "path": str(path.with_suffix(".png"))}
        elif part["type"] == "video":
            path.with_suffix(".mp4").write_bytes(encode_mp4(part["video"]))
            part = {"type": "video", "path": str(path.with_suffix(".mp4"))}
        parts.append(part)
    return {**message, "content": parts}


def judge(processor: MiniMaxM3VLProcessor, prompt: Prompt, written: np.ndarray) -> tuple[bool, bool, str]:
    """Reads an answer as users read it, with the parser of the chat format.

    Args:
        processor (MiniMaxM3VLProcessor): Its tokenizer wrote the prompt.
        prompt (Prompt): The question.
        written (int64 (tokens,)): What the model wrote, up to its end or a limit.

    Returns:
        Whether it is right, whether it is well-formed (it ends, and a call can be read), and what it says.
    """
    tokenizer = processor.tokenizer
    ends = np.flatnonzero(written == tokenizer.eos_token_id)
    written = written[: ends[0] + 1] if len(ends) else written
    message: Any = processor.parse_response(written.tolist(), prefix=prompt.ids.tolist(), tools=prompt.tools)
    calls = message.get("tool_calls") or []
    said = (message.get("content") or "").strip()
    if calls:
        functions = [call["function"] for call in calls]
        said = json.dumps([{"name": call["name"], "arguments": call["arguments"]} for call in functions])
    is_whole = bool(len(ends))
    if prompt.question == "call":
        is_whole = is_whole and bool(calls) and not message.get("invalid_tool_calls")
        return is_whole and json.loads(said) == [json.loads(prompt.answer)], is_whole, said
    return is_whole and not calls and said == prompt.answer, is_whole, said

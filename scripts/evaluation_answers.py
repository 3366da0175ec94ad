"""Greedy answers to prompts, in batches or from one cache for a long text, and how many of them are right."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from math import sqrt
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from decoding_graphs import decoding_graphs
from evaluation_prompts import Prompt
from modeling_minimax_m3.runtime.transformers_versions import CACHE_NAME

EXTRA_TOKENS = 8  # that an answer may be longer than the longest right one of its batch, before it is cut
LONGEST_EAGER = 16  # new tokens up to which the capture of a step as a CUDA graph costs more than it saves
Z = 1.96  # of a 95% interval


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share by Wilson's formula, which also holds for shares near 0 and 1."""
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"`right` must be from 0 to `total`, and `total` at least 1, got {right} of {total}.")
    share, spread = right / total, Z**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = Z * sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def batches(prompts: Sequence[Prompt], most_tokens: int) -> Iterator[list[int]]:
    """Numbers of prompts of about the same length, so that a batch with its padding has at most `most_tokens` tokens."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].ids))
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) + 1) * len(prompts[number].ids) > most_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def model_inputs(prompts: Sequence[Prompt], padding: int) -> dict[str, torch.Tensor]:
    """Prompts in a batch, padded on the left, with their media in order."""
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = torch.from_numpy(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    for pixels, grids, name in (
        ("pixel_values", "image_grid_thw", "images"),
        ("pixel_values_videos", "video_grid_thw", "videos"),
    ):
        if media := [medium for prompt in prompts for medium in getattr(prompt, name)]:
            inputs[pixels] = torch.from_numpy(np.concatenate([patches for patches, _ in media]))
            inputs[grids] = torch.from_numpy(np.concatenate([grid for _, grid in media]))
    return inputs


@torch.no_grad()
def answer_batch(model: Any, prompts: Sequence[Prompt], **options: Any) -> list[np.ndarray]:
    """What the model writes for each prompt by greedy decoding: int64 (tokens,), with padding behind its end."""
    inputs = {
        name: value.to(model.device)
        for name, value in model_inputs(prompts, model.config.get_text_config().pad_token_id).items()
    }
    limit = max(prompt.num_tokens for prompt in prompts) + EXTRA_TOKENS
    with decoding_graphs(limit > LONGEST_EAGER):
        output = model.generate(**inputs, max_new_tokens=limit, do_sample=False, **options)
    return list(output[:, inputs["input_ids"].shape[1] :].cpu().numpy())


@torch.no_grad()
def answer_in_turn(model: Any, prompts: Sequence[Prompt], **options: Any) -> list[np.ndarray]:
    """The same for the prompts of one row, each of which continues the one before: no token is read twice."""
    cache = DynamicCache(config=model.config)
    written = []
    for prompt in prompts:
        written += answer_batch(model, [prompt], **{CACHE_NAME: cache}, **options)
        cache.crop(len(prompt.ids) - cache.get_seq_length())  # what it wrote: the next prompt has the right answer
    return written


def share(outcomes: Iterable[bool]) -> dict[str, Any]:
    """`right` and `answers` as numbers, `accuracy` as a share, and its 95% `interval`."""
    values = list(outcomes)
    low, high = wilson_interval(sum(values), len(values))
    return {
        "right": sum(values),
        "answers": len(values),
        "accuracy": round(sum(values) / len(values), 5),
        "interval": [round(low, 5), round(high, 5)],
    }


def by_question(
    prompts: Sequence[Prompt], verdicts: Sequence[tuple[bool, bool, str]], most_mistakes: int = 5
) -> dict[str, Any]:
    """The shares of one task: of all answers, of each kind of question, and the first mistakes of each kind."""
    kinds: defaultdict[str, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        kinds[prompt.question].append(number)
    found: dict[str, Any] = share(right for right, _, _ in verdicts)
    found["well_formed"] = share(formed for _, formed, _ in verdicts)
    found["questions"] = {kind: share(verdicts[number][0] for number in kinds[kind]) for kind in sorted(kinds)}
    found["mistakes"] = {
        kind: mistakes
        for kind in sorted(kinds)
        if (
            mistakes := [
                {"right": prompts[number].answer, "written": verdicts[number][2][:200]}
                for number in kinds[kind]
                if not verdicts[number][0]
            ][:most_mistakes]
        )
    }
    return found

"""What the model writes for rows of the evaluation data."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

IGNORED = -100
SHOWN = 400  # characters of a prompt
# A text has no question. The model continues this share of it.
SHARE_OF_TEXT = 0.5
LONGEST_PROMPT = 4096  # tokens
MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def is_sharded(model: torch.nn.Module, arguments: TrainingArguments) -> bool:
    """Whether one process alone cannot run the model."""
    engine = str(getattr(arguments.distributed_state, "distributed_type", "")).rpartition(".")[2]
    return engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM") or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def sample_prompts(dataloader: Any, count: int, media_tokens: set[int]) -> list[dict[str, torch.Tensor]]:
    """The prompts of the first rows: what stands before the first learned token.

    Args:
        dataloader (DataLoader): Of the evaluation. Its collator gives `labels`.
        count (int): Rows to look at.
        media_tokens (set of int): Placeholders of images and videos. A row with such tokens behind its prompt is
            passed over, because its pixels would not fit the prompt.

    Returns:
        The inputs of `generate` of each prompt, with `reference`, the learned tokens (tokens,).
    """
    prompts = []
    for row in islice(_rows(dataloader.dataset), count):
        batch = dataloader.collate_fn([row])
        if "labels" not in batch or "input_ids" not in batch:
            return []
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        learned = (labels != IGNORED).nonzero().flatten()
        if not len(learned):
            continue
        start = int(learned[0])
        if start <= 1:
            start = max(int(len(ids) * SHARE_OF_TEXT), 1)
            learned = learned[learned >= start]
        rest = ids[start:]
        if start > LONGEST_PROMPT or any(int(token) in media_tokens for token in rest.unique()):
            continue
        # only the first answer, or the first document of a pack
        gap = (learned.diff() > 1).nonzero().flatten()
        answer = learned[: int(gap[0]) + 1] if len(gap) else learned
        prompt = {"input_ids": ids[None, :start], "attention_mask": torch.ones(1, start, dtype=torch.long)}
        prompts.append(prompt | {name: batch[name] for name in MEDIA if name in batch} | {"reference": ids[answer]})
    return prompts


def _rows(dataset: Any) -> Iterator[Any]:
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        return iter(dataset)
    return (dataset[index] for index in range(len(dataset)))


def shorten_media(ids: torch.Tensor, media_tokens: set[int]) -> torch.Tensor:
    """Leaves one placeholder of each image, so that a person can read the prompt.

    Args:
        ids (torch.Tensor (tokens,)): Token ids.
        media_tokens (set of int): Placeholders of images and videos.

    Returns:
        The ids without placeholders that follow one.
    """
    is_media = torch.isin(ids, torch.tensor(sorted(media_tokens), dtype=ids.dtype))
    follows = torch.zeros_like(is_media)
    follows[1:] = is_media[1:] & is_media[:-1]
    return ids[~follows]


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and decoding without CUDA graphs, whose memory training needs."""
    was_training, graphs = model.training, os.environ.get("MINIMAX_M3_CUDA_GRAPHS")
    os.environ["MINIMAX_M3_CUDA_GRAPHS"] = "0"
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if graphs is None:
            del os.environ["MINIMAX_M3_CUDA_GRAPHS"]
        else:
            os.environ["MINIMAX_M3_CUDA_GRAPHS"] = graphs


def generate_samples(
    model: Any, processor: Any, dataloader: Any, count: int, max_new_tokens: int
) -> list[dict[str, str]]:
    """Greedy answers to the first prompts of the evaluation data.

    Returns:
        `prompt` (its end), `answer` and `reference` of each, as texts.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    names = ("image_token_id", "video_token_id")
    media_tokens = {int(getattr(processor, name)) for name in names if getattr(processor, name, None) is not None}
    found = []
    with _evaluation_mode(model):
        for prompt in sample_prompts(dataloader, count, media_tokens):
            reference = prompt.pop("reference")
            length = prompt["input_ids"].shape[1]
            inputs = {name: value.to(model.device) for name, value in prompt.items()}
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            text = tokenizer.decode(shorten_media(prompt["input_ids"][0], media_tokens))
            found.append(
                {
                    "prompt": text if len(text) <= SHOWN else f"…{text[-SHOWN:]}",
                    "answer": tokenizer.decode(output[0, length:]),
                    "reference": tokenizer.decode(reference[:max_new_tokens]),
                }
            )
    return found

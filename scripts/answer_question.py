"""Asks a model one held-out question, and says what each token of its answer attended to.

The result is a plain value that `json` writes: the demonstration prints it, and the page of the gallery shows it.
"""

import base64
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from attention_recorder import AttentionRecorder, Medium, Part, find_media, place_of, prompt_parts
from heldout_questions import Question, read_answer
from processing_minimax_m3.special_tokens import THINK_END_TOKEN

SHARE = 10_000  # weights are whole numbers of this part, so that the page stays small
PROMPT_TOKENS = 1200  # of a prompt that the page shows
EXCERPT = 140  # characters of a block that the page shows


def answer_question(
    model: Any,
    processor: Any,
    question: Question,
    max_new_tokens: int = 48,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Asks the question, and records what each token of the answer attended to.

    Args:
        model (MiniMaxM3SparseForConditionalGeneration): Answers by greedy decoding.
        processor (MiniMaxM3VLProcessor): Writes the prompt.
        question (Question): What is asked.
        max_new_tokens (int): Most tokens of the answer.
        now (callable): Clock in seconds.

    Returns:
        `task`, `kind`, `index`, `question`, `expected`, `given`, `right`; `written`, the answer with its control
        tokens; `tokens`, its pieces; `answer_token`, the number of the first one behind the thinking; `prompt`,
        `prompt_tokens`, `seconds`; `layers`, the numbers of the sparse layers; `heads`; `parts`, names of the parts of
        the prompt, the answer last; `shares[token][layer][head][part]`, in parts of `scale`;
        `media` with `cells[token][layer][head][medium][region]` where the prompt has some; `blocks` where the text has
        more blocks than a query selects. `chosen[token][layer]` has then the blocks by key/value head, and
        `block_shares[token][layer][head]` the share of each of them.
    """
    inputs = question.inputs(processor)
    prompt = inputs["input_ids"][0].tolist()
    started = now()
    with torch.inference_mode(), AttentionRecorder(model) as recorder:
        output = model.generate(
            **inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False, use_cache=True
        )
    seconds = now() - started
    written = output[0, len(prompt) :].tolist()
    passes = recorder.passes[-len(written) :]
    given, is_right = read_answer(processor, question, prompt, written)
    decode = processor.tokenizer.decode
    media = find_media(processor, {name: value.cpu() for name, value in inputs.items()})
    asked = place_of(processor.tokenizer, prompt, question.text)[0] if question.document is not None else None
    parts = prompt_parts(prompt, media, asked)
    layers = sorted(passes[0])
    record: dict[str, Any] = {name: getattr(question, name) for name in ("task", "kind", "index")}
    record |= {
        "question": question.text,
        "expected": question.answer,
        "given": given,
        "right": is_right,
        "written": decode(written),
        "tokens": (tokens := [decode([token]) for token in written]),
        "answer_token": first_of_answer(tokens),
        "scale": SHARE,
        "prompt": prompt_text(processor, prompt),
        "prompt_tokens": len(prompt),
        "seconds": round(seconds, 2),
        "layers": layers,
        "heads": passes[0][layers[0]].weights.shape[0],
        "parts": [*(name for name, _ in parts), "answer"],
        "shares": [[_shares(step[layer].weights, parts, len(prompt)) for layer in layers] for step in passes],
        "tools": [tool["function"]["name"] for tool in question.tools or ()],
    }
    if media:
        record["media"] = _media(question, media)
        record["cells"] = [[_cells(step[layer].weights, media) for layer in layers] for step in passes]
    text = model.config.get_text_config()
    if len(prompt) > text.index_block_size * text.index_topk_blocks:
        record |= _blocks(processor.tokenizer, prompt, question, asked, passes, layers, text)
    return record


def first_of_answer(tokens: list[str]) -> int:
    """The number of the first token behind the end of the thinking, with which an answer without thinking begins too."""
    end = tokens.index(THINK_END_TOKEN) if THINK_END_TOKEN in tokens else -1
    return min(end + 1, len(tokens) - 1)


def prompt_text(processor: Any, ids: list[int]) -> str:
    """The prompt as text: one placeholder for each picture or second, and of a long one the start and the end."""
    media = {processor.image_token_id, processor.video_token_id}
    kept = [token for token, before in zip(ids, [None, *ids]) if token not in media or token != before]
    if len(kept) <= PROMPT_TOKENS:
        return processor.tokenizer.decode(kept)
    start, end = kept[: PROMPT_TOKENS // 2], kept[-PROMPT_TOKENS // 2 :]
    left_out = f"\n\n[... {len(kept) - PROMPT_TOKENS:,} tokens ...]\n\n"
    return processor.tokenizer.decode(start) + left_out + processor.tokenizer.decode(end)


def _rounded(values: torch.Tensor) -> list:
    return (values * SHARE).round().int().tolist()


def _shares(weights: torch.Tensor, parts: list[Part], prompt_tokens: int) -> list[list[int]]:
    """For each head, the shares of the parts of the prompt and, last, of the answer so far."""
    sums = [torch.stack([weights[:, start:end].sum(-1) for start, end in spans]).sum(0) for _, spans in parts]
    return _rounded(torch.stack([*sums, weights[:, prompt_tokens:].sum(-1)], dim=-1))


def _cells(weights: torch.Tensor, media: list[Medium]) -> list[list[list[int]]]:
    """For each head and medium, the shares of its regions, row by row."""
    by_medium = [_rounded(weights[:, medium.start : medium.end]) for medium in media]
    return [list(cells) for cells in zip(*by_medium)]


def _blocks(
    tokenizer: Any,
    prompt: list[int],
    question: Question,
    asked: int | None,
    passes: list,
    layers: list[int],
    text: Any,
) -> dict[str, Any]:
    """The blocks of a long prompt, which of them each token chose, and what each head gave to them."""
    size = text.index_block_size
    starts = range(0, len(prompt), size)
    excerpts = [tokenizer.decode(prompt[start : start + size])[:EXCERPT] for start in starts]
    found: dict[str, Any] = {"size": size, "excerpts": excerpts, "fact": []}
    if question.fact is not None:
        first, last = place_of(tokenizer, prompt, question.fact, before=asked)
        found |= {"fact": list(range(first // size, (last - 1) // size + 1)), "fact_text": question.fact}
    chosen = [[step[layer].blocks for layer in layers] for step in passes]
    shares = [[_block_shares(step[layer].weights, step[layer].blocks, size) for layer in layers] for step in passes]
    return {"blocks": found, "chosen": chosen, "block_shares": shares}


def _block_shares(weights: torch.Tensor, blocks: list[list[int]], size: int) -> list[list[int]]:
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[1] % size))
    sums = padded.unflatten(-1, (-1, size)).sum(-1)  # (heads, blocks)
    group = len(sums) // len(blocks)
    return [_rounded(sums[head, blocks[head // group]]) for head in range(len(sums))]


def _media(question: Question, media: list[Medium]) -> list[dict[str, Any]]:
    """Pictures as data URIs, with the rows and columns of their regions, and the second of a video's frames."""
    if question.picture is not None:
        pictures = [question.picture] * len(media)
    else:
        assert question.frames is not None
        # one frame stands for the frames of a second
        firsts = [round(number * len(question.frames) / len(media)) for number in range(len(media))]
        pictures = [Image.fromarray(np.asarray(question.frames[first])) for first in firsts]
    return [
        {"source": data_uri(picture), "rows": one.rows, "columns": one.columns, "second": one.second}
        for picture, one in zip(pictures, media)
    ]


def data_uri(picture: Image.Image) -> str:
    """A picture as the text of a data address, in WebP without loss."""
    file = BytesIO()
    picture.save(file, "webp", lossless=True, method=6)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def mean_shares(record: dict[str, Any], token: int) -> dict[str, float]:
    """The shares of the parts of the prompt for one token of an answer, the mean over layers and heads."""
    shares = torch.tensor(record["shares"][token]).float().mean((0, 1)) / SHARE
    return dict(zip(record["parts"], shares.tolist()))


def mean_cells(record: dict[str, Any], token: int) -> list[torch.Tensor]:
    """For each picture or second, the shares of its regions (rows, columns), the mean over layers and heads."""
    layers = record["cells"][token]
    found = []
    for number, medium in enumerate(record["media"]):
        cells = torch.tensor([[head[number] for head in layer] for layer in layers]).float().mean((0, 1)) / SHARE
        found.append(cells.view(medium["rows"], medium["columns"]))
    return found


def mean_blocks(record: dict[str, Any], token: int) -> torch.Tensor:
    """The shares of all blocks of a long text for one token of an answer, the mean over layers and heads."""
    total = torch.zeros(len(record["blocks"]["excerpts"]))
    layers = record["chosen"][token]
    for by_head, shares in zip(layers, record["block_shares"][token]):
        group = len(shares) // len(by_head)
        for head, values in enumerate(shares):
            total.index_add_(0, torch.tensor(by_head[head // group]), torch.tensor(values).float())
    return total / (SHARE * len(layers) * record["heads"])

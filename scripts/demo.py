"""Chat with a tiny MiniMax-M3 about a photograph, a video and a long text, on any machine.

    python scripts/demo.py [--output FOLDER] [--max-new-tokens N] [--long-tokens N]

The script builds a model with the real architecture and random weights, writes it to disk, and loads it like a
released checkpoint. Its answers mean nothing. The demo shows that every part runs, how fast, and in how much memory. A
picture shows which key blocks the query blocks of the long text selected.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Any

# Everything is on this machine; set before Transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import av
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer
from transformers.utils import logging

from configuration_minimax_m3 import tiny_config
from make_tiny_checkpoint import make_tiny_checkpoint, training_text
from modeling_minimax_m3.msa import available_backends
from plot_selection import SelectionRecorder, plot_selections, sparse_layers
from replace_when_done import replace_when_done

MIB = 2**20
NUM_STEPS = 5


class TimedStreamer(TextStreamer):
    """Prints tokens as they arrive, and records their times in seconds since the streamer was made."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.started = time.perf_counter()
        self.arrivals: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.arrivals.append(time.perf_counter() - self.started)
        super().put(value)


def announce(step: int, text: str) -> None:
    print(f"\n[{step}/{NUM_STEPS}] {text}", flush=True)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Sets `MiB` at the end: peak GPU memory in the block, or the peak resident size of this process so far."""
    measured: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield measured
    if device.type == "cuda":
        measured["MiB"] = torch.cuda.max_memory_allocated(device) / MIB
    else:
        # the unit is KiB on Linux and bytes on macOS
        unit = 1 if sys.platform == "darwin" else 1024
        measured["MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def write_panning_video(photograph: Path, path: Path, *, seconds: int = 4, fps: int = 12, side: int = 224) -> Path:
    """Encodes an mp4 (H.264) in which a square window of `side` pixels moves diagonally over the photograph."""
    image = Image.open(photograph).convert("RGB")
    num_frames = seconds * fps
    with replace_when_done(path) as unfinished, av.open(str(unfinished), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for i in range(num_frames):
            left = round((image.width - side) * i / (num_frames - 1))
            top = round((image.height - side) * i / (num_frames - 1))
            frame = av.VideoFrame.from_image(image.crop((left, top, left + side, top + side)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def long_document(tokenizer: Any, num_tokens: int) -> str:
    """The opening of the Python language reference, up to the end of the line where it reaches `num_tokens` tokens."""
    text = "\n\n".join(training_text())
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= num_tokens:
        raise ValueError(f"`--long-tokens` must be below {len(offsets)}, the length of the text, got {num_tokens}.")
    return text[: text.index("\n", offsets[num_tokens][0])]


def chat(model: Any, processor: Any, content: list[dict[str, str]], max_new_tokens: int) -> None:
    """Asks one question, streams the answer, and prints time and memory."""
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    prompt_tokens = inputs["input_ids"].shape[1]
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            print(f"  {inputs[name].shape[0]} patches in {name}")
    print(f"  reading {prompt_tokens} tokens ...\n  > ", end="", flush=True)
    with peak_memory(model.device) as memory:
        streamer = TimedStreamer(processor.tokenizer)
        model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, streamer=streamer)
    first, last, new_tokens = streamer.arrivals[0], streamer.arrivals[-1], len(streamer.arrivals)
    decoding = f", then {(last - first) / (new_tokens - 1) * 1000:.1f} ms a token" if new_tokens > 1 else ""
    print(
        f"  {prompt_tokens} tokens in, {new_tokens} out, {last:.2f} s: first token after {first:.2f} s{decoding}; "
        f"peak memory {memory['MiB']:.0f} MiB"
    )


def describe(model: Any) -> str:
    text = model.config.text_config
    backend = available_backends()[0] if text.msa_backend == "auto" else text.msa_backend
    return (
        f"  {type(model).__name__}, {model.num_parameters() / 1e6:.2f}M parameters, {model.dtype} on {model.device}\n"
        f"  attention of the layers: {', '.join(text.layer_types)}\n"
        f"  MLPs of the layers: {', '.join(text.mlp_layer_types)}\n"
        f"  sparse attention: backend {backend}, blocks of {text.index_block_size}, "
        f"{text.index_topk_blocks} of them for each query\n"
        f"  dense attention: {text._attn_implementation}; experts: {text._experts_implementation}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat with a tiny MiniMax-M3 about a photo, a video and a long text.")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="where files go (demo_output)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="tokens of each answer (32)")
    parser.add_argument("--long-tokens", type=int, default=32768, help="least length of the long text (32768)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    torch.manual_seed(0)
    photograph = Path(str(files("skimage.data") / "astronaut.png"))

    announce(1, "building a tiny checkpoint: real architecture, random weights, so the answers mean nothing")
    # the released block size and number of blocks, so that the picture shows a selection of the released size
    config = tiny_config(text={"index_block_size": 128, "index_topk_blocks": 16})
    checkpoint = make_tiny_checkpoint(arguments.output / "checkpoint", config=config)
    for file in sorted(checkpoint.iterdir()):
        print(f"  {file} ({file.stat().st_size / 1024:.0f} KiB)")

    announce(2, f'loading it: AutoProcessor and AutoModelForImageTextToText.from_pretrained("{checkpoint}")')
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto").to(device)
    print(describe(model))

    announce(3, f"a photograph: {photograph.name} of scikit-image")
    question = {"type": "text", "text": "Who is in this photograph?"}
    chat(model, processor, [{"type": "image", "path": str(photograph)}, question], arguments.max_new_tokens)

    video = write_panning_video(photograph, arguments.output / "panning.mp4")
    announce(4, f"a video: {video} ({video.stat().st_size / 1024:.0f} KiB), the camera panning over the photograph")
    question = {"type": "text", "text": "What does the camera do?"}
    chat(model, processor, [{"type": "video", "path": str(video)}, question], arguments.max_new_tokens)

    document = long_document(processor.tokenizer, arguments.long_tokens)
    announce(5, f"a long text: {len(document)} characters of the Python language reference")
    question = {"type": "text", "text": f"{document}\n\nWhat is the text about?"}
    with SelectionRecorder(min_tokens=arguments.long_tokens) as recorder:
        chat(model, processor, [question], arguments.max_new_tokens)
    layers = sparse_layers(config.text_config)
    picture = plot_selections(
        dict(zip(layers, recorder.selections)),
        config.text_config.index_block_size,
        arguments.output / "selected_blocks.png",
        title=f"key blocks of {config.text_config.index_block_size} tokens, selected while reading "
        f"{recorder.selections[0].shape[0]} tokens",
    )
    print(f"\nThe key blocks that each query block selected: {picture}")


if __name__ == "__main__":
    main()

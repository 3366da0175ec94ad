"""Train a tiny MiniMax-M3 with LoRA from end to end: make a checkpoint, train it on a few chats, and ask it.

    python examples/lora/walkthrough.py [--output FOLDER] [options of minimax-m3 train]

It runs on a CPU in a minute. With the options of identity.yaml the loss of the last steps is below 0.15. The model
knew nothing before, and now gives the learned answers.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# Everything is on this machine; set before Transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from make_tiny_checkpoint import make_tiny_checkpoint
from modeling_minimax_m3.commands import train

# The model is so small that a second thread only waits for the first. On a busy machine it waits very long.
torch.set_num_threads(1)

HERE = Path(__file__).resolve().parent
STATED_LOSS = 0.15


def ask(model: torch.nn.Module, processor, question: str) -> str:
    """The model's most likely answer to a question."""
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.removeprefix("</mm:think>").strip()


def main() -> float:
    """Runs all steps. Returns the loss of the last logged steps."""
    parser = argparse.ArgumentParser(description="LoRA on a tiny MiniMax-M3, from checkpoint to answers.")
    parser.add_argument("--output", type=Path, default=Path("finetune_demo"), help="where files go (finetune_demo)")
    arguments, options = parser.parse_known_args()
    data = HERE / "identity.jsonl"

    print("\n[1/3] a tiny checkpoint: the real architecture with random weights")
    checkpoint = make_tiny_checkpoint(arguments.output / "checkpoint")

    print("\n[2/3] training adapters: minimax-m3 train examples/lora/identity.yaml ...", flush=True)
    adapter = arguments.output / "adapter"
    trainer = train.main(
        [str(HERE / "identity.yaml"), "--model", str(checkpoint), "--dataset", str(data)]
        + ["--output_dir", str(adapter), *options]
    )
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    losses = losses or [history[-1]["train_loss"]]  # the run ended before its first log

    print("\n[3/3] asking the checkpoint, with the adapters on top of it")
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model = PeftModel.from_pretrained(model, adapter).eval()
    known = 0
    rows = [json.loads(line)["messages"] for line in data.read_text(encoding="utf-8").splitlines()]
    for question, answer in rows:
        said = ask(model, processor, question["content"])
        known += said == answer["content"]
        print(f"  {question['content']} {said}")
    print(f"{known} of {len(rows)} answers learned; loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses[-1]


if __name__ == "__main__":
    loss = main()
    if loss > STATED_LOSS:
        raise SystemExit(f"the loss should be below {STATED_LOSS}")

"""`examples/other_trainers` with the trainers themselves, each in a process of its own, because they patch Transformers.

A trainer that is not installed skips its tests. None of them allows our version of Transformers in its metadata, so
`pip install --no-deps` installs it; `docs/other_trainers.md` says how.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[2] / "examples" / "other_trainers"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TRAINERS = {"swift": "ms-swift", "llamafactory": "llamafactory", "axolotl": "axolotl"}
# Rows as the trainer reads them, and the same rows as ours: what both make of them goes to a file.
SWIFT_TOKENS = """
import json, sys
import torch
import ms_swift_plugin
from swift.model import get_model_processor
from swift.template import get_template
checkpoint, rows, target = sys.argv[1:]
model, processor = get_model_processor(checkpoint, model_type="minimax_m3_vl", torch_dtype=torch.float32)
template = get_template(processor)
template.set_mode("train")
found = []
for row in json.load(open(rows)):
    template.chat_template_kwargs["thinking_mode"] = "adaptive"
    encoded = template.encode(row)
    found.append([list(encoded["input_ids"]), list(encoded["labels"])])
json.dump([type(model).__module__, found], open(target, "w"))
"""
LLAMAFACTORY_TOKENS = """
import json, sys
import llamafactory_train
from llamafactory.data.template import TEMPLATES
from transformers import AutoProcessor
checkpoint, rows, target = sys.argv[1:]
processor = AutoProcessor.from_pretrained(checkpoint)
template, found = TEMPLATES["minimax_m3"], []
for row in json.load(open(rows)):
    messages = template.mm_plugin.process_messages(row["messages"], row.get("images", []), [], [], processor)
    ids, labels = [], []
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    for prompt, answer in template.encode_multiturn(processor.tokenizer, messages, system, row.get("tools")):
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
    found.append([ids, labels])
json.dump(["", found], open(target, "w"))
"""
OURS = """
import json, sys
import modeling_minimax_m3
from transformers import AutoProcessor
from processing_minimax_m3 import MultimodalChatCollator
collator, found = MultimodalChatCollator(AutoProcessor.from_pretrained(sys.argv[1])), []
for row in json.load(open(sys.argv[2])):
    batch = collator([row])
    found.append([batch["input_ids"][0].tolist(), batch["labels"][0].tolist()])
json.dump(["", found], open(sys.argv[3], "w"))
"""


def run_trainer(*arguments, folder: Path, **variables: str) -> None:
    path = os.pathsep.join([str(EXAMPLES), *filter(None, sys.path)])
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **offline, **variables},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, f"{process.stdout[-3000:]}\n{process.stderr[-3000:]}"


def tokens(code: str, checkpoint: Path, rows: list[dict], folder: Path, **variables: str) -> tuple[str, list]:
    """The module of the model's class, and ids and labels of each row."""
    (folder / "rows.json").write_text(json.dumps(rows))
    run_trainer("-c", code, checkpoint, folder / "rows.json", folder / "found.json", folder=folder, **variables)
    return tuple(json.loads((folder / "found.json").read_text()))


def needs(module: str) -> pytest.MarkDecorator:
    """Skips where a trainer is not installed, and names it."""
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason=f"needs {TRAINERS[module]}: see docs/other_trainers.md"
    )


def check_adapter(folder: Path, experts: bool) -> None:
    """The adapter is on attention, not on the vision tower, and on the experts if they were asked for."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        trained = [name for name in names if "lora_B" in name and file.get_tensor(name).abs().max() > 0]
    assert any("q_proj" in name for name in trained)
    assert any(".experts." in name for name in trained) == experts
    assert not any("vision_tower" in name for name in names)


@pytest.fixture
def picture(tmp_path) -> str:
    Image.linear_gradient("L").resize((84, 56)).convert("RGB").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def rows(picture) -> list[dict]:
    """A picture, a system message with two turns, and reasoning in both turns."""
    short = [("user", "Say 1."), ("assistant", "1"), ("user", "Again."), ("assistant", "1 again")]
    thought = [
        ("user", "Count."),
        ("assistant", "<mm:think>One.</mm:think>1"),
        ("user", "On."),
        ("assistant", "<mm:think>Two.</mm:think>2"),
    ]
    chats = [[("user", "<image>What is this?"), ("assistant", "Grey.")], [("system", "Be short."), *short], thought]
    made = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    made[0]["images"] = [picture]
    return made


TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"name": "sum", "arguments": {"numbers": [1, 2]}}
CALLS = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "3"},
]


def chat_of_calls(call: str, result: str) -> dict:
    """The row of `CALLS` with a trainer's own roles for a call and its result."""
    contents = [("user", "1 + 2?"), (call, json.dumps(CALL)), (result, "3"), ("assistant", "3")]
    return {"messages": [{"role": role, "content": text} for role, text in contents], "tools": json.dumps(TOOLS)}


@pytest.mark.slow
@needs("swift")
def test_swift_reads_rows_as_we_do(tiny_checkpoint, rows, tmp_path):
    module, theirs = tokens(
        SWIFT_TOKENS, tiny_checkpoint, [*rows, chat_of_calls("tool_call", "tool_response")], tmp_path
    )
    _, ours = tokens(OURS, tiny_checkpoint, [*rows, {"messages": CALLS, "tools": TOOLS}], tmp_path)
    assert module.startswith("modeling_minimax_m3.")
    for (their_ids, their_labels), (ids, labels) in zip(theirs, ours, strict=True):
        assert their_ids == ids
        # ms-swift also learns the line break behind the end of a turn
        more = [place for place, (one, two) in enumerate(zip(their_labels, labels)) if one != two]
        assert [labels[place] for place in more] == [-100] * len(more)
        assert all(labels[place - 1] >= 0 > labels[place] for place in more)


@pytest.mark.slow
@needs("swift")
def test_swift_trains(tiny_checkpoint, rows, tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    plugin = EXAMPLES / "ms_swift_plugin.py"
    flags = ["--tuner_type", "lora", "--target_modules", "all-linear", "--lora_dropout", "0"]
    flags += ["--target_parameters", *EXPERTS, "--max_steps", "2", "--report_to", "none", "--add_version", "false"]
    flags += ["--use_cpu", "true", "--torch_dtype", "float32", "--model_type", "minimax_m3_vl", "--output_dir", "run"]
    command = ["-m", "swift.cli.sft", "--model", tiny_checkpoint, "--external_plugins", plugin, "--dataset", data]
    run_trainer(*command, *flags, folder=tmp_path)
    check_adapter(tmp_path / "run" / "checkpoint-2", experts=True)


@pytest.mark.slow
@needs("llamafactory")
def test_llamafactory_reads_rows_as_we_do(tiny_checkpoint, rows, tmp_path):
    given = [*rows, chat_of_calls("function", "observation")]
    _, theirs = tokens(LLAMAFACTORY_TOKENS, tiny_checkpoint, given, tmp_path, DISABLE_VERSION_CHECK="1")
    _, ours = tokens(OURS, tiny_checkpoint, [*rows, {"messages": CALLS, "tools": TOOLS}], tmp_path)
    for (their_ids, their_labels), (ids, labels) in zip(theirs, ours, strict=True):
        assert their_ids == ids[:-1]  # without the line break behind the last turn
        assert their_labels == labels[:-1]


@pytest.mark.slow
@needs("llamafactory")
def test_llamafactory_trains(tiny_checkpoint, rows, tmp_path):
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    info = {"chats": {"file_name": "chats.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}}
    info["chats"]["tags"]["system_tag"] = "system"
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    config = {
        "model_name_or_path": str(tiny_checkpoint),
        "template": "minimax_m3",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "dataset_dir": str(tmp_path),
        "dataset": "chats",
        "output_dir": str(tmp_path / "run"),
        "disable_gradient_checkpointing": True,
        "gradient_checkpointing": True,
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": True,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run_trainer(EXAMPLES / "llamafactory_train.py", "config.yaml", folder=tmp_path, DISABLE_VERSION_CHECK="1")
    check_adapter(tmp_path / "run", experts=False)


@pytest.mark.slow
@needs("axolotl")
def test_axolotl_trains(tiny_checkpoint, picture, tmp_path):
    question = [{"type": "image", "path": picture}, {"type": "text", "text": "What is this?"}]
    answer = [{"type": "text", "text": "Grey."}]
    row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    (tmp_path / "chats.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    config = {
        "base_model": str(tiny_checkpoint),
        "plugins": ["axolotl_plugin.MiniMaxM3Plugin"],
        "processor_type": "AutoProcessor",
        "datasets": [{"path": str(tmp_path / "chats.jsonl"), "type": "chat_template"}],
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sample_packing": False,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0,
        "lora_target_modules": r".*language_model.*\.(q_proj|v_proj)",  # a list would take the vision tower too
        "lora_target_parameters": EXPERTS,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "lora_mlp_kernel": False,
        "sequence_len": 1024,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "learning_rate": 1e-4,
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run_trainer("-m", "axolotl.cli.train", "config.yaml", folder=tmp_path)
    check_adapter(tmp_path / "run", experts=True)

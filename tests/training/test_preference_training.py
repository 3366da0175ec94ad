"""TRL's reward, DPO, KTO and GRPO trainers: the recipes of `docs/preference_training.md`, and tools that are called."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor

pytest.importorskip("trl")

from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

pytestmark = pytest.mark.compatibility

PAGE = Path(__file__).parents[2] / "docs" / "preference_training.md"
SNIPPET = re.compile(r"^## (.+?)$.*?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPES = dict(SNIPPET.findall(PAGE.read_text(encoding="utf-8")))


@pytest.fixture
def options(tmp_path):
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
    }


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return AutoProcessor.from_pretrained(tiny_checkpoint)


def test_page_has_the_four_recipes():
    assert list(RECIPES) == ["Reward model", "DPO", "KTO", "GRPO with tools"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_and_saves(recipe, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("M3_CHECKPOINT", str(tiny_checkpoint))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(compile(RECIPES[recipe], f"{PAGE.name}: {recipe}", "exec"), namespace)
    trainer = namespace["trainer"]
    assert trainer.state.global_step == 2
    if recipe == "Reward model":
        base = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, num_labels=1)
    else:
        base = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    saved = PeftModel.from_pretrained(base, trainer.args.output_dir)
    trained = dict(trainer.model.named_parameters())
    loaded = {name: value for name, value in saved.named_parameters() if "lora_" in name or "score.modules" in name}
    assert any("score" in name for name in loaded) == (recipe == "Reward model")
    for name, value in loaded.items():
        torch.testing.assert_close(value, trained[name].to(value), rtol=0, atol=0)


def test_reward_model_learns_a_preference(tiny_checkpoint, processor, options):
    def chat(answer):
        return [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": answer}]

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, num_labels=1)
    rows = [{"chosen": chat("4"), "rejected": chat("It may be 5, or something else.")}] * 12
    arguments = RewardConfig(max_steps=6, learning_rate=1e-3, lr_scheduler_type="constant", **options)
    trainer = RewardTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), processing_class=processor.tokenizer
    )
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[5]
    assert last["margin"] > first["margin"] + 0.1
    assert last["accuracy"] == 1.0


def test_tools_get_typed_arguments(tiny_checkpoint, processor, options, monkeypatch):
    received, completed = [], []

    def book(city: str, nights: list[list[int]], guests: dict[str, int], note: str) -> str:
        """Books a room.

        Args:
            city: Where.
            nights: First and last night of each stay.
            guests: How many of each kind.
            note: Anything else.
        """
        received.append((city, nights, guests, note))
        return "booked"

    def reward(completions, **kwargs):
        completed.extend(completions)
        return [float(index) for index in range(len(completions))]

    arguments = {"city": "Köln", "nights": [[1, 3], [7]], "guests": {"adults": 2}, "note": "10"}
    prompt = [{"role": "user", "content": "Book it."}]
    call = {"type": "function", "function": {"name": "book", "arguments": arguments}}
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "Now.", "tool_calls": [call]}
    template = {"tokenize": True, "return_dict": True, "tools": [book]}
    before = processor.apply_chat_template(prompt, add_generation_prompt=True, **template)["input_ids"][0]
    written = processor.apply_chat_template([*prompt, answer], **template)["input_ids"][0][len(before) :]
    written = written[: written.index(processor.tokenizer.eos_token_id) + 1]

    generate = GRPOTrainer._generate_single_turn
    turns = []

    def generate_call_first(self, *args, **kwargs):
        ids, logprobs = generate(self, *args, **kwargs)
        turns.append(len(ids))
        return ([list(written) for _ in ids] if len(turns) == 1 else ids), logprobs

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate_call_first)
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    start = model.lm_head.weight.detach().clone()
    options |= {"max_steps": 1, "learning_rate": 1e-3, "router_aux_loss_coef": 0.0}
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(
            num_generations=2, max_completion_length=len(written) + 64, max_tool_calling_iterations=1, **options
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt}] * 2),
        processing_class=processor,
        tools=[book],
    )
    trainer.train()
    assert received == [("Köln", [[1, 3], [7]], {"adults": 2}, "10")] * 2
    assert len(completed) == 2
    for first, result, *_ in completed:
        assert first == answer
        assert (result["role"], result["content"]) == ("tool", "booked")
    assert [len(completion) for completion in completed] == [3, 3]
    log = trainer.state.log_history[0]
    assert (log["tools/call_frequency"], log["tools/failure_frequency"]) == (1, 0)
    assert not torch.equal(model.lm_head.weight, start)

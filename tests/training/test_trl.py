"""TRL's trainers, which take a model's body and head apart, on models as they are loaded."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("trl")

from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import modeling_minimax_m3.models.text

pytestmark = pytest.mark.compatibility

LENGTHS = (40, 7, 23, 64, 31, 12, 50, 18)
CHAT = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A tiny model."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture
def model(tiny_checkpoint):
    return AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return AutoProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 300, (length,), generator=generator).tolist() for length in LENGTHS]


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
        "max_steps": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
    }


def changed(model, start):
    return {name for name, value in model.named_parameters() if not torch.equal(value, start[name])}


def copied(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_packed_documents_are_as_if_alone(model, processor, documents, options):
    rows = Dataset.from_dict({"input_ids": documents})
    arguments = SFTConfig(packing=True, max_length=128, router_aux_loss_coef=0.0, **options)
    trainer = SFTTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=processor.tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    packed = [part.tolist() for part in batch["input_ids"][0].split(batch["cu_seq_lens_q"].diff().tolist())]
    assert len(packed) > options["per_device_train_batch_size"]
    assert all(document in documents for document in packed)

    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    alone = [model(input_ids=torch.tensor([document]), labels=torch.tensor([document])) for document in packed]
    predictions = [len(document) - 1 for document in packed]
    expected = sum(output.loss * count for output, count in zip(alone, predictions)) / sum(predictions)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradient, expected_gradient = (
        torch.autograd.grad(value, model.get_input_embeddings().weight)[0] for value in (loss, expected)
    )
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
    together = {name: batch[name] for name in ("input_ids", "labels")}
    together["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert abs(trainer.compute_loss(model, together) - expected) > 1e-4 * expected

    start = copied(model)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[1]
    assert last["loss"] < first["loss"]
    assert trainer.evaluate()["eval_loss"] < first["loss"]
    assert first["entropy"] > 0
    assert 0 <= first["mean_token_accuracy"] <= 1
    moved = changed(model, start)
    assert not any("indexer" in name or "vision_tower" in name for name in moved)
    assert all(any(part in name for name in moved) for part in ("q_proj", "experts", "lm_head", "embed_tokens"))


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_chats_of_which_the_assistant_is_learned(model, processor, options, adapters):
    arguments = SFTConfig(padding_free=True, max_length=None, assistant_only_loss=True, **options)
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list([{"messages": CHAT}] * 4),
        processing_class=processor.tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]) if adapters else None,
    )
    start = copied(trainer.model)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    learned = processor.tokenizer.decode(labels[labels != -100])
    end = processor.tokenizer.eos_token
    assert learned == f"</mm:think>A tiny model.{end}</mm:think>Yes.{end}" * 2
    trainer.train()
    moved = changed(trainer.model, start)
    assert moved
    if adapters:
        assert all("lora_" in name for name in moved)


def test_images(model, processor, options):
    picture = Image.linear_gradient("L").resize((56, 84)).convert("RGB")
    rows = Dataset.from_list([{"messages": CHAT[:2], "images": [picture]}] * 4)
    arguments = SFTConfig(max_length=None, **options)
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=processor)
    assert next(iter(trainer.get_train_dataloader()))["image_grid_thw"].tolist() == [[1, 6, 4]] * 2
    start = copied(model)
    trainer.train()
    assert trainer.state.log_history[1]["loss"] < trainer.state.log_history[0]["loss"]
    assert any("vision_tower" in name for name in changed(model, start))


def test_group_relative_policy_optimization(model, processor, documents, options):
    completed = []

    def reward(completions, **kwargs):
        completed.extend(completions)
        return [float(index) for index in range(len(completions))]

    # Without the experts' loss, so that only the rewards can move the head.
    options |= {"max_steps": 1, "router_aux_loss_coef": 0.0}
    arguments = GRPOConfig(num_generations=2, max_completion_length=8, **options)
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "Who are you?"}, {"prompt": "Hello."}]),
        processing_class=processor.tokenizer,
    )
    start = copied(model)
    trainer.train()
    assert len(completed) == 2
    assert trainer.state.log_history[0]["reward"] == 0.5
    assert trainer.state.log_history[0]["entropy"] > 0
    assert "lm_head.weight" in changed(model, start)

    # What the policy's loss is made of, for prompts that are padded on the left.
    short, long = torch.tensor(documents[2]), torch.tensor(documents[3])
    pads = len(long) - len(short)
    ids = torch.stack([F.pad(short, (pads, 0)), long])
    mask = torch.stack([F.pad(torch.ones_like(short), (pads, 0)), torch.ones_like(long)])
    model.eval()
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, labels=ids.where(mask == 1, -100), fused_lm_head=True)
        for row, document in zip(output.log_probs, (short, long)):
            logits = model(input_ids=document[None, :-1]).logits[0]
            expected = -F.cross_entropy(logits, document[1:], reduction="none")
            torch.testing.assert_close(row[-len(expected) :], expected, rtol=1e-4, atol=1e-5)


def test_says_that_indexers_are_not_trained(model, processor, documents, options, monkeypatch):
    model.set_indexer_training(0.1)
    warnings = []
    monkeypatch.setattr(modeling_minimax_m3.models.text.logger, "warning_once", warnings.append)
    rows = Dataset.from_dict({"input_ids": documents})
    trainer = SFTTrainer(model, SFTConfig(**options), train_dataset=rows, processing_class=processor.tokenizer)
    trainer.train()
    assert any("indexer_divergence" in warning for warning in warnings)

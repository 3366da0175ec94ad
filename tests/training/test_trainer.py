"""Transformers' Trainer on tiny models: what works with any causal language model works here."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM

pytestmark = pytest.mark.compatibility

LENGTHS = (40, 7, 23, 64, 31, 12, 50, 18)
PROMPT = 3  # tokens of each document that are not learned


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MiniMaxM3VLForCausalLM(tiny_config(text={"num_hidden_layers": 2}).text_config)


@pytest.fixture
def documents():
    """Documents of different lengths, with labels on all but their first tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": [-100] * PROMPT + row[PROMPT:]} for row in ids]


def pad(features):
    longest = max(len(feature["input_ids"]) for feature in features)

    def column(name, value):
        return torch.tensor([feature[name] + [value] * (longest - len(feature[name])) for feature in features])

    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features])
    return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": mask}


flatten = DataCollatorWithFlattening()
flatten_with_offsets = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True)


@pytest.fixture
def make_trainer(tmp_path):
    def make(model, documents, *, collator=pad, trainer_class=Trainer, callbacks=(), **options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "seed": 1,
        }
        arguments = TrainingArguments(**{**defaults, **options})
        return trainer_class(
            model,
            arguments,
            data_collator=collator,
            train_dataset=documents,
            eval_dataset=documents,
            callbacks=list(callbacks),
        )

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal_weights(actual, expected, **tolerance):
    expected = expected.state_dict()
    for name, value in actual.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_learns_by_heart(model, documents, make_trainer):
    trainer = make_trainer(model, documents, max_steps=40, lr_scheduler_type="constant")
    trainer.train()
    history = losses(trainer)
    assert history[0] > 5
    assert history[-1] < 2


@pytest.mark.parametrize("collator", [pad, flatten, flatten_with_offsets], ids=["padded", "flat", "flat with offsets"])
def test_bfloat16_autocast_learns_what_float32_does(model, documents, make_trainer, collator):
    twin = copy.deepcopy(model)
    trainer = make_trainer(model, documents, collator=collator, max_steps=6)
    trainer.train()
    mixed = make_trainer(twin, documents, collator=collator, max_steps=6, bf16=True)
    mixed.train()
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32}
    assert losses(mixed)[-1] < losses(mixed)[0] - 0.5
    assert losses(mixed) == pytest.approx(losses(trainer), abs=0.05)


def test_bfloat16_weights(model, documents, make_trainer):
    trainer = make_trainer(model.bfloat16(), documents, max_steps=6)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("collator", [pad, flatten], ids=["padded", "flat"])
def test_gradient_checkpointing_changes_nothing(model, documents, make_trainer, use_reentrant, collator):
    twin = copy.deepcopy(model)
    make_trainer(model, documents, collator=collator).train()
    runs = []
    twin.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    make_trainer(
        twin,
        documents,
        collator=collator,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": use_reentrant},
    ).train()
    assert len(runs) == 2 * 3  # each of three steps runs every layer twice
    assert_equal_weights(twin, model, rtol=0, atol=0)


@pytest.mark.parametrize("collator", [pad, flatten], ids=["padded", "flat"])
@pytest.mark.parametrize("indexer_loss_coef", [0.0, 1.0], ids=["", "indexer"])
def test_accumulated_micro_batches_are_one_batch(model, documents, make_trainer, collator, indexer_loss_coef):
    model.set_indexer_training(indexer_loss_coef)
    # plain gradient descent: Adam would make a large step out of the sign of a gradient that is zero but for rounding
    options = {"optim": "sgd", "learning_rate": 0.5, "collator": collator}
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    one = make_trainer(whole, documents, per_device_train_batch_size=4, **options)
    one.train()
    four = make_trainer(parts, documents, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    four.train()
    assert losses(four) == pytest.approx(losses(one), rel=1e-4)
    assert_equal_weights(parts, whole, rtol=1e-4, atol=1e-6)
    changed = [name for name, value in whole.state_dict().items() if not torch.equal(value, model.state_dict()[name])]
    assert any("indexer" in name for name in changed) == (indexer_loss_coef > 0)
    assert any("indexer" not in name for name in changed)


def test_accumulation_weights_the_balance_loss_once(documents, make_trainer):
    """The router loss of each micro-batch is weighted by its predictions: equal rows train alike in one batch or four."""
    torch.manual_seed(0)
    text = {"num_hidden_layers": 2, "output_router_logits": True, "router_aux_loss_coef": 1.0}
    model = MiniMaxM3VLForCausalLM(tiny_config(text=text).text_config)
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    same = [documents[0]] * 4
    options = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 2}
    one = make_trainer(whole, same, per_device_train_batch_size=4, **options)
    one.train()
    four = make_trainer(parts, same, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    four.train()
    assert losses(four) == pytest.approx(losses(one), rel=1e-4)
    assert_equal_weights(parts, whole, rtol=1e-4, atol=1e-6)


def test_evaluation(model, documents, make_trainer):
    seen = []

    def count(prediction):
        seen.append(prediction.predictions.shape)
        return {"tokens": int((prediction.label_ids != -100).sum())}

    with torch.no_grad():
        batch = pad(documents)
        expected = model.eval()(**batch).loss.item()
    trainer = make_trainer(model, documents, per_device_eval_batch_size=8)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.compute_metrics = count
    metrics = trainer.evaluate()
    assert seen == [(8, max(LENGTHS), model.config.vocab_size)]
    assert metrics["eval_tokens"] == sum(LENGTHS) - PROMPT * len(LENGTHS)
    # a model whose `skip_logits` is set evaluates its loss just as well
    model.skip_logits, trainer.compute_metrics = True, None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model_class", [MiniMaxM3VLForCausalLM, MiniMaxM3SparseForConditionalGeneration])
def test_resumed_run_equals_an_uninterrupted_one_to_the_bit(model_class, documents, make_trainer, tmp_path):
    torch.manual_seed(0)
    config = tiny_config(text={"num_hidden_layers": 2})
    model = model_class(config.text_config if model_class is MiniMaxM3VLForCausalLM else config)
    options = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "lr_scheduler_type": "cosine"}
    options |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    interrupted = copy.deepcopy(model)
    through = make_trainer(model, documents, output_dir=str(tmp_path / "through"), **options)
    through.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    folder = str(tmp_path / "interrupted")
    make_trainer(interrupted, documents, output_dir=folder, callbacks=[Stop()], **options).train()
    torch.manual_seed(123)
    fresh = model_class(copy.deepcopy(model.config))
    resumed = make_trainer(fresh, documents, output_dir=folder, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert losses(resumed) == losses(through)
    assert_equal_weights(fresh, model, rtol=0, atol=0)
    states = (resumed.optimizer.state_dict()["state"], through.optimizer.state_dict()["state"])
    assert states[0].keys() == states[1].keys() and states[0]
    for index in states[0]:
        for name, value in states[0][index].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][index][name]))


def test_names_on_disk_load_into_a_model(tmp_path):
    """`Trainer` resumes by `load_state_dict`, whatever names a checkpoint's tensors have."""
    model, other = (MiniMaxM3SparseForConditionalGeneration(tiny_config()) for _ in range(2))
    for part in (model, other):  # types that differ are kept
        part.bfloat16().model.language_model.norm.float()
    torch.nn.init.normal_(model.model.language_model.norm.weight)
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert not on_disk.keys() & model.state_dict().keys() - {"lm_head.weight"}
    assert not any(other.load_state_dict(on_disk))
    assert_equal_weights(other, model, rtol=0, atol=0)

    result = other.load_state_dict({"nobody": torch.zeros(1), **on_disk}, strict=False)
    assert result.unexpected_keys == ["nobody"]
    head = on_disk.pop("language_model.lm_head.weight")
    assert other.load_state_dict(on_disk, strict=False).missing_keys == ["lm_head.weight"]
    other.load_state_dict({"lm_head.weight": head, **on_disk})  # some names of each kind
    without = {name: value for name, value in on_disk.items() if ".experts.0." not in name}
    with pytest.raises(ValueError, match=r"does not hold all parts of .*experts.*single file"):
        other.load_state_dict(without, strict=False)


@pytest.mark.parametrize("collator", [flatten, flatten_with_offsets], ids=["positions", "offsets"])
def test_packed_documents_train_as_padded_ones_do(model, documents, make_trainer, collator):
    twin = copy.deepcopy(model)
    options = {"optim": "sgd", "learning_rate": 0.5}
    padded = make_trainer(model, documents, **options)
    padded.train()
    packed = make_trainer(twin, documents, collator=collator, **options)
    packed.train()
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-4)
    assert_equal_weights(twin, model, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("collator", [flatten, flatten_with_offsets], ids=["positions", "offsets"])
def test_no_gradient_crosses_documents(model, documents, collator):
    labels = [{**document, "labels": [-100] * len(document["labels"])} for document in documents]
    labels[2]["labels"] = documents[2]["labels"]  # only one document is learned
    batch = collator(labels)
    embeddings = model.model.embed_tokens(batch.pop("input_ids")).detach().requires_grad_()
    model.train()(inputs_embeds=embeddings, **batch).loss.backward()
    start = sum(LENGTHS[:2])
    reached = embeddings.grad[0].abs().sum(1) > 0
    assert reached[start : start + LENGTHS[2] - 1].all()
    assert reached.sum() == LENGTHS[2] - 1


def test_masked_labels_are_not_learned(model, documents, make_trainer):
    changed = copy.deepcopy(documents)
    for document in changed:
        document["labels"] = [-100] * len(document["labels"])
        document["labels"][5] = 7
    batch = pad(changed)
    model.eval()
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = torch.nn.functional.cross_entropy(logits[:, 4], torch.full((len(LENGTHS),), 7))
        torch.testing.assert_close(model.train()(**batch).loss, expected)

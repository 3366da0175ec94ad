"""The indexers' loss in the model: its value, what it trains, layouts, checkpointing, freezing, logs."""

import copy
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache, Trainer, TrainingArguments

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLTextModel,
)
from modeling_minimax_m3.trainer_logging import IndexerLossLogging

COEF = 0.3


def make_model(make_pair, coef=COEF, dtype=torch.float32, **text):
    config = tiny_config(text={"indexer_loss_coef": coef, **text}).text_config
    model = make_pair(MiniMaxM3VLForCausalLM, config, dtype=dtype)[1]
    model.set_experts_implementation("eager")
    return model.train()


@pytest.fixture
def model(make_pair):
    return make_model(make_pair)


def is_indexer(name):
    return ".indexer." in name


def grads_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def run_backward(model, **inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: grad.clone() for name, grad in grads_of(model).items()}


def assert_same_gradients(actual, expected, tolerance=1e-4):
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        error = (grad - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: {error}"


# --- the value ---------------------------------------------------------------------------------------------------


def divergence_by_weights(model, tokens, **inputs):
    """KL divergence (B, T) of each token, from captured index states and returned attention weights."""
    states, handles = [], []
    for layer in model.model.layers:
        if layer.self_attn.indexer is not None:
            hook = layer.self_attn.indexer.register_forward_hook(lambda module, args, output: states.append(output))
            handles.append(hook)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model.eval()(tokens, output_attentions=True, **inputs).attentions
    for handle in handles:
        handle.remove()
    sparse = [i for i, layer in enumerate(model.model.layers) if layer.self_attn.indexer is not None]
    total = 0.0
    for (index_query, index_key), layer in zip(states, sparse, strict=True):
        weights = attentions[layer]
        teacher = weights.unflatten(1, (index_query.shape[2], -1)).mean(2)
        scores = torch.einsum("bthd,bsd->bhts", index_query, index_key) * index_query.shape[-1] ** -0.5
        student = scores.masked_fill(teacher == 0, -torch.inf).log_softmax(-1)
        terms = torch.where(teacher > 0, teacher * (teacher.log() - student), 0.0)
        total = total + terms.sum(-1).mean(1) / len(sparse)
    model.train()
    return total


@pytest.mark.parametrize("warmup", [False, True], ids=["sparse", "warmup"])
def test_value_is_that_of_the_attention_weights(make_pair, make_tokens, warmup):
    model = make_model(make_pair, dtype=torch.float64, indexer_warmup=warmup)
    tokens = make_tokens(model.config, 2, 120)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.5, -100)
    expected = divergence_by_weights(model, tokens)
    counted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
    model.set_attn_implementation("sdpa")
    for extra, rows, denominator in (
        ({"labels": labels}, counted, counted.sum()),
        ({"labels": labels, "num_items_in_batch": 500}, counted, 500),
        ({}, torch.ones_like(counted), counted.numel()),
    ):
        outputs = model(tokens, **extra)
        torch.testing.assert_close(outputs.indexer_loss, (expected * rows).sum() / denominator)
    assert outputs.indexer_loss > 0.01
    with_loss = model(tokens, labels=labels)
    model.config.indexer_loss_coef = 0.0
    without = model(tokens, labels=labels)
    assert without.indexer_loss is None
    torch.testing.assert_close(with_loss.loss, without.loss + COEF * with_loss.indexer_loss)


def test_shifted_labels_and_other_ignore_index(model, make_tokens):
    tokens = make_tokens(model.config, 2, 50)
    labels = tokens.clone()
    labels[:, :20] = -100
    expected = model(tokens, labels=labels).indexer_loss
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(tokens, labels=labels, shift_labels=shifted).indexer_loss, expected)
    renamed = labels.masked_fill(labels == -100, -7)
    torch.testing.assert_close(model(tokens, labels=renamed, ignore_index=-7).indexer_loss, expected)


def test_text_model_returns_the_divergence_of_each_token(model, make_tokens):
    tokens = make_tokens(model.config, 2, 60)
    outputs = model.model(tokens)
    assert outputs.indexer_divergence.shape == (2, 60)
    assert outputs.indexer_divergence.dtype == torch.float32
    torch.testing.assert_close(model(tokens).indexer_loss, outputs.indexer_divergence.mean())
    assert isinstance(model.model, MiniMaxM3VLTextModel)
    assert model.model.eval()(tokens).indexer_divergence is None


def test_only_sparse_layers_count(make_pair, make_tokens):
    kinds = ["full_attention", "minimax_m3_structured", "minimax_m3_sparse", "minimax_m3_structured"]
    text = {"layer_types": kinds, "structured_anchor_blocks": 1, "structured_random_blocks": 1}
    model = MiniMaxM3VLForCausalLM(tiny_config(text={"indexer_loss_coef": COEF, **text}).text_config).train()
    tokens = make_tokens(model.config, 1, 100)
    seen = []
    model.model.layers[2].self_attn.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    outputs = model(tokens, labels=tokens)
    torch.testing.assert_close(outputs.indexer_loss, seen[0][:, :-1].mean())
    model.config.layer_types = ["full_attention"] * 4
    dense = MiniMaxM3VLForCausalLM(model.config).train()(tokens, labels=tokens)
    assert dense.indexer_loss is None and dense.loss.isfinite()


def test_when_it_is_computed(model, make_tokens):
    tokens = make_tokens(model.config, 1, 40)
    model.eval()
    with torch.no_grad():
        assert model(tokens).indexer_loss is None, "generation pays for nothing"
        assert model(tokens, labels=tokens).indexer_loss > 0, "evaluation sees it"
        assert model(tokens, labels=tokens, output_indexer_loss=False).indexer_loss is None
        model.config.indexer_loss_coef = 0.0
        outputs = model(tokens, labels=tokens, output_indexer_loss=True)
        assert outputs.indexer_loss > 0
        assert torch.equal(outputs.loss, model(tokens, labels=tokens).loss)
        assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 43)
        mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
        with pytest.raises(NotImplementedError, match="4-D `attention_mask`"):
            model(tokens, attention_mask=mask, output_indexer_loss=True)


def test_output_attentions_changes_nothing(model, make_tokens):
    tokens = make_tokens(model.config, 2, 60)
    model.set_attn_implementation("eager")
    plain, plain_grads = run_backward(model, input_ids=tokens, labels=tokens)
    outputs, grads = run_backward(
        model, input_ids=tokens, labels=tokens, output_attentions=True, output_hidden_states=True
    )
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 60, 60)] * 4
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 60, 64)] * 5
    torch.testing.assert_close(outputs.indexer_loss, plain.indexer_loss)
    assert_same_gradients(grads, plain_grads)
    assert isinstance(model(tokens, labels=tokens, return_dict=False), tuple)


# --- whom it trains ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [False, True], ids=["sparse", "warmup"])
def test_each_loss_trains_its_own_part(make_pair, make_tokens, warmup):
    model = make_model(make_pair, indexer_warmup=warmup)
    tokens = make_tokens(model.config, 2, 100)
    parameters = dict(model.named_parameters())
    outputs = model(tokens, labels=tokens, output_router_logits=True)
    alone = torch.autograd.grad(outputs.indexer_loss, parameters.values(), allow_unused=True, retain_graph=True)
    for (name, _), grad in zip(parameters.items(), alone):
        assert is_indexer(name) == (grad is not None), name
    outputs.loss.backward()
    language = copy.deepcopy(model)
    language.set_indexer_training(0.0, warmup)
    _, expected = run_backward(language, input_ids=tokens, labels=tokens, output_router_logits=True)
    assert not any(map(is_indexer, expected))
    actual = grads_of(model)
    assert_same_gradients({name: grad for name, grad in actual.items() if not is_indexer(name)}, expected, 1e-6)
    scaled = {name: COEF * grad for (name, _), grad in zip(parameters.items(), alone) if grad is not None}
    assert_same_gradients({name: grad for name, grad in actual.items() if is_indexer(name)}, scaled)
    assert len(scaled) == 8 and all(grad.norm() > 0 for grad in scaled.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("warmup", [False, True], ids=["sparse", "warmup"])
def test_gradient_checkpointing_changes_nothing(make_pair, make_tokens, warmup, use_reentrant):
    model = make_model(make_pair, indexer_warmup=warmup)
    tokens = make_tokens(model.config, 2, 60)
    plain, expected = run_backward(model, input_ids=tokens, labels=tokens)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    outputs, grads = run_backward(model, input_ids=tokens, labels=tokens, output_hidden_states=True)
    torch.testing.assert_close(outputs.indexer_loss, plain.indexer_loss)
    assert len(outputs.hidden_states) == 5
    assert_same_gradients(grads, expected, 1e-6)


def test_indexers_alone_can_be_trained(make_pair, make_tokens):
    model = make_model(make_pair)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_indexer(name))
    tokens = make_tokens(model.config, 2, 60)
    _, expected = run_backward(model, input_ids=tokens, labels=tokens)
    assert len(expected) == 8
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, grads = run_backward(model, input_ids=tokens, labels=tokens)
    assert_same_gradients(grads, expected, 1e-6)


def test_micro_batches_add_up_to_their_batch(model, make_tokens):
    tokens = make_tokens(model.config, 4, 70)
    labels = tokens.clone()
    for row, prompt in enumerate((5, 60, 33, 0)):
        labels[row, :prompt] = -100
    counted = int((labels[:, 1:] != -100).sum())
    whole, expected = run_backward(model, input_ids=tokens, labels=labels)
    model.zero_grad()
    parts = [
        model(tokens[rows], labels=labels[rows], num_items_in_batch=counted)
        for rows in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    sum(part.loss for part in parts).backward()
    torch.testing.assert_close(sum(part.indexer_loss for part in parts), whole.indexer_loss)
    assert_same_gradients(grads_of(model), expected)


# --- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [False, True], ids=["sparse", "warmup"])
@pytest.mark.parametrize("layout", ["left", "right", "holes", "packed", "restarts"])
def test_every_layout_counts_the_same_tokens(make_pair, make_tokens, layout, warmup):
    model = make_model(make_pair, indexer_warmup=warmup)
    documents = [make_tokens(model.config, 1, length, seed=length)[0] for length in (70, 41)]
    alone = [model(document[None], labels=document[None]) for document in documents]
    expected = (alone[0].indexer_loss * 69 + alone[1].indexer_loss * 40) / 109
    expected_without_labels = sum(model(document[None]).indexer_loss * len(document) for document in documents) / 111
    if layout in ("packed", "restarts"):
        spare = 9 if layout == "packed" else 0  # padding after the last document
        tokens = torch.cat((*documents, documents[0][:spare]))[None]
        labels = tokens.clone()
        labels[:, [0, 70]] = -100
        labels[:, 111:] = -100
        positions = torch.cat((torch.arange(70), torch.arange(41), torch.arange(spare)))[None]
        inputs = {"position_ids": positions}
        if layout == "packed":
            offsets = torch.tensor([0, 70, 111], dtype=torch.int32)
            inputs |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    else:
        width = 80
        slots = torch.arange(width)
        real = [slots[:70], slots[:41]]
        if layout == "left":
            real = [slots[-70:], slots[-41:]]
        elif layout == "holes":
            real = [slots.roll(3)[:70].sort().values, slots[1::2][:40].tolist() + [79]]
            real[1] = torch.tensor(sorted({*real[1], 0}))[:41]
        tokens, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
        for row, (where, document) in enumerate(zip(real, documents)):
            tokens[row, where], mask[row, where] = document, 1
        labels = tokens.masked_fill(mask == 0, -100)
        labels[range(2), [int(where[0]) for where in real]] = -100  # no token of the document predicts its first one
        inputs = {"attention_mask": mask}
    if layout == "holes":
        # The language loss counts a token by the label in the next slot, which may be a hole: pass what follows it.
        shifted = torch.full_like(labels, -100)
        for row, (where, document) in enumerate(zip(real, documents)):
            shifted[row, where[:-1]] = document[1:]
        inputs["shift_labels"] = shifted
    outputs = model(tokens, labels=labels, **inputs)
    torch.testing.assert_close(outputs.indexer_loss, expected, rtol=1e-4, atol=1e-6)
    inputs.pop("shift_labels", None)
    torch.testing.assert_close(model(tokens, **inputs).indexer_loss, expected_without_labels, rtol=1e-4, atol=1e-6)


def test_pads_never_count_even_with_labels(model, make_tokens):
    tokens = make_tokens(model.config, 1, 60)
    mask = (torch.arange(60) < 40).long()[None]
    other = torch.where(mask == 1, tokens, tokens.flip(1))
    outputs = [model(ids, attention_mask=mask, labels=tokens) for ids in (tokens, other)]
    torch.testing.assert_close(outputs[0].indexer_loss, outputs[1].indexer_loss)


def test_a_pass_with_a_past(model, make_tokens):
    tokens, cache = make_tokens(model.config, 1, 60), DynamicCache(config=model.config)
    whole = model.model(tokens).indexer_divergence
    pieces = [model.model(tokens[:, start : start + 20], cache=cache).indexer_divergence for start in range(0, 60, 20)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_warmup_is_dense_attention(make_pair, make_tokens):
    """Warm-up attends to all keys in training, in evaluation and in cached decoding."""
    model = make_model(make_pair, index_topk_blocks=1, index_block_size=4, indexer_warmup=True).eval()
    config = copy.deepcopy(model.config)
    config.layer_types, config.indexer_warmup = ["full_attention"] * 4, False
    dense = MiniMaxM3VLForCausalLM(config).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    tokens = make_tokens(model.config, 2, 50)
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    with torch.no_grad():
        expected = dense(tokens, attention_mask=mask).logits
        torch.testing.assert_close(model(tokens, attention_mask=mask).logits, expected)
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(tokens, **options), dense.generate(tokens, **options))
        model.config.indexer_warmup = False
        assert (model(tokens, attention_mask=mask).logits - expected).abs().max() > 1e-2


def test_multimodal_model(make_inputs):
    config = tiny_config(text={"indexer_loss_coef": COEF})
    model = MiniMaxM3SparseForConditionalGeneration(config).train()
    inputs = make_inputs(config, images=[[1, 8, 8]], length=60)
    outputs = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    base = model.model(**inputs)
    torch.testing.assert_close(outputs.indexer_loss, base.indexer_divergence[:, :-1].mean())
    language = model(**inputs, labels=inputs["input_ids"], output_indexer_loss=False)
    assert language.indexer_loss is None
    torch.testing.assert_close(outputs.loss, language.loss + 0.001 * outputs.aux_loss + COEF * outputs.indexer_loss)
    outputs.indexer_loss.backward()
    assert {is_indexer(name) for name in grads_of(model)} == {True}
    model.set_indexer_training(0.0)
    assert model(**inputs).indexer_loss is None
    assert not any(p.requires_grad for name, p in model.named_parameters() if is_indexer(name))


@pytest.mark.parametrize("warmup", [False, True], ids=["sparse", "warmup"])
def test_whole_graph(make_pair, make_tokens, warmup):
    torch._dynamo.reset()
    model = make_model(make_pair, indexer_warmup=warmup)
    model.set_experts_implementation("grouped_mm")
    tokens = make_tokens(model.config, 2, 60)
    eager, expected = run_backward(model, input_ids=tokens, labels=tokens)
    graphs = CompileCounterWithBackend("aot_eager")
    model.compile(fullgraph=True, backend=graphs)
    outputs, grads = run_backward(model, input_ids=tokens, labels=tokens)
    assert graphs.frame_count == 1
    torch.testing.assert_close(outputs.indexer_loss, eager.indexer_loss)
    assert_same_gradients(grads, expected)


def test_autocast(model, make_tokens):
    tokens = make_tokens(model.config, 2, 60)
    plain = model(tokens, labels=tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(tokens, labels=tokens)
    outputs.loss.backward()
    assert abs(outputs.indexer_loss / plain.indexer_loss - 1) < 0.05
    assert len([name for name in grads_of(model) if is_indexer(name)]) == 8


# --- freezing ----------------------------------------------------------------------------------------------------


def trainable_indexers(model):
    return {parameter.requires_grad for name, parameter in model.named_parameters() if is_indexer(name)}


def test_frozen_unless_the_loss_is_on(tmp_path, make_tokens):
    model = MiniMaxM3VLForCausalLM(tiny_config().text_config)
    assert trainable_indexers(model) == {False}
    model.save_pretrained(tmp_path)
    assert "indexer_loss_coef" not in json.loads((tmp_path / "config.json").read_text())
    loaded, info = MiniMaxM3VLForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert trainable_indexers(loaded) == {False}
    assert all(parameter.requires_grad for name, parameter in loaded.named_parameters() if not is_indexer(name))
    trained = MiniMaxM3VLForCausalLM.from_pretrained(tmp_path, indexer_loss_coef=0.1)
    assert trainable_indexers(trained) == {True}
    trained.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["indexer_loss_coef"] == 0.1
    loaded.set_indexer_training(0.2, warmup=True)
    assert trainable_indexers(loaded) == {True}
    assert (loaded.config.indexer_loss_coef, loaded.config.indexer_warmup) == (0.2, True)
    assert loaded.model.layers[-1].self_attn.config.indexer_warmup
    with pytest.raises(Exception, match="'indexer_loss_coef':\n.*got -1"):
        loaded.set_indexer_training(-1.0)
    assert loaded.config.indexer_loss_coef == 0.2


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("coef", [0.0, COEF])
@pytest.mark.parametrize("unfrozen", [False, True], ids=["as made", "all trainable"])
def test_data_parallel_waits_for_no_gradient(make_pair, make_tokens, process_group, coef, unfrozen):
    model = make_model(make_pair, coef)
    if unfrozen:
        model.requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens = make_tokens(model.config, 1, 40)
    for _ in range(2):  # the second pass would raise
        parallel(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(map(is_indexer, moved)) == (coef > 0)
    assert len(moved) > 10


@pytest.mark.parametrize("coef", [0.0, COEF])
def test_adapters_on_every_linear_layer(make_pair, make_tokens, coef):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(make_pair, coef), LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    tokens = make_tokens(model.config, 1, 40)
    model(input_ids=tokens, labels=tokens).loss.backward()
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name and parameter.grad is not None for name, parameter in adapters.items())
    of_indexers = [p.grad.norm() for name, p in adapters.items() if is_indexer(name) and "lora_B" in name]
    assert len(of_indexers) == 4
    assert all((norm > 0) == (coef > 0) for norm in of_indexers)


def test_labels_of_the_kept_tokens_alone(make_pair, make_tokens):
    model = make_model(make_pair).eval()
    tokens = make_tokens(model.config, 2, 30)
    labels = tokens.clone()
    labels[:, :-3] = -100  # the first of the four kept ones is predicted by no kept token
    expected = model(tokens, labels=labels)
    for kept in (4, torch.arange(26, 30)):
        outputs = model(tokens, labels=tokens[:, -4:], logits_to_keep=kept)
        torch.testing.assert_close(outputs.indexer_loss, expected.indexer_loss)
        torch.testing.assert_close(outputs.loss, expected.loss)


# --- Trainer's logs ----------------------------------------------------------------------------------------------


class IndexerTrainer(IndexerLossLogging, Trainer):
    pass


def test_trainer_logs_the_value(make_pair, make_tokens, tmp_path):
    model = make_model(make_pair)
    rows = [{"input_ids": row, "labels": row} for row in make_tokens(model.config, 8, 30)]
    expected = [model(torch.stack([row["input_ids"] for row in rows[i : i + 4]])) for i in (0, 4)]
    expected = [outputs.indexer_loss.item() for outputs in expected]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, logging_steps=1,
        learning_rate=0.0, report_to=[], use_cpu=True, eval_strategy="steps", eval_steps=2, disable_tqdm=True,
        per_device_eval_batch_size=4, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = IndexerTrainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    logged = [entry["indexer_loss"] for entry in trainer.state.log_history if "indexer_loss" in entry]
    evaluated = [entry["eval_indexer_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    divergence = model.eval()(torch.stack([row["input_ids"] for row in rows]), output_indexer_loss=True)
    assert divergence.indexer_loss > 0
    assert len(logged) == 2 and len(evaluated) == 1
    # Tokens without a label to predict, the last of each row, are in `expected` but not in the logs.
    assert logged == pytest.approx(expected, rel=0.1)
    assert evaluated[0] == pytest.approx(logged[0], rel=1e-4), "the same four rows"
    assert trainer.evaluate()["eval_indexer_loss"] == pytest.approx(evaluated[0])


def test_trainer_keeps_calls_apart(make_pair, make_tokens, tmp_path):
    """A run's or evaluation's value holds nothing from before: no steps after the last log, no prediction."""
    model = make_model(make_pair)
    rows = [{"input_ids": row, "labels": row} for row in make_tokens(model.config, 6, 30)]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, max_steps=3, logging_steps=2, learning_rate=0.0, report_to=[],
        use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential", save_strategy="no",
    )  # fmt: skip
    trainer = IndexerTrainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
    logged = []
    for _ in range(2):
        trainer.train()
        logged.append([entry["indexer_loss"] for entry in trainer.state.log_history if "indexer_loss" in entry])
    assert logged[1] == pytest.approx(logged[0])
    evaluated = trainer.evaluate()["eval_indexer_loss"]
    trainer.predict(rows[2:])
    assert trainer.evaluate()["eval_indexer_loss"] == pytest.approx(evaluated)


def test_trainer_without_the_loss_logs_none(make_pair, make_tokens, tmp_path):
    model = make_model(make_pair, coef=0.0)
    rows = [{"input_ids": row, "labels": row} for row in make_tokens(model.config, 2, 20)]
    arguments = TrainingArguments(tmp_path, max_steps=1, logging_steps=1, report_to=[], use_cpu=True)
    trainer = IndexerTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert not any("indexer_loss" in entry for entry in trainer.state.log_history)

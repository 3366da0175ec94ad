"""scripts/finetune.py refuses options that would do nothing, and names that fit nothing, before weights are loaded."""

import importlib
import json

import pytest
import transformers
from datasets import Dataset, DatasetDict, IterableDataset
from PIL import Image
from transformers import AutoProcessor

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM

CHAT = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A tiny model."}]
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--max_steps", "2", "--save_strategy", "no"]
TEXTS, CHATS, IMAGES = ["--dataset", "{texts}"], ["--dataset", "{chats}"], ["--dataset", "{images}"]


@pytest.fixture(scope="module")
def finetune():
    return importlib.import_module("modeling_minimax_m3.commands.train")


@pytest.fixture(scope="module")
def idle_options():
    return importlib.import_module("modeling_minimax_m3.commands.idle_options")


@pytest.fixture(scope="module")
def places(tiny_checkpoint, tmp_path_factory):
    """Paths of checkpoints and of data."""
    folder = tmp_path_factory.mktemp("places")
    tokenizer = AutoProcessor.from_pretrained(tiny_checkpoint).tokenizer
    kinds = {
        "text_model": {},
        "dense_model": {"layer_types": ["full_attention"] * 4, "mlp_layer_types": ["dense"] * 4},
        "sparse_model": {"layer_types": ["minimax_m3_sparse"] * 4},
    }
    for name, options in kinds.items():
        MiniMaxM3VLForCausalLM(tiny_config(text=options).text_config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    Image.linear_gradient("L").resize((56, 84)).convert("RGB").save(folder / "photo.png")
    look = [{**CHAT[0], "content": [{"type": "image"}]}, CHAT[1]]
    look = {"messages": look, "images": [str(folder / "photo.png")]}
    rows = {"texts": {"text": "Some text."}, "chats": {"messages": CHAT}, "images": look}
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    Dataset.from_list([rows["texts"]]).save_to_disk(str(folder / "saved"))
    DatasetDict({"train": Dataset.from_list([rows["texts"]])}).save_to_disk(str(folder / "splits"))
    return {
        "composite_model": tiny_checkpoint,
        **{name: folder / name for name in (*kinds, "saved", "splits")},
        **{name: folder / f"{name}.jsonl" for name in rows},
    }


@pytest.fixture
def arguments(places, tmp_path):
    """Fills in paths, and adds the flags that every run needs."""

    def fill(flags, model="composite_model"):
        filled = [flag.format(**places) for flag in flags]
        return ["--model", str(places[model]), "--output_dir", str(tmp_path / "run"), *QUICK, *filled]

    return fill


@pytest.fixture
def no_weights(finetune, monkeypatch):
    for name in ("AutoModelForImageTextToText", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", None)


# Circumstance: flags with an option that is idle in it, and the error.
CASES = {
    "adapter": (
        [*TEXTS, "--adapter", "run", "--lora_rank", "8"],
        "--lora_rank would do nothing with --adapter, which has its own",
    ),
    "no_lora": (
        [*TEXTS, "--lora_rank", "16", "--lora_experts"],
        "--lora_rank, --lora_experts would .* without --lora",
    ),
    "lora": ([*IMAGES, "--lora", "--train_vision"], "--train_vision would do nothing with --lora or --adapter, which"),
    "label_smoothing": (
        [*TEXTS, "--label_smoothing_factor", "0.1", "--indexer_loss_coef", "0.1"],
        "--indexer_loss_coef would do nothing with --label_smoothing_factor",
    ),
    "no_evaluation": (
        [*TEXTS, "--eval_strategy", "steps", "--eval_steps", "3"],
        "--eval_strategy, --eval_steps would do nothing without --eval_dataset, --eval_split or --eval_fraction",
    ),
    "any_run": ([*TEXTS, "--do_predict"], "--do_predict would do nothing here"),
    "streaming": ([*TEXTS, "--streaming", "--num_proc", "2"], "--num_proc would do nothing with --streaming"),
    "held_out": (
        [*TEXTS, "--eval_fraction", "0.5", "--eval_dataset", "{chats}"],
        "--eval_dataset would do nothing with --eval_fraction",
    ),
    "packing": (
        [*TEXTS, "--packing", "--padding_free", "true"],
        "--padding_free would do nothing with --packing",
    ),
    "no_named_data": (
        [*TEXTS, "--dataset_config", "en"],
        "--dataset_config would do nothing where the data are files",
    ),
    "no_chats": (
        [*TEXTS, "--messages_column", "chat", "--thinking_mode", "disabled"],
        "--messages_column, --thinking_mode would do nothing where the data have no chats: the rows are of the kind text",
    ),
    "no_texts": ([*CHATS, "--text_column", "body"], "--text_column would do nothing where the data have no texts"),
    "media": ([*IMAGES, "--padding_free", "true"], "--padding_free would do nothing where the data have images"),
    "no_media": ([*CHATS, "--train_vision"], "--train_vision would do nothing where the data have neither images"),
    "no_vision": ([*TEXTS, "--train_vision"], "--train_vision would do nothing with a checkpoint that reads text"),
    "no_experts": (
        [*TEXTS, "--lora", "--lora_experts", "--router_aux_loss_coef", "0.1"],
        "--lora_experts, --router_aux_loss_coef would do nothing with a checkpoint that has no routed experts",
    ),
    "no_indexers": ([*TEXTS, "--indexer_loss_coef", "0.1"], "--indexer_loss_coef would .* has no learned-sparse"),
    "no_adapted_indexers": (
        [*TEXTS, "--lora", "--lora_targets", "o_proj", "--indexer_loss_coef", "0.1"],
        "--indexer_loss_coef would do nothing where no adapter is on the indexers: add q_proj",
    ),
    "own_attention": (
        [*TEXTS, "--attn_implementation", "eager"],
        "--attn_implementation would do nothing where neither a dense layer nor a vision tower",
    ),
}
MODELS = {
    "no_vision": "text_model",
    "no_experts": "dense_model",
    "no_indexers": "dense_model",
    "own_attention": "sparse_model",
}


def test_every_circumstance_has_a_case(idle_options):
    assert CASES.keys() == idle_options.IDLE.keys()


@pytest.mark.parametrize("circumstance", CASES)
def test_options_that_would_do_nothing_are_refused(finetune, arguments, no_weights, circumstance):
    flags, message = CASES[circumstance]
    with pytest.raises(SystemExit, match=message):
        finetune.main(arguments(flags, MODELS.get(circumstance, "composite_model")))


def test_idle_options_are_options(finetune, idle_options, capsys):
    with pytest.raises(SystemExit):
        finetune.parse_arguments(["--help"])
    listed = capsys.readouterr().out
    for _, options in idle_options.IDLE.values():
        assert [option for option in options if f"--{option}" not in listed] == []


NAMES = {
    "target": (
        ["--lora_targets", "q_proj", "qproj"],
        "--lora_targets: no module that can be trained ends in qproj; possible are .*k_proj",
    ),
    "target of the tower": (
        ["--lora_targets", "q_proj", "out_proj"],
        "--lora_targets: .* ends in out_proj; possible are",
    ),
    "target that is no linear layer": (
        ["--lora_targets", "norm"],
        "--lora_targets: .* ends in norm; possible are down_proj",
    ),
    "part of a name": (
        ["--lora_targets", "proj"],
        "--lora_targets: no module that can be trained ends in proj; possible are",
    ),
    "target that is saved": (
        ["--lora_targets", "lm_head", "--lora_save", "lm_head"],
        "--lora_targets: .* in lm_head;",
    ),
    "indexer without a loss": (["--lora_targets", "indexer.q_proj"], "--lora_targets: .* ends in indexer.q_proj;"),
    "saved": (
        ["--lora_save", "lm_haed"],
        "--lora_save: no module that can be trained ends in lm_haed; possible are .*lm_head",
    ),
    "saved indexer without a loss": (["--lora_save", "indexer"], "--lora_save: .* ends in indexer; possible are"),
    "saved tower without images": (
        ["--lora_save", "vision_tower"],
        "--lora_save: .* ends in vision_tower; possible are",
    ),
    "saved without weights": (
        ["--lora_save", "rotary_emb"],
        "--lora_save: no module that can be trained ends in rotary_emb;",
    ),
    "saved list": (["--lora_save", "layers"], "--lora_save: no module that can be trained ends in layers;"),
    "dropout of experts": (["--lora_experts", "--lora_dropout", "0.1"], "PEFT cannot make the adapters: .*dropout"),
    "rank": (["--lora_rank", "0"], "PEFT cannot make the adapters: .*0"),
    "scale": (["--lora_alpha", "0"], "--lora_alpha must not be 0"),
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("model", ["composite_model", "text_model"])
def test_adapters_that_cannot_be_are_refused(finetune, arguments, no_weights, model, case):
    flags, message = NAMES[case]
    with pytest.raises(SystemExit, match=message):
        finetune.main(arguments([*TEXTS, "--lora", *flags], model))


def trained_by(finetune, argv):
    model = finetune.prepare(argv).model
    batch = dict.fromkeys(("input_ids", "labels"), model.dummy_inputs["input_ids"])
    model.train()(**batch).loss.backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all(value.grad is not None for value in trained.values())
    return trained.keys()


@pytest.mark.parametrize("model", ["composite_model", "text_model"])
def test_saved_modules_are_those_that_the_loss_reaches(finetune, arguments, model):
    """The tower has a q_proj too, and the indexers q_norm; `norm` is not the end of the name `q_norm`."""
    flags = [*TEXTS, "--lora", "--lora_targets", "o_proj", "--lora_save"]
    trained = trained_by(finetune, arguments([*flags, "norm", "q_proj"], model))
    saved = {name.partition(".modules_to_save.")[0] for name in trained if ".modules_to_save." in name}
    prefix = "base_model.model.model." + ("language_model." if model == "composite_model" else "")
    assert saved == {f"{prefix}norm"} | {f"{prefix}layers.{i}.self_attn.q_proj" for i in range(4)}
    assert {name.partition(".lora_")[0] for name in trained if ".lora_" in name} == {
        f"{prefix}layers.{i}.self_attn.o_proj" for i in range(4)
    }


def test_tower_is_saved_where_there_are_images(finetune, arguments):
    trainer = finetune.prepare(arguments([*IMAGES, "--lora", "--lora_save", "multi_modal_projector"]))
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert any("multi_modal_projector.modules_to_save" in name for name in trained)
    assert not any("vision_tower" in name for name in trained)


@pytest.mark.parametrize(
    "flags",
    [
        [*CHATS, "--eval_dataset", "{texts}", "--text_column", "text", "--messages_column", "messages"],
        [*TEXTS, "--lora", "--lora_experts", "--indexer_loss_coef", "0.1", "--router_aux_loss_coef", "0.1"],
        [*TEXTS, "--attn_implementation", "eager", "--lora", "false", "--lora_experts", "false"],
        [*IMAGES, "--padding_free", "false", "--remove_unused_columns", "false"],
        [*TEXTS, "--eval_strategy", "no", "--do_train"],
    ],
)
def test_options_that_do_something_are_taken(finetune, arguments, flags):
    finetune.prepare(arguments(flags))


@pytest.mark.parametrize("kind", ["saved", "splits"])
def test_saved_data_have_splits_and_are_streamed(finetune, arguments, kind):
    assert isinstance(finetune.prepare(arguments(["--dataset", f"{{{kind}}}"])).train_dataset, Dataset)
    streamed = finetune.prepare(arguments(["--dataset", f"{{{kind}}}", "--streaming"])).train_dataset
    assert isinstance(streamed, IterableDataset)
    with pytest.raises(SystemExit, match="the split of .* must be one of train, got 'test'"):
        finetune.main(arguments(["--dataset", f"{{{kind}}}", "--eval_split", "test"]))

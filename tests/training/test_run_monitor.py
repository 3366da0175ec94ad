"""`RunMonitor`: what it counts against plain counts, where it shows it, and that it changes nothing."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithFlattening, ProgressCallback, Trainer, TrainingArguments

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import run_monitor
from modeling_minimax_m3.flops import forward_flops
from modeling_minimax_m3.layers.attention import MiniMaxM3VLAttention
from modeling_minimax_m3.layers.moe import MiniMaxM3VLTopKRouter
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.monitoring.pass_flops import PassFlops, peak_flops, token_positions
from modeling_minimax_m3.monitoring.report import MOST_POINTS, chart, points_of, report_page
from modeling_minimax_m3.monitoring.samples import shorten_media
from modeling_minimax_m3.monitoring.selected_mass import selected_mass
from modeling_minimax_m3.monitoring.tallies import PassTallies, expert_load
from modeling_minimax_m3.run_monitor import RunMonitor

from ..forked_processes import run_script

ROOT = Path(__file__).resolve().parents[2]
LOSSES = {"output_router_logits": True, "router_aux_loss_coef": 0.01, "indexer_loss_coef": 0.1}


def make_model(**text) -> MiniMaxM3VLForCausalLM:
    torch.manual_seed(0)
    return MiniMaxM3VLForCausalLM(tiny_config(text=text).text_config)


def make_rows(*lengths: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 400, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": one, "labels": [-100] * 10 + one[10:]} for one in ids]


def make_trainer(folder, model, rows, monitor=None, **options) -> Trainer:
    given = {"max_steps": 2, "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), use_cpu=True, **{**given, "per_device_train_batch_size": 2, **options})
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:2], data_collator=DataCollatorWithFlattening()
    )
    if monitor is not None:
        monitor.attach(trainer)
    return trainer


def logs_of(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# ---- what is counted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("lengths", [(200,), (70, 5, 125)], ids=["one document", "three documents"])
def test_operations_are_those_of_the_documents(lengths, share):
    config = tiny_config(text={"num_hidden_layers": 4}).text_config
    parts = Counter()
    for length in lengths:
        parts.update(forward_flops(config, length))
    passes = 2 + share
    expected = passes * (parts["attention projections"] + parts["mlp"] + parts["output head"] / 2)  # half is learned
    expected += 3 * parts["attention"] + parts["indexer projections"] + parts["index scores"]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    assert PassFlops(config, share)(positions, None, sum(lengths) // 2) == pytest.approx(expected, rel=1e-5)


def test_a_trained_indexer_has_gradients():
    config = tiny_config(text={"num_hidden_layers": 4, "indexer_loss_coef": 0.1}).text_config
    parts = forward_flops(config, 100)
    expected = 3 * sum(count for part, count in parts.items() if part != "output head")
    assert PassFlops(config, 1.0)(torch.arange(100)[None], None, 0) == pytest.approx(expected, rel=1e-5)


def test_positions_in_all_layouts():
    device, expected = torch.device("cpu"), [0, 1, 2, 0, 1]
    offsets = torch.tensor([0, 3, 5])
    assert token_positions((1, 5), device, cu_seq_lens=offsets).tolist() == [expected]
    assert token_positions((1, 5), device, position_ids=torch.tensor([expected])).tolist() == [expected]
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    found = token_positions((2, 4), device, attention_mask=mask)
    assert found[mask.bool()].tolist() == [0, 1, 0, 1, 2]


def test_padding_counts_neither_as_tokens_nor_for_experts_nor_as_operations():
    model = make_model(num_hidden_layers=3).train()
    ids = torch.randint(5, 400, (1, 60))
    found = []
    for padding in (0, 20):
        tallies = PassTallies(model)
        padded = torch.nn.functional.pad(ids, (0, padding), value=0)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (0, padding))
        labels = torch.nn.functional.pad(ids, (0, padding), value=-100)
        model(input_ids=padded, attention_mask=mask, labels=labels)
        experts = tallies.read_experts(torch.device("cpu"))
        found.append((tallies.read(["tokens", "learned", "flops"], True, torch.device("cpu")), experts))
        tallies.remove()
    assert found[0][0][:2] == [60, 59]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1][1] == found[0][1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_are_counted_once(checkpointing):
    model = make_model(num_hidden_layers=3).train()
    chosen = {}

    def note(number, experts):
        chosen.setdefault(number, experts)  # of the first pass

    for name, module in model.named_modules():
        if isinstance(module, MiniMaxM3VLTopKRouter):
            number = int(name.split(".")[2])
            module.register_forward_hook(lambda m, a, out, n=number: note(n, out[2].flatten().tolist()))
    tallies = PassTallies(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(5, 400, (2, 50))
    model(input_ids=ids, labels=ids).loss.backward()  # runs each layer again with checkpointing
    with torch.no_grad():
        model(input_ids=ids)  # no training pass
    counts = tallies.read_experts(torch.device("cpu"))
    config = model.config
    assert {number: Counter(ids) for number, ids in chosen.items()} == {
        number: Counter({expert: count for expert, count in enumerate(of_layer) if count})
        for number, of_layer in counts.items()
    }
    assert all(sum(of_layer) == 100 * config.num_experts_per_tok for of_layer in counts.values())
    assert all(sum(of_layer) == 0 for of_layer in tallies.read_experts(torch.device("cpu")).values()), "forgotten"


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_a_compiled_loss_keeps_its_gradient():
    """Inductor drops a product with 1. The value of the monitor must not become the loss itself."""
    tallies = PassTallies(make_model(num_hidden_layers=2))
    tallies._mode, tallies._inputs = True, {"num_items_in_batch": None}

    def observed(weight):
        loss = weight.square().sum()
        tallies._end(None, (), {"loss": loss})
        return loss

    weight = torch.ones(3, requires_grad=True)
    torch.compile(observed)(weight).backward()
    assert weight.grad.tolist() == [2.0] * 3
    assert tallies.sums[True]["language_loss"].item() == 3.0


def test_load_of_experts():
    assert expert_load([5, 5, 5, 5]) == {"entropy": pytest.approx(1), "most_used": 0.25, "least_used": 0.25}
    assert expert_load([20, 0, 0, 0]) == {"entropy": 0, "most_used": 1, "least_used": 0}
    assert expert_load([0, 0]) == {}


@pytest.mark.parametrize("asked", [None, (70, 100, 149)], ids=["last", "chosen"])
@pytest.mark.parametrize("layout", ["packed", "left", "right"])
def test_the_selected_mass_is_that_of_plain_attention(layout, asked):
    """Against a softmax over all keys of the document, of one query and head at a time."""
    model = make_model(num_hidden_layers=4).train()
    config = model.config
    seen = []

    def observe(layer, query, key, blocks, sequence_layout):
        seen.append((query.detach(), key.detach(), blocks, sequence_layout, layer.scaling))

    layers = [module for module in model.modules() if isinstance(module, MiniMaxM3VLAttention) and module.selector]
    layers[0].selection_observer = observe
    long, short = 150, 40
    ids = torch.randint(5, 400, (1, long))
    if layout == "packed":
        inputs = {
            "input_ids": torch.cat([torch.randint(5, 400, (1, short)), ids], 1),
            "position_ids": torch.cat([torch.arange(short), torch.arange(long)])[None],
        }
        real, start = None, short
    else:
        before, after = (200, 0) if layout == "left" else (0, 200)  # longer than the document
        mask = torch.nn.functional.pad(torch.ones_like(ids), (before, after))
        inputs = {"input_ids": torch.nn.functional.pad(ids, (before, after)), "attention_mask": mask}
        real, start = mask.bool(), before
    model(**inputs, use_cache=False)
    ((query, key, blocks, sequence_layout, scale),) = seen
    ordered = None if real is None else sequence_layout.order_queries(real)
    if real is not None and not bool(ordered[0, start]):
        start = int(ordered[0].nonzero()[0])
    places = None if asked is None else torch.tensor(asked) + start
    options = (config.index_block_size, scale, places)
    mass, best, count = selected_mass(query, key, blocks, sequence_layout, ordered, *options)
    positions = range(long - 8, long) if asked is None else asked
    assert count == len(positions)
    shares, best_shares = [], []
    group = query.shape[2] // key.shape[2]
    for position in positions:
        of_blocks: dict[int, list[float]] = {}
        for head in range(query.shape[2]):
            keys = key[0, start : start + position + 1, head // group]
            weights = (keys @ query[0, start + position, head] * scale).softmax(0)
            chosen = set(blocks[0, start + position, head // group].tolist())
            held = [w for at, w in enumerate(weights.tolist()) if at // config.index_block_size in chosen]
            shares.append(sum(held))
            summed = of_blocks.setdefault(head // group, [0.0] * (position // config.index_block_size + 1))
            for at, w in enumerate(weights.tolist()):
                summed[at // config.index_block_size] += w / group
        best_shares += [sum(sorted(summed)[-blocks.shape[-1] :]) for summed in of_blocks.values()]
    assert mass / count == pytest.approx(sum(shares) / len(shares), abs=1e-5)
    assert best / count == pytest.approx(sum(best_shares) / len(best_shares), abs=1e-5)
    assert 0 < mass <= best < count


def test_queries_whose_blocks_are_all_selected_do_not_count(tmp_path):
    model = make_model(num_hidden_layers=4)
    width = model.config.index_block_size * model.config.index_topk_blocks
    short, long = (make_trainer(tmp_path, model, make_rows(n, n), RunMonitor(), max_steps=1) for n in (width - 2, 200))
    short.train()
    long.train()
    assert "selected_mass" not in logs_of(short)[0]
    assert 0 < logs_of(long)[0]["selected_mass"] < 1


# ---- in a trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_losses_apart_add_up_to_the_loss(tmp_path, accumulation):
    rows = make_rows(60, 100, 80, 40, 90, 70)
    options = {"gradient_accumulation_steps": accumulation, "logging_steps": 2, "eval_strategy": "steps"}
    trainer = make_trainer(tmp_path, make_model(**LOSSES), rows, RunMonitor(), **options, eval_steps=2)
    trainer.train()
    (log,) = logs_of(trainer)
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    for entry, prefix in ((log, ""), (evaluation, "eval_")):
        total = entry[f"{prefix}language_loss"]
        total += 0.01 * entry[f"{prefix}balance_loss"] + 0.1 * entry[f"{prefix}indexer_loss"]
        # micro-batches weight the balance by their tokens in the loss, and alike in the log
        assert total == pytest.approx(entry[f"{prefix}loss"], rel=1e-3)
        assert 0 < entry[f"{prefix}selected_mass"] <= 1
    assert log["balance_loss"] > 1 and log["indexer_loss"] > 0


def test_rates_leave_evaluation_and_saving_out(tmp_path, monkeypatch):
    """With a clock that goes on by the test alone."""
    now = [100.0]
    monkeypatch.setattr(run_monitor, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    model, monitor = make_model(num_hidden_layers=2).train(), RunMonitor(report=False, console=False)
    trainer = make_trainer(tmp_path, model, make_rows(50, 50), max_steps=4)
    state, control = trainer.state, trainer.control
    state.max_steps, state.logging_steps = 4, 2
    events = {"args": trainer.args, "state": state, "control": control, "model": model}
    monitor.on_train_begin(**events)
    ids = torch.randint(5, 400, (1, 50))
    for step in (1, 2):
        monitor.on_step_begin(**events)
        model(input_ids=ids, labels=ids)
        now[0] += 2.0
        state.global_step = step
        monitor.on_step_end(**events)
        if step == 1:
            now[0] += 1000.0
            monitor.on_evaluate(**events)
            now[0] += 500.0
            monitor.on_save(**events)
    logs = {"loss": 1.0}
    monitor.on_log(**events, logs=logs)
    assert logs["tokens_per_second"] == pytest.approx(100 / 4)
    assert logs["learned_tokens_per_second"] == pytest.approx(98 / 4)
    assert logs["eta_seconds"] == pytest.approx(1504)  # the rest of the run evaluates and saves too
    monitor.close()


def test_mfu_is_a_share_of_the_peak(tmp_path):
    trainer = make_trainer(tmp_path, make_model(num_hidden_layers=2), make_rows(50, 50), RunMonitor(peak=1e12))
    trainer.train()
    log = logs_of(trainer)[-1]
    assert log["mfu"] == pytest.approx(log["flops_per_second"] / 1e12)
    assert log["peak_memory_gib"] > 0.1
    assert "language_loss" not in log, "it is the loss"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A1000", None),
    ],
)
def test_peaks_of_devices(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_a_run_with_it_is_the_same_run(tmp_path, tiny_checkpoint):
    """Bitwise, with answers to prompts in between, and nothing stays on the model."""
    rows, weights, hooks = make_rows(150, 100, 120, 90), [], []
    for monitor in (None, RunMonitor(samples=1, max_new_tokens=2)):
        model = make_model(**LOSSES, attention_dropout=0.1)
        options = {"eval_strategy": "steps", "eval_steps": 1}
        trainer = make_trainer(tmp_path, model, rows, monitor, **options)
        trainer.callback_handler.processing_class = AutoTokenizer.from_pretrained(tiny_checkpoint)
        trainer.train()
        weights.append(model.state_dict())
        hooks.append(sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()))
        assert not any("selection_observer" in vars(module) for module in model.modules())
    assert hooks[0] == hooks[1]
    assert len(monitor.samples) == 2
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_one_line_for_each_log(tmp_path, capsys):
    trainer = make_trainer(tmp_path, make_model(**LOSSES), make_rows(150, 100), RunMonitor(), logging_steps=1)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [re.match(r"step \d/2", line)[0] for line in lines] == ["step 1/2", "step 2/2"]
    for name in ("loss", "language", "balance", "indexer", "gradient", "tokens/s", "FLOP/s", "GiB", "experts", "left"):
        assert name in lines[0], name


@pytest.mark.parametrize("steps, logged", [(500, [2]), (2, [2]), (1, [1, 2])])
def test_a_short_run_shows_its_end(steps, logged, tmp_path, capsys):
    """Also where `logging_steps` is greater than the number of steps, and each step once."""
    rows = make_rows(1200, 1200, 1200, 1200)
    trainer = make_trainer(tmp_path, make_model(**LOSSES), rows, RunMonitor(), logging_steps=steps)
    trainer.train()
    assert [entry["step"] for entry in logs_of(trainer)] == logged
    assert "selected_mass" in logs_of(trainer)[-1]
    assert capsys.readouterr().out.count("step 2/2") == 1
    assert "<circle" in (tmp_path / "report.html").read_text()


def test_no_log_where_none_is_wanted(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), make_rows(50, 50), RunMonitor(), logging_strategy="no")
    trainer.train()
    assert logs_of(trainer) == []


@pytest.mark.parametrize("options", [{}, LOSSES], ids=["language", "all losses"])
def test_a_loss_that_is_no_number_is_seen(options, tmp_path, capsys, monkeypatch):
    """`Trainer` alone logs such a loss as 0."""
    warnings = []
    monkeypatch.setattr(run_monitor.logger, "warning", warnings.append)
    model = make_model(**options)
    trainer = make_trainer(tmp_path, model, make_rows(50, 50), RunMonitor(), max_steps=3)
    trainer.train()
    assert not warnings
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    trainer.train()
    assert "language nan" in capsys.readouterr().out
    assert len(warnings) == 1
    assert "language_loss is nan at step 1" in warnings[0]
    assert warnings[0] in (tmp_path / "report.html").read_text()


def test_a_run_continues_beside_samples_that_were_cut_off(tmp_path):
    lines = [json.dumps({"step": step, "prompt": "a", "answer": "b", "reference": "c"}) for step in (1, 2)]
    (tmp_path / "samples.jsonl").write_text(f"{lines[0]}\n{lines[1][:20]}")
    assert [sample["step"] for sample in run_monitor.read_samples(tmp_path / "samples.jsonl")] == [1]


def test_bars_stay_and_their_lines_go(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path, make_model(num_hidden_layers=2), make_rows(50, 50), RunMonitor(), disable_tqdm=False
    )
    assert any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    assert "{'loss'" not in capsys.readouterr().out


def test_tensorboard_has_the_values(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(
        tmp_path, make_model(**LOSSES), make_rows(150, 100), RunMonitor(), report_to=["tensorboard"]
    )
    trainer.train()
    found = accumulator.EventAccumulator(str(tmp_path / "logs"))
    found.Reload()
    names = set(found.Tags()["scalars"])
    assert {"train/tokens_per_second", "train/expert_entropy", "train/language_loss", "train/eta_seconds"} <= names
    assert {"train/layer_01/expert_entropy", "train/layer_03/selected_mass"} <= names


def test_it_works_as_an_ordinary_callback_of_trl(tmp_path, tiny_checkpoint):
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no", bf16=False,
        per_device_train_batch_size=2,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in make_rows(100, 60)])
    trainer = trl.SFTTrainer(
        make_model(),
        arguments,
        train_dataset=rows,
        callbacks=[RunMonitor()],
        processing_class=AutoTokenizer.from_pretrained(tiny_checkpoint),
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train()
    logs = logs_of(trainer)
    assert len(logs) == 2
    assert all(log["tokens_per_second"] > log["learned_tokens_per_second"] > 0 for log in logs)
    assert all(0 < log["expert_entropy"] <= 1 for log in logs)


def test_another_model_is_refused(tmp_path):
    monitor = RunMonitor()
    trainer = make_trainer(tmp_path, make_model(num_hidden_layers=2), make_rows(50, 50))
    with pytest.raises(ValueError, match="must train a MiniMax-M3, got Linear"):
        monitor.on_train_begin(trainer.args, trainer.state, trainer.control, model=torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": -1}, "`samples` must be an integer of at least 0, got -1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be an integer of at least 1, got 0"),
        ({"peak": 0.0}, "`peak` must be a positive number"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        RunMonitor(**options)


# ---- the report ---------------------------------------------------------------------------------------------------


def test_operations_where_zero3_has_cut_the_weights():
    model = make_model()
    model.model.embed_tokens.requires_grad_(False)
    expected = PassTallies(model)._flops.per_token
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert PassTallies(model)._flops.per_token == expected


def test_an_image_of_a_prompt_is_one_placeholder():
    ids = torch.tensor([7, 7, 1, 1, 7, 7, 7, 8, 8, 1, 7])
    assert shorten_media(ids, {7, 8}).tolist() == [7, 1, 1, 7, 1, 7]
    assert shorten_media(ids, set()).tolist() == ids.tolist()


def test_the_report_needs_no_other_file(tmp_path):
    trainer = make_trainer(tmp_path, make_model(**LOSSES), make_rows(150, 100), RunMonitor(facts={"a<b": "c&d"}))
    trainer.train()
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "http" not in page and "src=" not in page
    assert page.count("<polyline") >= 10
    assert "a&lt;b" in page and "c&amp;d" in page
    assert page.count('<tr><td class="number">') == 3  # layers with experts; the sparse ones are among them


def test_values_of_curves():
    history = [{"loss": float(step), "step": step} for step in range(4 * MOST_POINTS + 1)]
    points = points_of(history, "loss")
    assert len(points) <= MOST_POINTS + 2
    assert points[0] == (0, 0) and points[-1] == (4 * MOST_POINTS, 4 * MOST_POINTS)
    assert points_of([{"loss": float("nan"), "step": 1}, {"loss": "2", "step": 2}, {"eval_loss": 1.0}], "loss") == []
    assert chart("Nothing", {"loss": []}) == ""
    single = chart("One <point>", {"loss": [(3.0, 2.0)]})
    assert "One &lt;point&gt;" in single and "nan" not in single
    sample = {"step": 1, "prompt": "<b>", "answer": "&", "reference": "r"}
    assert "&lt;b&gt;" in report_page("t", {}, [], {}, [sample])


# ---- several processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_report_what_one_does(tmp_path, tiny_checkpoint):
    """The same four rows in a step: the same experts, losses and one report."""
    rows = [{"text": f"Block {number} holds the keys of its own sequence. " * 4} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for processes in (1, 2):
        flags = ["--model", tiny_checkpoint, "--dataset", tmp_path / "rows.jsonl", "--output_dir", tmp_path / f"run{processes}",
                 "--use_cpu", "--max_steps", "1", "--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true",
                 "--per_device_train_batch_size", str(4 // processes), "--router_aux_loss_coef", "0.01",
                 "--eval_dataset", tmp_path / "rows.jsonl", "--sample_tokens", "4"]  # fmt: skip
        printed = run_script(
            ROOT / "scripts" / "finetune.py", *map(str, flags),
            folder=tmp_path, processes=processes, ACCELERATE_USE_CPU="true",
        )  # fmt: skip
        assert "".join(printed).count("step 1/1") == 1
        folder = tmp_path / f"run{processes}"
        assert (folder / "report.html").is_file() and len((folder / "samples.jsonl").read_text().splitlines()) == 2
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        found.append(next(entry for entry in history if "loss" in entry))
    one, two = found
    for name in ("expert_entropy", "expert_most_used", "expert_least_used"):
        assert two[name] == pytest.approx(one[name], abs=1e-6), name
    assert two["language_loss"] == pytest.approx(one["language_loss"], rel=1e-4)
    assert two["balance_loss"] == pytest.approx(one["balance_loss"], rel=0.02)  # each process balances its own tokens

"""`scripts/pretrain.py` from end to end on a tiny model: it learns, resumes to the same weights, and scores rightly."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from configuration_minimax_m3 import small_config, tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from processing_minimax_m3.pretraining import LongRows, Packs, Stage, collate_packs, parse_stages
from processing_minimax_m3.pretraining.packs import join_rows

STEPS = 6
OPTIONS = (
    *("--config", "tiny", "--use_cpu", "--max_steps", str(STEPS), "--pack_tokens", "2048", "--stages", "1024:0.5,2048:1"),
    *("--tasks", "thinking=1,image=1", "--eval_packs", "2", "--eval_steps", "3", "--logging_steps", "1"),
    *("--save_steps", "4", "--dataloader_num_workers", "0", "--indexer_warmup_share", "0.34", "--disable_tqdm", "true"),
)  # fmt: skip


def run(load_script, folder, *more: str):
    return load_script("pretrain").main([*OPTIONS, "--output_dir", str(folder), *more])


def curves(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]


def losses(folder) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in curves(folder) if "loss" in line}


@pytest.fixture(scope="module")
def finished(load_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run(load_script, folder)
    return folder


def test_run_learns_and_logs_its_curves(finished):
    found = losses(finished)
    assert list(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < found[1] - 0.5
    lines = curves(finished)
    assert {line["step"]: line["tokens"] for line in lines}[STEPS] == STEPS * 2048
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    for name in ("eval_loss_image", "eval_loss_tools", "eval_accuracy_thinking_sum", "eval_expert_load"):
        assert name in evaluations[0]
    assert all(line["indexer_loss"] > 0 for line in lines if "loss" in line)


def test_result_is_a_checkpoint_of_its_own(finished):
    folder = finished / "final"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "indexer_loss_coef" not in config["text_config"]
    assert not config["text_config"]["output_router_logits"]
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert model.config.text_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("[e~[")
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "How many apples are left?"}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    assert processor.image_processor.get_number_of_image_patches(500, 500) == (112 // 14) ** 2
    assert processor.video_processor.get_num_of_video_patches(2, 500, 500) == (56 // 14) ** 2
    record = json.loads((folder / "training.json").read_text())
    assert record["seed"] == 42
    assert record["steps"] == STEPS
    assert "thinking=1,image=1" in record["command"]
    assert record["seconds"] == [
        round(line["train_runtime"], 1) for line in curves(finished) if "train_runtime" in line
    ]
    assert len(record["seconds"]) == 1 and "earlier_runs" not in record
    assert record["commit"] is None or re.fullmatch("[0-9a-f]{7,}", record["commit"])


@pytest.mark.slow
def test_resumed_run_has_the_same_losses_and_weights(load_script, finished, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(finished, resumed, ignore=shutil.ignore_patterns("final", f"checkpoint-{STEPS}"))
    run(load_script, resumed, "--resume_from_checkpoint", "true")
    assert losses(resumed) == losses(finished)
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (finished, resumed)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), f"holds checkpoint-{STEPS} of an earlier run.*--resume_from_checkpoint true"),
        (("--resume_from_checkpoint", "true", "--max_steps", "5"), f"`--max_steps` must be at least {STEPS}"),
        (("--resume_from_checkpoint", "true", "--seed", "7"), "`seed` was 42 and is 7 now"),
        (
            ("--resume_from_checkpoint", "true", "--tasks", "thinking"),
            "`tasks` was 'thinking=1,image=1' and is 'thinking'",
        ),
    ],
)
def test_run_neither_loses_nor_mixes_what_another_left(load_script, finished, more, message):
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    with pytest.raises(SystemExit, match=f"^pretrain: .*{message}"):
        run(load_script, finished, *more)
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_incomplete_checkpoint_is_passed_over(load_script, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    weights = tmp_path / "run" / f"checkpoint-{STEPS}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    options = [*OPTIONS, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "true"]
    trainer = load_script("pretrain").prepare(options)
    assert trainer.args.resume_from_checkpoint.endswith("checkpoint-4")


def test_line_that_was_cut_off_is_dropped(load_script, tmp_path):
    path = tmp_path / "curves.jsonl"
    path.write_text('{"step": 4}\n{"step": 8}\n{"step": 4, "tok')
    state = SimpleNamespace(global_step=4, is_world_process_zero=True)
    load_script("pretraining_run").CurveLog(path, 1).on_train_begin(None, state, None)
    assert path.read_text() == '{"step": 4}\n'


def test_failed_end_leaves_the_earlier_result(load_script, finished, tmp_path, monkeypatch):
    pretrain = load_script("pretrain")
    shutil.copytree(finished / "final", tmp_path / "final")
    before = {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()}

    def fail(trainer, folder, argv, metrics):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(pretrain, "write_final", fail)
    with pytest.raises(OSError, match="no space left"):
        pretrain.save_final(None, tmp_path / "final", [], {})
    assert {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()} == before


def test_earlier_runs_are_told_oldest_first(load_script, finished, tmp_path):
    pretrain = load_script("pretrain")
    argv = [*OPTIONS, "--output_dir", str(tmp_path)]
    trainer = pretrain.prepare(argv)
    assert trainer.earlier_run is None
    shutil.copy(finished / "curves.jsonl", tmp_path)
    trainer.earlier_run = {"seed": 2, "earlier_runs": [{"seed": 1}]}
    pretrain.save_final(trainer, tmp_path / "final", argv, {})
    record = json.loads((tmp_path / "final" / "training.json").read_text())
    assert record["earlier_runs"] == [{"seed": 1}, {"seed": 2}]


def test_options_of_long_rows_are_those_of_the_training_packs(load_script, tmp_path):
    """Held-out packs keep the defaults, so these options change no held-out row."""
    options = ("--long_share", "0.9", "--long_spread", "2", "--most_positions", "4096")
    trainer = load_script("pretrain").prepare([*OPTIONS, "--output_dir", str(tmp_path), *options])
    assert trainer.train_dataset.long_rows == LongRows(share=0.9, spread=2.0, most_positions=4096)
    assert trainer.eval_dataset.long_rows == LongRows()


def test_tree_without_git_has_no_commit(load_script, tmp_path, monkeypatch):
    pretrain = load_script("pretrain")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    assert pretrain.commit_of_this_file() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pretrain.commit_of_this_file() is None


@pytest.mark.slow
def test_run_goes_on_from_the_weights_and_the_tokenizer_of_another(load_script, finished, tmp_path):
    options = [option for option in OPTIONS if option not in ("--config", "tiny")]
    more = ["--output_dir", str(tmp_path), "--init_from", str(finished / "final"), "--seed", "7"]
    trainer = load_script("pretrain").main([*options, *more])
    assert losses(tmp_path)[1] < losses(finished)[1] - 0.2
    assert (
        trainer.processor.tokenizer.get_vocab()
        == AutoProcessor.from_pretrained(finished / "final").tokenizer.get_vocab()
    )
    record, earlier = (json.loads((f / "final" / "training.json").read_text()) for f in (tmp_path, finished))
    assert record["options"]["init_from"] == more[3]
    assert record["earlier_runs"] == [earlier]
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "float32" not in str(config)


def test_a_loss_that_is_no_number_ends_the_run(load_script, tmp_path, monkeypatch):
    pretrain = load_script("pretrain")
    monkeypatch.setattr(pretrain.PackTrainer, "training_step", lambda *args, **kwargs: torch.tensor(torch.nan))
    with pytest.raises(SystemExit, match="^pretrain: the loss is nan at step 1, .*lower `--learning_rate`"):
        pretrain.main([*OPTIONS, "--output_dir", str(tmp_path)])
    assert not (tmp_path / "final").exists()


@pytest.mark.slow
def test_time_limit_saves_a_run_that_goes_on(load_script, finished, tmp_path, capsys):
    run(load_script, tmp_path, "--time_limit", "0.001")
    assert "stopped at step 1" in capsys.readouterr().out
    assert not (tmp_path / "final").exists()
    run(load_script, tmp_path, "--resume_from_checkpoint", "true")
    assert losses(tmp_path) == losses(finished)


def test_phases_follow_the_number_of_the_step(load_script):
    phases = load_script("pretraining_run").IndexerPhases(0.5, warmup_steps=2)
    model = MiniMaxM3SparseForConditionalGeneration(tiny_config())
    found = []
    for step in (0, 1, 2, 5):
        phases.on_step_begin(None, SimpleNamespace(global_step=step), None, model=model)
        text = model.config.get_text_config()
        found.append((text.indexer_warmup, text.indexer_loss_coef))
    assert found == [(True, 0.5), (True, 0.5), (False, 0.5), (False, 0.5)]


def test_first_stage_may_be_the_warm_up(load_script):
    """A query of the small model selects 16 blocks of 128 keys."""
    dense_steps = load_script("pretrain").dense_steps
    stages = parse_stages("1024:0.2,2048:0.4,4096:1")
    assert dense_steps(small_config(), stages, 1000, 0) == 400
    assert dense_steps(small_config(), stages, 1000, 500) == 500
    assert dense_steps(small_config(), stages[2:], 1000, 0) == 0


def test_scores_equal_those_of_each_row_alone(load_script, processor, weights):
    torch.manual_seed(0)
    model = MiniMaxM3SparseForConditionalGeneration(tiny_config(text={"vocab_size": 1024}))
    packs = Packs(processor, "heldout", 2, tokens=2048, stages=[Stage(1.0, 1024)], weights=weights)
    scores = load_script("pretraining_run").score_packs(model, packs)
    assert model.training
    model.eval()
    total, count, right, answers = {}, {}, {}, {}
    for index in range(2):
        for row in packs.rows(index):
            inputs = collate_packs([join_rows([row], len(row.ids), processor.tokenizer.pad_token_id)])
            with torch.no_grad():
                logits = model(**inputs, use_cache=False).logits[0].log_softmax(-1)
            for place in range(1, len(row.ids)):
                if row.labels[place] >= 0:
                    value = -logits[place - 1, row.labels[place]].item()
                    total[row.modality] = total.get(row.modality, 0.0) + value
                    count[row.modality] = count.get(row.modality, 0) + 1
            for answer in row.answers:
                guesses = logits[answer.start - 1 : answer.end - 1].argmax(-1).tolist()
                right[answer.task] = right.get(answer.task, 0) + (
                    guesses == row.ids[answer.start : answer.end].tolist()
                )
                answers[answer.task] = answers.get(answer.task, 0) + 1
    assert len(total) > 2
    for modality in total:
        assert scores[f"loss_{modality}"] == pytest.approx(total[modality] / count[modality], abs=2e-4)
    assert scores["loss"] == pytest.approx(sum(total.values()) / sum(count.values()), abs=2e-4)
    for task in answers:
        assert scores[f"answers_{task}"] == answers[task]
        assert scores[f"accuracy_{task}"] == pytest.approx(right[task] / answers[task], abs=1e-4)
    assert 1 <= scores["expert_load"] <= 4


def test_right_answers_count_as_right(load_script, processor, monkeypatch):
    """A stand-in for the model knows the next token, except in some answers."""
    packs = Packs(processor, "heldout", 1, tokens=2048, stages=[Stage(1.0, 1024)], weights={"thinking": 1.0})
    pack = packs[0]
    missed = pack["answers"][1]

    class Knowing(torch.nn.Linear):
        config = tiny_config()

        def forward(self, input_ids, logits_to_keep, **kwargs):
            following = input_ids[0, logits_to_keep + 1].clone()
            following[logits_to_keep + 1 == missed[3] - 1] += 1  # the last token of one answer
            logits = torch.nn.functional.one_hot(following, 1024).float()[None] * 20
            return SimpleNamespace(logits=logits, router_logits=(torch.rand(2048, 4),))

    scores = load_script("pretraining_run").score_packs(Knowing(1, 1), packs)
    number = len(pack["answers"])
    assert scores["accuracy_thinking"] == pytest.approx((number - 1) / number, abs=1e-4)
    assert scores["loss"] < 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--config", "huge"), "`--config` must be one of .*'huge'"),
        (("--init_from", "run/final"), "`--config` has no effect with `--init_from`"),
        (("--max_steps", "-1"), "`--max_steps` must be at least 1"),
        (("--indexer_warmup_share", "2"), "`--indexer_warmup_share` must be from 0 to 1, got 2"),
        (("--long_share", "1.5"), "`--long_share` must be from 0 to 1, got 1.5"),
        (("--long_share", "nan"), "`--long_share` must be from 0 to 1, got nan"),
        (("--long_spread", "0.5"), "`--long_spread` must be at least 1, got 0.5"),
        (("--long_spread", "nan"), "`--long_spread` must be at least 1, got nan"),
        (("--most_positions", "-1"), "`--most_positions` must be at least 0, got -1"),
        (("--most_positions", "1000"), "`--most_positions` must be above the length of .*, 1024 tokens, .*, got 1000"),
        (("--stages", "131072:1", "--most_positions", "9000"), "must be above .*, 16384 tokens, .*, got 9000"),
        (("--tasks", "poetry=1"), "poetry"),
        (("--tasks", "image=many"), "`--tasks` must be NAME=WEIGHT.*'image=many'"),
        (("--stages", "4096:1"), "pack of 2048 tokens cannot hold"),
        (("--stages", "256:1", "--tasks", "video=1"), "no row of video fits into 256 tokens.*`--stages`"),
        (("--train_sampling_strategy", "random"), "must be sequential"),
        (("--tasks", "image=inf"), "`weights.'image'.` must be a number above 0, got inf"),
        (("--tasks", "image=1,image=2"), "`--tasks` must have each name once, got 'image' twice"),
        (("--time_limit", "-1"), "`--time_limit` must be at least 0 seconds, got -1"),
        (("--indexer_loss_coef", "nan"), "`--indexer_loss_coef` must be a number from 0, got nan"),
        (("--per_device_train_batch_size", "0"), "--per_device_train_batch_size must be at least 1, got 0"),
        (("--dataloader_num_workers", "-1"), "`--dataloader_num_workers` must be at least 0, got -1"),
        (("--resume_from_checkpoint", "true"), "no complete checkpoint in"),
        (("--resume_from_checkpoint", "nowhere"), "there is no folder nowhere"),
        (("--dataloader_num_workers", "100000"), "/dev/shm has .* MiB free.*dataloader_num_workers"),
    ],
)
def test_faulty_options_end_the_program_with_their_name(load_script, tmp_path, more, message):
    with pytest.raises(SystemExit, match=f"^pretrain: .*{message}"):
        run(load_script, tmp_path, *more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "minimax_m3_vl", "text_config": 3}', "has a config.json that no model can have: "),
        (None, "must be the folder of a checkpoint, but .* has no config.json"),
        ('{"model_type": "llama"}', "must be a checkpoint of the model type 'minimax_m3_vl', but .* has 'llama'"),
    ],
)
def test_wrong_folder_to_start_from_is_named(load_script, tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    options = [option for option in OPTIONS if option not in ("--config", "tiny")]
    with pytest.raises(SystemExit, match=f"^pretrain: `--init_from` {message}"):
        load_script("pretrain").main([*options, "--init_from", str(tmp_path), "--output_dir", str(tmp_path / "run")])


def test_weights_that_are_cut_off_are_named(load_script, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "cut")
    (file,) = (tmp_path / "cut").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match="`checkpoint` must be a whole checkpoint, but .* model.safetensors is cut off"
    ):
        load_script("checkpoint_folder").check_checkpoint(tmp_path / "cut")


def test_weights_of_other_sizes_are_named(load_script, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config))
    options = [option for option in OPTIONS if option not in ("--config", "tiny")]
    more = ["--init_from", str(tmp_path / "mixed"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="^pretrain: `--init_from`: the weights in .* do not fit its config.json"):
        load_script("pretrain").main([*options, *more])

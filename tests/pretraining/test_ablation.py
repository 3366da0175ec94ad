"""`scripts/ablation.py`: the same rows for all arms, the comparison of their runs, and the script from end to end."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from processing_minimax_m3.pretraining import LongRows, Packs, Stage

from ..forked_processes import start_python

SHORT = (
    *("--steps", "2", "--evaluations", "1", "--eval_packs", "1", "--pack_tokens", "1024"),
    *("--stages", "512:1", "--tasks", "image,code", "--workers", "0"),
)  # fmt: skip
SMALL = ("--size", "tiny", *SHORT)


@pytest.fixture(scope="module")
def scripts(load_script):
    return SimpleNamespace(**{name: load_script(name) for name in ("ablation", "ablation_runs", "ablation_report")})


def test_arms_with_one_modality_read_its_rows_of_the_same_packs(scripts, processor, tmp_path):
    weights = {"image": 2.0, "code": 1.0, "recall": 1.0}
    packs = Packs(processor, "train", 2, tokens=4096, stages=[Stage(1.0, 1024)], weights=weights)
    assert list(scripts.ablation_runs.write_packs(packs, tmp_path, 0)) == [0, 1]
    for modalities in (scripts.ablation_runs.EVERYTHING, ("image",), ("code", "recall")):
        written = scripts.ablation_runs.WrittenPacks(tmp_path, 2, modalities, packs.padding)
        for index in range(2):
            expected = [row for row in packs.rows(index) if row.modality in modalities]
            found = written.rows(index)
            assert [row.ids.tolist() for row in found] == [row.ids.tolist() for row in expected]
            for row, other in zip(found, expected):
                for (patches, grids), (same, same_grids) in zip(row.images + row.videos, other.images + other.videos):
                    assert patches.dtype == same.dtype and (patches - same).abs().max() < 0.02
                    assert grids.tolist() == same_grids.tolist()
            pack = written[index]
            assert pack["lengths"] == [len(row.ids) for row in expected], "no padding"
    with pytest.raises(ValueError, match="no pack in .* has a row of poetry"):
        scripts.ablation_runs.WrittenPacks(tmp_path, 2, ("poetry",), packs.padding)[0]


def test_pack_without_a_row_of_the_modality_becomes_the_next_one(scripts, processor, tmp_path):
    for index, weights in enumerate(({"code": 1.0}, {"thinking": 1.0})):
        (tmp_path / str(index)).mkdir()
        packs = Packs(processor, "train", 1, tokens=1024, stages=[Stage(1.0, 512)], weights=weights)
        list(scripts.ablation_runs.write_packs(packs, tmp_path / str(index), 0))
        (tmp_path / str(index) / "0.pickle").rename(tmp_path / f"{index}.pickle")
    written = scripts.ablation_runs.WrittenPacks(tmp_path, 2, ("tools",), packs.padding)
    assert written[0]["input_ids"].tolist() == written[1]["input_ids"].tolist()
    assert set(written[0]["modalities"]) == {"tools"}


def test_arms_differ_in_one_thing(scripts):
    arms, config = scripts.ablation_runs.ARMS, scripts.ablation_runs.arm_config
    for size in ("small", "tiny"):
        types = {name: config(arm, size).text_config.layer_types for name, arm in arms.items()}
        assert {tuple(types[name]) for name in ("learned", "text only", "image only", "video only")} == {
            tuple(types["learned"])
        }
        assert {found[0] for found in types.values()} == {"full_attention"}
        text = config(arms["structured"], size).text_config
        pattern = (text.structured_local_blocks, text.structured_anchor_blocks, text.structured_random_blocks)
        assert sum(pattern) == text.index_topk_blocks, "as many blocks as the learned arm selects"
    assert {len(arms[name].modalities) for name in ("dense", "learned", "structured")} == {6}


def make_record(arm: str, seed: int, loss: float, steps=(10, 20), **scores: float) -> dict:
    evaluations = [{"step": step, "loss": loss * 20 / step, **scores} for step in steps]
    return {"arm": arm, "seed": seed, "evaluations": evaluations, "coverage": []}


def test_comparison_pairs_the_seeds(scripts):
    records = [make_record("dense", seed, 2.0 + seed) for seed in range(3)]
    records += [make_record("learned", seed, (2.0 + seed) * (1.0 + 0.01 * seed), loss_image=1.2) for seed in range(3)]
    records += [make_record("image only", seed, 9.0, loss_image=1.0) for seed in range(3)]
    found = scripts.ablation_report.compare(records)
    assert found["step"] == 20
    ratio = found["loss_ratios"]["loss: learned / dense"]
    assert ratio["values"] == pytest.approx([1.0, 1.01, 1.02])
    assert ratio["mean"] == pytest.approx(1.01)
    # Student's quantile 4.303, standard deviation 0.01
    assert ratio["interval"] == pytest.approx([1.01 - 4.303 * 0.01 / 3**0.5, 1.01 + 4.303 * 0.01 / 3**0.5], abs=1e-4)
    assert found["loss_ratios"]["loss_image: learned / image only"]["mean"] == pytest.approx(1.2)
    assert found["scores"]["loss"]["dense"]["mean"] == pytest.approx(3.0)
    assert "loss: structured / dense" not in found["loss_ratios"]


def test_comparison_is_at_the_last_step_that_all_runs_reached(scripts):
    records = [make_record("dense", 0, 2.0), make_record("learned", 0, 2.0, steps=(10,))]
    assert scripts.ablation_report.compare(records)["step"] == 10
    with pytest.raises(ValueError, match="no step has an evaluation of all runs.*'learned/0': 5"):
        scripts.ablation_report.compare([records[0], make_record("learned", 0, 2.0, steps=(5,))])


def test_recall_is_compared_by_arm_and_length(scripts, tmp_path, capsys):
    records = [make_record(arm, seed, 2.0, steps=(10,)) for arm in ("dense", "structured") for seed in range(2)]
    for record, far in zip(records, (1.0, 0.9, 0.2, 0.4)):
        record["recall"] = [{"tokens": 1024, "accuracy": 1.0}, {"tokens": 2048, "accuracy": far}]
    found = scripts.ablation_report.compare(records)
    assert {arm: {tokens: value["mean"] for tokens, value in by.items()} for arm, by in found["recall"].items()} == {
        "dense": {"1024": 1.0, "2048": 0.95},
        "structured": {"1024": 1.0, "2048": 0.3},
    }
    scripts.ablation_report.print_comparison(found)
    assert "recall of structured in 2,048 tokens: 0.3000 [" in capsys.readouterr().out
    result = {"comparison": found, "budget": {"arms": ["dense", "structured"]}, "runs": records}
    tables = scripts.ablation_report.ablation_tables(result)
    assert "| 2,048 | 95.0% (100%, 90%) | 30.0% (20%, 40%) |" in tables
    assert "selected blocks" not in tables, "no table without rows"
    assert scripts.ablation_report.plot_ablation(result, tmp_path / "picture.png").stat().st_size > 1000
    for record in records:
        del record["recall"]
    assert "recall" not in scripts.ablation_report.compare(records)


def fork(command, stdout, stderr, env):
    """Stands for `subprocess.Popen`."""
    process = start_python(command[1:], env, [Path(stdout.name), Path(stderr.name)])
    return SimpleNamespace(poll=lambda: process.exitcode, terminate=process.terminate)


@pytest.mark.slow
def test_script_trains_all_arms_and_compares_them(scripts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scripts.ablation, "subprocess", SimpleNamespace(Popen=fork))
    monkeypatch.setattr(scripts.ablation, "POLL", 0.1)
    arms = ("--arms", "dense,learned,image only", "--seeds", "1")
    recall = ("--recall_to", "1024", "--recall_rows", "1")
    scripts.ablation.main([str(tmp_path / "out"), *SMALL, *arms, *recall, "--work", str(tmp_path / "work")])
    result = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert result["budget"]["runs"] == 3 and result["budget"]["tokens"] == 2048
    assert sorted(run["arm"] for run in result["runs"]) == ["dense", "image only", "learned"]
    for run in result["runs"]:
        assert [step for step, _ in run["curve"]] == [1, 2]
        assert [evaluation["step"] for evaluation in run["evaluations"]] == [2]
        assert [(found["tokens"], found["answers"]) for found in run["recall"]] == [(1024, 5)]
    ratios = result["comparison"]["loss_ratios"]
    assert {"loss: learned / dense", "loss_image: learned / image only"} <= set(ratios)
    losses = {run["arm"]: run["evaluations"][0] for run in result["runs"]}
    expected = losses["learned"]["loss_image"] / losses["image only"]["loss_image"]
    assert ratios["loss_image: learned / image only"]["mean"] == pytest.approx(expected, abs=1e-4)
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 1000
    assert "3 runs (3 arms, 1 seeds) of 2 steps of 1,024 tokens" in capsys.readouterr().out


def test_failed_runs_are_named_with_their_log(scripts, tmp_path, capsys, monkeypatch):
    def fail(command, stdout, stderr, env):
        stdout.write("no memory left")
        return SimpleNamespace(poll=lambda: 1, terminate=lambda: None)

    monkeypatch.setattr(scripts.ablation, "subprocess", SimpleNamespace(Popen=fail))
    monkeypatch.setattr(scripts.ablation, "POLL", 0.0)
    monkeypatch.setattr(scripts.ablation, "make_data", lambda arguments, folder: None)
    with pytest.raises(SystemExit, match="all runs failed"):
        scripts.ablation.main([str(tmp_path / "out"), *SMALL, "--arms", "dense", "--seeds", "1"])
    assert "the run of 'dense' with seed 0 failed:\nno memory left" in capsys.readouterr().err


@pytest.mark.parametrize(("named", "expected"), [(None, "0101"), ("5,3", "5353")])
def test_runs_share_the_gpus(scripts, tmp_path, monkeypatch, named, expected):
    seen = []

    def start(command, stdout, stderr, env):
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        return SimpleNamespace(poll=lambda: 1, terminate=lambda: None)

    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(scripts.ablation.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(scripts.ablation, "subprocess", SimpleNamespace(Popen=start))
    monkeypatch.setattr(scripts.ablation, "POLL", 0.0)
    arguments = scripts.ablation.read_arguments([str(tmp_path), *SMALL, "--seeds", "2"])
    arguments.arms = ["dense", "learned"]
    assert scripts.ablation.train_all(arguments, tmp_path, []) == []
    assert seen == list(expected)


def test_plan_states_the_budget_and_trains_nothing(scripts, tmp_path, capsys):
    scripts.ablation.main(["--plan"])
    without_folder = capsys.readouterr().out
    scripts.ablation.main([str(tmp_path / "out"), "--plan"])
    text = capsys.readouterr().out
    assert text == without_folder
    assert text.startswith("18 runs (6 arms, 3 seeds) of 1,500 steps of 8,192 tokens: 12.3M tokens each")
    assert "image only: 7,367,104 parameters, minimax_m3_sparse, rows of image" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--arms", "dense,poetic"), "`--arms` must be names of .*'poetic'"),
        (("--tasks", "poetry"), "`--tasks` must be names of .*'poetry'"),
        (("--arms", "dense,dense"), "`--arms` must have each name once, got 'dense' twice"),
        (("--stages", "16384:1"), "a pack of 8192 tokens cannot hold the rows of 16384 tokens"),
        (
            ("--tasks", "code,thinking"),
            "`--tasks` must have rows of image for the arm 'image only', got rows of code, tools",
        ),
        (("--seeds", "0"), "`--seeds` must be above 0, got 0"),
        (("--evaluations", "9999"), "`--evaluations` must be at most the 1500 steps, got 9999"),
        (("--warmup_share", "2"), "`--warmup_share` must be from 0 to 1, got 2"),
        (("--long_share", "-1"), "`--long_share` must be from 0 to 1, got -1"),
        (("--learning_rate", "0"), "`--learning_rate` must be above 0, got 0"),
        (("--stages", "4096"), "a stage must be TOKENS:SHARE"),
        (("--jobs", "-1"), "`--jobs` must be at least 0, got -1"),
        (("--recall_to", "512"), "`--recall_to` must be 0 or at least 1024 tokens, got 512"),
        (("--recall_rows", "0"), "`--recall_rows` must be above 0, got 0"),
    ],
)
def test_faulty_options_end_the_program_with_their_name(scripts, tmp_path, more, message):
    with pytest.raises(SystemExit, match=f"^ablation: .*{message}"):
        scripts.ablation.main([str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["output", "work"])
def test_folder_that_cannot_be_written_is_named_before_anything_is_made(scripts, tmp_path, place):
    (tmp_path / "file").touch()
    folders = {"output": tmp_path / "out", "work": tmp_path / "work"} | {place: tmp_path / "file"}
    options = [str(folders["output"]), "--work", str(folders["work"]), "--arms", "dense", "--tasks", "code"]
    with pytest.raises(SystemExit, match=f"^ablation: `(--)?{place}` .*file cannot be written"):
        scripts.ablation.main(options)
    assert not list(tmp_path.rglob("*.pickle"))


@pytest.fixture(scope="module")
def checkpoint(scripts, processor, tmp_path_factory) -> Path:
    """A model as `pretrain.py` leaves it, with indexers in all layers but the first."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = scripts.ablation_runs.arm_config(scripts.ablation_runs.ARMS["learned"], "tiny")
    MiniMaxM3SparseForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("arm", ["dense", "learned", "structured"])
def test_arms_start_with_the_weights_of_a_checkpoint(scripts, checkpoint, tmp_path, monkeypatch, arm):
    class Started(Exception):
        pass

    def trainer(model, training, **_):
        raise Started(model, training)

    monkeypatch.setattr(scripts.ablation_runs, "PackTrainer", trainer)
    arguments = [
        "--init_from",
        str(checkpoint),
        "--learning_rate",
        "3e-4",
        "--run",
        f"{arm}/0",
        "--work",
        str(tmp_path),
    ]
    with pytest.raises(Started) as started:
        scripts.ablation.main([str(tmp_path / "out"), *SHORT, *arguments])
    model, training = started.value.args
    assert training.learning_rate == 3e-4
    kind = scripts.ablation_runs.ARMS[arm].attention
    assert model.config.text_config.layer_types == ["full_attention"] + 3 * [kind]
    expected = MiniMaxM3SparseForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    found = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    without = {name for name in expected if ".indexer." in name}
    assert set(expected) - set(found) == (set() if arm == "learned" else without) and without


def test_data_of_a_checkpoint_have_its_tokens(scripts, checkpoint, processor, tmp_path):
    options = ["--init_from", str(checkpoint), "--long_share", "1", "--tasks", "code", "--seeds", "1"]
    arguments = scripts.ablation.read_arguments([str(tmp_path / "out"), *SHORT, *options, "--stages", "1100:1"])
    arguments.pack_tokens, arguments.tasks = 1100, ["code"]
    scripts.ablation.make_data(arguments, tmp_path)
    (row, *_) = scripts.ablation_runs.WrittenPacks(tmp_path / "0", 1, ("code",), 0).rows(0)
    assert len(row.ids) >= 1024, "a long row comes first"
    (same, *_) = Packs(
        processor, "train", 2, tokens=1100, stages=[Stage(1.0, 1100)], weights={"code": 1.0}, long_rows=LongRows(1.0)
    ).rows(0)
    assert row.ids.tolist() == same.ids.tolist()
    found = scripts.ablation_runs.WrittenPacks(tmp_path / "heldout", 1, ("code",), 0).rows(0)
    expected = Packs(processor, "heldout", 1, tokens=1100, stages=[Stage(1.0, 1100)], weights={"code": 1.0}).rows(0)
    assert [row.ids.tolist() for row in found] == [row.ids.tolist() for row in expected], "whatever the share"


def test_a_checkpoint_without_indexers_cannot_start_the_learned_arm(scripts, checkpoint, tmp_path):
    folder = tmp_path / "dense"
    folder.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["layer_types"] = ["full_attention"] * 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="`--init_from` must have indexers .* for the arm 'learned'.* in .*dense"):
        scripts.ablation.main(["--plan", "--init_from", str(folder)])
    scripts.ablation.main(["--plan", "--init_from", str(folder), "--arms", "dense,structured"])
    with pytest.raises(SystemExit, match="`--init_from` must be the folder of a checkpoint"):
        scripts.ablation.main(["--plan", "--init_from", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="`--size` has no effect with `--init_from`"):
        scripts.ablation.main(["--plan", "--init_from", str(folder), "--arms", "dense", "--size", "small"])
    config["text_config"]["layer_types"][0] = "minimax_m3_structured"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="`--init_from` must have full_attention in its first layer"):
        scripts.ablation.main(["--plan", "--init_from", str(folder), "--arms", "dense"])


def test_comparison_needs_its_folder(scripts, capsys):
    with pytest.raises(SystemExit):
        scripts.ablation.main(["--seeds", "1"])
    assert "required: output" in capsys.readouterr().err


def test_missing_package_of_a_task_ends_the_program(scripts, tmp_path, monkeypatch):
    def fail(*_):
        raise ImportError("the task 'digits' needs scikit-learn")

    monkeypatch.setattr(scripts.ablation, "make_data", fail)
    with pytest.raises(SystemExit, match="^ablation: the task 'digits' needs scikit-learn"):
        scripts.ablation.main([str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_picture_of_a_broken_file_names_the_fault(scripts, tmp_path):
    (tmp_path / "ablation.json").write_text("{")
    with pytest.raises(SystemExit, match="^ablation: .*ablation.json is not readable JSON"):
        scripts.ablation.main(["plot", str(tmp_path / "ablation.json"), str(tmp_path / "picture.png")])

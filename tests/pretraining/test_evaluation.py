"""`scripts/evaluate_pretraining.py`: prompts, answers, their judgement, probes, and the script from end to end."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from processing_minimax_m3.pretraining import RowEncoder, digits, make_row

TASKS = ("recall", "image", "video", "tools", "thinking")


@pytest.fixture(scope="module")
def scripts(load_script):
    names = (
        "evaluate_pretraining",
        "evaluation_answers",
        "evaluation_probes",
        "evaluation_prompts",
        "plot_evaluation",
    )
    return SimpleNamespace(**{name: load_script(name) for name in names})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = tiny_config(text={"vocab_size": 1024})
    return MiniMaxM3SparseForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def checkpoint(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_interval_of_a_share(scripts):
    """Against values from a table of Wilson's formula."""
    interval = scripts.evaluation_answers.wilson_interval
    assert interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert interval(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    for right, total in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="`right` must be from 0 to `total`"):
            interval(right, total)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_what_stands_before_the_answers(scripts, processor, task):
    encoder = RowEncoder(processor)
    row = make_row(task, "heldout", 3, characters=800)
    whole = encoder.encode(row)
    prompts = scripts.evaluation_prompts.row_prompts(encoder, row)
    assert [prompt.answer for prompt in prompts] == row["answers"]
    for prompt, place in zip(prompts, whole.answers):
        assert prompt.ids.tolist() == whole.ids[: place.start].tolist()
        assert prompt.num_tokens == place.end - place.start
        for media, token in ((prompt.images, processor.image_token_id), (prompt.videos, processor.video_token_id)):
            assert sum(int(grids.prod(-1).sum()) for _, grids in media) == 4 * (prompt.ids == token).sum()
    assert len(prompts[-1].images) == len(whole.images)
    assert len(prompts[-1].videos) == len(whole.videos)


@pytest.mark.parametrize("task", ["image", "video"])
def test_files_give_the_same_prompts(scripts, processor, task):
    pytest.importorskip("av")
    row = make_row(task, "heldout", 5)
    plain = scripts.evaluation_prompts.row_prompts(RowEncoder(processor), row)
    files = scripts.evaluation_prompts.file_prompts(processor, row)
    assert len(plain) == len(files)
    for one, other in zip(plain, files):
        assert (one.question, one.answer) == (other.question, other.answer)
        assert one.ids.tolist() == other.ids.tolist()
        assert other.num_tokens >= one.num_tokens - 1
        for media, others in ((one.images, other.images), (one.videos, other.videos)):
            assert bool(media) == bool(others)
            if media:
                pixels, read = (np.concatenate([patches for patches, _ in part]) for part in (media, others))
                # png keeps pixels, mp4 nearly
                assert np.abs(pixels - read).mean() < (1e-5 if task == "image" else 0.3)


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_are_judged_right_and_no_others(scripts, processor, task):
    encoder = RowEncoder(processor)
    row = make_row(task, "heldout", 4, characters=600)
    whole, judge = encoder.encode(row), scripts.evaluation_prompts.judge
    prompts = scripts.evaluation_prompts.row_prompts(encoder, row)
    padding = processor.tokenizer.pad_token_id
    for number, (prompt, place) in enumerate(zip(prompts, whole.answers)):
        written = whole.ids[place.start : place.end]
        assert judge(processor, prompt, np.append(written, [padding] * 3))[:2] == (True, True)
        assert judge(processor, prompt, written[:-1])[:2] == (False, False), "it has no end"
        others = [
            o for o, p in zip(whole.answers, prompts) if p.answer != prompt.answer or p.question != prompt.question
        ]
        for other in others:
            if prompts[whole.answers.index(other)].answer != prompt.answer:
                assert not judge(processor, prompt, whole.ids[other.start : other.end])[0], number


def test_broken_call_is_not_well_formed(scripts, processor):
    encoder = RowEncoder(processor)
    row = make_row("tools", "heldout", 0)
    whole = encoder.encode(row)
    prompt, place = scripts.evaluation_prompts.row_prompts(encoder, row)[0], whole.answers[0]
    written = whole.ids[place.start : place.end]
    close = processor.tokenizer.convert_tokens_to_ids("</invoke>")
    broken = written[written != close] if close in written else np.delete(written, slice(-8, -1))
    assert scripts.evaluation_prompts.judge(processor, prompt, broken)[:2] == (False, False)


def greedy(model, prompt, scripts, steps):
    """The most probable token behind the whole text, again and again, up to the end of an answer."""
    inputs = scripts.evaluation_answers.model_inputs([prompt], model.config.get_text_config().pad_token_id)
    written = []
    for _ in range(steps):
        with torch.no_grad():
            written.append(int(model(**inputs, use_cache=False).logits[0, -1].argmax()))
        if written[-1] == model.generation_config.eos_token_id:
            break
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[written[-1]]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return written


@pytest.mark.parametrize("task", ["image", "video", "recall"])
def test_batch_and_turns_write_what_one_prompt_alone_gives(scripts, model, processor, task):
    prompts = scripts.evaluation_prompts.row_prompts(
        RowEncoder(processor), make_row(task, "heldout", 6, characters=500)
    )[:4]
    batch = scripts.evaluation_answers.answer_batch(model, prompts)
    turns = scripts.evaluation_answers.answer_in_turn(model, prompts)
    pieces = scripts.evaluation_answers.answer_in_turn(model, prompts, prefill_chunk_size=100)
    for prompt, *written in zip(prompts, batch, turns, pieces):
        expected = greedy(model, prompt, scripts, 4)
        # behind its end, a batch has padding
        assert [ids[: len(expected)].tolist() for ids in written] == [expected] * 3


def test_batches_hold_each_prompt_once_and_no_more_tokens_than_allowed(scripts):
    lengths = [5, 300, 20, 7, 90, 90, 1000]
    prompts = [SimpleNamespace(ids=np.zeros(length)) for length in lengths]
    found = list(scripts.evaluation_answers.batches(prompts, 400))
    assert sorted(number for batch in found for number in batch) == list(range(7))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[number] for number in batch) <= 400
    assert [len(batch) for batch in found] == [4, 1, 1, 1]


def test_recall_rows_have_their_length_and_depths(scripts, processor):
    module = scripts.evaluation_prompts
    depths = (0.0, 0.5, 1.0)
    data = module.PromptData(processor, [module.Job("recall", "recall", 0, 2048, depths)], seed=1)
    prompts = data[0]
    assert 0.9 * 2048 <= len(prompts[-1].ids) <= 2048
    assert [prompt.depth for prompt in prompts] == list(depths)
    text = processor.tokenizer.decode(prompts[0].ids).split("]~b]user\n")[1]
    places = [text.index(f"is {prompt.answer}.") / text.index("What is the number") for prompt in prompts]
    assert places == pytest.approx(depths, abs=0.12)
    with pytest.raises(ValueError, match="needs more than 64 tokens"):
        module.PromptData(processor, [module.Job("recall", "recall", 0, 64, depths)], seed=1)[0]


def test_perplexity_is_that_of_the_last_tokens_alone(scripts, model, processor):
    probes = scripts.evaluation_probes
    documents = [probes.code_tokens(RowEncoder(processor), index, 1024, 1) for index in range(2)]
    found = probes.code_perplexity(model, documents, [512, 1024, 4096], 1024, lambda: None)
    assert [(one["tokens"], one["documents"]) for one in found] == [(512, 2), (1024, 2)], "none has 4096 tokens"
    for one in found:
        losses = []
        for ids in documents:
            ids = torch.from_numpy(ids[-one["tokens"] :])[None]
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            losses.append(-logits[-257:-1].gather(1, ids[0, -256:, None]).mean().item())
        assert one["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        assert one["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)
        half = 1.96 * abs(losses[0] - losses[1]) / 2
        assert one["interval"] == pytest.approx([np.mean(losses) - half, np.mean(losses) + half], abs=1e-4)


def test_coverage_is_between_even_attention_and_all(scripts, model, processor):
    probes = scripts.evaluation_probes
    text = model.config.get_text_config()
    selected = text.index_topk_blocks * text.index_block_size
    documents = [probes.code_tokens(RowEncoder(processor), 0, 512, 1)]
    (found,) = probes.coverage(model, documents, [selected, 512], lambda: None)
    assert found["tokens"] == 512
    assert sorted(found["layers"]) == [str(i) for i, name in enumerate(text.layer_types) if "sparse" in name]
    assert found["share"] == pytest.approx(np.mean(list(found["layers"].values())), abs=1e-4)
    assert 0.1 < found["share"] < found["best"] < 0.95
    positions = np.linspace(selected, 512, 64)
    assert found["blocks_share"] == pytest.approx(float(np.mean(selected / positions)), abs=1e-4)
    for module in model.modules():
        assert "selection_observer" not in vars(module)


def test_load_of_experts_counts_the_choices_of_the_routers(scripts, model, processor):
    probes = scripts.evaluation_probes
    rows = probes.loaded_rows(RowEncoder(processor), ["thinking"], 2, seed=1)
    found = probes.expert_loads(model, rows, 4096, lambda: None)
    counts = torch.zeros(3, 4)
    for row in rows["thinking"]:
        with torch.no_grad():
            outputs = model(input_ids=torch.from_numpy(row.ids)[None], use_cache=False, output_router_logits=True)
        for layer, logits in enumerate(outputs.router_logits):
            counts[layer] += torch.bincount(logits.topk(2, dim=-1).indices.flatten(), minlength=4)
    for layer, entry in enumerate(found["thinking"]):
        assert entry["shares"] == pytest.approx((counts[layer] / counts[layer].sum()).tolist(), abs=0.01)
        assert entry["most_used"] == max(entry["shares"])
    assert found["all"] == found["thinking"], "of one task alone"


def test_script_writes_its_results(scripts, checkpoint, tmp_path, capsys):
    pytest.importorskip("av")
    options = ("--quick", "--tasks", "image,video,code", "--answers", "2", "--file_answers", "1", "--longest", "1024")
    record = scripts.evaluate_pretraining.main([str(checkpoint), str(tmp_path / "scores"), *options, "--workers", "0"])
    assert json.loads((tmp_path / "scores" / "results.json").read_text()) == record
    assert (tmp_path / "scores" / "results.png").stat().st_size > 1000
    assert sorted(record["answers"]) == ["image", "video"]
    for task in ("image", "video"):
        for part in ("answers", "files"):
            scores = record[part][task]
            assert scores["answers"] == sum(of_kind["answers"] for of_kind in scores["questions"].values())
            assert scores["interval"][0] <= scores["accuracy"] <= scores["interval"][1]
            assert scores["right"] == 0 and scores["mistakes"], "the weights are random"
    assert [row["tokens"] for row in record["recall"]] == [1024]
    assert [row["tokens"] for row in record["perplexity"]] == [512, 1024]
    assert set(record["experts"]) == {"image", "video", "code", "all"}
    assert set(record["seconds"]) == set(scripts.evaluate_pretraining.PARTS)
    assert "image from files: 0.0% right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--parts", "recall,recall"), "`--parts` must have each name once, got 'recall' twice"),
        (
            ("--parts", "answers", "--tasks", "code"),
            "`--tasks` must have one of .*recall.* for the part 'answers', got code",
        ),
        (
            ("--parts", "files", "--tasks", "recall"),
            "`--tasks` must have one of image.* for the part 'files', got recall",
        ),
        (("--parts", "poetry"), "`--parts` must be names of answers, .*'poetry'"),
        (("--tasks", "image,poetry"), "`--tasks` must be names of .*'poetry'"),
        (("--answers", "0"), "`--answers` must be at least 1, got 0"),
        (("--longest", "100"), "`--longest` must be at least 1024 tokens, got 100"),
        (("--workers", "-1"), "`--workers` must be at least 0, got -1"),
    ],
)
def test_faulty_options_end_the_program_with_their_name(scripts, checkpoint, tmp_path, more, message):
    with pytest.raises(SystemExit, match=f"^evaluate_pretraining: .*{message}"):
        scripts.evaluate_pretraining.main([str(checkpoint), str(tmp_path / "scores"), *more])
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "`checkpoint` must be the folder of a checkpoint, but .* has no config.json"),
        ("{", ".*config.json is not readable JSON"),
        ("[]", ".*config.json must hold a JSON object"),
        ("{}", "`checkpoint` must be a checkpoint of the model type 'minimax_m3_vl', but .*config.json has None"),
        ('{"model_type": "llama"}', "`checkpoint` must be a checkpoint of the model type .*, but .* has 'llama'"),
    ],
)
def test_folder_without_a_model_is_named(scripts, tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(SystemExit, match=f"^evaluate_pretraining: {message}"):
        scripts.evaluate_pretraining.main([str(tmp_path), str(tmp_path / "scores")])


def test_folder_that_cannot_be_written_is_named_before_anything_is_measured(scripts, checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="^evaluate_pretraining: `output` .*file cannot be written"):
        scripts.evaluate_pretraining.main([str(checkpoint), str(tmp_path / "file"), "--parts", "recall"])


def test_picture_has_the_parts_of_the_results(scripts, tmp_path):
    with pytest.raises(ValueError, match="must have one of answers, .*got seed"):
        scripts.plot_evaluation.plot_evaluation({"seed": 1}, tmp_path / "picture.png")
    scores = {"accuracy": 0.5, "interval": [0.2, 0.8]}
    scripts.plot_evaluation.plot_evaluation({"files": {"image": scores}}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert scripts.plot_evaluation.short(262144) == "256k" and scripts.plot_evaluation.short(2**20) == "1M"
    assert scripts.plot_evaluation.short(512) == "512"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "is not readable JSON"),
        (b"{", "is not readable JSON"),
        (b"[1]", "must hold a JSON object, got"),
        (b"{}", "must have one of answers, .* to draw, got none"),
    ],
)
def test_picture_of_a_broken_file_names_the_fault(scripts, tmp_path, monkeypatch, content, message):
    results = tmp_path / "results.json"
    results.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["plot_evaluation.py", str(results), str(tmp_path / "picture.png")])
    with pytest.raises(SystemExit, match=f"^plot_evaluation: .*{message}"):
        scripts.plot_evaluation.main()
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("part", ["answers", "files", "experts"])
def test_missing_package_of_a_task_ends_the_program_before_it_measures(
    scripts, checkpoint, tmp_path, monkeypatch, capsys, part
):
    for cached in (digits._digits, digits.digit_indices):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    options = [
        str(checkpoint),
        str(tmp_path / "scores"),
        "--quick",
        "--parts",
        f"coverage,{part}",
        "--tasks",
        "digits",
    ]
    with pytest.raises(SystemExit, match="^evaluate_pretraining: the task 'digits' needs scikit-learn"):
        scripts.evaluate_pretraining.main(options)
    assert "measured" not in capsys.readouterr().out

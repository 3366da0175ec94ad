"""The demonstration and the gallery from end to end: on random weights, and on the trained checkpoint where it is."""

import json
import re
from pathlib import Path

import pytest

from configuration_minimax_m3 import tiny_config

SHORT = {"index_topk_blocks": 2, "index_block_size": 128}  # so that a text of some hundred tokens has a choice
TRAINED = Path(__file__).resolve().parents[2] / "examples" / "minimax-m3-small"
needs_trained = pytest.mark.skipif(
    not (TRAINED / "config.json").is_file(), reason="examples/minimax-m3-small is not in this checkout"
)


@pytest.fixture(scope="module")
def checkpoint(load_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    return load_script("make_tiny_checkpoint").make_tiny_checkpoint(folder, config=tiny_config(text=SHORT))


def records_of(page: Path) -> list[dict]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text()).group(1))


def test_demonstration_shows_answers_beside_the_right_ones(load_script, checkpoint, tmp_path, capsys):
    records = load_script("demo").main([str(checkpoint), "--output", str(tmp_path), "--long-tokens", "600"])
    printed = capsys.readouterr().out
    assert [record["task"] for record in records] == ["image", "video", "recall"]
    for record in records:
        assert f"  answer:   {record['given']}\n  right is: {record['expected']}   (WRONG)\n" in printed
    assert "0 of 3 answers are right" in printed
    assert "0 s " in printed and "1 s " in printed  # seconds of the video
    assert records[2]["blocks"]["fact_text"] in printed
    assert re.search(r"layer 3: \d of \d key/value heads chose the block of the fact", printed)
    assert records[2]["prompt_tokens"] >= 600
    assert [record["given"] for record in records_of(tmp_path / "answers.html")] == [r["given"] for r in records]


def test_other_seed_asks_other_questions(load_script, tmp_path):
    questions = load_script("heldout_questions")
    first, again, other = (questions.short_question("image", "colour", tmp_path, seed) for seed in (0, 0, 1))
    assert first.picture.tobytes() == again.picture.tobytes() != other.picture.tobytes()


def test_without_a_checkpoint_one_is_built(load_script, tmp_path, monkeypatch, capsys):
    demo = load_script("demo")
    monkeypatch.setattr(demo, "CHECKPOINT", tmp_path / "none")
    monkeypatch.setattr(demo, "small_config", lambda: tiny_config(text=SHORT))
    folder = demo.open_checkpoint(None, tmp_path)
    assert (folder / "model.safetensors").is_file()
    assert "random weights" in capsys.readouterr().out


def test_folder_without_a_checkpoint_ends_the_demonstration(load_script, tmp_path):
    with pytest.raises(
        SystemExit, match="demo: `checkpoint` must be the folder of a checkpoint, but .* has no config"
    ):
        load_script("demo").main([str(tmp_path), "--output", str(tmp_path)])


def test_length_that_no_text_has_ends_the_demonstration(load_script, checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit, match="^demo: no held-out text of 0 tokens was found"):
        load_script("demo").main([str(checkpoint), "--output", str(tmp_path), "--long-tokens", "0"])
    assert "question" not in capsys.readouterr().out  # before anything is asked


def test_places_that_cannot_be_written_are_named_before_anything_is_asked(load_script, tmp_path, checkpoint):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="^demo: `--output` .*file cannot be written"):
        load_script("demo").main([str(checkpoint), "--output", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="^make_gallery: `page` must be a file"):
        load_script("make_gallery").main([str(checkpoint), str(tmp_path)])


def test_gallery_is_written(load_script, checkpoint, tmp_path, capsys):
    page = tmp_path / "gallery.html"
    options = ["--questions", "image:count", "tools:call", "recall:needle", "--long-tokens", "600"]
    load_script("make_gallery").main([str(checkpoint), str(page), *options])
    records = records_of(page)
    assert [record["name"] for record in records] == ["picture: count", "tool call", "long text: needle"]
    assert "0 of 3 answers are right" in capsys.readouterr().out
    assert json.loads(records[1]["expected"])["name"] in records[1]["tools"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--questions", "image"], "`--questions` must be TASK:KIND, .* got 'image'"),
        (["--questions", "colours:colour"], "`task` must be one of .* got 'colours'"),
    ],
)
def test_questions_that_do_not_exist_end_the_gallery(load_script, checkpoint, tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"make_gallery: {message}"):
        load_script("make_gallery").main([str(checkpoint), str(tmp_path / "gallery.html"), *options])
    assert not (tmp_path / "gallery.html").exists()


def test_usual_share_is_that_of_the_kind_or_of_the_length(load_script):
    usual_share = load_script("demo").usual_share
    recall = [{"tokens": n * 1000, "mean_tokens": n * 1000 - 50, "right": n, "answers": 60} for n in (1, 2, 4)]
    scores = {"recall": recall, "answers": {"image": {"questions": {"count": {"right": 7, "answers": 9}}}}}
    assert usual_share(scores, {"task": "image", "kind": "count"}).startswith("7 of 9 held-out questions of this kind")
    long = usual_share(scores, {"task": "recall", "kind": "needle", "prompt_tokens": 1600})
    assert long.startswith("2 of 60 held-out questions about texts of 2,000 tokens")


def test_answer_begins_behind_the_thinking(load_script):
    first = load_script("answer_question").first_of_answer
    assert first(["red", "[e~["]) == 0
    assert first(["<mm:think>", "2", "</mm:think>", "red", "[e~["]) == 3
    assert first(["</mm:think>"]) == 0  # cut off there


@pytest.mark.slow
@needs_trained
def test_trained_checkpoint_gives_three_right_answers(load_script, tmp_path, capsys):
    """What `make demo` does, with an eighth of its long text, which would take most of a minute."""
    records = load_script("demo").main(["--output", str(tmp_path), "--long-tokens", "4096"])
    printed = capsys.readouterr().out
    assert "3 of 3 answers are right" in printed
    assert len(re.findall(r"usually:  \d+ of \d+ held-out questions", printed)) == 3
    assert records[2]["prompt_tokens"] >= 4000
    assert [(record["given"], record["right"]) for record in records] == [(r["expected"], True) for r in records]

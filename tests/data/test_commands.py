"""The commands `minimax-m3 check` and `minimax-m3 show`."""

import base64
import io
import json
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from PIL import Image

from modeling_minimax_m3.__main__ import COMMANDS, main

from ..forked_processes import run_python

ASK, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me <b>."}
LONG = {"text": "Block 7 holds the keys of its own sequence. " * 60}
LOOK = {"role": "user", "content": "<image>What?"}


@pytest.fixture
def mixed(write_rows, picture):
    return write_rows(
        {"messages": [ASK, ANSWER], "id": 1},
        {"messages": [ASK, {**ANSWER, "reasoning_content": "Hm."}], "chat_template_kwargs": {"thinking_mode": "enabled"}},
        {"messages": [ASK, ANSWER], "id": 2},
        LONG,
        {"messages": [{**ASK, "content": LONG["text"]}, ANSWER]},
        {"messages": [ASK, {**ANSWER, "content": LONG["text"]}]},
        {"messages": [LOOK, ANSWER], "images": [str(picture)]},
        {"messages": [{**ASK, "content": LONG["text"]}, LOOK, ANSWER], "images": [str(picture)]},
        {"prompt": "2 + 2 =", "completion": " 4"},
    )  # fmt: skip


def check(capsys, *arguments):
    """The exit status of a check and what it printed."""
    with pytest.raises(SystemExit) as stopped:
        main(["check", *map(str, arguments)])
    return stopped.value.code, capsys.readouterr().out


def test_a_check_counts_what_training_would_meet(mixed, tiny_checkpoint, tmp_path, capsys):
    status, printed = check(
        capsys, mixed, "--model", tiny_checkpoint, "--max_length", "600", "--report", tmp_path / "report.json"
    )
    assert status == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["rows"] == 9
    assert found["faults"] == []
    assert found["kinds"] == {"chat": 7, "text": 1, "completion": 1}
    assert found["roles"] == {"user": 8, "assistant": 7}
    assert found["thinking"] == [
        {"mode": "adaptive", "has_reasoning": False, "answers": 6},
        {"mode": "enabled", "has_reasoning": True, "answers": 1},
    ]
    assert (found["images"], found["videos"], found["media_tokens"]) == (2, 0, 24)
    assert found["repeated_rows"] == 1
    assert found["unused_columns"] == {"id": 2}
    trained = found["trained"]
    assert (trained["cut_rows"], trained["split_texts"]) == (1, 1)
    assert sorted(trained["left_out"].values()) == [1, 1]
    assert trained["rows"] == 6 + -(-(len_of(tiny_checkpoint, LONG["text"]) + 1) // 600)
    assert found["lengths"]["most"] > 600
    for line in (
        "9: 7 chat, 1 text",
        "left out   1 rows have nothing to learn",
        "beyond --max_length",
        "not read   columns id",
    ):
        assert line in printed


def len_of(checkpoint, text):
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"])


def test_counts_are_those_of_training(mixed, tiny_checkpoint, tmp_path, capsys):
    """The report of a check says what `train` has in its data sets."""
    from modeling_minimax_m3.commands import train

    check(capsys, mixed, "--model", tiny_checkpoint, "--max_length", "600", "--report", tmp_path / "report.json")
    trained = json.loads((tmp_path / "report.json").read_text())["trained"]
    flags = [
        "--model",
        str(tiny_checkpoint),
        "--dataset",
        str(mixed),
        "--output_dir",
        str(tmp_path / "run"),
        "--use_cpu",
    ]
    trainer = train.prepare([*flags, "--max_length", "600", "--max_steps", "1"])
    batch = [trainer.data_collator([row]) for row in trainer.train_dataset]
    assert len(batch) == trained["rows"]
    assert sum(row["input_ids"].shape[1] for row in batch) == trained["tokens"]
    assert sum(int((row["labels"] != -100).sum()) for row in batch) == trained["learned_tokens"]
    assert trainer.train_dataset.lengths == [row["input_ids"].shape[1] for row in batch]


def test_a_check_prints_every_fault_and_fails(write_rows, tiny_checkpoint, tmp_path, capsys):
    path = write_rows(*[{"text": number} for number in range(5)])
    arguments = [path, "--model", tiny_checkpoint, "--report", tmp_path / "report.json", "--max_faults", "3"]
    status, printed = check(capsys, *arguments)
    assert status == 1
    assert [line for line in printed.splitlines() if "must be a text" in line] == [
        f"{path}, row {number + 1}: `text`: must be a text, got {number}." for number in range(3)
    ]
    assert "... and 2 more" in printed
    assert "faults     5" in printed
    faults = json.loads((tmp_path / "report.json").read_text())["faults"]
    assert faults[4] == {"file": str(path), "row": 5, "field": "text", "problem": "must be a text, got 4."}


def test_only_decoding_finds_damage_behind_a_header(write_rows, tiny_checkpoint, tmp_path, capsys):
    Image.effect_noise((200, 200), 60).convert("RGB").save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    path = write_rows({"messages": [LOOK, ANSWER], "images": [str(tmp_path / "cut.jpg")]})
    assert check(capsys, path, "--model", tiny_checkpoint)[0] == 0
    status, printed = check(capsys, path, "--model", tiny_checkpoint, "--decode_media")
    assert status == 1
    assert "row 1: `images[0]`: the image" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere.jsonl", "--model", "{model}"], "check: there is no file nowhere.jsonl"),
        (["check", "{rows}", "--model", "nowhere"], "check: .*nowhere"),
        (
            ["check", "{rows}", "--model", "{model}", "--max_length", "1"],
            "check: --max_length must be at least 2, got 1",
        ),
        (["show", "{rows}", "--model", "{model}", "--row", "4"], "show: --row: .* has no row 4; its rows are 1 to 3"),
        (["show", "{rows}", "--model", "{model}", "--row", "2"], "show: .* has no row 2"),
        (["show", "{rows}", "--model", "{model}", "--row", "3"], "show: .*row 3: `text`: must be a text, got 3"),
        (["shows"], "the command must be one of check, show, train, evaluate, merge, chat, got 'shows'"),
    ],
)
def test_mistakes(write_rows, tiny_checkpoint, arguments, message):
    places = {"rows": write_rows({"text": "a"}, b"", {"text": 3}), "model": tiny_checkpoint}
    with pytest.raises(SystemExit, match=message):
        main([argument.format(**places) for argument in arguments])


@pytest.mark.parametrize(("command", "option"), [("check", "--report"), ("show", "--html")])
def test_a_file_that_cannot_be_written_is_refused_first(write_rows, tmp_path, capsys, command, option):
    for path, message in ((tmp_path / "no" / "file", "does not exist"), (tmp_path, "must be a file, got the folder")):
        with pytest.raises(SystemExit):
            main([command, str(write_rows({"text": "a"})), "--model", "not read", option, str(path)])
        printed = capsys.readouterr().err
        assert f"argument {option}: " in printed and message in printed


def test_a_shown_row_marks_what_is_learned(mixed, tiny_checkpoint, capsys):
    main(["show", str(mixed), "--model", str(tiny_checkpoint)])
    printed = capsys.readouterr().out
    assert f"1 of {mixed}" in printed
    assert "thinking mode  adaptive" in printed
    assert "not read       columns id" in printed
    assert re.findall("»(.*?)«", printed, re.DOTALL) == ["</mm:think>Me <b>.[e~["]
    main(["show", str(mixed), "--model", str(tiny_checkpoint), "--row", "6", "--max_length", "600"])
    printed = capsys.readouterr().out
    assert re.findall("[[]cut: (.*)]\n", printed, re.DOTALL)[0].rstrip().endswith("[e~[")
    assert "too long" in printed


def test_a_shown_row_has_colours_on_a_terminal(mixed, tiny_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["show", str(mixed), "--model", str(tiny_checkpoint)])
    assert "\033[30;42m</mm:think>Me <b>.[e~[\033[0m" in capsys.readouterr().out


def test_a_page_shows_tokens_and_pictures(write_rows, picture, load_script, tiny_checkpoint, tmp_path, capsys):
    pytest.importorskip("av")
    clip = load_script("panning_video").write_panning_video(picture, tmp_path / "clip.mp4", seconds=2, fps=8, side=56)
    look = {"role": "user", "content": "<image>What <i>?<video>"}
    path = write_rows({"messages": [look, ANSWER], "images": [str(picture)], "videos": [str(clip)]})
    page = tmp_path / "row.html"
    main(["show", str(path), "--model", str(tiny_checkpoint), "--html", str(page)])
    assert f"wrote {page}" in capsys.readouterr().out
    text = page.read_text()
    assert '<span class="learned">&lt;/mm:think&gt;Me &lt;b&gt;.[e~[</span>' in text
    assert '<span class="media">]&lt;]image[&gt;[ x 12</span>' in text
    assert "<i>" not in text
    pictures = [Image.open(io.BytesIO(base64.b64decode(found))) for found in re.findall('base64,([^"]+)', text)]
    assert [image.size for image in pictures] == [(112, 84), *[(56, 56)] * 6]
    assert "images[0]: 112 x 84 pixels" in text
    assert "videos[0]: 0.0 seconds" in text
    assert not re.search('(src|href)="(?!data:)', text), "the page needs no other file"


def test_commands_are_listed(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", printed, re.MULTILINE) for name in COMMANDS)
    main([])
    assert capsys.readouterr().out == printed


def test_help_of_train_keeps_the_lines_of_its_examples(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert "\n    minimax-m3 train run.yaml --learning_rate 1e-4\n" in printed
    assert re.search(r"Rank of the adapters\.\s+\(default: 16\)", printed)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_commands_name_the_package_that_they_need(command, tmp_path):
    code = "import sys; sys.modules['datasets'] = None; from modeling_minimax_m3.__main__ import main; main(['{}'])"
    done = run_python("-c", code.format(command), folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"minimax-m3 {command} needs datasets: pip install datasets peft\n"


def test_the_package_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "modeling_minimax_m3", "check", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "usage: minimax-m3 check" in done.stdout
    for script in entry_points(group="console_scripts", name="minimax-m3"):
        assert script.value == "modeling_minimax_m3.__main__:main"


def test_snippet_of_the_page_runs(write_rows, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall("^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    write_rows({"messages": [ASK, ANSWER]}, {"text": 3}, name="chats.jsonl")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/data.md", "exec"), {"checkpoint": tiny_checkpoint})
    assert "chats.jsonl, row 2: `text`: must be a text, got 3" in capsys.readouterr().out

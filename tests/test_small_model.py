"""The shipped small checkpoint: tables of the pages that quote it, curves, media of the examples, pictures of any size."""

import json
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_minimax_m3  # noqa: F401 - registers the classes


def test_pages_have_the_tables(load_script):
    for page, part, tables in load_script("small_model_tables").pages():
        assert tables in page.read_text(encoding="utf-8"), f"{part} of {page.name}: make small-model"


def test_stored_scores_are_drawn(load_script, tmp_path):
    results = json.loads((load_script("small_model_tables").RESULTS / "pretraining_scores.json").read_text())
    load_script("plot_evaluation").plot_evaluation(results, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 1000


def test_tables_need_their_place(load_script):
    replace = load_script("small_model_tables").replace_tables
    starts, end = load_script("small_model_tables").STARTS, load_script("small_model_tables").END
    first, second = (f"{starts[part]}old\n{end}" for part in ("checkpoint", "ablation"))
    new = f"{starts['ablation']}\nnew\n\n{end}"
    assert replace(f"a\n{first}b\n{second}c\n", "new\n", "ablation") == f"a\n{first}b\n{new}c\n"
    new = new.replace(starts["ablation"], starts["checkpoint"])
    assert replace(f"a\n{first}b\n{second}c\n", "new\n") == f"a\n{new}b\n{second}c\n"
    with pytest.raises(ValueError, match="the page must have the lines"):
        replace(f"a\n{end}", "new")


@pytest.mark.parametrize("name", ["ablation", "ablation_recall"])
def test_stored_ablation_is_complete_and_drawn(load_script, tmp_path, name):
    """Its comparison follows from its runs, and each arm has as many runs as its budget says."""
    report = load_script("ablation_report")
    result = json.loads((load_script("small_model_tables").RESULTS / f"pretraining_{name}.json").read_text())
    assert result["comparison"] == report.compare(result["runs"])
    assert (
        len(result["runs"]) == result["budget"]["runs"] and result["comparison"]["step"] == result["budget"]["steps"]
    )
    report.plot_ablation(result, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 1000


def test_runs_and_their_processes_are_told(load_script):
    first = {"steps": 20, "device": "a device", "torch": "2.11", "options": {"stages": "512:0.5,1024:1"}}
    second = first | {"steps": 5, "options": {"stages": "4096:1"}, "earlier_runs": [first]}
    curves = [
        [{"tokens": 1e6, "train_runtime": 30.0}, {"tokens": 2e6, "train_runtime": 20.4}],
        [{"tokens": 3e6, "train_runtime": 9.0}],
    ]
    tell = load_script("small_model_tables").run_sentences
    words = "20 steps with 2M tokens, in rows of up to 1,024, on one a device with PyTorch 2.11: 30 s + 20 s, resumed once."
    assert " ".join(tell(first, curves[:1]).split()) == f"The checkpoint comes from {words}"
    text = " ".join(tell(second, curves).split())
    assert text.startswith(
        f"The checkpoint comes from {words} Then came 5 steps with 3M tokens, in rows of up to 4,096"
    )
    with pytest.raises(ValueError, match="zip"):  # a run without its curves
        tell(second, curves[:1])


def test_tokens_of_runs_that_follow_each_other_are_counted_on(load_script):
    script = load_script("plot_curves")
    runs = [[{"step": step, "tokens": step * 10} for step in (1, 2)], [{"step": 1, "tokens": 40}]]
    joined = script.join_runs(runs)
    assert [(row["run"], row["tokens"]) for row in joined] == [(0, 10), (0, 20), (1, 60)]
    assert runs[1][0]["tokens"] == 40


def test_curves_are_drawn(load_script, tmp_path, monkeypatch):
    script = load_script("plot_curves")
    rows = [
        {"step": step, "tokens": step * 1000, "seconds": step % 5 + 1.0, "loss": 2.0 / step, "indexer_loss": 0.1}
        for step in range(1, 10)
    ]
    rows.append({"step": 9, "tokens": 9000, "seconds": 9.0, "eval_loss": 1.0, "eval_loss_code": 0.9})
    (tmp_path / "curves.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in (1, 2):
        path = tmp_path / f"{number}.png"
        monkeypatch.setattr(sys, "argv", ["plot_curves", *[str(tmp_path / "curves.jsonl")] * number, str(path)])
        script.main()
        with Image.open(path) as picture:
            assert picture.width > 3 * picture.height
    assert (tmp_path / "1.png").read_bytes() != (tmp_path / "2.png").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: "),
        ('{"step": 1, "tokens": 2}', "line 1 must have `step`, `tokens` and `seconds`, got"),
        ('{"step": 1, "tokens": 2, "seconds": 3}', "must have lines with `loss`, got 1 lines without"),
        ("", "must have lines with `loss`, got 0 lines without"),
        ('{"step": 1, "tokens": 2, "seconds": 3, "loss": "x"}', "line 1: `loss` must be a number, got 'x'"),
        ('{"step": "1", "tokens": 2, "seconds": 3, "loss": 4}', "line 1: `step` must be a number, got '1'"),
        (
            '{"step": 1, "tokens": 2, "seconds": 3, "eval_loss_code": null}',
            "`eval_loss_code` must be a number, got None",
        ),
    ],
)
def test_faulty_curves_are_refused(load_script, tmp_path, text, message):
    (tmp_path / "curves.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_script("plot_curves").read_curves(tmp_path / "curves.jsonl")


def test_curves_that_are_no_text_are_refused(load_script, tmp_path):
    (tmp_path / "curves.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="curves.jsonl is no text"):
        load_script("plot_curves").read_curves(tmp_path / "curves.jsonl")


def test_example_media_are_drawn(load_script, tmp_path, capsys):
    from processing_minimax_m3.pretraining import make_row

    script = load_script("example_media")
    script.main([str(tmp_path / "new")])
    row = make_row("image", "heldout", script.PICTURE[1])
    with Image.open(tmp_path / "new" / "photo.png") as picture:
        assert picture.tobytes() == row["messages"][0]["content"][0]["image"].tobytes()
    assert (tmp_path / "new" / "clip.mp4").stat().st_size > 500
    assert "photo.png" in capsys.readouterr().out


def test_missing_video_library_is_named(load_script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SystemExit, match=r"example_media: .*av.*: `pip install \"\.\[video\]\"`"):
        load_script("example_media").main([str(tmp_path)])
    assert not (tmp_path / "clip.mp4").exists()


def test_folder_that_cannot_be_made_ends_the_drawing(load_script, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="example_media: .*file"):
        load_script("example_media").main([str(tmp_path / "file")])


# Of three held-out pictures: the number of the row that begins with it, questions and answers.
PICTURES = {
    0: {
        "What shape is the orange object?": "square",
        "How many objects are there?": "two",
        "What colour is the ring?": "green",
    },
    2: {
        "What shape is the black object?": "diamond",
        "How many yellow objects are there?": "one",
        "What colour is the diamond?": "black",
    },
    3: {
        "What colour is the triangle?": "pink",
        "How many rings are there?": "one",
        "What shape is the pink object?": "triangle",
    },
}


@pytest.fixture(scope="module")
def answer(load_script):
    folder = load_script("small_model_tables").CHECKPOINT
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def ask(picture: Image.Image, question: str) -> tuple[str, list[int]]:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            thinking_mode="disabled",
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        prompt = inputs["input_ids"][0]
        message = processor.parse_response(output[0, len(prompt) :], prefix=prompt)
        return message["content"], inputs["image_grid_thw"][0].tolist()

    return ask


def heldout_picture(index: int) -> Image.Image:
    from processing_minimax_m3.pretraining import make_row

    return make_row("image", "heldout", index)["messages"][0]["content"][0]["image"]


@pytest.mark.parametrize("side", [56, 224, 448])
def test_pictures_of_any_size_are_read(answer, side):
    for index, questions in PICTURES.items():
        picture = heldout_picture(index).resize((side, side), Image.Resampling.BICUBIC)
        for question, expected in questions.items():
            assert answer(picture, question) == (expected, [1, 8, 8]), (index, question)


def test_picture_that_is_no_square_is_read(answer):
    content, grid = answer(heldout_picture(0).resize((640, 360)), "How many objects are there?")
    assert content in ("zero", "one", "two", "three", "four") and grid == [1, 6, 10]

"""Rows of files of every type, with the number of each row."""

import json
import pickle

import pytest
from datasets import Dataset, Features, Image, List, Value

from processing_minimax_m3.data import RowFault, Rows, open_rows, read_example
from processing_minimax_m3.data.sources import stream_rows

ROWS = [{"text": "a"}, {"text": "b", "more": {"deep": [1]}}, {"messages": [{"role": "user", "content": "c"}]}]


def read(*names, **options):
    rows = Rows(open_rows([str(name) for name in names], **options))
    return [(located.number, located.row) for located in rows.located(range(len(rows)))]


@pytest.mark.parametrize("form", ["lines", "list", "pretty list", "one object"])
def test_json_of_every_form(tmp_path, form):
    path = tmp_path / "rows.json"
    content = {
        "lines": "\n".join(map(json.dumps, ROWS)),  # without a break at the end
        "list": json.dumps(ROWS),
        "pretty list": json.dumps(ROWS, indent=2),
        "one object": json.dumps(ROWS[1], indent=2),
    }[form]
    path.write_text("\ufeff" + content, encoding="utf-8")
    expected = [ROWS[1]] if form == "one object" else ROWS
    assert read(path) == list(enumerate(expected, 1))
    assert [row.row for row in stream_rows(open_rows([str(path)], streaming=True))] == expected


def test_numbers_are_those_of_lines(write_rows):
    path = write_rows(ROWS[0], b"", b"  ", ROWS[1], b"", ROWS[2])
    assert read(path) == [(1, ROWS[0]), (4, ROWS[1]), (6, ROWS[2])]
    assert [(row.number, row.row) for row in stream_rows(open_rows([str(path)], streaming=True))] == read(path)


def test_files_one_after_the_other(write_rows, tmp_path):
    first, second = write_rows(*ROWS[:2], name="a.jsonl"), write_rows(*ROWS, name="b.jsonl")
    table = tmp_path / "c.parquet"
    Dataset.from_list([{"text": "d", "id": 1}]).to_parquet(table)
    rows = Rows(open_rows([str(first), str(second), str(table)]))
    places = [(located.file, located.number) for located in rows.located(range(len(rows)))]
    assert places == [(str(first), 1), (str(first), 2), *((str(second), n) for n in (1, 2, 3)), (str(table), 1)]
    assert rows.read(5) == {"text": "d", "id": 1}
    assert pickle.loads(pickle.dumps(rows)).read(4) == ROWS[2]


def test_csv(tmp_path):
    path = tmp_path / "rows.csv"
    long = "x" * 200_000
    path.write_text(f'text,messages\n"a, ""b""\nc",\n{long},\n,"[{{""role"": ""user"", ""content"": ""d""}}]"\ne,,f\n')
    found = read(path)
    assert found[:2] == [(1, {"text": 'a, "b"\nc'}), (2, {"text": long})]
    assert read_example(found[2][1]).messages == [{"role": "user", "content": "d"}]
    assert isinstance(found[3][1], RowFault)
    assert "row 4: the row has more cells than the header has columns: ['f']" in str(found[3][1])


def test_csv_in_latin_1_names_its_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text\nfine\nGrüße\n".encode("latin-1"))
    assert read_example(read(path)[0][1]).text == "fine"
    with pytest.raises(ValueError, match="`text` must be text, but holds .*udcfc"):
        read_example(read(path)[1][1])


def test_images_of_tables_stay_files(tmp_path, picture):
    features = Features({"text": Value("string"), "image": Image(), "images": List(Image())})
    rows = Dataset.from_list([{"text": "a", "image": str(picture), "images": [str(picture)]}], features=features)
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(tmp_path / "rows.parquet")
    for name in ("saved", "rows.parquet"):
        ((_, row),) = read(tmp_path / name)
        assert row["image"]["bytes"] == row["images"][0]["bytes"] == picture.read_bytes() or row["image"]["path"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["nowhere.jsonl"], {}, "there is no file nowhere.jsonl"),
        (["{empty}"], {}, "the file .*empty.jsonl is empty"),
        (["{list}"], {}, "list.json is not JSON: .*line 1"),
        (["{latin}"], {}, r"latin.json: the text must be UTF-8, but byte 12 is 0xfc"),
        (["{damaged}"], {}, "damaged.parquet cannot be read: "),
        (["a", "b"], {}, "must consist of files"),
        (["nowhere"], {}, "nowhere is no folder here, and no data set that the Hub gives: "),
        (["{folder}"], {}, "the folder .*folder cannot be read as data: "),
        (["{notes}"], {}, "files of data end in .jsonl, .*, got .*notes.md"),
        (["{good}"], {"split": "test"}, "files have only the split 'train', got 'test'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
def test_files_that_are_refused(tmp_path, names, options, message, streaming):
    files = {
        "empty": b"",
        "good": b"{}",
        "list": b"[{},",
        "latin": '[{"text": "ü"}]'.encode("latin-1"),
        "damaged": b"PAR1",
        "notes": b"# Notes",
    }
    suffixes = {"list": "json", "latin": "json", "damaged": "parquet", "notes": "md"}
    places = {name: tmp_path / f"{name}.{suffixes.get(name, 'jsonl')}" for name in files}
    for name, path in places.items():
        path.write_bytes(files[name])
    places["folder"] = tmp_path / "folder"
    places["folder"].mkdir()
    if streaming and "{damaged}" in names:
        pytest.skip("datasets opens a streamed table when it is read")
    with pytest.raises(ValueError, match=message):
        open_rows([name.format(**places) for name in names], streaming=streaming, **options)

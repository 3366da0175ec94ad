"""The page of the gallery, opened in a browser: `chromium`, `google-chrome` or what CHROMIUM names."""

import json
import os
import re
import shutil
import subprocess

import pytest

CONTROLS = "]~!b[</script><b>bold</b>"  # an answer that would end the data, if it were written as it is
BROWSERS = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")


def example(**changes):
    """A record as `answer_question.answer_question` returns it: 2 tokens, 1 layer, 2 heads, a picture of 2 regions."""
    record = {"task": "image", "kind": "colour", "index": 0, "question": "What colour?", "expected": "red"}
    record |= {"given": "red", "right": True, "written": "red", "tokens": ["red", "[e~["], "prompt_tokens": 40}
    record |= {"prompt": "What colour?", "scale": 100, "seconds": 1.0, "layers": [3], "heads": 2, "tools": []}
    record |= {"parts": ["picture", "answer"], "shares": [[[[100, 0], [50, 50]]], [[[10, 90], [30, 70]]]]}
    record["answer_token"] = 0
    record["media"] = [{"source": "data:image/png;base64,", "rows": 1, "columns": 2, "second": None}]
    record["cells"] = [[[[[60, 40]], [[10, 40]]]], [[[[10, 0]], [[0, 30]]]]]
    return record | changes


def long_example():
    """A text of 3 blocks, of which 2 are chosen."""
    changes = {"task": "recall", "kind": "needle", "right": False, "given": CONTROLS}
    changes["blocks"] = {"size": 128, "excerpts": ["first", "second", "third"], "fact": [1], "fact_text": "in Bonn"}
    changes |= {"chosen": [[[[1, 2]]]] * 2, "block_shares": [[[[70, 30], [40, 60]]]] * 2}
    found = example(**changes)
    del found["media"], found["cells"]
    return found


@pytest.fixture(scope="module")
def gallery(load_script):
    return load_script("gallery_page")


@pytest.fixture(scope="module")
def browser():
    found = next((path for name in BROWSERS if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no browser: install chromium, or name one with CHROMIUM")
    return found


@pytest.fixture
def read(gallery, browser, tmp_path):
    """`read(address)`: what the browser shows of the page of three examples."""
    records = [example(), long_example(), example(answer_token=1)]
    page = gallery.write_page(records, tmp_path / "page.html", "A <title>", 'It says "`${1}`".')

    def show(address: str = "") -> str:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        run = subprocess.run([*command, "--dump-dom", f"file://{page}#{address}"], capture_output=True, text=True)
        assert "</html>" in run.stdout, run.stderr
        return run.stdout.split("<script>")[0] + run.stdout.split("</script>")[-1]

    return show


def shares(page: str, kind: str) -> list[float]:
    """The shares of the elements of a class, in order."""
    return [
        float(value) for value in re.findall(rf'<(?:div|button)[^>]*class="{kind}[^>]*data-share="([\d.]+)"', page)
    ]


def test_browser_shows_the_mean_of_all_heads(read):
    page = read()
    assert re.search(r'<body[^>]*data-ready="3"', page) and "data-error" not in page
    assert "2 of 3 answers to held-out questions are right." in page
    assert "A &lt;title&gt;</h1>" in page
    assert shares(page, "part") == [0.75, 0.25]
    regions = re.search(r'<div class="regions".*?</div></div>', page).group()
    assert re.findall(r'data-share="([\d.]+)"', regions) == ["0.350", "0.400"]


def test_address_chooses_token_layer_and_head(read):
    page = read("example=0&token=1&layer=3&head=0")
    assert shares(page, "part") == [0.1, 0.9]
    regions = re.search(r'<div class="regions".*?</div></div>', page).group()
    assert re.findall(r'data-share="([\d.]+)"', regions) == ["0.100", "0.000"]


def test_blocks_and_the_fact_are_marked(read):
    page = read("example=1&head=1")
    assert "data-error" not in page
    assert re.findall(r'<button class="(block[^"]*)"', page) == ["block", "block chosen fact", "block chosen"]
    assert shares(page, "block") == [0, 0.4, 0.6]
    assert '<pre id="excerpt">third ...</pre>' in page
    assert "wrong, right is: red" in page
    assert shares(read("example=1"), "block") == [0, 0.55, 0.45]  # the mean of both heads
    assert "&lt;b&gt;bold&lt;/b&gt;" in page  # text of the answer stays text


def test_page_opens_at_the_first_token_of_the_answer(read):
    page = read("example=2")
    assert re.search(r'aria-pressed="true"[^>]*aria-label="token 1: ', page)
    assert shares(page, "part") == [0.2, 0.8]
    assert shares(read("example=2&token=0"), "part") == [0.75, 0.25]


@pytest.mark.parametrize("address", ["example=9&token=9&layer=8&head=77", "example=-1&token=x&head=", "nonsense"])
def test_address_out_of_range_is_no_error(read, address):
    page = read(address)
    assert re.search(r'<body[^>]*data-ready="3"', page) and "data-error" not in page


def test_page_needs_nothing_else(gallery, tmp_path):
    text = gallery.write_page([example(), long_example()], tmp_path / "page.html", "A title").read_text()
    assert not re.search(r"https?:|src=\"(?!data:)|@import|url\(", text)
    assert "default-src 'none'" in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text).group(1)
    assert [record["name"] for record in json.loads(data)] == ["picture: colour", "long text: needle"]
    assert json.loads(data)[1]["given"] == CONTROLS


def test_page_of_nothing_is_refused(gallery, tmp_path):
    with pytest.raises(ValueError, match="at least one answer"):
        gallery.write_page([], tmp_path / "page.html", "A title")
    assert not (tmp_path / "page.html").exists()

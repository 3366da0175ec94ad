"""docs/fine_tuning.md is followed in an empty folder: every command runs and gives what the page says.

Each command is a process of its own, forked from one that has imported PyTorch. Nothing is installed, there is no GPU,
and the samples of a run are short.
"""

import base64
import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ..forked_processes import run_python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "fine_tuning.md").read_text(encoding="utf-8")
PART = re.compile(r"^## (?:\d+\. )?(?P<heading>.+?)$|^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
# With the prefix of its unit, which depends on the speed of the machine.
NUMBER = re.compile(r"[\d.]+(e-\d+)?[kMGT]?")
# What Python gets for the program that a command calls. `pip` is not called.
PROGRAMS = {"python": [], "minimax-m3": ["-m", "modeling_minimax_m3"]}
OF_TRAINING = ["--use_cpu", "--sample_tokens", "8"]
STOCK = """
import sys
import transformers
assert "modeling_minimax_m3" not in sys.modules
model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1])
assert type(model).__module__.startswith("transformers."), type(model)
"""


def read_parts() -> dict[str, dict[str, str]]:
    """The snippets of the page: heading -> language -> code, snippets of a language one behind the other."""
    parts, heading = {}, ""
    for match in PART.finditer(PAGE):
        if match["code"] is None:
            heading = match["heading"]
        else:
            snippets = parts.setdefault(heading, {})
            snippets[match["kind"]] = snippets.get(match["kind"], "") + match["code"]
    return parts


PARTS = read_parts()


def read_commands(code: str) -> list[list[str]]:
    """What Python gets for each command of a snippet, which is a line."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program != "pip":
            more = OF_TRAINING if (program, arguments[0]) == ("minimax-m3", "train") else []
            commands.append([*PROGRAMS[program], *arguments, *more])
    return commands


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder in which all steps but the server ran, and what each of them printed."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    printed = {}
    for heading, snippets in PARTS.items():
        for kind, code in snippets.items():
            if kind == "text" or heading == "Serve it":
                continue
            for command in read_commands(code) if kind == "bash" else [["-c", code]]:
                done = run_python(*command, folder=folder)
                assert done.returncode == 0, f"{heading}: {done.stdout[-1500:]}\n{done.stderr[-3000:]}"
                printed[heading] = printed.get(heading, "") + done.stdout
    return folder, printed


def test_every_step_ran(followed):
    steps = [line for line in PAGE.splitlines() if re.match(r"## \d", line)]
    assert [int(re.search(r"\d+", step)[0]) for step in steps] == list(range(1, 13))
    assert list(followed[1]) == [
        *("Install", "Make the data", "Check the data", "Look at a row", "Plan the memory", "Train an adapter"),
        *("Measure it", "Talk to it", "Merge the adapter"),
    ]


def test_the_report_of_check_is_that_of_the_page(followed):
    printed = followed[1]["Check the data"].splitlines()
    assert [line for line in PARTS["Check the data"]["text"].splitlines() if line not in printed] == []


def test_the_learned_tokens_are_shown(followed):
    folder, printed = followed
    assert "</mm:think>»It is red.[e~[«" in printed["Look at a row"]
    assert "data:image/" in (folder / "row.html").read_text()


def test_both_plans_fit(followed):
    assert followed[1]["Plan the memory"].count("fits: ") == 2


def test_the_run_is_seen(followed):
    folder, printed = followed
    lines = [line for line in printed["Train an adapter"].splitlines() if line.startswith("step ")]
    logged = [line for line in lines if re.match(r"step \d+/\d+  loss ", line)]
    assert len(logged) == 8, printed["Train an adapter"]  # steps 5, 10, 15 and 18 of each run
    assert re.sub(NUMBER, "0", logged[0]) == re.sub(NUMBER, "0", PARTS["Watch the run"]["text"].splitlines()[0])
    report = (folder / "run" / "report.html").read_text()
    assert "<polyline" in report and "which colour is it?" in report and "<script" not in report
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"].count("]<]image[>[") for sample in samples} == {1}
    assert (folder / "run_quantized" / "adapter_model.safetensors").is_file()


def test_the_scores_of_the_adapter_are_better(followed):
    folder, _ = followed
    before, after = (json.loads((folder / name).read_text()) for name in ("before.json", "after.json"))
    assert after["files"]["test.jsonl"]["loss"] < before["files"]["test.jsonl"]["loss"]
    assert after["files"]["test.jsonl"]["rows"] == 4


def test_the_model_answers(followed):
    assert followed[1]["Talk to it"].strip()


def test_the_cards_are_filled_in(followed):
    folder, _ = followed
    card = (folder / "run" / "README.md").read_text()
    assert "base_model: CHECKPOINT" in card and "eval_loss" in card and "| `learning_rate` | `0.0001` |" in card
    merged = (folder / "merged" / "README.md").read_text()
    assert "minimax-m3 merge run merged" in merged and "Card of run" in merged


def test_stock_transformers_loads_the_merged_checkpoint(followed):
    done = run_python("-c", STOCK, "merged", folder=followed[0])
    assert done.returncode == 0, done.stderr[-3000:]


def ask(port: int, content: object) -> dict:
    body = {"model": "merged", "max_tokens": 4, "messages": [{"role": "user", "content": content}]}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    return json.load(urllib.request.urlopen(request))


def test_the_server_answers(followed):
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        pytest.skip("needs transformers[serving]")
    folder, _ = followed
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = PARTS["Serve it"]["bash"].split()
    assert command == ["transformers", "serve", "merged"]
    program = "import sys\nfrom transformers.cli.transformers import main\nmain()"
    flags = [*command[1:], "--port", str(port), "--device", "cuda" if torch.cuda.is_available() else "cpu"]
    server = subprocess.Popen([sys.executable, "-c", program, *flags], cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        while True:
            assert server.poll() is None, server.stderr.read()[-3000:]
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health")
                break
            except OSError:
                time.sleep(0.5)
        picture = base64.b64encode((folder / "red.png").read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        text = ask(port, "Which colour is it?")
        seen = ask(port, [image, {"type": "text", "text": "Which colour is it?"}])
        assert text["choices"][0]["message"]["content"] and seen["choices"][0]["message"]["content"]
        # 64 tokens of the picture, and one before and behind it
        assert seen["usage"]["prompt_tokens"] - text["usage"]["prompt_tokens"] == 66
    finally:
        server.terminate()
        server.wait()

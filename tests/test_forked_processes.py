"""The processes that tests fork: what a script sees, and how one that fails or hangs is told."""

import multiprocessing

import pytest
import torch

from .forked_processes import run_python, run_script


def write(folder, code):
    (folder / "script.py").write_text("import os, sys, time, torch\n" + code)
    return folder / "script.py"


def test_processes_form_a_group(tmp_path):
    code = "from torch import distributed\ndistributed.init_process_group('gloo')\n"
    code += "total = torch.tensor(10.0 ** distributed.get_rank())\ndistributed.all_reduce(total)\n"
    code += "torch.save((total, sys.argv[1:], os.environ['EXTRA']), f'{sys.argv[1]}/{distributed.get_rank()}')\n"
    run_script(write(tmp_path, code), str(tmp_path), folder=tmp_path, processes=3, EXTRA="given")
    for rank in range(3):
        assert torch.load(tmp_path / str(rank)) == (111.0, [str(tmp_path)], "given")


def test_one_process_is_no_group(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    run_script(write(tmp_path, "assert 'WORLD_SIZE' not in os.environ"), folder=tmp_path, processes=1)


@pytest.mark.parametrize("code", ["raise ValueError('of rank 1')", "sys.exit('of rank 1')", "os._exit(3)"])
def test_one_that_fails_ends_all(tmp_path, code):
    script = write(tmp_path, f"if os.environ['RANK'] == '1':\n    {code}\ntime.sleep(1000)")
    with pytest.raises(
        AssertionError, match=r"process 1 ended with [13]: (?s:.*)" + ("" if "_exit" in code else "of rank 1")
    ):
        run_script(script, folder=tmp_path)


def test_those_that_hang_are_ended(tmp_path):
    script = write(tmp_path, "time.sleep(1000)")
    with pytest.raises(AssertionError, match="the processes did not end in time"):
        run_script(script, folder=tmp_path, timeout=1)
    assert not multiprocessing.active_children()


SHOWN = (
    "import os, sys\nprint(__name__, *sys.argv[1:], os.environ['EXTRA'], os.getcwd())\nprint('ill', file=sys.stderr)\n"
)


@pytest.mark.parametrize("form", ["code", "module", "script"])
def test_python_runs_code_modules_and_scripts(tmp_path, form):
    (tmp_path / "shown.py").write_text(SHOWN)
    first = {"code": ["-c", SHOWN], "module": ["-m", "shown"], "script": ["shown.py"]}[form]
    done = run_python(*first, "--a", "b", folder=tmp_path, EXTRA="given")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"__main__ --a b given {tmp_path}\n", "ill\n")


@pytest.mark.parametrize(
    ("code", "returned", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('bad')", 1, "bad\n"),
        ("sys.exit()", 0, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_python_ends_as_elsewhere(tmp_path, code, returned, said):
    done = run_python("-c", f"import sys\n{code}", folder=tmp_path)
    assert done.returncode == returned
    assert done.stderr == said or (said and f"\n{said}: division by zero\n" in done.stderr)


def test_nothing_of_the_repository_is_imported_before(tmp_path):
    names = ("configuration_minimax_m3", "processing_minimax_m3", "modeling_minimax_m3", "transformers", "torch")
    code = f"import sys; print(*[name for name in {names} if name in sys.modules])"
    assert run_python("-c", code, folder=tmp_path).stdout.split() == ["transformers", "torch"]


def test_python_that_hangs_is_ended(tmp_path):
    with pytest.raises(AssertionError, match="the processes did not end in time: (?s:.*)begun"):
        run_python(
            "-c",
            "import sys, time; print('begun', file=sys.stderr, flush=True); time.sleep(1000)",
            folder=tmp_path,
            timeout=1,
        )

"""Run the test suites of the installed Transformers on the classes of this project.

    python scripts/upstream_suites                    # from the source distribution of the installed version
    python scripts/upstream_suites --stock            # the same suites on stock's own classes
    python scripts/upstream_suites -n 2 -k processor  # two processes; some of the tests

The source distribution has the suites that every model shares: models, configurations, training, processors and
several processes. It lacks some files that these suites import, and `stand_ins` replaces them. It has no tests of
generation, exporting and pipelines, so those do not run.

The script downloads two packages to a temporary folder: the source distribution, and `parameterized`, which the suites
need. Tests that need the Hub, a GPU or more processes than CPUs skip themselves. `known_failures.toml` names each test
that fails, with the reason. The exit status is 1 if another test fails, or if a listed test passes or does not exist.
"""

import argparse
import fnmatch
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PACKAGE = "minimax_m3"


def download(requirement: str, folder: Path) -> Path:
    """Downloads the source distribution of `requirement`, and returns the folder with its files."""
    command = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", folder]
    subprocess.run([sys.executable, "-m", "pip", *command, requirement], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def prepare(source: Path, folder: Path) -> None:
    """Copies upstream's tests to `folder`, with stand-ins for missing files and the suites of this project."""
    for name in ("tests", "utils"):
        if (source / name).exists():
            shutil.copytree(source / name, folder / name)
    for file in (HERE / "stand_ins").rglob("*.py"):
        target = folder / file.relative_to(HERE / "stand_ins")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    shutil.copytree(HERE / "suites", folder / "tests" / PACKAGE)
    for inner in (folder / "tests").rglob("*.py"):
        (inner.parent / "__init__.py").touch()


class Results:
    """A pytest plug-in that keeps the outcome of each test, by its class and name."""

    def __init__(self):
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("::")[2]
        # phases and subtests report too, and if one fails, the test fails
        if (report.outcome != "passed" or report.when == "call") and self.outcomes.get(name) != "failed":
            self.outcomes[name] = report.outcome


def read_known_failures(release: str, subject: str) -> dict[str, str]:
    """Patterns of the tests that fail with this release of Transformers and these classes, with the reasons."""
    return {
        pattern: entry["reason"]
        for entry in tomllib.loads((HERE / "known_failures.toml").read_text())["failure"]
        for pattern in entry["tests"]
        if subject in entry.get("subjects", ["ours", "stock"])
        and release.startswith(tuple(entry.get("versions", [""])))
    }


def find_unexpected(outcomes: dict[str, str], known: dict[str, str], is_complete: bool) -> list[str]:
    """Unknown failures, known failures that pass, and, if all tests ran, known failures that match no test."""
    unexpected = []
    matched = set()
    for name, outcome in sorted(outcomes.items()):
        patterns = {pattern for pattern in known if fnmatch.fnmatchcase(name, pattern)}
        matched |= patterns
        if outcome == "failed" and not patterns:
            unexpected.append(f"{name} failed")
        elif outcome == "passed" and patterns:
            unexpected.append(f"{name} passed, but known_failures.toml lists it")
    if is_complete:
        unexpected += [
            f"{pattern} of known_failures.toml matches no test" for pattern in known if pattern not in matched
        ]
    return unexpected


def print_failures(outcomes: dict[str, str], known: dict[str, str]) -> None:
    """Prints the known failures by reason."""
    failed = sorted(name for name, outcome in outcomes.items() if outcome == "failed")
    for reason in dict.fromkeys(known.values()):
        patterns = [pattern for pattern in known if known[pattern] == reason]
        names = [name for name in failed if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if names:
            print("\n  ".join([f"\n{reason}", *names]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", action="store_true", help="test stock's classes instead")
    parser.add_argument("--source", type=Path, help="unpacked source distribution (default: downloaded)")
    parser.add_argument("-n", type=int, default=0, help="test processes (default: the tests run in this one)")
    parser.add_argument("-k", default="", help="choose tests by name, as in pytest")
    parser.add_argument("--tb", default="no", help="how much to show of each failure, as in pytest")
    arguments = parser.parse_args()

    transformers = version("transformers")
    subject = "stock" if arguments.stock else "ours"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = arguments.source or download(f"transformers=={transformers}", folder / "download")
        prepare(source.resolve(), folder)
        if importlib.util.find_spec("parameterized") is None:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "parameterized"]
            subprocess.run(pip, check=True)
        checkpoint = folder / "checkpoint"
        subprocess.run([sys.executable, HERE.parent / "make_tiny_checkpoint.py", checkpoint], check=True)

        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "UPSTREAM_SUITES_CHECKPOINT": str(checkpoint),
            "UPSTREAM_SUITES_STOCK": "1" if arguments.stock else "",
        }
        sys.path.insert(0, str(folder))
        results = Results()
        options = ["--rootdir", folder, "-c", os.devnull, "--import-mode=importlib", "-q", f"--tb={arguments.tb}"]
        options += ["-p", "no:cacheprovider", "--disable-warnings", "-n", arguments.n, "-k", arguments.k]
        status = pytest.main([str(option) for option in [*options, folder / "tests" / PACKAGE]], plugins=[results])
    known = read_known_failures(transformers, subject)
    print(f"\nTransformers {transformers}, {'stock' if arguments.stock else 'this project'}")
    print_failures(results.outcomes, known)
    unexpected = find_unexpected(results.outcomes, known, is_complete=not arguments.k)
    if unexpected:
        print("\n  ".join(["\nUnexpected", *unexpected]))
    counts = Counter(results.outcomes.values())
    print(f"\n{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    if unexpected or status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(1)


if __name__ == "__main__":
    main()

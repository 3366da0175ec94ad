"""Check whether there is a release of Transformers that this project does not allow yet, and which tests fail on it.

    python scripts/check_upstream.py            # the tests marked `compatibility`
    python scripts/check_upstream.py --all      # all tests
    python scripts/check_upstream.py --release 5.25.0

The script makes an environment for it, `.venv-upstream`. The exit status is 1 if a test fails.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]


def read_allowed() -> SpecifierSet:
    """The releases of Transformers that pyproject.toml allows."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (versions,) = (entry.removeprefix("transformers") for entry in dependencies if entry.startswith("transformers"))
    return SpecifierSet(versions)


def find_newest() -> str:
    """The release that `pip install transformers` installs today."""
    command = "install --dry-run --no-deps --ignore-installed --quiet --report - transformers"
    report = subprocess.run([sys.executable, "-m", "pip", *command.split()], check=True, capture_output=True).stdout
    return json.loads(report)["install"][0]["metadata"]["version"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", help="the release to try (default: the newest, if it is not allowed yet)")
    parser.add_argument("--all", action="store_true", help="run all tests")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-upstream", help="folder of the environment")
    arguments = parser.parse_args()

    allowed, release = read_allowed(), arguments.release or find_newest()
    if not arguments.release and release in allowed:
        print(f"Transformers {release} is the newest release, and allowed ({allowed}).")
        return
    print(f"Transformers {release}; allowed: {allowed}. Setting up {arguments.venv} ...", flush=True)
    venv.create(arguments.venv, clear=True, with_pip=True)
    python = arguments.venv / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, "-c", ROOT / "requirements" / "constraints.txt", f"{ROOT}[dev]"], check=True)
    # in a command of its own, because pip would reject a release that the project does not allow
    subprocess.run([*install, "--upgrade", f"transformers=={release}"], check=True)
    chosen = [] if arguments.all else ["-m", "compatibility"]
    tests = subprocess.run(
        [python, "-m", "pytest", "-q", "-n", "2", "--tb=no", *chosen], cwd=ROOT, capture_output=True, text=True
    )
    failed = re.findall(r"^(?:FAILED|ERROR) .*", tests.stdout, re.MULTILINE)
    print("\n".join([*failed, tests.stdout.strip().splitlines()[-1] if tests.stdout.strip() else tests.stderr]))
    sys.exit(tests.returncode != 0)


if __name__ == "__main__":
    main()

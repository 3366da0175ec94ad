"""Check types with mypy: the three packages, the scripts, the benchmarks and the examples.

    python scripts/check_types.py             # what `make lint` runs
    python scripts/check_types.py --ratchet   # what the list of modules with errors in pyproject.toml should be

mypy names a module after its file. The folders `configuration` and `processing` are imported by longer names, so mypy
reads them through links in build/types that have these names.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKS = ROOT / "build" / "types"
RENAMED = {"configuration_minimax_m3": "configuration", "processing_minimax_m3": "processing"}
FOLDERS = [f"build/types/{name}" for name in RENAMED] + ["modeling_minimax_m3", "benchmarks"]
FILES = ["scripts/*.py", "examples/**/*.py"]


def make_links() -> None:
    LINKS.mkdir(parents=True, exist_ok=True)
    for name, folder in RENAMED.items():
        link = LINKS / name
        if not link.is_symlink():
            link.symlink_to(ROOT / folder, target_is_directory=True)


def run_mypy(*options: str) -> subprocess.CompletedProcess[str]:
    """Run mypy on all that is checked; paths in its output are those of the checkout."""
    make_links()
    files = [str(path.relative_to(ROOT)) for pattern in FILES for path in sorted(ROOT.glob(pattern))]
    command = [sys.executable, "-m", "mypy", *options, *FOLDERS, *files]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for name, folder in RENAMED.items():
        result.stdout = result.stdout.replace(f"build/types/{name}", folder)
    return result


def listed_modules() -> list[str]:
    """The modules whose errors pyproject.toml ignores."""
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["overrides"]
    return [module for override in overrides if override.get("ignore_errors") for module in override["module"]]


def count_errors() -> dict[str, int]:
    """The number of errors of each module that has any, with nothing ignored."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8").replace("$MYPY_CONFIG_FILE_DIR", str(ROOT))
    config = LINKS.parent / "mypy-without-ratchet.toml"
    make_links()
    cache, filled = LINKS.parent / "mypy-without-ratchet", ROOT / ".mypy_cache"
    if filled.is_dir() and not cache.exists():  # what was found out about torch and Transformers, which takes longest
        shutil.copytree(filled, cache)
    config.write_text(settings.replace("ignore_errors = true", "ignore_errors = false"), encoding="utf-8")
    result = run_mypy("--config-file", str(config), "--cache-dir", str(cache))
    if result.returncode not in (0, 1):
        sys.exit(result.stdout)
    counts: dict[str, int] = {}
    for path in re.findall(r"^(\S+?)\.py:\d+: error:", result.stdout, re.MULTILINE):
        module = module_name(path)
        counts[module] = counts.get(module, 0) + 1
    return counts


def module_name(path: str) -> str:
    """The name by which mypy knows the file `path`, which has no suffix: `scripts/demo` is `demo`."""
    parts = path.removesuffix("/__init__").split("/")
    if parts[0] in ("scripts", "examples"):
        return parts[-1]
    names = {folder: name for name, folder in RENAMED.items()}
    return ".".join([names.get(parts[0], parts[0]), *parts[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratchet", action="store_true", help="count the errors of all modules, listed or not")
    if not parser.parse_args().ratchet:
        result = run_mypy()
        print(result.stdout, end="")
        sys.exit(result.returncode)
    counts = count_errors()
    for module, count in sorted(counts.items()):
        print(f'    "{module}",  # {count}')
    print(f"{sum(counts.values())} errors in {len(counts)} modules")
    if clean := sorted(set(listed_modules()) - set(counts)):
        sys.exit(f"listed in pyproject.toml, and clean: {', '.join(clean)}")


if __name__ == "__main__":
    main()

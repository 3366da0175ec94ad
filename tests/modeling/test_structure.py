"""The READMEs of the packages name every module, and imports point the way that they say."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "modeling_minimax_m3"
# Each folder may import from those after it, and from itself.
ORDER = ("models", "training", "loading", "layers", "runtime", "fused", "msa")
NUMBERS = "mxfp8"  # a module that needs PyTorch alone, so every folder may import it
BESIDE = ("planning", "conversion")  # no other folder imports these
APART = {frozenset(("training", "loading"))}  # neither imports the other


def modules_of(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__"}


def named_in(readme: Path, section: str) -> set[str]:
    """What the table of a section names in its first column."""
    text = readme.read_text(encoding="utf-8")
    body = re.search(rf"^#+ {section}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]
    return set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (.*?) \|", body, re.MULTILINE)))) - {"__init__"}


@pytest.mark.parametrize("folder", [*ORDER[:-1], *BESIDE])
def test_readme_names_every_module_of_a_folder(folder):
    assert named_in(PACKAGE / "README.md", folder) == modules_of(PACKAGE / folder)


def test_readme_names_every_command():
    assert named_in(PACKAGE / "README.md", "commands") == modules_of(PACKAGE / "commands")


@pytest.mark.parametrize("folder", ["data", "pretraining"])
def test_readme_names_every_module_of_the_folders_of_processing(folder):
    assert named_in(ROOT / "processing" / "README.md", folder) == modules_of(ROOT / "processing" / folder)


@pytest.mark.parametrize(
    "folder",
    [ROOT / "processing" / "data", ROOT / "processing" / "pretraining", PACKAGE / "commands"],
    ids=["data", "pretraining", "commands"],
)
def test_only_the_top_imports_data_and_commands(folder):
    """Whoever uses the processor or the model alone needs neither. Data for pretraining are data."""
    inside = {*folder.rglob("*.py"), *(ROOT / "processing" / "pretraining").rglob("*.py")}
    for path in (
        {*(ROOT / "processing").rglob("*.py"), *PACKAGE.rglob("*.py")} - inside - {ROOT / "processing" / "__init__.py"}
    ):
        if path.is_relative_to(PACKAGE / "commands"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert folder.name not in (node.module or "").split("."), path.name


@pytest.mark.parametrize("package", ["configuration", "processing", "modeling_minimax_m3"])
def test_readme_names_every_module_of_a_package(package):
    assert named_in(ROOT / package / "README.md", package) == modules_of(ROOT / package)


@pytest.mark.parametrize("folder", ORDER)
def test_imports_point_down(folder):
    allowed = {other for other in ORDER[ORDER.index(folder) :] if frozenset((folder, other)) not in APART}
    for path in (PACKAGE / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                targets = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                assert set(targets) <= allowed | {NUMBERS}, f"{path.name} imports {targets}"


def test_conversion_imports_no_model():
    for path in (PACKAGE / "conversion").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert node.module in (NUMBERS, "version"), path.name


def test_configuration_does_not_import_the_model():
    for path in (ROOT / "configuration").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "modeling_minimax_m3" not in ast.unparse(node), path.name


def test_numbers_need_pytorch_alone():
    tree = ast.parse((PACKAGE / f"{NUMBERS}.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["from typing import NamedTuple", "import torch"]

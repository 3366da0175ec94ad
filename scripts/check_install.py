"""Follow the README in an empty environment, as a newcomer does: Install, Load, Chat, With Trainer.

    python scripts/check_install.py .venv-newest

The script builds the wheel of this checkout and makes a new environment. Then it runs the README's `pip install`
commands in order, with the wheel instead of the checkout, so that pip chooses today's versions. After each command it
runs the snippets that need this command, on a tiny checkpoint, in a temporary folder. At the end it prints the
versions.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# The snippets to run after each command of the README's Install, and the code that makes their files.
STAGES = {
    ".": ["Chat with an image", "Several conversations at once"],
    ".[video]": ["Chat with a video"],
    ".[train]": ["With Trainer"],
}
MAKE_PHOTO = "from PIL import Image; Image.effect_noise((224, 168), 60).convert('RGB').save('photo.png')"
MAKE_CLIP = """
import av, numpy
with av.open("clip.mp4", "w") as container:
    stream = container.add_stream("mpeg4", rate=12)
    stream.width = stream.height = 112
    for shade in range(24):
        frame = av.VideoFrame.from_ndarray(numpy.full((112, 112, 3), 10 * shade, numpy.uint8), format="rgb24")
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
"""
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "av", "peft", "datasets", "pillow", "numpy")


def read_snippet(heading: str) -> str:
    return re.search(rf"^#+ {re.escape(heading)}$.*?^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[1]


def read_install_commands() -> list[str]:
    """The arguments of `pip install` in the README's Install, in order."""
    block = re.search(r"^## Install$.*?^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[1]
    return re.findall(r'^pip install "?(\.[^"\s]*)"?', block, re.MULTILINE)


def build_wheel(python: Path, folder: Path) -> Path:
    subprocess.run([python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path, help="folder of the environment; its content is removed first")
    parser.add_argument("--keep_wheel", type=Path, help="copy the wheel to this folder")
    arguments = parser.parse_args()

    commands = read_install_commands()
    if commands != list(STAGES):
        sys.exit(f"the README's Install must have the commands {list(STAGES)}, got {commands}: update STAGES")
    venv.create(arguments.venv, clear=True, with_pip=True)
    python = arguments.venv.resolve() / "bin" / "python"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = build_wheel(python, folder / "wheel")
        if arguments.keep_wheel:
            arguments.keep_wheel.mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel, arguments.keep_wheel)

        def run(code: str, title: str) -> None:
            print(f"--- {title}", flush=True)
            variables = {"M3_CHECKPOINT": "checkpoint", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "scripts")}
            subprocess.run([python, "-c", code], cwd=folder, env=variables, check=True)

        for command, headings in STAGES.items():
            print(f"--- pip install {command}", flush=True)
            subprocess.run([python, "-m", "pip", "install", "-q", f"{wheel}{command[1:]}"], check=True)
            if command == ".":
                run(MAKE_PHOTO, "a picture")
                run("from make_tiny_checkpoint import make_tiny_checkpoint as m; m('checkpoint')", "a tiny checkpoint")
            elif command == ".[video]":
                run(MAKE_CLIP, "a video")
            for heading in headings:
                run(read_snippet("Load") + read_snippet(heading), f"README: Load, {heading}")
        listed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    print("\n".join(line for line in listed.splitlines() if line.split()[0] in PACKAGES))


if __name__ == "__main__":
    main()

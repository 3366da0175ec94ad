"""Read damaged image files and count the outcomes.

    python scripts/fuzz_images.py [--files N] [--format png ...] [--seed S] [--keep FOLDER]

The script damages small files of each format: it changes bytes, cuts off the end, or removes or repeats a part. The
same seed gives the same files. Reading a file must give an image or a ValueError. Any other error, a crash of the
process and a file that takes too long are failures, and `--keep` saves the files that fail. A separate process reads
the files.
"""

import argparse
import collections
import faulthandler
import functools
import io
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "avif")
SECONDS_PER_FILE = 20
OUTCOMES = {"read": "read", "refused": "refused", "error": "other errors", "crash": "crashes", "hang": "hangs"}
FAILURES = ("error", "crash", "hang")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="damaged files of each format (default: 10000)")
    parser.add_argument("--format", choices=FORMATS, nargs="+", default=list(FORMATS), help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="save the files that fail to this folder")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)  # set for the process that reads
    return parser.parse_args(arguments)


@functools.cache
def make_originals(suffix: str) -> list[bytes]:
    """Undamaged files of a format: of noise, which compresses badly, and of a gradient, which compresses well."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 4), dtype=np.uint8)
    gradient = np.linspace(0, 255, 48 * 64 * 4).astype(np.uint8).reshape(48, 64, 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {
        "png": [{}, {"save_all": True}],
        "jpeg": [{}, {"progressive": True}],
        "webp": [{}, {"lossless": True}, {"save_all": True}],
        "gif": [{}, {"save_all": True}],
        "bmp": [{}],
        "tiff": [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "packbits"}],
        "avif": [{}, {"save_all": True}],
    }
    modes = {"png": ["RGB", "RGBA", "P", "L", "1"], "webp": ["RGB", "RGBA"], "gif": ["P"], "avif": ["RGB", "RGBA"]}
    modes |= {"jpeg": ["RGB", "L", "CMYK"], "bmp": ["RGB", "P", "1"], "tiff": ["RGB", "CMYK", "P", "1"]}
    originals = []
    for pixels in (noise, gradient):
        for mode in modes[suffix]:
            for given in options[suffix]:
                image = Image.fromarray(pixels if mode in ("RGBA", "CMYK") else pixels[..., :3])
                if mode == "CMYK":
                    image = Image.frombytes("CMYK", image.size, pixels.tobytes())
                image = image.convert(mode)
                extra = {"append_images": [image.rotate(180)]} if "save_all" in given else {}
                if suffix not in ("gif", "bmp"):
                    extra["exif"] = exif
                file = io.BytesIO()
                image.save(file, suffix, **given, **extra)
                originals.append(file.getvalue())
    return originals


def damage(original: bytes, chance: random.Random) -> bytes:
    """Damages a file: wrong bytes anywhere or near the start, noise, a cut, or a lost or repeated part."""
    content = bytearray(original)
    kind = chance.randrange(6)
    start = chance.randrange(len(content))
    stop = min(len(content), start + chance.randint(1, 64))
    if kind < 2:
        for _ in range(chance.randint(1, 16)):
            content[chance.randrange(len(content) if kind == 0 else min(256, len(content)))] ^= chance.randint(1, 255)
    elif kind == 2:
        content[start:stop] = chance.randbytes(stop - start)
    elif kind == 3:
        del content[start:]
    elif kind == 4:
        del content[start:stop]
    else:
        content[start:start] = content[start:stop]
    return bytes(content)


def damaged_file(suffix: str, index: int, seed: int) -> bytes:
    chance = random.Random(f"{seed} {suffix} {index}")
    return damage(chance.choice(make_originals(suffix)), chance)


def read_files(arguments: argparse.Namespace) -> None:
    """Reads the files in this process and prints one outcome per line. A crash or a hang ends the process."""
    from processing_minimax_m3 import MiniMaxM3VLImageProcessor

    warnings.simplefilter("ignore")
    processor = MiniMaxM3VLImageProcessor()
    for suffix, index in all_files(arguments)[arguments.first :]:
        content = damaged_file(suffix, index, arguments.seed)
        faulthandler.dump_traceback_later(SECONDS_PER_FILE, exit=True)
        try:
            processor.fetch_images(content)
            outcome = "read"
        except ValueError:
            outcome = "refused"
        except Exception as error:
            outcome = f"error {type(error).__name__}: {error}".splitlines()[0]
        print(outcome, flush=True)
    faulthandler.cancel_dump_traceback_later()


def all_files(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    return [(suffix, index) for suffix in arguments.format for index in range(arguments.files)]


def read_elsewhere(arguments: argparse.Namespace) -> list[str]:
    """Reads the files in other processes. Each process continues after the file that ended the one before."""
    total = len(all_files(arguments))
    options = ["--files", str(arguments.files), "--seed", str(arguments.seed), "--format", *arguments.format]
    outcomes: list[str] = []
    while len(outcomes) < total:
        command = [sys.executable, __file__, *options, "--first", str(len(outcomes))]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        is_hang = "Timeout (0:00:" in done.stderr
        if not lines and not is_hang and done.returncode > 0:
            raise SystemExit(done.stderr)  # the process did not start
        outcomes += lines
        if len(outcomes) < total:
            outcomes.append("hang" if is_hang else f"crash with exit code {done.returncode}")
    return outcomes


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arguments.format = [suffix for suffix in arguments.format if f".{suffix}" in Image.registered_extensions()]
    if arguments.first is not None:
        read_files(arguments)
        return
    counts: dict[str, collections.Counter] = {suffix: collections.Counter() for suffix in arguments.format}
    for (suffix, index), outcome in zip(all_files(arguments), read_elsewhere(arguments)):
        kind = outcome.split()[0]
        counts[suffix][kind] += 1
        if kind in FAILURES:
            print(f"{suffix} {index}: {outcome}")
            if arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                content = damaged_file(suffix, index, arguments.seed)
                (arguments.keep / f"{index}.{suffix}").write_bytes(content)
    for suffix, count in counts.items():
        print(f"{suffix}: " + ", ".join(f"{count[kind]} {name}" for kind, name in OUTCOMES.items()))
    raise SystemExit(any(count[kind] for count in counts.values() for kind in FAILURES))


if __name__ == "__main__":
    main()

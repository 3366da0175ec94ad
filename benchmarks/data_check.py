"""Times `minimax-m3 check` on many short rows, and measures how full packs of the standard library's files are.

    python -m benchmarks.data_check

The tokenizer is a byte-level BPE that learns 32,768 tokens from the standard library, because the released one has to
be downloaded. The rows are slices of the same files: texts of about 300 tokens, and chats of about 300 tokens, of
which about 200 are the fixed prompt of the chat template.
"""

import argparse
import itertools
import json
import random
import resource
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from configuration_minimax_m3 import tiny_config
from processing_minimax_m3.data import Encoder, Reading, Rows, open_rows
from processing_minimax_m3.data.checking import check_rows
from processing_minimax_m3.data.packing import pack_lengths
from processing_minimax_m3.special_tokens import SPECIAL_TOKENS

from .measure import OtherLoad, environment
from .report import as_table

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 32_768
CHARACTERS = {"text": 1250, "chat": 370}  # of a slice, on average
BUDGET = 32_768  # tokens of a pack


def library_files() -> list[str]:
    """Text of the files of Python's standard library, without packages that were installed."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    return [file.read_text("utf-8", "replace") for file in files if "site-packages" not in file.parts]


def make_processor(texts: list[str]) -> Any:
    """A processor with a tokenizer of `VOCABULARY` tokens."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from make_tiny_checkpoint import build_processor

    tiny = tiny_config()
    first = tiny.image_token_id - SPECIAL_TOKENS.index("]<]image[>[")  # id of the first special token
    moved = {name: getattr(tiny, name) + VOCABULARY - first for name in ("image_token_id", "video_token_id")}
    text = tiny.text_config.to_dict()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text[name] += VOCABULARY - first
    text["vocab_size"] = VOCABULARY + len(SPECIAL_TOKENS)
    config = type(tiny)(text_config=text, vision_config=tiny.vision_config.to_dict(), **moved)
    return build_processor(config, texts)


def write_rows(path: Path, kind: str, count: int, texts: list[str]) -> None:
    """Writes rows of slices, whose lengths vary from a fifth of the average to twice as much."""
    chosen, joined = random.Random(0), "\n".join(texts)
    average = CHARACTERS[kind]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            start, length = chosen.randrange(len(joined)), chosen.randint(average // 5, 2 * average - average // 5)
            text = joined[start : start + length]
            half = length // 2
            turns = [{"role": "user", "content": text[:half]}, {"role": "assistant", "content": text[half:]}]
            row = {"text": text} if kind == "text" else {"messages": turns}
            file.write(json.dumps(row) + "\n")


def processor_seconds() -> float:
    """Seconds that this process and its children that ended have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def time_check(kind: str, count: int, processor: Any, texts: list[str], processes: int) -> dict[str, Any]:
    """One check of `count` rows, from the file to the report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, kind, count, texts)
        with OtherLoad() as others:
            start, computed = time.perf_counter(), processor_seconds()
            report = check_rows(Rows(open_rows([str(path)])), Encoder(processor), Reading(), 4096, processes)
            str(report)
            seconds, computed = time.perf_counter() - start, processor_seconds() - computed
    return {
        "kind": kind,
        "rows": report.rows,
        "faults": len(report.faults),
        "tokens_of_a_row": sum(report.lengths) / max(len(report.lengths), 1),
        "processes": processes,
        "seconds": seconds,
        "processor_seconds": computed,
        "cores_of_others": others.cores,
    }


def measure_packing(processor: Any, texts: list[str]) -> dict[str, Any]:
    """How full packs of whole files are."""
    lengths = list(map(len, processor.tokenizer(texts, verbose=False)["input_ids"]))
    packing = pack_lengths(lengths, BUDGET)
    return {
        "files": len(lengths),
        "longer_than_a_pack": len(packing.too_long),
        "budget": BUDGET,
        "packs": len(packing.packs),
        "fill": packing.fill,
    }


def as_page(record: dict[str, Any]) -> str:
    """The record as tables."""
    header = ["rows", "tokens of a row", "seconds", "processor seconds", "cores that others kept busy"]
    table = [
        [
            f"{row['rows']:,} {row['kind']}s",
            f"{row['tokens_of_a_row']:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['processor_seconds']:.1f}",
            f"{row['cores_of_others']:.2f}",
        ]
        for row in record["check"]
    ]
    packing = record["packing"]
    machine = ", ".join(f"{name} {value}" for name, value in record["environment"].items())
    return "\n".join(
        [
            "# Check and packing",
            "",
            f"`{record['command']}`",
            "",
            machine,
            "",
            f"Check, from the file to the report, with {record['check'][0]['processes']} processes:",
            "",
            as_table(header, table),
            "",
            f"Packs of {packing['budget']:,} tokens from {packing['files']:,} files of the standard library: "
            f"{packing['packs']:,} packs, {packing['fill']:.2%} full. {packing['longer_than_a_pack']} files are longer "
            "than a pack and left out.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of a check (100000)")
    parser.add_argument("--processes", type=int, default=2, help="processes of a check (2)")
    parser.add_argument("--output", type=Path, default=RESULTS / "data_check", help="results, without a suffix")
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.data_check", *itertools.islice(sys.argv, 1, None)]),
        "environment": environment(),
    }
    texts = library_files()
    processor = make_processor(texts)
    record["packing"] = measure_packing(processor, texts)
    record["check"] = [time_check(kind, arguments.rows, processor, texts, arguments.processes) for kind in CHARACTERS]
    arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(as_page(record))
    print(as_page(record))


if __name__ == "__main__":
    main()

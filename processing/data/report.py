"""What a check of data found: counts, faults, a histogram of lengths."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..chat_template import THINKING_MODES
from ..messages import REASONING_FIELDS
from .encoded_rows import EncodedRow
from .encoding import Encoded
from .faults import Fault
from .formats import Example
from .packing import pack_lengths

BAR = 40  # characters of the longest bar


@dataclass
class DataReport:
    """What a check found.

    Args:
        max_length (int): Greatest number of tokens of a row in training.
        rows (int): Rows that were read, those with faults included.
        faulty_rows (int): Rows with faults.
        faults (list of Fault): The faults, in the order of the rows.
        lengths (list of int): Tokens of each row without a fault, in order, images and videos included.
        trained_lengths (list of int): Tokens of each row that training would see.
        learned (int): Tokens that training would learn.
        media_tokens (int): Tokens of images and videos.
        media (Counter): Images and videos.
        kinds (Counter): Rows by kind: "chat", "text", "completion".
        roles (Counter): Messages by role.
        thinking (Counter): Answers by the thinking mode of their chat, and by whether they have reasoning.
        cut (int): Chats and completions that lose their end.
        split (int): Texts that become several rows.
        left_out (Counter): Rows that are left out, by the reason.
        unused (Counter): Rows by a column that nothing reads.
        repeated (int): Rows that say the same as an earlier row.
    """

    max_length: int
    rows: int = 0
    faulty_rows: int = 0
    faults: list[Fault] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    trained_lengths: list[int] = field(default_factory=list)
    learned: int = 0
    media_tokens: int = 0
    media: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    roles: Counter = field(default_factory=Counter)
    thinking: Counter = field(default_factory=Counter)
    cut: int = 0
    split: int = 0
    left_out: Counter = field(default_factory=Counter)
    unused: Counter = field(default_factory=Counter)
    repeated: int = 0
    _seen: set[bytes] = field(default_factory=set, repr=False)

    def add(self, result: EncodedRow) -> None:
        """Counts one row."""
        self.rows += 1
        if result.fault is not None:
            self.faulty_rows += 1
            self.faults += [result.fault, *result.further_faults]
            return
        example, encoded = result.checked()
        self.kinds[example.kind] += 1
        self.lengths.append(encoded.length)
        self.media_tokens += encoded.media_tokens
        self.media.update(encoded.media)
        self.unused.update(example.unused)
        self._count_messages(example)
        self._count_repeated(example)
        if left_out := encoded.why_left_out(self.max_length):
            self.left_out[left_out] += 1
        else:
            self._count_trained(encoded)

    def _count_trained(self, encoded: Encoded) -> None:
        is_longer = encoded.length > self.max_length
        if encoded.is_text:
            rows = [row["labels"] for row in encoded.rows(self.max_length)]
            self.split += is_longer
            self.trained_lengths += map(len, rows)
            self.learned += sum(label >= 0 for labels in rows for label in labels)
        else:
            self.cut += is_longer
            self.trained_lengths.append(min(encoded.length, self.max_length))
            self.learned += encoded.num_learned(self.max_length)

    def _count_messages(self, example: Example) -> None:
        mode = example.variables.get("thinking_mode", THINKING_MODES[0])
        for message in example.messages or ():
            self.roles[message["role"]] += 1
            if message["role"] == "assistant":
                has_reasoning = any(message.get(name) for name in REASONING_FIELDS)
                self.thinking[mode, has_reasoning or "</mm:think>" in str(message.get("content"))] += 1

    def _count_repeated(self, example: Example) -> None:
        content = repr((example.messages, example.tools, example.prompt, example.text))
        digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self.repeated += digest in self._seen
        self._seen.add(digest)

    def merge(self, other: "DataReport") -> None:
        """Adds the counts of the rows behind these."""
        sums = ("rows", "faulty_rows", "learned", "media_tokens", "cut", "split")
        for name in (*sums, "faults", "lengths", "trained_lengths"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("media", "kinds", "roles", "thinking", "left_out", "unused"):
            getattr(self, name).update(getattr(other, name))
        self.repeated += other.repeated + len(self._seen & other._seen)
        self._seen |= other._seen

    def as_dict(self) -> dict[str, Any]:
        """All counts and faults, for a JSON file."""
        packing = pack_lengths(self.trained_lengths, self.max_length)
        return {
            "rows": self.rows,
            "max_length": self.max_length,
            "faulty_rows": self.faulty_rows,
            "faults": [fault.as_dict() for fault in self.faults],
            "kinds": dict(self.kinds),
            "roles": dict(self.roles),
            "thinking": [
                {"mode": mode, "has_reasoning": has_reasoning, "answers": count}
                for (mode, has_reasoning), count in sorted(self.thinking.items())
            ],
            "tokens": sum(self.lengths),
            "media_tokens": self.media_tokens,
            "images": self.media["image"],
            "videos": self.media["video"],
            "lengths": _percentiles(self.lengths),
            "trained": {
                "rows": len(self.trained_lengths),
                "tokens": sum(self.trained_lengths),
                "learned_tokens": self.learned,
                "cut_rows": self.cut,
                "split_texts": self.split,
                "left_out": dict(self.left_out),
            },
            "packing": {"packs": len(packing.packs), "fill": packing.fill},
            "unused_columns": dict(self.unused),
            "repeated_rows": self.repeated,
        }

    def __str__(self) -> str:
        """The report for a terminal, without the faults."""
        found = self.as_dict()
        trained, packing = found["trained"], found["packing"]
        lines = [f"rows       {self.rows:,}: {_listed(self.kinds, 'none readable')}"]
        if self.roles:
            lines.append(f"messages   {_listed(self.roles)}")
        for entry in found["thinking"]:
            kind = "with reasoning" if entry["has_reasoning"] else "without reasoning"
            lines.append(f"answers    {entry['answers']:,} {kind} in thinking mode {entry['mode']}")
        if self.media:
            lines.append(f"media      {_listed(self.media)}, {self.media_tokens:,} tokens")
        if self.lengths:
            shares = ", ".join(f"{name} {value:,}" for name, value in found["lengths"].items())
            lines += [f"tokens     {found['tokens']:,}; of a row: {shares}", *histogram(self.lengths, self.max_length)]
        lines.append(
            f"training   {trained['rows']:,} rows of at most {self.max_length:,} tokens, {trained['tokens']:,} tokens, "
            f"{self.learned:,} of them learned"
        )
        if self.trained_lengths and not self.media:
            packs = f"{packing['packs']:,} packs of {self.max_length:,} tokens, {packing['fill']:.1%} full"
            lines.append(f"packing    {packs} (with --packing)")
        if self.cut:
            lines.append(f"cut        {self.cut:,} rows lose their end")
        if self.split:
            lines.append(f"cut        {self.split:,} texts become several rows")
        lines += [f"left out   {count:,} rows {reason}" for reason, count in self.left_out.items()]
        if self.repeated:
            lines.append(f"repeated   {self.repeated:,} rows say the same as an earlier row")
        if self.unused:
            lines.append(f"not read   columns {', '.join(sorted(self.unused))}")
        lines.append(f"faults     {len(self.faults):,}" + (f", in rows: {self.faulty_rows:,}" if self.faults else ""))
        return "\n".join(lines)


def _listed(counts: Counter, otherwise: str = "") -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common() if count) or otherwise


def _percentiles(lengths: list[int]) -> dict[str, int]:
    if not lengths:
        return {}
    names = {"least": 0, "median": 50, "90%": 90, "99%": 99, "most": 100}
    values = np.percentile(lengths, list(names.values()), method="higher")
    return {name: int(value) for name, value in zip(names, values)}


def histogram(lengths: list[int], max_length: int) -> list[str]:
    """Lines of a histogram whose bins double in width, marked where they lie beyond `max_length`."""
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    first, last = int(powers.min()), int(powers.max())
    counts = np.bincount(powers, minlength=last + 1)[first:]
    lines = []
    for power, count in zip(range(first, last + 1), counts):
        bar = "#" * max(round(BAR * count / counts.max()), int(count > 0))
        beyond = "  beyond --max_length" if 2**power // 2 >= max_length and count else ""
        lines.append(f"  up to {2**power:>9,} {bar:<{BAR}} {count:,}{beyond}")
    return lines

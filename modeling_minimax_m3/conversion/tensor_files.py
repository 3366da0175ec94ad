"""Safetensors files, read and written piece by piece, so that no file is in memory as a whole."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I64": torch.int64,
}
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}

_LENGTH = struct.Struct("<Q")  # the first bytes of a file: how long the header is
_LARGEST_HEADER = 100_000_000  # bytes, as in the library
_BYTES_AT_A_TIME = 2**23


@dataclass(frozen=True)
class Region:
    """Values that lie behind each other in a file: a tensor, or some of its leading rows.

    Args:
        file (Path): The file.
        offset (int): Where the values begin, in bytes from the start of the file.
        dtype (torch.dtype): Of the values.
        shape (tuple[int, ...]): Of the values.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, start: int, shape: tuple[int, ...]) -> "Region":
        """Values from element `start` on, as a tensor of `shape`."""
        return replace(self, offset=self.offset + start * self.dtype.itemsize, shape=shape)

    def read(self) -> torch.Tensor:
        """The values as a tensor of their own."""
        buffer = bytearray(self.nbytes)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            view = memoryview(buffer)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{self.file} ends inside a tensor: it was cut off while it was read.")
                view = view[count:]
        if not buffer:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(buffer, dtype=self.dtype).view(self.shape)


def read_header(file: Path) -> tuple[dict[str, Region], dict[str, str]]:
    """The tensors of a file and its metadata. The values are not read.

    Raises:
        ValueError: The file is no safetensors file, or its size is not what its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else size
        if length > min(size - _LENGTH.size, _LARGEST_HEADER):
            raise ValueError(
                f"{file} is not a complete safetensors file: it has {size} bytes, too few for its header of {length}."
            )
        try:
            entries = json.loads(stream.read(length))
            metadata = entries.pop("__metadata__", {})
            tensors, spans = {}, []
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{file}: {name} must have a dtype of {', '.join(DTYPES)}, got {entry['dtype']}.")
                region = Region(file, _LENGTH.size + length + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
                if region.nbytes != end - begin:
                    raise ValueError(
                        f"{file}: {name} must have {region.nbytes} bytes by its shape, got {end - begin}."
                    )
                tensors[name] = region
                spans.append((begin, end))
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{file} has no readable safetensors header ({type(error).__name__}: {error})."
            ) from error
    end = 0
    for begin, span_end in sorted(spans):
        if begin != end:
            raise ValueError(f"{file}: the tensors of its header overlap or leave gaps, at byte {begin}.")
        end = span_end
    if size != _LENGTH.size + length + end:
        raise ValueError(
            f"{file} must have {_LENGTH.size + length + end} bytes by its header, got {size}: it is cut off or was "
            "changed."
        )
    return tensors, metadata


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Wide dtypes first, so that every tensor lies at a multiple of its element size. Then by name."""
    return sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))


class TensorFileWriter:
    """Writes a safetensors file from beginning to end and hashes it on the way.

    Args:
        file (Path): The file, which is replaced.
        specs (list[TensorSpec]): The tensors, in the order in which their bytes come.
        metadata (Mapping[str, str]): Metadata of the header.
    """

    def __init__(self, file: Path, specs: list[TensorSpec], metadata: Mapping[str, str]):
        self._expected = sum(spec.nbytes for spec in specs)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        begin = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": NAMES_OF_DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begin, begin + spec.nbytes],
            }
            begin += spec.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._hash = hashlib.sha256()
        self._stream = file.open("wb")
        self._write(_LENGTH.pack(len(encoded)) + encoded)
        self._written = 0

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """The system names no file if it cannot write to one that is open."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._stream.name) from error

    def _write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        with self._named_errors():
            self._stream.write(data)

    def write(self, values: torch.Tensor) -> None:
        """Append values, in any dtype: their bytes count."""
        data = memoryview(values.contiguous().flatten().view(torch.uint8).numpy().data)
        self._written += len(data)
        self._write(data)

    def close(self) -> str:
        """Bring the file to the disk. Returns its SHA-256.

        Raises:
            OSError: The disk is full, or the file cannot be written for another reason.
            RuntimeError: Other bytes were written than the header says.
        """
        with self._named_errors():
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._stream.close()
        if self._written != self._expected:
            raise RuntimeError(f"{self._written} bytes were written instead of {self._expected}")
        return self._hash.hexdigest()


def hash_file(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BYTES_AT_A_TIME))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_durably(file: Path, content: bytes) -> None:
    """Write a small file beside its place and rename it, so that it is there completely or not at all."""
    beside = file.with_name(f"{file.name}.tmp")
    with beside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)

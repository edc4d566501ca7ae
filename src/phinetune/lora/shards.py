"""safetensors files as they lie on disk: where each tensor is, and copying its bytes from file to file.

The header is read, the tensors are not; nothing is mapped into memory, so what is copied does not count as memory used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from phinetune.errors import ModelError
from phinetune.model.folder import safetensors_header

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the floating point types -> torch's."""
_CHUNK = 8 << 20


class Layout:
    """Where every tensor of a model is: file, dtype, shape, bytes."""

    def __init__(self, files: list[Path]) -> None:
        self.headers: dict[Path, dict[str, Any]] = {}
        self.metadata: dict[Path, Any] = {}
        self.starts: dict[Path, int] = {}
        self.file_of: dict[str, Path] = {}
        for file in files:
            try:
                header, size = safetensors_header(file)
            except (ValueError, KeyError, TypeError):
                raise ModelError(f"{file}: not a safetensors file, or cut off in its header") from None
            if file.stat().st_size != size:
                raise ModelError(f"{file}: {file.stat().st_size} bytes, must be {size}: the file is cut off or damaged")
            self.metadata[file] = header.pop("__metadata__", None)
            self.headers[file] = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
            with file.open("rb") as stream:
                self.starts[file] = 8 + int.from_bytes(stream.read(8), "little")
            self.file_of |= dict.fromkeys(header, file)

    def entry(self, name: str) -> Any:
        """dtype, shape and data_offsets of a tensor."""
        return self.headers[self.file_of[name]][name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, of all files."""
        return {name: tuple(entry["shape"]) for header in self.headers.values() for name, entry in header.items()}


def copy_bytes(read: BinaryIO, write: BinaryIO, start: int, stop: int) -> None:
    """Bytes from file to file, inside the kernel where it can."""
    read.seek(start)
    left = stop - start
    if hasattr(os, "sendfile"):
        offset = start
        while left:
            sent = os.sendfile(write.fileno(), read.fileno(), offset, min(left, 1 << 30))
            if sent == 0:
                raise ModelError("a file of the base model ended early")
            offset, left = offset + sent, left - sent
        return
    while left:
        block = read.read(min(left, _CHUNK))
        write.write(block)
        left -= len(block)


def read_tensor(read: BinaryIO, start: int, stop: int, entry: Any) -> Tensor:
    """The tensor in bytes `start` to `stop`, on its own memory."""
    buffer = bytearray(stop - start)
    read.seek(start)
    view = memoryview(buffer)
    while view:
        count = read.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ModelError("a file of the base model ended early")
        view = view[count:]
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    return torch.frombuffer(buffer, dtype=dtype).view(shape) if buffer else torch.empty(shape, dtype=dtype)


def write_tensor(write: BinaryIO, tensor: Tensor) -> None:
    """The bytes of `tensor`."""
    if tensor.numel():
        view = memoryview(cast(Any, tensor.contiguous().view(-1).view(torch.uint8).numpy()))
        while view:
            view = view[write.write(view) :]

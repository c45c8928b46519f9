"""Write a safetensors file tensor by tensor: safetensors' own writer needs all of them, and a copy, in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from rlhf.errors import RunFailed
from rlhf.files import sha256_of

COPY_BYTES = 64 << 20  # of a tensor that is on a GPU, at a time
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class TensorFile:
    """One safetensors file that is being written.

    Source: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
    """

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]):
        """Open the file and write its header.

        Args:
            tensors: shape and dtype (any device, also meta) by name, in the order in which `write` will be called. A tensor
                must not follow one of a smaller dtype with an odd number of elements: readers want them aligned.
        """
        self._planned = tensors
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            start, end = end, end + tensor.nbytes
            dtype, shape = _DTYPES[tensor.dtype], list(tensor.shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        self.path = path
        self._digest = hashlib.sha256()
        self._file: IO[bytes] = open(path, "wb")
        self._put(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor, on any device.

        Raises:
            RunFailed: it has another shape or dtype than the header says.
        """
        expected = self._planned[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise RunFailed(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {expected.dtype} {tuple(expected.shape)} as planned"
            )
        if tensor.numel():
            content = tensor.detach().reshape(-1).view(torch.uint8)
            for part in content.split(COPY_BYTES):
                self._put(part.cpu().numpy().data)

    def _put(self, data) -> None:
        self._digest.update(data)
        self._file.write(data)

    def finish(self) -> str:
        """Flush to disk and close; returns the sha256 of what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def close(self) -> str:
        """`finish`, then read the file again.

        Raises:
            RunFailed: what the disk holds is not what was written.
        """
        digest = self.finish()
        if sha256_of(self.path) != digest:
            raise RunFailed(f"{self.path} reads differently from what was written; check the disk")
        return digest

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # what is buffered can't be written to a full disk
            self._file.close()

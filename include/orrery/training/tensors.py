"""Tensors at rest: `weights.safetensors`, and one digest over what they are. No pickle, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
# Names of the safetensors format, https://github.com/huggingface/safetensors#format
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def digest(tensors: Mapping[str, Array]) -> str:
    """Return sha256 over (name, dtype, shape, bytes) of the tensors, sorted by name: equal weights, equal digest."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        array = _little(tensors[name])
        h.update(f"{name}\0{array.dtype.name}\0{list(array.shape)}\0{array.nbytes}\n".encode())
        h.update(array.tobytes())
    return h.hexdigest()


def to_safetensors(tensors: Mapping[str, Array]) -> bytes:
    """Return the tensors as a safetensors file: length of the header, JSON header, then the bytes, sorted by name."""
    header: dict[str, Any] = {}
    parts, at = [], 0
    for name in sorted(tensors):
        array = _little(tensors[name])
        header[name] = {
            "dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes],
        }  # fmt: skip
        parts.append(array.tobytes())
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def _little(array: Array) -> Array:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)

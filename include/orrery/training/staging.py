"""What a checkpoint is made of: the leaves of a nested dict, and copies of its tensors that training cannot change."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

Path: TypeAlias = tuple[str | int | tuple[int], ...]  # keys of dicts, and (i,) for the i-th of a list


@dataclass(eq=False)
class Fragment:
    """A run of a flattened tensor of `numel` elements, from `start` on: what one process has of it under ZeRO.

    `flat` [n] may be empty. The fragments of all processes together are the whole, without overlap. DCP sees a
    one-dimensional tensor in chunks, through the two methods that it asks for.
    """

    flat: Tensor
    start: int
    numel: int

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return torch.Size((self.numel,))

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.flat.dtype

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return self.numel * int(self.flat.itemsize)

    def detach(self) -> Fragment:
        """Return the same run without its history."""
        return Fragment(self.flat.detach(), self.start, self.numel)

    def clone(self) -> Fragment:
        """Return a copy of the run."""
        return Fragment(self.flat.clone(), self.start, self.numel)

    def copy_(self, other: Fragment) -> Fragment:
        """Take over the elements of the same run."""
        self.flat.copy_(other.flat)
        return self

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        chunk = ChunkStorageMetadata(torch.Size((self.start,)), self.flat.shape)
        return [chunk] if len(self.flat) else []

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]  # fmt: skip


Stored: TypeAlias = Tensor | Fragment


def name(path: Path) -> str:
    """Return a leaf's name: its path with slashes, `optimizer/state/0/exp_avg`."""
    return "/".join(str(part[0] if isinstance(part, tuple) else part) for part in path)


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield path and value of every leaf: a tensor, or what JSON can hold. Lists of plain values are leaves."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list) and any(isinstance(value, dict | list | Stored) for value in tree):
        for i, value in enumerate(tree):
            yield from leaves(value, (*path, (i,)))
    else:
        yield path, tree


def tensors_and_values(tree: dict[str, Any]) -> tuple[dict[Path, Stored], dict[Path, Any]]:
    """Return the tensors and the other leaves, each by path."""
    found = dict(leaves(tree))
    tensors = {path: value for path, value in found.items() if isinstance(value, Stored)}
    return tensors, {path: value for path, value in found.items() if path not in tensors}


def from_json(parts: list[Any]) -> Path:
    """Return a path that JSON has made a list of."""
    return tuple((part[0],) if isinstance(part, list) else part for part in parts)


def put(tree: Any, path: Path, value: Any) -> None:
    """Set a leaf, making the dicts and lists above it where there are none. A tuple stays one (JSON has only lists)."""
    for part, following in itertools.pairwise(path):
        default: Any = [] if isinstance(following, tuple) else {}
        if not isinstance(part, tuple):
            tree = tree.setdefault(part, default)
        else:
            while len(tree) <= part[0]:
                tree.append(type(default)())
            tree = tree[part[0]]
    last = path[-1]
    if isinstance(last, tuple):
        tree += [None] * (last[0] + 1 - len(tree))
        tree[last[0]] = value
    else:
        tree[last] = tuple(value) if isinstance(tree.get(last), tuple) else value


def local(tensor: Stored) -> Tensor:
    """Return this process's part of a tensor, without its history."""
    if isinstance(tensor, Fragment):
        return tensor.flat.detach()
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.detach()


def signature(tensors: dict[Path, Stored], values: dict[Path, Any]) -> str:
    """Return a digest of names, types and shapes: what all processes have to agree on."""
    rows = [f"{name(p)} {t.dtype} {tuple(t.shape)}" for p, t in tensors.items()] + [name(p) for p in values]
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


SMALL = 16 << 10  # bytes of a whole tensor: statistics of up to 4,096 features


def share(tensors: dict[Path, Stored], rank: int, world: int) -> list[Path]:
    """Return what process `rank` of `world` writes: its part of every sharded tensor, and some of the whole ones.

    Whole tensors are copied and written by one process: small ones by rank 0, large ones so that bytes come out even.
    """
    mine, load = [], [0] * world
    for path, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, name(item[0]))):
        if isinstance(tensor, DTensor | Fragment):
            mine.append(path)
            continue
        # A batch norm's statistics may differ by rank between two steps, and rank 0's are the ones that count.
        owner = 0 if tensor.nbytes <= SMALL else min(range(world), key=load.__getitem__)
        load[owner] += tensor.nbytes
        if owner == rank:
            mine.append(path)
    return mine


class Staging:
    """Copies of tensors in host memory, in the same buffers each time: a page that is known costs no fault."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Iterable[tuple[str, Stored]]) -> dict[str, Tensor]:
        """Copy this process's part of each tensor; they may change as soon as this returns."""
        copies: dict[str, Tensor] = {}
        on_device = False
        for key, tensor in tensors:
            source = local(tensor)
            copies[key] = self._buffer(key, source)
            copies[key].copy_(source, non_blocking=True)
            on_device |= source.is_cuda
        if on_device:
            torch.cuda.current_stream().synchronize()
        return copies

    def reserve(self, tensors: Iterable[tuple[str, Stored]]) -> None:
        """Make the buffers for tensors that will be copied. Their memory is pinned for a GPU: some 0.1 s per 100 MB."""
        for key, tensor in tensors:
            self._buffer(key, local(tensor))

    def _buffer(self, key: str, source: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[key] = buffer
        return buffer

    def forget(self, keep: set[str]) -> None:
        """Free the buffers of all other tensors."""
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in keep}

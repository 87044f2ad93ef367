"""How torch's distributed checkpoints (DCP) lie in the store: safetensors files of every process and one JSON index.

DCP plans who writes and reads what, and reshards; its own files are pickles, these are not. The index says of every
tensor which part of it lies where, in files relative to the checkpoints' folder: a tensor of an earlier checkpoint is
referred to by leaving its entry as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from orrery.store import File
from orrery.training.checkpoints import Checkpoints
from orrery.training.staging import local

INDEX = "index.json"
# Names of the safetensors format, https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
TYPES = {text: dtype for dtype, text in DTYPES.items()}


def write(target: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Write contiguous CPU tensors as a safetensors file; return at which byte of the file each begins."""
    header: dict[str, Any] = {}
    ordered, at = list(tensors), 0
    for key, tensor in ordered:
        entry = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        header[key] = entry
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            f.write(_bytes(tensor))
    return {key: 8 + len(text) + int(entry["data_offsets"][0]) for key, entry in header.items()}


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class StagedPlanner(DefaultSavePlanner):  # type: ignore[misc, unused-ignore]
    """Plans by the live tensors' shapes, and hands out the staged copies of their bytes."""

    def __init__(self, staged: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged = staged

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return this process's copy of a tensor."""
        return self.staged[index.fqn]


class InPlacePlanner(DefaultLoadPlanner):  # type: ignore[misc, unused-ignore]
    """Plans what this process needs for its tensors and fragments as they are, and names where it goes."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the tensors by name, and what is stored of them."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return this process's part of a tensor."""
        return local(self.state_dict[index.fqn])


class Writer(StorageWriter):
    """One process's side of a save: its files, and on rank 0 the index. `files` are what it has written."""

    def __init__(self, checkpoints: Checkpoints, name: str, rank: int, scratch: Path, index: dict[str, Any]) -> None:
        self.checkpoints, self.name, self.rank, self.scratch, self.index = checkpoints, name, rank, scratch, index
        self.files: list[File] = []

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leave the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's tensors, those of the best weights into a file of their own."""
        done: list[WriteResult] = []
        for kind in ("state", "best"):
            items = [item for item in plan.items if item.index.fqn.startswith("best/") == (kind == "best")]
            if items:
                done += self._file(f"{self.name}/{kind}-{self.rank:05d}.safetensors", items, planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(done)
        return future

    def _file(self, path: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        tensors = [(item.index.fqn, planner.resolve_data(item)) for item in items]
        store = self.checkpoints.store
        where = self.checkpoints.path(path)
        target = Path(store.full(where)) if store.is_local else self.scratch / path
        try:
            at = write(target, tensors)
            self.files.append(store.upload(target, where).model_copy(update={"path": path}))
        finally:
            if not store.is_local:
                target.unlink(missing_ok=True)
        results = []
        for item, (key, tensor) in zip(items, tensors, strict=True):
            place = {"file": path, "begin": at[key], "shape": list(tensor.shape)}
            results.append(WriteResult(item.index, tensor.nbytes, place))
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index (rank 0, when all processes have written)."""
        entries: dict[str, Any] = self.index["tensors"]
        for result in (r for ranks in results for r in ranks):
            fqn = result.index.fqn
            known = metadata.state_dict_metadata[fqn]
            entry = entries[fqn]
            entry |= {"dtype": DTYPES[known.properties.dtype], "shape": list(known.size)}
            entry.setdefault("chunks", []).append({"offset": list(result.index.offset or ()), **result.storage_data})
        path = f"{self.name}/{INDEX}"
        data = json.dumps(self.index, separators=(",", ":")).encode()
        target = self.scratch / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        try:
            file = self.checkpoints.store.upload(target, self.checkpoints.path(path))
        finally:
            target.unlink(missing_ok=True)
        self.files.append(file.model_copy(update={"path": path}))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Asked by DCP where it has to find a writer by itself; here it is given one."""
        return True


class Reader(StorageReader):
    """One process's side of a load: the parts that it needs of an index's tensors. `locate` finds a file's path."""

    def __init__(self, index: dict[str, Any], locate: Callable[[str], Path]) -> None:
        self.index, self.locate = index, locate

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self) -> Metadata:
        """Return the index as DCP knows it."""
        known, places = {}, {}
        for key, entry in self.index["tensors"].items():
            chunks = []
            for chunk in entry["chunks"]:
                offset = torch.Size(chunk["offset"] or [0] * len(entry["shape"]))
                chunks.append(ChunkStorageMetadata(offset, torch.Size(chunk["shape"])))
                places[MetadataIndex(key, offset)] = chunk
            properties = TensorProperties(dtype=TYPES[entry["dtype"]])
            known[key] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(known, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Keep where things lie."""
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for into the tensors that the planner names."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.places[item.storage_index]["file"], []).append(item)
        for name, items in by_file.items():
            with self.locate(name).open("rb") as f:
                for item in items:
                    chunk = self.places[item.storage_index]
                    dtype = TYPES[self.index["tensors"][item.storage_index.fqn]["dtype"]]
                    part = _read(f, chunk, dtype, item)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Asked by DCP where it has to find a reader by itself; here it is given one."""
        return True


def _read(f: Any, chunk: dict[str, Any], dtype: torch.dtype, item: ReadItem) -> Tensor:
    """Return the asked part of a stored chunk. Of its first dimension only the rows asked for are read."""
    shape = list(chunk["shape"])
    begin, rest = chunk["begin"], []
    if shape:
        row = dtype.itemsize * int(torch.Size(shape[1:]).numel())
        begin += row * item.storage_offsets[0]
        shape[0] = item.lengths[0]
        rest = list(zip(item.storage_offsets, item.lengths, strict=True))[1:]
    part = torch.empty(shape, dtype=dtype)
    f.seek(begin)
    if f.readinto(_bytes(part)) != part.nbytes:
        raise OSError(f"{f.name} ends before byte {begin + part.nbytes:,}")
    for dimension, (offset, length) in enumerate(rest, start=1):
        part = part.narrow(dimension, offset, length)
    return part

"""The embedder on a GPU, in torch: the same weights, pooling and normalisation as its graph, larger batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from orrery.errors import SpecError, UserError
from orrery.rag.embedding import source as sources
from orrery.rag.embedding.session import TOKENIZER, Embedder, Facts, Rows, Vectors, open_tokenizer


class GpuEmbedder(Embedder):
    """An embedder whose session is a torch module on `device`; one batch at a time."""

    _batch_tokens = 1 << 16
    device = "cuda"

    def _run(self, ids: list[Rows]) -> Vectors:
        import torch

        tokens, mask = (torch.from_numpy(side).to(self.device) for side in self._padded(ids))
        with torch.inference_mode():
            return np.asarray(self._session(tokens, mask).float().cpu().numpy(), np.float32)


def open_on_gpu(origin: sources.Source, folder: Path, facts: Facts) -> Embedder:
    """Open an embedder from where it comes from. Raises `UserError` without a GPU, `SpecError` where that cannot be."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "embed: the compute class has a GPU, and torch finds no CUDA: it would run on the CPU at a GPU's price",
            hint="`image` of the class in platform.yaml: a torch with CUDA, and a node with the vendor's driver; "
            "or set embedder.compute to a class without a GPU",
        )
    if facts.precision != "fp32":
        raise SpecError(
            f"embedder.precision: {facts.precision} is made for CPUs",
            hint="precision: fp32, or a compute class without a GPU",
        )
    if origin.exported is not None:
        raise SpecError(
            "embedder.model: an exported embedder runs on CPUs alone",
            hint="give the folder with its weights, or a compute class without a GPU",
        )
    return on_device(origin, folder, facts, GpuEmbedder.device)


def on_device(origin: sources.Source, folder: Path, facts: Facts, device: str) -> Embedder:
    """Open an embedder in torch on a device; `folder` holds its tokenizer."""
    from orrery.rag.embedding.graph import load

    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    module: Any = load(sources.gathered(origin, origin.scratch / "weights"), facts)[0]
    made = GpuEmbedder(facts, open_tokenizer(folder / TOKENIZER), module.to(device), 1)
    made.device = device
    return made

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
    """An embedder whose session is a torch module on the GPU; one batch at a time."""

    _batch_tokens = 1 << 16

    def _run(self, ids: list[Rows]) -> Vectors:
        import torch

        tokens, mask = (torch.from_numpy(side).to("cuda") for side in self._padded(ids))
        with torch.inference_mode():
            return np.asarray(self._session(tokens, mask).float().cpu().numpy(), np.float32)


def open_on_gpu(origin: sources.Source, folder: Path, facts: Facts) -> Embedder:
    """Open an embedder from where it comes from. Raises `UserError` without a GPU, `SpecError` where that cannot be."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "embed: the compute class has a GPU, but torch finds no CUDA here",
            hint="check the class' image (a CUDA build of torch) and its node's driver, or set `embedder.compute` to a "
            "class without a GPU",
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
    from orrery.rag.embedding.graph import load

    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    module: Any = load(sources.gathered(origin, folder.parent / "gpu"), facts)[0]
    return GpuEmbedder(facts, open_tokenizer(folder / TOKENIZER), module.to("cuda"), 1)

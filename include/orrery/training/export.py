"""A torch network as ONNX bytes: the same bytes each time, compared with torch before anyone uses them."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from orrery.errors import OrreryError, SpecError
from orrery.training import Dataset
from orrery.training.network import Network
from orrery.training.signature import canonical, feed, predict

OPSET = 20
CHECK_ROWS = 256
TOLERANCE = 1e-5  # absolute for probabilities; relative to the size of the values for a regression


def to_onnx(network: Network, sample: Dataset) -> bytes:
    """Return the network as ONNX, checked against torch on rows of `sample`. Raises `SpecError` when it cannot be."""
    rows = min(CHECK_ROWS, sample.rows)
    few = Dataset(sample.numeric[:rows], sample.categorical[:rows], sample.label[:rows], sample.schema)
    network.eval()
    try:
        with _quiet():
            model = _export(network, few)
    except torch.onnx.OnnxExporterError as e:
        raise SpecError(
            f"model.py: the module cannot be exported to ONNX: {str(e)[:2000]}",
            hint="no branches on values in forward; torch operations only",
        ) from e
    data = canonical(model)
    _compare(network, data, few)
    return data


def _export(network: Network, few: Dataset) -> Any:
    given = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in feed(few).items()}
    batch = torch.export.Dim("N")
    program = torch.onnx.export(
        network, tuple(given.values()), dynamo=True, opset_version=OPSET, verbose=False,
        input_names=list(given), output_names=["prediction"],
        # One entry for the one variadic argument of Network.forward.
        dynamic_shapes=(tuple({0: batch} for _ in given),),
    )  # fmt: skip
    assert program is not None
    return program.model_proto


def _compare(network: Network, model: bytes, few: Dataset) -> None:
    with torch.inference_mode():
        wanted = network(*(torch.from_numpy(np.ascontiguousarray(a)) for a in feed(few).values())).numpy()
    found = predict(model, few, "the exported model.onnx")
    scale = max(1.0, float(np.abs(wanted).max()))
    worst = float(np.abs(found - wanted).max())
    if worst > TOLERANCE * scale:
        raise OrreryError(
            f"model.onnx differs from the torch model by up to {worst:.3g} (allowed {TOLERANCE * scale:.3g})"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about torchvision and about its own deprecations out of a user's log."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""What every export must be: the inputs and the output of `schema`, tried out. Used for all models and the baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from orrery.errors import SpecError
from orrery.training import Dataset
from orrery.training.schema import Schema

SUM_TOLERANCE = 1e-3  # what float32 sums over thousands of classes may be off
TYPES = {"numeric": "tensor(float)", "categorical": "tensor(int64)", "prediction": "tensor(float)"}


def canonical(model: Any) -> bytes:
    """Return an ONNX model's bytes without what people wrote into it: stack traces, paths, inferred shapes."""
    model.doc_string = model.graph.doc_string = ""
    for repeated in (model.metadata_props, model.graph.metadata_props, model.graph.value_info):
        del repeated[:]
    for item in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    return bytes(model.SerializeToString(deterministic=True))


def graph_bytes(made: Any) -> bytes:
    """Return the canonical bytes of what a `to_onnx()` gave. Raises `SpecError` when it is no ONNX graph."""
    import onnx

    try:
        model = onnx.load_from_string(made) if isinstance(made, bytes) else made
        onnx.checker.check_model(model)
    except Exception as e:  # protobuf's and onnx's own errors, and whatever an object of another type raises
        raise SpecError(f"model.py: to_onnx() returned {type(made).__name__}, no valid ONNX model: {e}") from None
    return canonical(model)


def session(model: bytes) -> Any:
    """Return an ONNX session on one thread: the same sums in the same order on every machine."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feed(data: Dataset) -> dict[str, npt.NDArray[Any]]:
    """Return what a session is fed: the inputs that the schema has."""
    given: dict[str, npt.NDArray[Any]] = {}
    if data.schema.numeric:
        given["numeric"] = data.numeric
    if data.schema.categorical:
        given["categorical"] = data.categorical
    return given


def predict(model: bytes, data: Dataset, what: str) -> npt.NDArray[np.float32]:
    """Return a model's predictions. Raises `SpecError` when it has another signature, or a prediction is not finite."""
    try:
        opened = session(model)
    except Exception as e:  # onnxruntime has a class of its own for every way in which a file is wrong
        raise SpecError(f"{what} is not an ONNX model that can be opened: {e}") from None
    _refuse_names(opened, data.schema, what)
    try:
        (found,) = opened.run(["prediction"], feed(data))
    except Exception as e:
        raise SpecError(f"{what} cannot be run on the tune part: {e}") from None
    wanted = (data.rows, len(data.schema.classes)) if data.schema.task == "multiclass" else (data.rows,)
    if found.shape != wanted:
        raise SpecError(f"{what}: prediction has shape {found.shape} for {data.rows:,} rows, wanted {wanted}")
    if not np.isfinite(found).all():
        raise SpecError(f"{what}: {int((~np.isfinite(found)).sum()):,} predictions on the tune part are not finite")
    if data.schema.task != "regression" and (found.min() < 0 or found.max() > 1):
        raise SpecError(f"{what}: prediction is a probability, found {found.min():g} to {found.max():g}")
    if data.schema.task == "multiclass" and np.abs(found.sum(axis=1) - 1).max() > SUM_TOLERANCE:
        raise SpecError(f"{what}: the probabilities of a row's classes do not add up to 1")
    return np.asarray(found, dtype=np.float32)


def _refuse_names(opened: Any, schema: Schema, what: str) -> None:
    inputs = [name for name, has in (("numeric", schema.numeric), ("categorical", schema.categorical)) if has]
    wanted = {n: TYPES[n] for n in (*inputs, "prediction")}
    found = {v.name: v.type for v in (*opened.get_inputs(), *opened.get_outputs())}
    if found != wanted:
        raise SpecError(
            f"{what} has the signature {_text(found)}, wanted {_text(wanted)}",
            hint="an input whose list in the schema is empty is left out; see orrery/training/schema.py",
        )


def _text(signature: dict[str, str]) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in sorted(signature.items())) or "nothing"

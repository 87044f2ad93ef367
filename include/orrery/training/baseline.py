"""What a model has to beat: a straight line. Logistic regression, or ridge regression, as an ONNX graph.

Inputs: standardised numbers (missing as the mean) and one weight per id of the small categories. Written with
numpy alone: Newton's method on sums over chunks of rows, so memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper
from threadpoolctl import threadpool_limits

from orrery.training import Dataset
from orrery.training.calibration import sigmoid
from orrery.training.dataset import moments
from orrery.training.schema import Schema
from orrery.training.signature import canonical

Floats: TypeAlias = npt.NDArray[np.float64]
MAX_IDS = 50  # a larger category has too little data per id for a straight line
PENALTY = 1.0  # L2 on all weights but the constant: what C=1 and alpha=1 mean elsewhere
CHUNK = 16_384
MAX_STEPS = 25
OPSET = 20
IR_VERSION = 10  # the one that belongs to opset 20 era runtimes; onnx would write its newest


class Design:
    """The columns of the straight line: [constant, numbers, one column per id of each small category]."""

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self.mean, self.std = moments(data.numeric)
        sizes = list(data.schema.categorical.values())
        small = [i for i, size in enumerate(sizes) if size <= MAX_IDS]
        # Without any number the smallest category has to do, whatever its size.
        self.categories = small or ([] if data.schema.numeric else [int(np.argmin(sizes))])
        self.sizes = [sizes[i] for i in self.categories]
        self.width = 1 + len(self.mean) + sum(self.sizes)

    def chunks(self) -> Iterator[tuple[slice, Floats]]:
        """Yield the design matrix [rows, width] chunk by chunk."""
        for start in range(0, self.data.rows, CHUNK):
            rows = slice(start, min(start + CHUNK, self.data.rows))
            yield rows, self._matrix(rows)

    def _matrix(self, rows: slice) -> Floats:
        numeric, ids = self.data.numeric[rows].astype(np.float64), self.data.categorical[rows]
        x = np.zeros((len(numeric), self.width))
        x[:, 0] = 1.0
        at = 1 + len(self.mean)
        x[:, 1:at] = np.nan_to_num((numeric - self.mean) / self.std, nan=0.0)
        for i, size in zip(self.categories, self.sizes, strict=True):
            x[np.arange(len(x)), at + ids[:, i]] = 1.0
            at += size
        return x

    @property
    def penalty(self) -> Floats:
        """The L2 penalty per column."""
        return np.where(np.arange(self.width) == 0, 1e-9, PENALTY)


def fit(data: Dataset) -> bytes:
    """Fit the baseline and return it as ONNX with the schema's signature; the same bytes on every run."""
    with threadpool_limits(1):  # the order of a sum must not depend on the number of cores
        design, task = Design(data), data.schema.task
        if task == "regression":
            weights = _ridge(design, data.label.astype(np.float64))[:, None]
        elif task == "binary":
            weights = _logistic(design, data.label.astype(np.float64))[:, None]
        else:  # one class against the rest, normalised in the graph
            each = [_logistic(design, (data.label == c).astype(np.float64)) for c in range(len(data.schema.classes))]
            weights = np.stack(each, axis=1)
    return _graph(design, data.schema, weights)


def _ridge(design: Design, y: Floats) -> Floats:
    """Return the weights of the penalised least squares."""
    gram, right = np.diag(design.penalty), np.zeros(design.width)
    for rows, x in design.chunks():
        gram += x.T @ x
        right += x.T @ y[rows]
    return np.asarray(np.linalg.solve(gram, right))


def _logistic(design: Design, y: Floats) -> Floats:
    """Return the weights of the penalised logistic regression, by Newton's method with halved steps."""
    weights = np.zeros(design.width)
    loss, gradient, hessian = _derivatives(design, y, weights)
    for _ in range(MAX_STEPS):
        step = np.linalg.solve(hessian, gradient)
        # Newton's decrement: what this step can still gain.
        if float(gradient @ step) < 1e-10 * max(1.0, loss):
            break
        size = 1.0
        while True:
            moved = weights - size * step
            new = _derivatives(design, y, moved)
            if new[0] <= loss or size < 1e-4:
                break
            size /= 2
        if new[0] > loss:
            break
        weights, (loss, gradient, hessian) = moved, new
    return weights


def _derivatives(design: Design, y: Floats, weights: Floats) -> tuple[float, Floats, Floats]:
    """Return the penalised loss, its gradient and its Hessian."""
    loss = float(0.5 * (design.penalty * weights**2).sum())
    gradient, hessian = design.penalty * weights, np.diag(design.penalty)
    for rows, x in design.chunks():
        z = x @ weights
        p = sigmoid(z)
        loss += float((np.logaddexp(0.0, z) - y[rows] * z).sum())
        gradient = gradient + x.T @ (p - y[rows])
        hessian += (x * (p * (1 - p))[:, None]).T @ x
    return loss, gradient, hessian


def _graph(design: Design, schema: Schema, weights: Floats) -> bytes:
    """Write weights [width, outputs] as a graph: one Gemm for the numbers, one Gather per category, their sum."""
    constants: dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int64]] = {"constant": _f32(weights[0])}
    nodes, terms, at = [], ["constant"], 1 + len(design.mean)
    if schema.numeric:
        constants |= {"mean": _f32(design.mean), "std": _f32(design.std), "zero": _f32(0.0)}
        constants["numeric_weight"] = _f32(weights[1:at])
        nodes += [
            helper.make_node("Sub", ["numeric", "mean"], ["centred"]),
            helper.make_node("Div", ["centred", "std"], ["standard"]),
            helper.make_node("IsNaN", ["numeric"], ["missing"]),
            helper.make_node("Where", ["missing", "zero", "standard"], ["filled"]),
            helper.make_node("MatMul", ["filled", "numeric_weight"], ["numeric_term"]),
        ]
        terms.append("numeric_term")
    for i, size in zip(design.categories, design.sizes, strict=True):
        constants |= {f"column_{i}": np.array(i, dtype=np.int64), f"weight_{i}": _f32(weights[at : at + size])}
        nodes += [
            helper.make_node("Gather", ["categorical", f"column_{i}"], [f"ids_{i}"], axis=1),
            helper.make_node("Gather", [f"weight_{i}", f"ids_{i}"], [f"term_{i}"], axis=0),
        ]
        terms.append(f"term_{i}")
        at += size
    nodes.append(helper.make_node("Sum", terms, ["line"]))
    nodes += _head(schema, constants)
    return _model(schema, nodes, constants)


def _head(schema: Schema, constants: dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int64]]) -> list[object]:
    constants["axis"] = np.array([1], dtype=np.int64)
    if schema.task == "regression":
        return [helper.make_node("Squeeze", ["line", "axis"], ["prediction"])]
    if schema.task == "binary":
        squeeze = helper.make_node("Squeeze", ["line", "axis"], ["logit"])
        return [squeeze, helper.make_node("Sigmoid", ["logit"], ["prediction"])]
    return [
        helper.make_node("Sigmoid", ["line"], ["each"]),
        helper.make_node("ReduceSum", ["each", "axis"], ["together"], keepdims=1),
        helper.make_node("Div", ["each", "together"], ["prediction"]),
    ]


def _model(
    schema: Schema, nodes: list[object], constants: dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int64]]
) -> bytes:
    inputs = []
    if schema.numeric:
        inputs.append(helper.make_tensor_value_info("numeric", TensorProto.FLOAT, ["N", len(schema.numeric)]))
    if schema.categorical:
        inputs.append(helper.make_tensor_value_info("categorical", TensorProto.INT64, ["N", len(schema.categorical)]))
    shape = ["N", len(schema.classes)] if schema.task == "multiclass" else ["N"]
    output = helper.make_tensor_value_info("prediction", TensorProto.FLOAT, shape)
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "baseline", inputs, [output], tensors)
    opsets = [helper.make_opsetid("", OPSET)]
    return canonical(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="orrery"))


def _f32(value: Floats | float) -> npt.NDArray[np.float32]:
    return np.asarray(value, dtype=np.float32)

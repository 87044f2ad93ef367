"""Boosted trees from LightGBM, written out as ONNX by hand: one TreeEnsembleRegressor over all inputs side by side.

numeric float32 [N, n], NaN where missing --+
                                            +-- Concat -- trees -- prediction [N]
categorical int64 [N, k] -- Cast float32 ---+
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydantic import BaseModel

from orrery.training import Dataset, tunable
from orrery.training.schema import Schema

STOP_AFTER = 20  # rounds without a better error on the rows that are not fitted on


class Params(BaseModel):
    """What training may vary; `tune` searches the bounds."""

    trees: int = tunable(300, low=50, high=1000)
    leaves: int = tunable(31, low=7, high=255, log=True)
    learning_rate: float = tunable(0.08, low=0.01, high=0.3, log=True)
    min_rows: int = tunable(40, low=10, high=500, log=True)


class Trees:
    """A fitted booster that can write itself as ONNX."""

    def __init__(self, booster: lightgbm.Booster, schema: Schema) -> None:
        self.booster, self.schema = booster, schema

    def to_onnx(self) -> onnx.ModelProto:
        """Return the graph with the signature of the schema."""
        return graph(self.booster.dump_model(num_iteration=self.booster.best_iteration), self.schema)


def fit(train: Dataset, valid: Dataset, params: Params) -> Trees:
    """Fit on `train`, stop by `valid`. One thread and a seed: the same trees on every machine."""
    settings = {
        "objective": "regression", "num_leaves": params.leaves, "learning_rate": params.learning_rate,
        "min_data_in_leaf": params.min_rows, "deterministic": True, "num_threads": 1, "force_row_wise": True,
        "seed": 0, "verbosity": -1,
    }  # fmt: skip
    fitted_on = lightgbm.Dataset(_columns(train), train.label)
    checked_on = lightgbm.Dataset(_columns(valid), valid.label, reference=fitted_on)
    stop = lightgbm.early_stopping(STOP_AFTER, verbose=False)
    booster = lightgbm.train(settings, fitted_on, params.trees, valid_sets=[checked_on], callbacks=[stop])
    return Trees(booster, train.schema)


def _columns(data: Dataset) -> npt.NDArray[np.float32]:
    """Numbers and category ids side by side; trees cut an id's range in two like any number's."""
    return np.concatenate([data.numeric, data.categorical.astype(np.float32)], axis=1)


# -- LightGBM's trees as ONNX (https://onnx.ai/onnx/operators/onnx_aionnxml_TreeEnsembleRegressor.html) ---------------


def graph(dumped: dict[str, Any], schema: Schema) -> onnx.ModelProto:
    """Return `Booster.dump_model()` as an ONNX model."""
    trees = helper.make_node(
        "TreeEnsembleRegressor", ["columns"], ["sums"], domain="ai.onnx.ml",
        n_targets=1, aggregate_function="SUM", post_transform="NONE", **attributes(dumped),
    )  # fmt: skip
    inputs, nodes, parts = [], [], []
    if schema.numeric:
        inputs.append(helper.make_tensor_value_info("numeric", TensorProto.FLOAT, ["N", len(schema.numeric)]))
        parts.append("numeric")
    if schema.categorical:
        inputs.append(helper.make_tensor_value_info("categorical", TensorProto.INT64, ["N", len(schema.categorical)]))
        nodes.append(helper.make_node("Cast", ["categorical"], ["ids"], to=TensorProto.FLOAT))
        parts.append("ids")
    nodes += [
        helper.make_node("Concat", parts, ["columns"], axis=1),
        trees,
        helper.make_node("Squeeze", ["sums", "axis"], ["prediction"]),
    ]
    output = helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["N"])
    axis = numpy_helper.from_array(np.array([1], dtype=np.int64), "axis")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
    body = helper.make_graph(nodes, "house_energy", inputs, [output], [axis])
    return helper.make_model(body, opset_imports=opsets, ir_version=10)


def attributes(dumped: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the operator's parallel lists: one entry per node, and one per leaf."""
    columns: dict[str, list[Any]] = {
        f"nodes_{name}": []
        for name in ("treeids", "nodeids", "modes", "featureids", "values", "truenodeids", "falsenodeids",
                     "missing_value_tracks_true")
    } | {f"target_{name}": [] for name in ("treeids", "nodeids", "ids", "weights")}  # fmt: skip
    for number, tree in enumerate(dumped["tree_info"]):
        for node in nodes_of(tree["tree_structure"]):
            leaf = "leaf" in node
            entry = {
                "treeids": number, "nodeids": node["id"], "modes": "LEAF" if leaf else "BRANCH_LEQ",
                "featureids": 0 if leaf else node["feature"], "values": 0.0 if leaf else node["threshold"],
                "truenodeids": 0 if leaf else node["left"], "falsenodeids": 0 if leaf else node["right"],
                "missing_value_tracks_true": int(not leaf and node["missing_left"]),
            }  # fmt: skip
            for name, value in entry.items():
                columns[f"nodes_{name}"].append(value)
            if leaf:
                target = {"treeids": number, "nodeids": node["id"], "ids": 0, "weights": node["leaf"]}
                for name, value in target.items():
                    columns[f"target_{name}"].append(value)
    return columns


def nodes_of(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one tree's nodes, the root first, with numbers for names."""
    queue, count = [(root, 0)], 1
    while queue:
        node, number = queue.pop()
        if "leaf_value" in node and "split_feature" not in node:
            yield {"id": number, "leaf": node["leaf_value"]}
            continue
        if node["decision_type"] != "<=":
            raise ValueError(f"decision {node['decision_type']!r}: category ids are given as plain numbers here")
        left, right = count, count + 1
        count += 2
        queue += [(node["left_child"], left), (node["right_child"], right)]
        yield {
            "id": number, "feature": node["split_feature"], "threshold": below(node["threshold"]),
            "left": left, "right": right, "missing_left": missing_goes_left(node),
        }  # fmt: skip


def missing_goes_left(node: dict[str, Any]) -> bool:
    """Where NaN goes. A feature without missing values in training reads a later NaN as 0, as LightGBM does."""
    if node["missing_type"] == "NaN":
        return bool(node["default_left"])
    return bool(node["threshold"] >= 0.0)


def below(threshold: float) -> float:
    """The largest float32 that is not above `threshold`: x <= threshold is then the same for every float32 x."""
    rounded = np.float32(threshold)
    return float(rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32(-np.inf)))

"""A model of any library: house_energy's LightGBM through the verb, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import lightgbm
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from training_bench import Bench, Run, trips

from orrery import bundle
from orrery.errors import SpecError
from orrery.training import Dataset, signature
from orrery.training.dataset import encoded
from orrery.training.schema import Schema

TESTS = Path(__file__).resolve().parent.parent
PROJECT = TESTS / "projects" / "house_energy"
sys.path.insert(0, str(TESTS))

from house_energy_data import land  # noqa: E402

# A mean per sign of the first number: enough of a model to see what `fit` was given.
STUMP = """
import numpy as np
from onnx import TensorProto, helper, numpy_helper

class Stump:
    def __init__(self, value, schema):
        self.value, self.schema = value, schema

    def to_onnx(self):
        value = numpy_helper.from_array(np.array(self.value, np.float32), "value")
        first = numpy_helper.from_array(np.array(0, np.int64), "first")
        zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
        nodes = [helper.make_node("Gather", ["categorical", "first"], ["id"], axis=1),
                 helper.make_node("Cast", ["id"], ["float"], to=1),
                 helper.make_node("Mul", ["float", "zero"], ["zeros"]),
                 helper.make_node("Add", ["zeros", "value"], ["prediction"])]
        inputs = [helper.make_tensor_value_info("numeric", TensorProto.FLOAT, ["N", len(self.schema.numeric)]),
                  helper.make_tensor_value_info("categorical", TensorProto.INT64, ["N", len(self.schema.categorical)])]
        output = helper.make_tensor_value_info("OUTPUT", TensorProto.FLOAT, ["N"])
        graph = helper.make_graph(nodes, "stump", inputs, [output], [value, first, zero], doc_string="from /home")
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

def fit(train, valid, params):
    return Stump(RESULT, train.schema)
"""
MEAN = "train.label.mean() / 2 + valid.label.mean() / 2"


def stump(result: str = MEAN, output: str = "prediction") -> str:
    return STUMP.replace("RESULT", result).replace("OUTPUT", output)


@pytest.fixture(scope="module")
def energy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Run, list[pa.Table]]:
    """Two weeks of meter readings through the project's own features.py and model.py."""
    root = tmp_path_factory.mktemp("energy")
    made = Bench(root, project="house_energy")
    packed = bundle.pack(PROJECT)
    bundle.push(made.store, packed)
    made.digest = packed.digest
    features = bundle.load_module(PROJECT, "house_energy_features", "features")
    tables = []
    for key in land(root / "readings", days=15):
        tables.append(features.readings(pyarrow.csv.read_csv(root / "readings" / f"{key}.csv")))
        if len(tables) < 15:
            made.commit(key, tables[-1])
    return made, made.train("one", overrides={"trees": 60}), tables


def test_lightgbm_trains_and_forecasts_the_next_day(energy: tuple[Bench, Run, list[pa.Table]]) -> None:
    _, run, tables = energy
    assert set(run.files) == {"model.onnx", "baseline.onnx", "schema.json", "params.json", "split.json"}
    assert run.result.facts["kind"] == "fit"
    schema = Schema.model_validate(run.json("schema.json"))
    assert "_house" not in schema.columns and schema.missing == ("outdoor_c",)
    day = tables[-1].filter(pa.compute.is_valid(tables[-1]["label"]))
    data = encoded(day, schema)
    found = signature.predict(run.files["model.onnx"].read_bytes(), data, "model")
    line = signature.predict(run.files["baseline.onnx"].read_bytes(), data, "baseline")
    variance = data.label.var()
    assert 1 - ((found - data.label) ** 2).mean() / variance > 0.9
    assert ((found - data.label) ** 2).mean() < ((line - data.label) ** 2).mean() < variance


def test_the_onnx_trees_are_lightgbms_also_for_missing_and_unknown_values() -> None:
    model = bundle.load_module(PROJECT, "house_energy_model", "model")
    rng = np.random.default_rng(0)
    schema = Schema(task="regression", numeric_columns=("a", "b"), vocabularies={"c": ("x", "y")}, missing=("a",))
    numeric = rng.normal(size=(3000, 2)).astype(np.float32)
    ids = rng.integers(0, 3, (3000, 1))
    label = (numeric[:, 0] * 3 + np.abs(numeric[:, 1]) + ids[:, 0]).astype(np.float32)
    numeric[rng.random(3000) < 0.2, 0] = np.nan
    train = Dataset(numeric[:2500], ids[:2500], label[:2500], schema)
    valid = Dataset(numeric[2500:], ids[2500:], label[2500:], schema)
    trees = model.fit(train, valid, model.Params(trees=80))
    # Values on a threshold, and NaN in a column that had none in training.
    on_edge = np.array(
        [
            [node["threshold"], np.nan]
            for node in model.nodes_of(trees.booster.dump_model()["tree_info"][0]["tree_structure"])
            if "threshold" in node
        ]
    )
    odd = Dataset(
        on_edge.astype(np.float32), np.zeros((len(on_edge), 1), np.int64), np.zeros(len(on_edge), np.float32), schema
    )
    made = signature.graph_bytes(trees.to_onnx())
    assert isinstance(trees.booster, lightgbm.Booster)
    for data in (valid, odd):
        columns = np.concatenate([data.numeric, data.categorical.astype(np.float32)], axis=1)
        np.testing.assert_allclose(
            signature.predict(made, data, "trees"), trees.booster.predict(columns), rtol=1e-4, atol=1e-4
        )


def test_two_processes_make_the_same_bytes(energy: tuple[Bench, Run, list[pa.Table]]) -> None:
    made, run, _ = energy
    apart = made.train_apart("apart", overrides={"trees": 60})
    assert apart.result.digest == run.result.digest
    assert apart.result.facts["weights_digest"] == run.result.facts["weights_digest"]


def test_the_holdout_is_seen_by_nobody(tmp_path: Path) -> None:
    """Labels and features of the holdout are other ones: what was trained is the same, byte by byte."""
    digests = []
    for name, last in (("plain", 0), ("changed", 1)):
        made = Bench(tmp_path / name)
        made.write_project(stump())
        table = trips(1000)
        rows = int(1000 * 0.86)
        if last:
            end = trips(1000, seed=5).slice(rows).set_column(1, "prediction_time", table["prediction_time"].slice(rows))
            table = pa.concat_tables([table.slice(0, rows), end])
        made.commit("2013-01", table)
        run = made.train(name)
        digests.append({n: p.read_bytes() for n, p in run.files.items()})
    assert digests[0] == digests[1]


def test_tune_rows_are_not_fitted_on(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    made.write_project(stump("float(len(train.label)) / 1e6"))
    made.commit("2013-01", trips(1000))
    run = made.train("counted")
    data = encoded(trips(10), Schema.model_validate(run.json("schema.json")))
    found = signature.predict(run.files["model.onnx"].read_bytes(), data, "model")
    assert found[0] * 1e6 == pytest.approx(run.result.facts["rows"]["fit"])
    assert b"from /home" not in run.files["model.onnx"].read_bytes()


def test_a_mistake_in_a_module_beside_model_py_is_named_with_its_file(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "trees.py").write_text("def fit(train, valid, params):\n    return 1 / 0\n")
    made.write_project("from .trees import fit\n")
    made.commit("2013-01", trips(500))
    with pytest.raises(SpecError, match=r"fit failed \(trees\.py, line 2\): ZeroDivisionError"):
        made.train("beside")


def test_a_training_survives_an_mlflow_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: nobody listens
    made = Bench(tmp_path)
    made.write_project(stump())
    made.commit("2013-01", trips(500))
    run = made.train("away")
    assert run.result.links == {} and "model.onnx" in run.files


NARROW_IDS = stump().replace('"categorical", TensorProto.INT64', '"categorical", TensorProto.INT32')
NOT_ONNX = """
class Model:
    def to_onnx(self): return b'no'
def fit(train, valid, params): return Model()
"""


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (stump("train.labels"), r"fit failed \(line 24\): AttributeError: 'Dataset' object has no attribute 'labels'"),
        (stump("np.linalg.inv([[0.0]])"), r"fit failed \(line 24\): LinAlgError"),  # raised inside of a library
        (stump("'much'"), r"to_onnx\(\) failed \(line 10\): ValueError"),
        (stump(output="wrong"), r"to_onnx\(\) returned ModelProto, no valid ONNX model"),
        (stump("float('nan')"), "predictions on the tune part are not finite"),
        (stump("3.0"), "prediction is a probability, found 3 to 3"),
        (NARROW_IDS, r"signature .*categorical: tensor\(int32\)"),
        ("def fit(train, valid, params): return 3\n", r"fit returned int, which has no to_onnx\(\)"),
        (NOT_ONNX, "no valid ONNX model"),
    ],
)
def test_an_export_that_breaks_the_signature_is_refused(tmp_path: Path, model: str, says: str) -> None:
    made = Bench(tmp_path)
    made.write_project(model)
    made.commit("2013-01", trips(500))
    with pytest.raises(SpecError, match=says):
        made.train("refused")

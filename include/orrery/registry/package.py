"""A candidate's files as an MLflow model folder: `mlflow.onnx.load_model("models:/<project>/<version>")` reads it.

Written by hand from MLflow's documented storage format (mlflow.org/docs/latest/ml/model, "MLmodel"): its own
writer costs ten seconds of imports for three small text files. tests/registry loads it with MLflow.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orrery.evaluation.exported import read_schema
from orrery.training.schema import Schema

FOLDER = "model"
REQUIREMENTS = ("mlflow", "numpy", "onnx", "onnxruntime")
PYTHON = "3.11"


def files(graph: Path, schema_file: Path, run: str) -> dict[str, bytes]:
    """Return the folder's files by name, but for the candidate's own that are only carried along."""
    schema = read_schema(schema_file, "candidate")
    described = {
        "artifact_path": FOLDER,
        "flavors": {
            "onnx": {"data": "model.onnx", "onnx_version": version("onnx"), "providers": ["CPUExecutionProvider"]},
            "python_function": {
                "data": "model.onnx",
                "env": {"virtualenv": "python_env.yaml"},
                "loader_module": "mlflow.onnx",
                "python_version": PYTHON,
            },
        },
        "mlflow_version": version("mlflow"),
        "run_id": run,
        "signature": signature(schema),
    }
    environment = {"python": PYTHON, "build_dependencies": [], "dependencies": ["-r requirements.txt"]}
    # JSON is YAML, which is what MLflow reads these two as.
    return {
        "MLmodel": json.dumps(described, indent=1, sort_keys=True).encode(),
        "python_env.yaml": json.dumps(environment, indent=1).encode(),
        "requirements.txt": "".join(f"{p}=={version(p)}\n" for p in REQUIREMENTS).encode(),
        "model.onnx": graph.read_bytes(),
        "schema.json": schema_file.read_bytes(),
    }


def signature(schema: Schema) -> dict[str, str]:
    """Return the graph's signature in MLflow's terms: tensors by name, the number of rows open."""
    inputs = [("numeric", "float32", [-1, len(schema.numeric_columns)])] if schema.numeric_columns else []
    inputs += [("categorical", "int64", [-1, len(schema.vocabularies)])] if schema.vocabularies else []
    shape = [-1, len(schema.classes)] if schema.task == "multiclass" else [-1]
    outputs = [("prediction", "float32", shape)]
    return {"inputs": json.dumps([_tensor(*t) for t in inputs]), "outputs": json.dumps([_tensor(*t) for t in outputs])}


def _tensor(name: str, kind: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "type": "tensor", "tensor-spec": {"dtype": kind, "shape": shape}}

"""One Spark session for all tests that run in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scoring_house import FIXTURES, SCHEMA, House

from orrery.scoring import session


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Spark, started as a step starts it, three tries a task; what runs `score` meanwhile is lent this session."""
    scratch = tmp_path_factory.mktemp("spark")
    talk: session.Conversation[None] = session.Conversation(scratch / "spark.log")
    with session.opened(talk, "local[2,3]", {}, scratch) as opened:
        yield opened


@pytest.fixture
def expected() -> Callable[[str, pa.Table], np.ndarray]:  # type: ignore[type-arg]
    """What ONNX Runtime says when it is asked directly, in one call, inputs encoded by hand."""

    def predict(name: str, table: pa.Table) -> np.ndarray:  # type: ignore[type-arg]
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime

        model = onnxruntime.InferenceSession(FIXTURES / f"{name}.onnx", providers=["CPUExecutionProvider"])
        columns = [[np.nan if v is None else v for v in table[c].to_pylist()] for c in SCHEMA.numeric]
        ids = [
            [vocabulary.index(v) + 1 if v in vocabulary else 0 for v in table[c].to_pylist()]
            for c, vocabulary in SCHEMA.vocabularies.items()
        ]
        feed = {"numeric": np.array(columns, np.float32).T, "categorical": np.array(ids, np.int64).T}
        return model.run(["prediction"], feed)[0]  # type: ignore[no-any-return]

    return predict

"""A store with features and a project that is tuned; trials run as the engine runs them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orrery.contract import Result, StepConfig
from orrery.store import Manifest, Ref
from orrery.tuning.outcome import NAME, PREDICTIONS, TRUTH, Outcome

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))

from training_bench import TORCH_MODEL, Bench, trips

KEY = "0123456789abcdef" * 2
STEP = "import sys, time; from orrery.step import main; sys.exit(main(sys.argv[1:], time.time()))"
# Another library's model, in a blink: a straight line through one number, or the other one's square.
LINE_MODEL = """
import os
import time
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydantic import BaseModel
from orrery.training import tunable

class Params(BaseModel):
    weight: float = tunable(0.0, low=0.0, high=1.0)
    kind: str = tunable("good", choices=["good", "bad"])
    width: int = tunable(2, low=1, high=64, log=True)
    fixed: int = 3

class Line:
    def __init__(self, schema, params):
        self.schema, self.params = schema, params

    def to_onnx(self):
        # More weight on distance and wind is better; `bad` turns it round.
        n = len(self.schema.numeric)
        w = np.zeros((n, 1), np.float32)
        w[self.schema.numeric.index("distance")] = 0.002 * self.params.weight
        w[self.schema.numeric.index("holiday")] = 0.5
        if self.params.kind == "bad":
            w = -w
        zero = numpy_helper.from_array(np.zeros((), np.float32), "zero")
        inits = [numpy_helper.from_array(w, "w"), zero, numpy_helper.from_array(np.array([1], np.int64), "axis")]
        nodes = [
            helper.make_node("IsNaN", ["numeric"], ["nan"]),
            helper.make_node("Where", ["nan", "zero", "numeric"], ["filled"]),
            helper.make_node("MatMul", ["filled", "w"], ["out"]),
            helper.make_node("Cast", ["categorical"], ["ids"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["ids", "axis"], ["sums"], keepdims=1),
            helper.make_node("Mul", ["sums", "zero"], ["none"]),
            helper.make_node("Add", ["out", "none"], ["both"]),
            helper.make_node("Sigmoid", ["both"], ["p"]),
            helper.make_node("Squeeze", ["p", "axis"], ["prediction"]),
        ]
        value = helper.make_tensor_value_info
        inputs = [value("numeric", TensorProto.FLOAT, ["N", n]),
                  value("categorical", TensorProto.INT64, ["N", len(self.schema.categorical)])]
        outputs = [value("prediction", TensorProto.FLOAT, ["N"])]
        graph = helper.make_graph(nodes, "line", inputs, outputs, inits)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

def fit(train, valid, params):
    while os.path.exists(os.environ.get("HOLD_FIT", "")):
        time.sleep(0.05)
    if params.weight > 0.95:
        raise ValueError("too heavy")
    return Line(train.schema, params)
"""


@dataclass
class Search(Bench):
    """One study: its key, where it is kept, and its trials."""

    trials: int = 20
    key: str = KEY

    @property
    def storage(self) -> str:
        return str(self.root / "tuning")

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(f"{self.key[:8]}-{number:03d}" for number in range(self.trials))

    def trial(self, number: int, attempt: int = 1, inputs: dict[str, tuple[Ref, ...]] | None = None) -> StepConfig:
        """Return one attempt of one trial."""
        config = self.config(
            self.addresses[number], verb="trial", inputs=inputs,
            number=number, study=self.key, storage=self.storage, trials=self.addresses,
        )  # fmt: skip
        folder = f"{self.project}/runs/test/trial-{number}/{attempt}"
        return config.model_copy(update={"attempt": attempt, "folder": folder, "task": f"trial-{number}"})

    def try_(self, number: int, **more: Any) -> Result:
        """Run a trial in this process."""
        return self._execute(self.trial(number, **more))

    def start(self, config: StepConfig, **env: str) -> subprocess.Popen[str]:
        """Start an attempt as a process of its own."""
        self.store.put(f"{config.folder}/config.json", config.model_dump_json().encode())
        where = f"{self.store.uri}/{config.folder}"
        argv = [
            sys.executable,
            "-u",
            "-c",
            STEP,
            "--config",
            f"{where}/config.json",
            "--result",
            f"{where}/result.json",
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(argv, **out, text=True, start_new_session=True, env=env)

    def manifest(self, number: int) -> Manifest | None:
        return self.store.manifest(f"{self.project}/trial/{self.addresses[number]}/manifest.json")

    def outcome(self, number: int) -> Outcome:
        found = self.manifest(number)
        assert found is not None
        return Outcome.model_validate(self.store.read_json(found.uri(NAME)))

    def array(self, number: int, name: str = PREDICTIONS) -> np.ndarray:
        found = self.manifest(number)
        assert found is not None
        return np.load(self.store.full(found.uri(name)))

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        label, moment = (self.array(0, name) for name in TRUTH)
        return label, moment

    def decide(self, numbers: range, address: str = "decided", **params: Any) -> Result:
        """Run `tune` over these trials."""
        found = [self.manifest(number) for number in numbers]
        inputs = {"features": tuple(self.refs), "trials": tuple(m.ref for m in found if m is not None)}
        return self._execute(
            self.config(address, verb="tune", inputs=inputs, study=self.key, storage=self.storage, **params)
        )


def search(
    root: Path, model: str = TORCH_MODEL, *, rows: int = 1500, tune: str = "{trials: 20}", **more: Any
) -> Search:
    """Make a search on two months of trips."""
    made = Search(root, **more)
    made.write_project(model)
    spec = root / "project" / "spec.yaml"
    spec.write_text(f"{spec.read_text()}\ntune: {tune}\n")
    made.pack()
    for month in (1, 2):
        made.commit(f"2013-{month:02d}", trips(rows, month=month))
    return made


def line_until(process: subprocess.Popen[str], text: str, within: float = 120) -> tuple[str, float]:
    """Read a process's log until a line holds `text`; return the line, and the seconds that it took."""
    assert process.stdout is not None
    began, seen = time.monotonic(), []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return line, time.monotonic() - began
        assert time.monotonic() - began < within, "".join(seen)
    raise AssertionError(f"it ended without {text!r}:\n{''.join(seen)}")

"""The verb with a torch model: determinism, processes, the export, and what a user's mistake looks like."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from training_bench import TORCH_MODEL, Bench, Run, bench, trips

from orrery.contract import Result
from orrery.errors import DataError, OrreryError, SpecError, UserError
from orrery.training import signature
from orrery.training.dataset import encoded
from orrery.training.schema import Schema, infer

FILES = {"model.onnx", "baseline.onnx", "weights.safetensors", "schema.json", "params.json", "split.json"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def one(shared: Bench) -> Run:
    return shared.train("one")


def predictions(run: Run, table: pa.Table, name: str = "model.onnx") -> np.ndarray:
    schema = Schema.model_validate(run.json("schema.json"))
    return signature.predict(run.files[name].read_bytes(), encoded(table, schema), name)


def auc(score: np.ndarray, label: np.ndarray) -> float:
    rank = score.argsort().argsort() + 1
    positive = label > 0
    n = positive.sum()
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (~positive).sum()))


def test_a_candidate_holds_what_the_contract_says(one: Run) -> None:
    assert set(one.files) == FILES
    assert set(one.result.metrics) == {"fit_loss", "tune_loss", "epochs", "rows"}
    assert one.json("params.json") == {
        "dim": 4, "dropout": 0.0, "epochs": 4, "batch_size": 128, "learning_rate": 0.01, "weight_decay": 0.01,
    }  # fmt: skip
    assert one.json("split.json") == one.result.facts["split"]
    assert one.json("schema.json")["vocabularies"] == {"carrier": ["A", "B", "C"]}
    assert one.json("schema.json")["missing"] == ["weather__wind"]
    assert one.result.facts["rows"]["fit"] > one.result.facts["rows"]["holdout"] > one.result.facts["rows"]["tune"]


def test_nothing_of_this_machine_is_in_the_files(one: Run, shared: Bench) -> None:
    for name, path in one.files.items():
        data = path.read_bytes()
        assert str(shared.root).encode() not in data and b"/tmp" not in data and b"site-packages" not in data, name
        assert b"stack_trace" not in data, name


def test_it_has_learnt_and_is_calibrated(one: Run) -> None:
    later = trips(4000, seed=9, month=3)
    label = np.asarray(later["label"])
    found = predictions(one, later)
    assert auc(found, label) > 0.85
    assert auc(predictions(one, later, "baseline.onnx"), label) > 0.8
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (found >= low) & (found < low + 0.25)
        assert abs(found[inside].mean() - label[inside].mean()) < 0.1


def test_another_process_makes_the_same_bytes(one: Run, shared: Bench) -> None:
    apart = shared.train_apart("apart")
    assert apart.result.facts["weights_digest"] == one.result.facts["weights_digest"]
    assert apart.result.digest == one.result.digest


def test_two_processes_train_the_same_model_but_for_rounding(one: Run, shared: Bench) -> None:
    two = shared.train("two", processes=2)
    assert two.result.metrics["tune_loss"] == pytest.approx(one.result.metrics["tune_loss"], rel=1e-3)
    later = trips(500, seed=9, month=3)
    np.testing.assert_allclose(predictions(two, later), predictions(one, later), atol=0.01)


def test_missing_values_unknown_categories_and_single_rows_are_scored(one: Run) -> None:
    odd = trips(3, month=4)
    odd = odd.set_column(odd.column_names.index("carrier"), "carrier", pa.array(["Z", None, "A"]))
    for name in ("distance", "holiday"):
        kind = odd[name].type
        odd = odd.set_column(odd.column_names.index(name), name, pa.array([None] * 3, kind))
    found = predictions(one, odd)
    assert found.shape == (3,) and np.isfinite(found).all()
    assert predictions(one, odd.slice(0, 1)) == pytest.approx(found[:1], abs=1e-6)


def test_a_seed_and_an_override_change_the_weights(one: Run, shared: Bench) -> None:
    other = shared.train("seeded", seed=1, overrides={"epochs": 1}, sample=0.5)
    assert other.result.facts["weights_digest"] != one.result.facts["weights_digest"]
    assert other.json("params.json")["epochs"] == 1 and other.result.metrics["epochs"] == 1
    assert 0.4 < other.result.facts["rows"]["fit"] / one.result.facts["rows"]["fit"] < 0.6


@pytest.mark.parametrize(("task", "dropped"), [("regression", ["carrier"]), ("multiclass", [])])
def test_other_tasks_and_an_absent_input(tmp_path: Path, task: str, dropped: list[str]) -> None:
    made = Bench(tmp_path)
    made.write_project(TORCH_MODEL, task)
    made.commit("2013-01", trips(3000, kind=task).drop_columns(dropped))
    run = made.train(task)
    later = trips(1000, seed=9, month=2, kind=task)
    found = predictions(run, later)
    if task == "regression":
        label = np.asarray(later["label"])
        assert 1 - ((found - label) ** 2).mean() / label.var() > 0.7  # in the target's units
        assert [i.name for i in signature.session(run.files["model.onnx"].read_bytes()).get_inputs()] == ["numeric"]
    else:
        assert run.json("schema.json")["classes"] == ["early", "late", "on_time"]
        names = np.array(run.json("schema.json")["classes"])
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
        assert (names[found.argmax(axis=1)] == np.asarray(later["label"].to_pylist())).mean() > 0.6


def test_training_stops_early_and_keeps_the_best_epoch(shared: Bench) -> None:
    # No weight can move far enough to be worse than the start, except with a rate that is absurd.
    run = shared.train("stops", overrides={"epochs": 40, "learning_rate": 0.3, "batch_size": 32})
    assert run.result.metrics["epochs"] == run.result.facts["best_epoch"] + 3 < 40


MADE = "return Net(schema, params, len(schema.classes) or 1)"
MISTAKES = [
    ("return out.squeeze(1) if self.one else out", "return out", SpecError, r"float32 \[2, 1\] for 2 rows; wanted"),
    (MADE, "return Net(schema, params, nope)", SpecError, r"build failed \(line \d+\): NameError"),
    (MADE, "raise SystemExit(3)", SpecError, r"build failed \(line \d+\): SystemExit: 3"),
    (
        "out = self.layers",
        "raise SystemExit\n        out = self.layers",
        SpecError,
        r"forward failed \(line \d+\): SystemExit",
    ),
    (MADE, "return 3", SpecError, "build returned int, not a torch nn.Module"),
    ("cat([numeric,", "cat([numeric, numeric,", SpecError, r"forward fails on numeric \[2, 4\], categorical \[2, 1\]"),
    (
        "out = self",
        "if numeric.sum() > 0: numeric = -numeric\n        out = self",
        SpecError,
        "cannot be exported to ONNX",
    ),
    (
        "out = self.layers",
        "if self.training: raise KeyError('mode')\n        out = self.layers",
        SpecError,
        r"a training step of the module failed \(line \d+\): KeyError: 'mode'",
    ),
    (
        "parts = ",
        "numeric = numeric.detach() * 0 + sum(p.sum() for p in self.parameters()).detach()\n        return "
        "numeric[:, 0]\n        parts = ",
        SpecError,
        "forward does not use embed.0.weight, layers.0.weight",
    ),
    ("out = self.layers", "out = float('nan') * self.layers", UserError, "the loss is not a number in epoch 1"),
]


@pytest.mark.parametrize(("before", "after", "kind", "says"), MISTAKES)
def test_a_mistake_in_the_module_is_told_without_a_traceback(
    tmp_path: Path, before: str, after: str, kind: type[Exception], says: str
) -> None:
    assert before in TORCH_MODEL
    made = bench(tmp_path, TORCH_MODEL.replace(before, after), rows=300)
    with pytest.raises(kind, match=says):
        made.train("wrong")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_gpu_that_is_paid_for_and_not_seen_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """A pod of a GPU class with the image for CPUs would train on, slowly, and be green."""
    made = bench(tmp_path, rows=300)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ORRERY_GPUS", "1")
    with pytest.raises(UserError, match="has a GPU, and torch sees none") as e:
        made.train("blind", processes=processes)
    assert "`image` of the class in platform.yaml" in e.value.hint


AUX = "self.embed = ", "self.aux = nn.Linear(3, 1)\n        self.embed = "


def test_a_parameter_that_forward_does_not_use_is_named_when_processes_wait_for_its_gradient(tmp_path: Path) -> None:
    made = bench(tmp_path, TORCH_MODEL.replace(*AUX), rows=300)
    with pytest.raises(SpecError, match=r"forward does not use aux\.weight, aux\.bias: .* 2 processes") as e:
        made.train("two", processes=2)
    assert "requires_grad_(False)" in e.value.hint
    assert made.train("alone", overrides={"epochs": 1}).result.facts["weights_digest"]  # one process does without it


def test_two_processes_again_make_the_same_weights(shared: Bench) -> None:
    first = shared.train("two-1", processes=2, overrides={"epochs": 2})
    second = shared.train_apart("two-2", processes=2, overrides={"epochs": 2})
    assert first.result.facts["weights_digest"] == second.result.facts["weights_digest"]
    assert first.result.digest == second.result.digest


def test_a_process_that_is_killed_is_told(tmp_path: Path) -> None:
    killer = "import os, signal\n        if self.training: os.kill(os.getpid(), signal.SIGKILL)\n        parts ="
    made = bench(tmp_path, TORCH_MODEL.replace("parts =", killer), rows=300)
    with pytest.raises(OrreryError, match="training process 0 ended with signal SIGKILL") as e:
        made.train("killed")
    assert "memory" in e.value.hint
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the agent's own handlers are gone


def test_told_to_stop_it_stops_commits_nothing_and_leaves_no_process(shared: Bench) -> None:
    config = shared.config("stopped", overrides={"epochs": 5000, "learning_rate": 1e-6})
    shared.store.put(f"{config.folder}/config.json", config.model_dump_json().encode())
    where = f"{shared.store.uri}/{config.folder}"
    code = "import sys, time; from orrery.step import main; sys.exit(main(sys.argv[1:], time.time()))"
    argv = [sys.executable, "-u", "-c", code, "--config", f"{where}/config.json", "--result", f"{where}/result.json"]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "epoch 1" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()  # ends when the last process that holds the pipe has ended
        assert process.wait(60) == 143, "".join(lines) + rest
    finally:
        if process.stdout is not None:
            process.stdout.close()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    result = Result.model_validate_json(shared.store.read(f"{config.folder}/result.json"))
    assert result.status == "interrupted"
    assert shared.store.manifest(f"{config.project}/train/stopped/manifest.json") is None


def test_partitions_with_other_features_are_refused(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    made.write_project("def fit(train, valid, params): ...\n")
    made.commit("2013-01", trips(300))
    made.commit("2013-02", trips(300, month=2).drop_columns(["distance"]))
    with pytest.raises(DataError, match="2013-01 and 2013-02 differ: distance"):
        made.train("differ")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (trips(300).slice(0, 0), "has no rows"),
        (trips(300).drop_columns(["distance", "weather__wind", "holiday", "carrier"]), "has no feature"),
        (trips(300).set_column(4, "distance", pa.array([float("inf")] * 300)), "infinite values in distance"),
        (trips(300).set_column(2, "label", pa.array([0, 2] * 150)), "a binary label is 0 or 1"),
        (trips(300).set_column(2, "label", pa.array(["no", "yes"] * 150)), "the label is string, the task is binary"),
        (trips(300).set_column(2, "label", pa.array([1] * 300)), "every label of the window is 1"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(tmp_path: Path, table: pa.Table, says: str) -> None:
    made = Bench(tmp_path)
    made.write_project("def fit(train, valid, params): ...\n")
    made.commit("2013-01", table)
    with pytest.raises(DataError, match=says):
        made.train("refused")


def test_a_column_without_any_value_in_the_window_is_left_out() -> None:
    """A sensor that was off for all months has nothing to teach; it comes back as a feature with its first value."""
    table = pa.table({"x": [1.0, None], "place": ["a", "b"], "off": pa.nulls(2)})
    schema = infer(table, "regression")
    assert schema.columns == ["x", "place"]

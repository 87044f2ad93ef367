"""ZeRO 1, 2, 3 on gloo: the same training as on one process, saved by runs, and resumed at another number of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from ranks import run
from torch import Tensor, nn

from orrery.store import Store
from orrery.training.checkpoints import Checkpoints
from orrery.training.place import Place
from orrery.training.saving import Loaded, ShardedSaver
from orrery.training.zero import ZeroStrategy, imported

pytestmark = pytest.mark.filterwarnings("ignore")  # DeepSpeed's and torch's about each other
FOLDER = "flights/train/abc/checkpoints"
ROWS = 24
Stage = Literal[1, 2, 3]


@pytest.fixture(scope="module", autouse=True)
def _imported_before_the_forks() -> None:
    imported(cuda=False)


def network() -> nn.Module:
    """Odd sizes, so that no parameter falls on a border of the partitions; a buffer beside."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(7, 11), nn.BatchNorm1d(11, affine=False, momentum=0.0), nn.ReLU(), nn.Linear(11, 1))


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 7, generator=generator)
    return x, x.sum(1, keepdim=True)


def train(strategy: ZeroStrategy, place: Place, first: int, last: int, microbatches: int = 1) -> list[float]:
    norms = []
    strategy.replica.eval()  # the norm's statistics of a part are not those of the whole
    for step in range(first, last):
        x, y = (t[place.rank :: place.world] for t in data(step))
        parts = list(zip(x.chunk(microbatches), y.chunk(microbatches), strict=True))
        for i, (xs, ys) in enumerate(parts):
            loss = (strategy.replica(xs) - ys).pow(2).mean() / len(parts)
            strategy.backward(loss, last=i == len(parts) - 1)
        norms.append(float(strategy.step()))
    return norms


def alone(steps: int, clip: float | None) -> tuple[dict[str, Tensor], list[float]]:
    """What one process without ZeRO makes of it."""
    module, norms = network().eval(), []
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(steps):
        x, y = data(step)
        (module(x) - y).pow(2).mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), clip or float("inf"))))
        optimizer.step()
        optimizer.zero_grad()
    return module.state_dict(), norms


def strategy(stage: Stage, clip: float | None = None) -> ZeroStrategy:
    return ZeroStrategy(network(), stage, learning_rate=0.01, weight_decay=0.1, clip=clip)


def saver(folder: Path, place: Place) -> ShardedSaver:
    return ShardedSaver(Checkpoints(Store(f"file://{folder}/store"), FOLDER), place, folder / "scratch")


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.allclose(left[k], right[k], rtol=1e-4, atol=1e-6) for k in left)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_trains_as_one_process_does(stage: Stage, tmp_path: Path) -> None:
    def work(place: Place) -> tuple[dict[str, Tensor], list[float]]:
        zero = strategy(stage, clip=1.0)
        norms = train(zero, place, 0, 6, microbatches=2)
        return zero.weights(), norms

    (weights, norms), (nothing, _) = run(work, 2, tmp_path)
    expected, expected_norms = alone(6, clip=1.0)
    assert close(weights, expected) and nothing == {}
    assert norms == pytest.approx(expected_norms, rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "worlds"),
    [(1, (2, 3)), (1, (3, 1)), (2, (2, 2)), (2, (2, 1)), (3, (2, 3)), (3, (3, 1)), (3, (1, 2))],
    ids=str,
)
def test_it_goes_on_at_another_number_of_processes(stage: Stage, worlds: tuple[int, int], tmp_path: Path) -> None:
    def begin(place: Place) -> int:
        zero, one = strategy(stage), saver(tmp_path, place)
        train(zero, place, 0, 3)
        one.begin(3, zero.tensors(), {"step": 3}, {"rank": place.rank})
        train(zero, place, 3, 5)  # what comes after is not in it
        one.close()
        return one.committed()

    def go_on(place: Place) -> tuple[Loaded | None, dict[str, Tensor], int]:
        zero, one = strategy(stage), saver(tmp_path, place)
        tensors = zero.tensors()
        loaded = one.load(tensors)
        zero.restore(tensors)
        train(zero, place, 3, 6)
        one.begin(6, zero.tensors(), {"step": 6}, {})
        one.close()
        return loaded, zero.weights(), one.committed()

    assert run(begin, worlds[0], tmp_path) == [3] * worlds[0]
    answers = run(go_on, worlds[1], tmp_path)
    loaded, weights, _ = answers[0]
    assert loaded is not None and loaded.step == 3 and (loaded.own is not None) == (worlds[0] == worlds[1])
    assert close(weights, alone(6, None)[0])
    assert [committed for *_, committed in answers] == [6] * worlds[1]


@pytest.mark.parametrize("stage", [1, 3])
def test_best_weights_are_copies_that_can_be_taken_back(stage: Stage, tmp_path: Path) -> None:
    def work(place: Place) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        zero = strategy(stage)
        train(zero, place, 0, 2)
        best = {name: t.detach().clone() for name, t in zero.tensors()["model"].items()}
        before = zero.weights()
        train(zero, place, 2, 4)
        zero.restore({"model": best})
        return before, zero.weights()

    before, after = run(work, 2, tmp_path)[0]
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_fresh_one_has_no_momentum(tmp_path: Path) -> None:
    """The state is made for a checkpoint to be loaded into; making it must not count as a step."""

    def work(place: Place) -> dict[str, Tensor]:
        zero = strategy(2)
        tensors: dict[str, Any] = zero.tensors()
        assert tensors["optimizer"]["step"] == 0.0
        train(zero, place, 0, 3)
        return zero.weights()

    assert close(run(work, 2, tmp_path)[0], alone(3, None)[0])


def test_nothing_is_compiled(tmp_path: Path) -> None:
    def work(_: Place) -> list[str]:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
        strategy(1)
        return [str(p) for p in (tmp_path / "extensions").rglob("*")]

    assert run(work, 2, tmp_path) == [[], []]

"""A study in Optuna's storage: what trials that run at the same time know of each other.

It is a memory, not the truth: a trial's committed output is (see `outcome`). A trial is written into the study in one
piece, parameters and number together, before it trains; so one that is killed finds them there and goes on with
them. What is committed and not told, or lost with the storage, is told on the next look.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from orrery.databases import REFUSED, scrub, with_driver
from orrery.errors import TryAgain, UserError
from orrery.store import trouble
from orrery.tuning.outcome import Outcome, State
from orrery.tuning.space import Space

# The user attribute that holds our number: Optuna counts in the order in which trials happen to ask.
NUMBER = "orrery"
STATES: dict[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
# Draws before the first guess: the tree-structured Parzen estimator needs something to go by (Bergstra et al. 2011).
RANDOM = 8
# A median of fewer finished trials, or of the first epoch, stops too much.
STARTUP, WARMUP = 4, 1


@dataclass(frozen=True)
class Where:
    """Which study, and where: all that a process needs to open it.

    `storage`: a folder, or a database's URL, in which $NAME is read from the environment.
    """

    storage: str
    project: str
    key: str
    maximize: bool
    prune: bool = True


@dataclass(frozen=True)
class Asked:
    """A trial's parameters, and its id in the storage. `again`: it had asked before."""

    id: int
    params: dict[str, Any]
    again: bool


class Study:
    """One opened study."""

    def __init__(self, where: Where, space: Space) -> None:
        self.where, self.space = where, space
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with told(where.storage):
            self._storage = _storage(where)
            # Two trials may make it at the same moment: the second one finds it.
            self._study = optuna.create_study(
                storage=self._storage, study_name=f"{where.project}/{where.key}", load_if_exists=True,
                direction=_direction(where), pruner=_pruner(where.prune),
            )  # fmt: skip

    def trials(self) -> dict[int, FrozenTrial]:
        """Return the trials by our number; of two with one number the first counts."""
        found: dict[int, FrozenTrial] = {}
        with told(self.where.storage):
            for trial in self._study.get_trials(deepcopy=False):
                if NUMBER in trial.user_attrs:
                    found.setdefault(int(trial.user_attrs[NUMBER]), trial)
        return found

    def ask(self, number: int, given: Mapping[str, Any] | None, seed: int) -> Asked:
        """Return a trial's parameters: those that it asked for before, else `given`, else the sampler's."""
        before = self.trials()
        if number in before:
            return self._asked(before[number], again=True)
        params = self._sampled(before, number, seed) if given is None else self.space.to_optuna(given)
        self._add(number, TrialState.RUNNING, params)
        # Two attempts of one trial may have asked at once: both go on with what was there first.
        return self._asked(self.trials()[number], again=False)

    def _asked(self, trial: FrozenTrial, again: bool) -> Asked:
        return Asked(trial._trial_id, self.space.from_optuna(trial.params), again)

    def _sampled(self, before: Mapping[int, FrozenTrial], number: int, seed: int) -> dict[str, Any]:
        """Return the sampler's parameters, from a copy of the study: nothing is written until all are known."""
        sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM, seed=(seed * 1_000_003 + number) % 2**32)
        copy = optuna.create_study(sampler=sampler, direction=_direction(self.where))
        copy.add_trials(before.values())
        return dict(copy.ask(self.space.distributions()).params)

    def _add(
        self,
        number: int,
        state: TrialState,
        params: Mapping[str, Any],
        value: float | None = None,
        epochs: Mapping[int, float] | None = None,
    ) -> None:
        with told(self.where.storage), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = create_trial(
                state=state,
                value=value,
                params=dict(params),
                distributions=self.space.distributions(),
                user_attrs={NUMBER: number},
                intermediate_values=dict(epochs or {}),
            )
            self._study.add_trial(trial)

    def report(self, trial: int, epoch: int, loss: float) -> bool:
        """Write down an epoch's loss; tell whether the trial should stop. Epochs count from 0.

        A trial that was killed comes by epochs that it has reported before: of those only the last is judged again.
        """
        with told(self.where.storage):
            frozen = self._storage.get_trial(trial)
            if epoch < (frozen.last_step or 0):
                return False
            if epoch not in frozen.intermediate_values and not frozen.state.is_finished():
                self._storage.set_trial_intermediate_value(trial, epoch, self._signed(loss))
                frozen = self._storage.get_trial(trial)
            return bool(self._study.pruner.prune(self._study, frozen))

    def _signed(self, loss: float) -> float:
        """Return a loss such that better is in the direction of the study."""
        return -loss if self.where.maximize else loss

    def tell(self, outcome: Outcome) -> bool:
        """Bring the study to what a trial's output says; tell whether that was news."""
        known = self.trials().get(outcome.number)
        if known is not None and known.state.is_finished():
            return False
        epochs = {epoch: self._signed(loss) for epoch, loss in enumerate(outcome.epochs)}
        state = STATES[outcome.state]
        if known is None:
            value = outcome.value if outcome.state != "pruned" else next(reversed(epochs.values()), None)
            self._add(outcome.number, state, self.space.to_optuna(outcome.params), value, epochs)
            return True
        with told(self.where.storage):
            for epoch in epochs.keys() - known.intermediate_values.keys():
                self._storage.set_trial_intermediate_value(known._trial_id, epoch, epochs[epoch])
            self._study.tell(known.number, outcome.value, state, skip_if_finished=True)
        return True


def _direction(where: Where) -> str:
    return "maximize" if where.maximize else "minimize"


def _pruner(prune: bool) -> optuna.pruners.BasePruner:
    if not prune:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=WARMUP)


def _storage(where: Where) -> BaseStorage:
    if "://" in where.storage and not where.storage.startswith("file://"):
        url = with_driver(os.path.expandvars(where.storage))
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    folder = Path(where.storage.removeprefix("file://")).expanduser() / where.project
    file = folder / f"{where.key}.journal"
    with trouble(str(file)):
        folder.mkdir(parents=True, exist_ok=True)
        lock = KernelLock(f"{file}.lock")
        _mend(file, lock)
        return JournalStorage(JournalFileBackend(str(file), lock_obj=lock))


def _mend(file: Path, lock: KernelLock) -> None:
    """Cut off a last line that is not whole: power failed, and every later reader would stumble over it."""
    if not file.exists():
        return
    lock.acquire()
    try:
        with file.open("r+b") as f:
            data = f.read()
            if data and not data.endswith(b"\n"):
                f.truncate(data.rfind(b"\n") + 1)
    finally:
        lock.release()


class KernelLock:
    """A lock that ends with its process. Optuna's own is a file: after a kill, all others wait half a minute."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._held: int | None = None

    def acquire(self) -> bool:
        """Wait until it is ours."""
        held = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(held, fcntl.LOCK_EX)
        self._held = held
        return True

    def release(self) -> None:
        """Give it back."""
        if self._held is not None:
            os.close(self._held)
            self._held = None


@contextlib.contextmanager
def told(where: str) -> Iterator[None]:
    """Turn what a database says into an error with the right exit code, without its password."""
    from sqlalchemy import engine, exc

    try:
        yield
    except (exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as e:
        cause = e.__cause__ if isinstance(e, optuna.exceptions.StorageInternalError) and e.__cause__ else e
        said = str(getattr(cause, "orig", None) or cause)
        with contextlib.suppress(exc.ArgumentError):
            said = scrub(said, engine.make_url(os.path.expandvars(where)))
        if REFUSED.search(said) or isinstance(cause, exc.ArgumentError):
            raise UserError(f"the study's database cannot be used: {said}", hint="check ORRERY_TUNING") from None
        raise TryAgain(f"the study's database cannot be reached: {said}") from None

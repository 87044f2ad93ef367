"""What the planner knows of a search: one study for what its trials share, and whose parameters a training takes."""

from __future__ import annotations

import os
from typing import Any

import pytest
from core_house import PLATFORM, SPEC, House

from orrery.errors import RequestError, SpecError
from orrery.ledger import Ledger
from orrery.plan import Plan
from orrery.store import Manifest

MONTHS = ("2013-01", "2013-02", "2013-03")
TUNE = "tune: {trials: 4, parallel: 2}\n"


def landed(house: House, key: str, text: str = "") -> Manifest:
    raw = house.commit("ingest", "raw", key, text=text)
    clean = house.commit("validate", "clean", key, inputs={"raw": (raw.ref,)}, text=text)
    return house.commit("materialize", "features", key, inputs={"clean": (clean.ref,)}, text=text)


@pytest.fixture
def tuned(house: House) -> House:
    """A house whose spec tunes, with features for three months."""
    (house.folder / "spec.yaml").write_text(SPEC + "features: {history: 0}\n" + TUNE)
    for key in MONTHS:
        landed(house, key)
    return house


def trial(house: House, number: int, keys: tuple[str, ...] = MONTHS[:2], **more: Any) -> Plan:
    return house.planner().plan(house.request("trial", *keys, options={"number": number}, **more))


def tried(house: House, keys: tuple[str, ...] = MONTHS[:2], skip: int | None = None, **more: Any) -> None:
    """Commit the search's trials at the addresses that were planned."""
    for number in range(4):
        if number != skip:
            config = trial(house, number, keys, **more).config
            made = Manifest(
                project="delays",
                verb="trial",
                key=config.key,
                address=str(config.address),
                digest=str(number),
                files={},
            )
            house.store.put_if_absent(made.path, made.model_dump_json().encode())


def decided(house: House, window: str, verdict: str, created: str = "2013-04-01") -> Manifest:
    return house.commit("tune", "tuned", window, verdict=verdict, reasons=[created])


def test_all_trials_share_a_study_and_each_has_an_address_that_the_others_know(tuned: House) -> None:
    plans = [trial(tuned, number) for number in range(4)]
    assert len({p.config.params["study"] for p in plans}) == 1
    addresses = [p.config.address for p in plans]
    assert len(set(addresses)) == 4
    assert all(list(p.config.params["trials"]) == addresses for p in plans)
    assert plans[0].config.params["storage"] == str(tuned.home / "var" / "tuning")


def test_other_data_another_sample_or_force_are_another_study(tuned: House) -> None:
    def key(**more: Any) -> str:
        return str(trial(tuned, 0, **more).config.params["study"])

    first = key()
    assert key(run="another", attempt=3) == first
    others = {key(sample=0.5), key(force=True), key(force=True, run="another"), key(keys=MONTHS)}
    assert len(others) == 4 and first not in others
    landed(tuned, MONTHS[0], text="again")
    assert key() != first


def test_only_the_second_trial_is_given_the_champion(tuned: House) -> None:
    model = tuned.commit("train", "candidate", "2012-12..2012-12")
    before = [trial(tuned, number).config.address for number in range(4)]
    payload = {"version": "1", "model": model.path}
    Ledger(os.environ["ORRERY_LEDGER"]).record("delays", "promotion", "run-1", "done", "me", payload)
    plans = [trial(tuned, number) for number in range(4)]
    assert [set(p.config.inputs) for p in plans][1] == {"features", "champion"}
    assert [a == p.config.address for a, p in zip(before, plans, strict=True)] == [True, False, True, True]


def test_the_decision_needs_all_trials(tuned: House) -> None:
    tried(tuned, skip=2)
    with pytest.raises(RequestError, match=r"1 of the search's 4 trials are not there for 2013-01\.\.2013-02: 2"):
        tuned.planner().plan(tuned.request("tune", *MONTHS[:2]))
    tried(tuned)
    plan = tuned.planner().plan(tuned.request("tune", *MONTHS[:2]))
    assert [r.digest for r in plan.config.inputs["trials"]] == ["0", "1", "2", "3"]
    # A forced search is one of its own, and the trials of this one are none of its.
    with pytest.raises(RequestError, match="4 of the search's 4"):
        tuned.planner().plan(tuned.request("tune", *MONTHS[:2], force=True))
    tried(tuned, force=True)
    assert tuned.planner().plan(tuned.request("tune", *MONTHS[:2], force=True)).config.address != plan.config.address


@pytest.mark.parametrize("number", [-1, 4, "0", None])
def test_a_trial_that_is_none_of_the_search_is_refused(tuned: House, number: Any) -> None:
    with pytest.raises(RequestError, match="they go from 0 to 3"):
        trial(tuned, number)


def test_a_project_that_is_not_tuned_says_so(house: House) -> None:
    landed(house, MONTHS[0])
    with pytest.raises(RequestError, match="its spec.yaml has no `tune`"):
        trial(house, 0, MONTHS[:1])


def trained_with(house: House, *keys: str) -> str | None:
    inputs = house.planner().plan(house.request("train", *keys)).config.inputs
    return inputs["tuned"][0].key if "tuned" in inputs else None


def test_a_training_takes_the_newest_search_of_its_window_s_end_or_before(tuned: House) -> None:
    assert trained_with(tuned, *MONTHS) is None
    decided(tuned, "2013-01..2013-01", "tuned")
    decided(tuned, "2013-01..2013-02", "tuned")
    assert trained_with(tuned, MONTHS[0]) == "2013-01..2013-01"
    assert trained_with(tuned, *MONTHS) == "2013-01..2013-02"
    decided(tuned, "2013-02..2013-03", "defaults")  # the newest says that the defaults are as good
    assert trained_with(tuned, *MONTHS) is None
    assert trained_with(tuned, *MONTHS[:2]) == "2013-01..2013-02"


def test_a_project_that_tunes_no_more_trains_with_its_own_parameters(tuned: House) -> None:
    decided(tuned, "2013-01..2013-02", "tuned")
    (tuned.folder / "spec.yaml").write_text(SPEC + "features: {history: 0}\n")
    assert trained_with(tuned, *MONTHS) is None


def test_pods_do_not_share_a_folder(tuned: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_PROFILE", "kubernetes")
    with pytest.raises(SpecError, match="pods do not share") as e:
        trial(tuned, 0)
    assert "ORRERY_TUNING" in e.value.hint
    monkeypatch.setenv("ORRERY_TUNING", "postgresql://orrery:$TUNING_PASSWORD@db/optuna")
    assert trial(tuned, 0).config.params["storage"] == "postgresql://orrery:$TUNING_PASSWORD@db/optuna"
    monkeypatch.setenv("ORRERY_TUNING", "s3://bucket/tuning")
    with pytest.raises(SpecError, match="s3://…, where no study can be kept"):
        trial(tuned, 0)


def test_a_password_in_the_study_s_address_is_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_TUNING", "postgresql://orrery:hunter2@db/optuna")
    with pytest.raises(SpecError, match="tuning: a password must be written as") as e:
        house.planner()
    assert "hunter2" not in str(e.value)


def test_where_the_study_is_kept_does_not_count(tuned: House, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trial(tuned, 2).config
    monkeypatch.setenv("ORRERY_TUNING", "elsewhere")
    after = trial(tuned, 2).config
    assert after.params["storage"] != before.params["storage"] and after.address == before.address


def test_the_class_of_a_trial_is_the_spec_s(tuned: House) -> None:
    (tuned.home / "include" / "platform.yaml").write_text(PLATFORM + '  big: {cpu: "8"}\n')
    assert trial(tuned, 0).compute == "cpu-small"
    spec = tuned.folder / "spec.yaml"
    spec.write_text(spec.read_text().replace("parallel: 2", "parallel: 2, compute: big"))
    assert trial(tuned, 0).compute == "big"


def test_weights_and_biases_is_told_to_the_steps_that_train_and_to_no_other(tuned: House) -> None:
    assert "ORRERY_WANDB" not in trial(tuned, 0).environment
    (tuned.home / "include" / "platform.yaml").write_text(PLATFORM + "wandb: {project: house}\n")
    told = trial(tuned, 0).environment["ORRERY_WANDB"]
    assert told == '{"project":"house","mode":"offline","entity":null}'
    assert "ORRERY_WANDB" in tuned.planner().plan(tuned.request("train", *MONTHS)).environment
    tried(tuned)
    assert "ORRERY_WANDB" not in tuned.planner().plan(tuned.request("tune", *MONTHS[:2])).environment

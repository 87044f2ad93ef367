"""The verdict is a table of rules: what each partition shows, in a row, gives one word."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orrery.monitoring.verdict import Policy, Seen, Sure, decide, known, pooled

POLICY = Policy("auc", 0.0125, False, persistence=2, cooldown=3, labelled=0.8)
ORDER = {"none": 0, "watch": 1, "retrain": 2}


def seen(loss: float | None = 0.0, key: str = "m5", se: float = 0.003, **other: object) -> Seen:
    """A partition of a model that promised an AUC of 0.75."""
    sure = None if loss is None else Sure(0.75 - loss, se, 29)
    return Seen(**{"key": key, "version": "1", "loss": loss, "observed": sure, "promised": Sure(0.75, 0.003, 13),
                   "labelled": 1.0, "prediction_psi": 0.01, "prediction_p": 0.4, **other})  # type: ignore[arg-type]  # fmt: skip


def word(now: Seen, *history: Seen | None, policy: Policy = POLICY) -> str:
    return decide(policy, history, now).word


BAD, GOOD = seen(0.03), seen(0.0)
DRIFTED = {"prediction_psi": 0.5, "prediction_p": 1e-9}
BLIND = seen(0.0, labelled=0.3, **DRIFTED)
TABLE = {
    "all is well": (GOOD, [GOOD, GOOD], "none"),
    "better than promised": (seen(-0.05), [seen(-0.05)], "none"),
    "the first partition of all": (BAD, [], "watch"),
    "one bad partition": (BAD, [GOOD], "watch"),
    "two in a row": (BAD, [BAD], "retrain"),
    "it recovered": (GOOD, [BAD, BAD], "none"),
    "bad, good, bad is no row": (BAD, [GOOD, BAD], "watch"),
    "a partition without a verdict ends a row": (BAD, [None, BAD], "watch"),
    "the champion changed in between": (BAD, [replace(BAD, version="0")], "watch"),
    "too small to matter, however sure": (seen(0.0124, se=1e-6), [seen(0.0124, se=1e-6)] * 5, "none"),
    "a loss of exactly the effect is one": (seen(0.0125, se=1e-6), [seen(0.0125, se=1e-6)], "retrain"),
    "large, but within chance": (seen(0.03, se=0.03), [seen(0.03, se=0.03)], "none"),
    "each within chance, together not": (seen(0.014, se=0.007), [seen(0.014, se=0.007)], "retrain"),
    "it has asked last time": (BAD, [replace(BAD, verdict="retrain")], "watch"),
    "it has asked three partitions ago": (BAD, [BAD, BAD, replace(BAD, verdict="retrain")], "watch"),
    "it has asked four partitions ago": (BAD, [BAD, BAD, BAD, replace(BAD, verdict="retrain")], "retrain"),
    "it asked, and the partition after has no verdict": (BAD, [BAD, None, replace(BAD, verdict="retrain")], "watch"),
    "a watch is no request": (BAD, [replace(BAD, verdict="watch")], "retrain"),
    "few labels say nothing": (seen(0.2, labelled=0.79), [seen(0.2, labelled=0.79)], "none"),
    "just labels enough": (seen(0.03, labelled=0.8), [BAD], "retrain"),
    "no labels, predictions moved": (BLIND, [GOOD], "watch"),
    "no labels, predictions moved twice": (BLIND, [BLIND], "retrain"),
    "no labels, moved, after a bad one": (BLIND, [BAD], "retrain"),
    "no labels, moved; the one before was fine": (BLIND, [seen(0.0, **DRIFTED)], "watch"),
    "no labels, nothing moved": (seen(0.0, labelled=0.0), [BLIND], "none"),
    "predictions moved, promise kept, for ever": (seen(0.0, **DRIFTED), [seen(0.0, **DRIFTED)] * 6, "none"),
    "moved by chance": (seen(0.0, prediction_psi=0.5, prediction_p=0.2), [], "none"),
    "moved a little": (seen(0.0, prediction_psi=0.19, prediction_p=0.0), [], "none"),
    "features moved, all of them, for ever": (seen(0.0, moved=("a", "b")), [seen(0.0, moved=("a", "b"))] * 6, "none"),
    "a feature lost its values": (seen(0.0, lost=("a",)), [], "watch"),
    "a feature lost its values, and the promise is broken": (seen(0.03, lost=("a",)), [BAD], "retrain"),
    "no promise": (seen(0.03, promised=None), [seen(0.03, promised=None)], "none"),
    "no promise, and predictions moved twice": (replace(BLIND, promised=None), [replace(BLIND, promised=None)], "retrain"),
    "one class only": (seen(None), [BAD], "none"),
    "NaN is not known": (seen(math.nan), [BAD], "none"),
    "an error that is NaN": (seen(0.03, se=math.nan), [BAD], "none"),
    "drift that is not a number": (seen(0.0, prediction_psi=math.nan, prediction_p=math.nan), [], "none"),
    "no drift at hand": (seen(0.0, prediction_psi=None, prediction_p=None), [], "none"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name: str) -> None:
    now, history, expected = TABLE[name]
    found = decide(POLICY, history, now)
    assert found.word == expected, found.reasons
    assert found.reasons and all(r and "nan" not in r and "None" not in r for r in found.reasons)


def test_at_once_and_without_a_cooldown() -> None:
    assert word(BAD, policy=replace(POLICY, persistence=1)) == "retrain"
    assert word(BAD, replace(BAD, verdict="retrain"), policy=replace(POLICY, cooldown=0)) == "retrain"
    assert word(BAD, BAD, policy=replace(POLICY, persistence=3)) == "watch"
    assert word(BAD, BAD, BAD, policy=replace(POLICY, persistence=3)) == "retrain"


def test_an_rmse_is_judged_as_a_share_of_its_promise() -> None:
    """Ten minutes promised: half a minute matters, 0.4 does not; the same numbers of 1 kWh would."""
    policy = Policy("rmse", 0.05, True, 1, 0, 0.8)
    worse = Seen("m1", "1", 0.5, Sure(10.5, 0.01, 29), Sure(10.0, 0.01, 29), 1.0)
    assert word(worse, policy=policy) == "retrain"
    assert word(replace(worse, loss=0.4), policy=policy) == "none"
    assert word(replace(worse, loss=0.4, promised=Sure(1.0, 0.01, 29)), policy=policy) == "retrain"


def test_a_promise_that_was_lucky_does_not_become_sure_by_waiting() -> None:
    """Its error counts whole, however many partitions are pooled; theirs shrink."""
    wide = [seen(0.02, se=0.004, promised=Sure(0.75, 0.02, 13)) for _ in range(5)]
    assert pooled(wide).least < 0
    assert 0.02 - pooled(wide).least == pytest.approx(2.16 * math.hypot(0.02, 0.004 / 5**0.5), rel=0.01)
    assert word(wide[0], *wide[1:], policy=replace(POLICY, persistence=5)) == "none"


def test_the_words_say_what_whoever_is_on_call_must_know() -> None:
    asked = decide(POLICY, [seen(0.028, "2013-05")], seen(0.0306, "2013-06"))
    assert asked.reasons[0].startswith(
        "retrain: auc is 0.0293 worse than the 0.7500 promised over 2013-05 to 2013-06, "
    )
    assert "surely 0.02" in asked.reasons[0] and "from 0.0125 on it matters" in asked.reasons[0]
    first = decide(POLICY, [GOOD], seen(0.0305))
    assert first.reasons == (
        "auc 0.7195 against 0.7500 promised: 0.0305 worse (from 0.0125 worse on it matters); "
        "1 more partition like this and it asks for a training",
    )
    cooling = decide(POLICY, [replace(BAD, key="2013-05", verdict="retrain")], BAD)
    assert "the verdict on 2013-05 was retrain already" in cooling.reasons[0]
    blind = decide(POLICY, [], seen(0.0, labelled=0.3))
    assert blind.reasons[0] == "no verdict on auc: labels are missing"
    assert blind.reasons[1] == "70.0% of the scored rows have no label; at most 20% may"
    moved = decide(POLICY, [], seen(0.001, moved=("temp", "wind", "rain", "snow", "fog")))
    assert (
        moved.reasons[1] == "features that have moved: temp, wind, rain and 2 more; by itself no reason to train again"
    )
    kept = decide(POLICY, [], seen(0.001, **DRIFTED))
    assert kept.reasons[1].startswith("predictions have moved (PSI 0.50): performance is what counts")
    lost = decide(POLICY, [], seen(0.0, lost=("temp",)))
    assert "temp: the values went missing; look at the source, a training would not mend it" in lost.reasons[0]
    assert "better" in decide(POLICY, [], seen(-0.02)).reasons[0]


# -- properties --------------------------------------------------------------------------------------

losses = st.floats(-0.2, 0.2)
psis = st.one_of(st.none(), st.floats(0, 2))
partitions = st.builds(
    seen,
    loss=st.one_of(st.none(), losses),
    se=st.floats(0.0001, 0.05),
    labelled=st.sampled_from([0.0, 0.5, 1.0, 1.0, 1.0]),
    prediction_psi=psis,
    prediction_p=st.sampled_from([0.0, 0.5]),
    verdict=st.sampled_from(["none", "none", "watch", "retrain"]),
    version=st.sampled_from(["1", "1", "1", "2"]),
)
histories = st.lists(st.one_of(st.none(), partitions, partitions, partitions), max_size=6)


@given(histories, partitions, st.floats(0, 0.2))
def test_a_larger_loss_never_weakens_the_verdict(history: list[Seen | None], now: Seen, more: float) -> None:
    if now.loss is None:
        return
    worse = replace(now, loss=now.loss + more)
    assert ORDER[word(worse, *history)] >= ORDER[word(now, *history)]


@given(histories, partitions, st.integers(0, 5), st.floats(0, 0.2))
def test_nor_does_a_larger_loss_before(history: list[Seen | None], now: Seen, place: int, more: float) -> None:
    if place >= len(history) or (before := history[place]) is None or before.loss is None:
        return
    worse = [*history[:place], replace(before, loss=before.loss + more), *history[place + 1 :]]
    assert ORDER[word(now, *worse)] >= ORDER[word(now, *history)]


@given(histories, partitions, st.floats(0, 2))
def test_nor_do_predictions_that_moved_farther(history: list[Seen | None], now: Seen, more: float) -> None:
    farther = replace(now, prediction_psi=(now.prediction_psi or 0.0) + more)
    assert ORDER[word(farther, *history)] >= ORDER[word(now, *history)]


@given(histories, partitions, st.lists(st.text(min_size=1, max_size=5), max_size=30))
def test_features_alone_change_nothing(history: list[Seen | None], now: Seen, moved: list[str]) -> None:
    assert word(replace(now, moved=tuple(moved)), *history) == word(now, *history)


@given(histories, partitions)
def test_no_request_within_the_cooldown_or_without_a_row(history: list[Seen | None], now: Seen) -> None:
    found = decide(POLICY, history, now)
    if found.word == "retrain":
        assert all(s is None or s.verdict != "retrain" for s in history[: POLICY.cooldown])
        row = [now, *history[: POLICY.persistence - 1]]
        assert len(row) == POLICY.persistence
        for one in row:
            assert one is not None and one.version == now.version
            assert (one.loss or 0) >= POLICY.effect if known(POLICY, one) else (one.prediction_psi or 0) >= 0.2
    assert found == decide(POLICY, history, now)


@given(histories, partitions)
def test_swapping_promised_and_observed_turns_a_loss_into_none(history: list[Seen | None], now: Seen) -> None:
    """A better partition after better ones is never a reason to train while labels are there."""
    if not known(POLICY, now) or now.loss is None or now.loss <= 0 or now.observed is None or now.promised is None:
        return
    swapped = replace(now, loss=-now.loss, observed=now.promised, promised=now.observed)
    assert word(swapped, *history) != "retrain"


def test_it_is_light() -> None:
    """A decision must not wait for numpy; it is asked for where there may be none."""
    code = (
        "import sys; import orrery.monitoring.verdict; heavy = {'numpy', 'scipy', 'pyarrow', 'pandas', 'torch'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

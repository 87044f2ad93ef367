"""From a request to a config: what is skipped, what is refused, and what the fingerprint is made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from core_house import SPEC, House
from test_partitions import HOSTILE

from orrery.contract import VERBS
from orrery.errors import RequestError, SpecError, UserError
from orrery.ledger import Ledger
from orrery.plan import Planner, Request, safe_name
from orrery.store import Ref


def prints(house: House, **kwargs: Any) -> dict[str, str]:
    return house.planner().plan(house.request(**kwargs)).config.fingerprint


def landed(house: House, key: str, text: str = "", history: str = "") -> None:
    """Land a partition and carry it to features, which look back at `history`."""
    raw = house.commit("ingest", "raw", key, text=text)
    clean = house.commit("validate", "clean", key, inputs={"raw": (raw.ref,)}, text=text)
    inputs = {"clean": (clean.ref,)}
    if history:
        before = house.store.latest_manifest("delays", "clean", history)
        assert before is not None
        inputs["history"] = (before.ref,)
    house.commit("materialize", "features", key, inputs=inputs, text=text)


# -- skipping ----------------------------------------------------------------------------------------


def test_unchanged_work_is_skipped_with_the_reason(house: House) -> None:
    assert house.planner().plan(house.request()).done is None
    house.tell(house.config())
    again = house.planner().plan(house.request(run="another", attempt=3))
    assert again.done is not None
    assert again.done.status == "done"
    assert again.done.metrics == {"value": 1.0}
    (manifest,) = house.manifests()
    assert (again.done.output, again.done.digest) == (manifest.path, manifest.digest)
    assert again.done.skipped == (
        f"unchanged since {manifest.created}: same code, project, environment, config and inputs"
    )


def test_work_whose_files_are_gone_is_not_skipped(house: House) -> None:
    house.tell(house.config())
    (manifest,) = house.manifests()
    Path(house.store.full(manifest.uri("out.json"))).unlink()
    assert house.planner().plan(house.request()).done is None


def test_what_was_superseded_is_published_again(house: House) -> None:
    house.tell(house.config())
    house.tell(house.config(2, value=2))
    plan = house.planner().plan(house.request(attempt=3, options={"marks": str(house.marks)}))
    assert plan.done is None
    assert house.tell(plan.config)[0] == 0
    assert len(house.store.pointers("delays", "probed", "2013-01")) == 3
    assert len(house.manifests()) == 2


def test_force_works_anew_once_per_run(house: House) -> None:
    house.tell(house.config())
    plan = house.planner().plan(house.request(run="run-2", force=True))
    assert plan.done is None
    assert plan.config.address != house.config().address
    house.tell(plan.config)
    assert len(house.manifests()) == 2
    assert house.planner().plan(house.request(run="run-2", attempt=2, force=True)).done is not None
    assert house.planner().plan(house.request(run="run-3", force=True)).done is None


def test_a_sample_is_something_else_and_publishes_nothing(house: House) -> None:
    plan = house.planner().plan(house.request(sample=0.01))
    assert plan.config.publish is False
    assert plan.config.address != house.config().address
    house.tell(plan.config)
    assert house.store.keys("delays", "probed") == []
    done = house.planner().plan(house.request(sample=0.01, run="other")).done
    assert done is not None


# -- the fingerprint ---------------------------------------------------------------------------------


def test_each_part_changes_with_its_own_cause_only(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    before = prints(house)
    assert set(before) == {"verb", "code", "project", "environment", "config", "inputs"}

    def changed() -> set[str]:
        return {part for part, value in prints(house).items() if value != before[part]}

    assert changed() == set()
    (house.folder / "features.py").write_text("ANSWER = 43\n")
    assert changed() == {"project"}
    (house.folder / "features.py").write_text("ANSWER = 42\n")
    assert changed() == set()
    pins = house.home / "docker" / "airflow" / "requirements.txt"
    text = pins.read_text()
    pins.write_text(text.replace("2.0", "2.1"))
    assert changed() == {"environment"}
    pins.write_text(text)
    monkeypatch.setattr("orrery.fingerprint.code", lambda module: "other")
    assert changed() == {"code"}


def test_config_counts_and_hints_do_not(house: House) -> None:
    before = prints(house)
    assert prints(house, options={"mode": "wait", "marks": "/elsewhere"}) == before
    for other in ({"options": {"value": 2.0}}, {"sample": 0.5}):
        assert {p for p, v in prints(house, **other).items() if v != before[p]} == {"config"}
    plan = house.planner().plan(house.request("probe", "2013-02"))
    assert {p for p, v in plan.config.fingerprint.items() if v != before[p]} == {"config"}


def test_inputs_count_by_content(house: House) -> None:
    landed(house, "2013-01")
    before = prints(house, verb="validate")
    landed(house, "2013-01", "landed again")
    after = prints(house, verb="validate")
    assert {part for part in before if before[part] != after[part]} == {"inputs"}


def test_where_and_when_and_who_do_not_count(house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = house.config()
    for name, value in {
        "ORRERY_STORE": f"file://{tmp_path}/other", "ORRERY_LEDGER": f"sqlite:///{tmp_path}/other.db",
        "ORRERY_DATA": "s3://elsewhere", "ORRERY_STAGE": "prod", "ORRERY_MLFLOW": "http://elsewhere",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    after = house.planner().plan(house.request(run="b", attempt=7, actor="eve", reason="why not")).config
    assert after.fingerprint == before.fingerprint
    assert after.address == before.address
    assert after.store != before.store


# -- inputs ------------------------------------------------------------------------------------------


def test_a_missing_input_is_told_with_what_there_is(house: House) -> None:
    with pytest.raises(RequestError, match="delays has no raw for 2013-01; there is none yet") as e:
        house.planner().plan(house.request("validate"))
    assert e.value.hint == "run ingest for 2013-01 first"
    landed(house, "2013-02")
    landed(house, "2013-03")
    with pytest.raises(RequestError, match=r"no raw for 2013-01; there is 2013-02 to 2013-03 \(2\)"):
        house.planner().plan(house.request("validate"))
    with pytest.raises(RequestError, match="no features for 2013-01"):
        house.planner().plan(house.request("train", "2013-01", "2013-02"))
    with pytest.raises(RequestError, match="has no champion yet"):
        house.planner().plan(house.request("score", "2013-02"))
    with pytest.raises(RequestError, match="has no candidate for 2013-02"):
        house.planner().plan(house.request("evaluate", "2013-02"))


def test_stale_inputs_are_refused(house: House) -> None:
    landed(house, "2013-01")
    plan = house.planner().plan(house.request("train"))
    assert [r.key for r in plan.config.inputs["features"]] == ["2013-01"]
    raw = house.commit("ingest", "raw", "2013-01", text="again")
    with pytest.raises(RequestError, match="clean of 2013-01 was made from raw data that landed again at") as e:
        house.planner().plan(house.request("materialize"))
    assert e.value.hint == "run delays.ingest for 2013-01"
    house.commit("validate", "clean", "2013-01", inputs={"raw": (raw.ref,)}, text="again")
    with pytest.raises(RequestError, match="features of 2013-01 was made from clean data that landed again"):
        house.planner().plan(house.request("train"))


def test_the_same_bytes_landed_again_are_not_stale(house: House) -> None:
    landed(house, "2013-01")
    other = house.commit("ingest", "raw", "2013-01", inputs={"x": (Ref(path="a/b/c", digest="d"),)}, text="")
    assert house.store.latest_manifest("delays", "raw", "2013-01") == other
    house.planner().plan(house.request("materialize"))


def test_history_is_taken_as_far_as_it_is_there(house: House) -> None:
    (house.folder / "spec.yaml").write_text(SPEC + "features: {history: 3}\n")
    for key in ("2012-12", "2013-01", "2013-03"):
        landed(house, key)
    plan = house.planner().plan(house.request("materialize", "2013-03"))
    assert [r.key for r in plan.config.inputs["clean"]] == ["2013-03"]
    assert [r.key for r in plan.config.inputs["history"]] == ["2012-12", "2013-01"]


def crowned(version: str, model: str) -> None:
    payload = {"version": version, "model": model}
    Ledger(os.environ["ORRERY_LEDGER"]).record("delays", "promotion", f"run-{version}", "done", "me", payload)


def test_the_champion_is_evaluated_beside_the_candidate(house: House) -> None:
    champion, candidate = house.verdict("2012-10..2012-12"), house.verdict("2013-01..2013-03", version="2")
    request = house.request("evaluate", "2013-01", "2013-02", "2013-03")
    assert "champion" not in house.planner().plan(request).config.inputs
    crowned("1", champion.path)
    inputs = house.planner().plan(request).config.inputs
    assert (inputs["champion"], inputs["candidate"]) == ((champion.ref,), (candidate.ref,))
    assert inputs["features"] == candidate.inputs["features"]


def test_a_promotion_in_between_labels_no_score_of_another_model(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    landed(house, "2013-01")
    old, new = house.verdict("2012-10..2012-12"), house.verdict("2012-11..2013-01", version="2")
    crowned("1", old.path)
    planner = house.planner()
    look = planner._model_of
    monkeypatch.setattr(planner, "_model_of", lambda champion: [look(champion), crowned("2", new.path)][0])
    config = planner.plan(house.request("score")).config
    assert (config.inputs["model"], config.params["model_version"]) == ((old.ref,), "1")
    config = house.planner().plan(house.request("score")).config
    assert (config.inputs["model"], config.params["model_version"]) == ((new.ref,), "2")


def test_a_report_is_of_the_features_and_the_model_that_were_scored(house: House) -> None:
    """Features that landed since, or a champion that came since, are another report's."""
    landed(house, "2013-04")
    used = house.store.latest_manifest("delays", "features", "2013-04")
    assert used is not None
    model = house.commit("train", "candidate", "2013-01..2013-03", inputs={"features": (used.ref,)})
    given = {"features": (used.ref,), "model": (model.ref,)}
    scores = house.commit("score", "scores", "2013-04", inputs=given)
    landed(house, "2013-04", text="again")
    house.commit("train", "candidate", "2013-02..2013-04", text="newer")
    inputs = house.planner().plan(house.request("report", "2013-04")).config.inputs
    assert inputs == {**given, "scores": (scores.ref,), "training": (used.ref,)}
    with pytest.raises(RequestError, match="no scores for 2013-05"):
        house.planner().plan(house.request("report", "2013-05"))


@pytest.mark.parametrize("verb", ["train", "score"])
@pytest.mark.parametrize(
    ("again", "message"),
    [
        (("raw", "2013-02"), "clean of 2013-02 was made from raw data that landed again"),
        (("clean", "2013-02"), "features of 2013-02 was made from clean data"),
        (("raw", "2013-01"), "clean of 2013-01 was made from raw data that landed again"),
        (("clean", "2013-01"), "features of 2013-02 look back at data that have landed"),
    ],
)
def test_nothing_is_made_from_stale_features(house: House, verb: str, again: tuple[str, str], message: str) -> None:
    crowned("1", house.verdict("2012-10..2012-12").path)
    landed(house, "2013-01")
    landed(house, "2013-02", history="2013-01")
    house.planner().plan(house.request(verb, "2013-02"))
    dataset, key = again
    maker = {"raw": "ingest", "clean": "validate"}[dataset]
    raw = house.store.latest_manifest("delays", "raw", key)
    assert raw is not None
    house.commit(maker, dataset, key, inputs={"raw": (raw.ref,)} if dataset == "clean" else {}, text="again")
    with pytest.raises(RequestError, match=message):
        house.planner().plan(house.request(verb, "2013-02"))


def test_an_older_model_is_tried_on_the_newest_features(house: House) -> None:
    """Its own training's would always do; what it must score is what comes next."""
    old, new = house.verdict("2013-01..2013-01"), house.verdict("2013-02..2013-02", version="2")
    crowned("1", old.path)
    crowned("2", new.path)
    landed(house, "2013-04")
    options = {"version": "1", "model": old.path, "previous": "2"}
    inputs = house.planner().plan(house.request("rollback", "2013-01", options=options)).config.inputs
    assert inputs["model"] == (old.ref,)
    assert [ref.key for ref in inputs["features"]] == ["2013-04"]


@pytest.mark.parametrize("verb", ["register", "promote", "rollback"])
def test_an_effect_is_not_tried_on_a_sample(house: House, verb: str) -> None:
    house.verdict("2013-01..2013-01")
    with pytest.raises(RequestError, match=f"{verb} cannot be tried on a sample"):
        house.planner().plan(house.request(verb, sample=0.01, options={"version": "1"}))


def test_a_plan_writes_nothing(house: House) -> None:
    """A dry run is a plan."""
    house.planner().plan(house.request())
    assert not (house.home / "store").exists()


def test_a_refused_candidate_ends_green_before_anything_is_started(house: House) -> None:
    house.verdict("2013-01..2013-01", "kept")
    for verb, options in (("register", {}), ("promote", {"version": "1"})):
        done = house.planner().plan(house.request(verb, options=options)).done
        assert done is not None
        assert (done.status, done.verdict, done.skipped) == ("done", "kept", "the gate refused the candidate")
        assert done.reasons == ["auc 0.8 is above 0.7"]


# -- hostile requests --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_partitions(house: House, key: str) -> None:
    planner = house.planner()
    with pytest.raises(RequestError):
        planner.plan(house.request("probe", key))
    if key not in ("2013-03..2013-04",):
        with pytest.raises(RequestError):
            planner.partitions_of(key, None)
    assert not (house.home / "store").exists()


def test_a_request_names_its_data(house: House) -> None:
    planner = house.planner()
    for partition, window, word in (
        (None, None, "neither"),
        ("2013-01", "2013-01..2013-02", "both"),
        ("", "", "neither"),
    ):
        with pytest.raises(RequestError, match=f"give a partition or a window, not {word}"):
            planner.partitions_of(partition, window)
    with pytest.raises(RequestError, match="without a partition or window"):
        planner.plan(Request("delays", "train", (), "run", "train"))
    with pytest.raises(RequestError, match="works on one partition, was asked for 2"):
        planner.plan(Request("delays", "probe", ("2013-01", "2013-02"), "run", "probe"))
    assert planner.partitions_of(None, "2013-01..2013-03") == ("2013-01", "2013-02", "2013-03")


def test_unknown_steps_and_options(house: House) -> None:
    planner = house.planner()
    with pytest.raises(RequestError, match="unknown step 'tran'.*\n.*did you mean 'train'"):
        planner.plan(Request("delays", "tran", ("2013-01",), "run", "tran"))
    with pytest.raises(RequestError, match="probe: valu: Extra inputs.*\n.*did you mean 'value'"):
        planner.plan(house.request(options={"valu": 1}))
    house.verdict("2013-01..2013-01")
    with pytest.raises(RequestError, match="promote: version: Field required"):
        planner.plan(house.request("promote"))


@pytest.mark.parametrize(
    "run", ["manual__2013-01-01T00:00:00+00:00", "../../../etc", "a/b", "", ".", "..", "ä" * 300, "$(id)\n"]
)
def test_any_run_id_becomes_one_plain_segment(house: House, run: str) -> None:
    plan = house.planner().plan(house.request(run=run))
    assert plan.config.folder.count("/") == 4
    house.store.full(plan.config.folder)
    assert house.tell(plan.config)[0] == 0


def test_a_safe_name_stays_as_it_is() -> None:
    """A run's name is made safe where it comes in and again where a path is made of it."""
    for text in ("a" * 300, "flight_delay.train--" + "x/" * 60, "a b", "plain"):
        assert safe_name(safe_name(text)) == safe_name(text)
        assert len(safe_name(text)) <= 120


def test_safe_names_differ_when_the_texts_do() -> None:
    texts = ["a", "a:", "a/", "a b", "..", ".", "", "x" * 300, "x" * 301, "A", "a\n", "_"]
    names = [safe_name(t) for t in texts]
    assert len(set(names)) == len(texts)
    assert names[0] == "a"
    assert all(len(n) < 140 for n in names)


# -- sources -----------------------------------------------------------------------------------------


def test_sources_are_filled_in_and_a_table_gets_its_secret_by_name(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORRERY_SOURCE_FLIGHTS", "postgresql://me:hunter2@db/shop")
    file = '{uri: "${data}/flights/{partition}.parquet", partition: month}'
    plan = house.planner().plan(house.request("ingest"))
    assert plan.config.params["sources"]["flights"]["uri"] == f"file://{house.home}/upstream/flights/2013-01.parquet"
    assert plan.config.address is None
    (house.folder / "spec.yaml").write_text(
        SPEC.replace(file, "{table: shop.orders, connection: shop, time_column: at, partition: month}")
    )
    plan = house.planner().plan(house.request("ingest"))
    source = plan.config.params["sources"]["flights"]
    assert (source["table"], source["secret_env"], source["uri"]) == ("shop.orders", "ORRERY_SOURCE_FLIGHTS", None)
    assert "hunter2" not in plan.config.model_dump_json()


def test_an_unknown_placeholder_names_file_and_field(house: House) -> None:
    (house.folder / "spec.yaml").write_text(SPEC.replace("${data}/flights", "${dta}/flights"))
    with pytest.raises(
        SpecError, match=r"spec\.yaml: sources\.flights\.uri: \$\{dta\} is unknown\n.*did you mean 'data'"
    ):
        house.planner().plan(house.request("ingest"))


def test_a_knowledge_base_is_no_model(house: House) -> None:
    (house.folder / "spec.yaml").write_text(
        "version: 1\nkind: knowledge_base\nowner: ops\nsources: {documents: {uri: x}}\n"
    )
    with pytest.raises(SpecError, match="this is a knowledge_base, not a model"):
        Planner("delays")


def test_planning_a_verb_of_every_kind_has_its_params() -> None:
    assert {v.scope for v in VERBS.values()} == {"partition", "window"}
    for verb in VERBS.values():
        assert verb.hints <= set(verb.params.model_fields)
        assert not (verb.effect and verb.dataset)


def test_a_champion_whose_model_is_gone(house: House) -> None:
    landed(house, "2013-01")
    payload = {"version": "1", "model": "delays/train/gone/manifest.json"}
    Ledger(os.environ["ORRERY_LEDGER"]).record("delays", "promotion", "run-0", "done", "me", payload)
    with pytest.raises(UserError, match="the model of champion version 1 .delays/train/gone/manifest.json. is gone"):
        house.planner().plan(house.request("score"))

"""What people write: every mistake is told with file, line, field, value, what is allowed and the nearest match."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from core_house import SPEC
from hypothesis import given, settings
from hypothesis import strategies as st

from orrery import checking, spec, yamlfile
from orrery.errors import SpecError
from orrery.spec import Checks, ModelSpec


def load(folder: Path, text: str) -> spec.Spec:
    (folder / "spec.yaml").write_text(text)
    return spec.load(folder)


def refused(folder: Path, old: str, new: str) -> str:
    """Return the message for SPEC with `old` replaced by `new`, without the folder."""
    assert old in SPEC
    with pytest.raises(SpecError) as e:
        load(folder, SPEC.replace(old, new, 1))
    return str(e.value).replace(f"{folder}/", "")


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(SPEC.splitlines(), 1) if text in line)


def test_a_password_in_a_uri_is_refused_and_not_repeated(tmp_path: Path) -> None:
    told = refused(tmp_path, "${data}/flights", "s3://key:hunter2@bucket")
    assert told.startswith(f"spec.yaml:{line_of('flights: {uri')}: sources.flights")
    assert "an Airflow `connection`" in told
    assert "hunter2" not in told


@pytest.mark.parametrize(
    ("old", "new", "line", "parts"),
    [
        ("owner: ops", "schedule: 99 6 * * *\nowner: ops", "owner", ["schedule: cron: minute '99' is not in 0 to 59"]),
        ("owner: ops", "schedule: 0 6 * *\nowner: ops", "owner", ["schedule: a cron has five fields", "not 4"]),
        ("owner: ops", "schedule: 0 6 */0 * *\nowner: ops", "owner", ["day of the month '*/0'"]),
        ("owner: ops", "schedule: 0 6 * foo *\nowner: ops", "owner", ["month 'foo'"]),
        ("owner: ops", "ownr: ops", "owner", ["ownr: no such field", "did you mean 'owner'?", "schedule"]),
        ("task: binary", "task: binry", "task", ["task: 'binry' is not allowed", "did you mean 'binary'?", "regression"]),
        ("version: 1", "version: 2", "version", ["version: ", "2"]),
        ("column: late", "colum: late", "label", ["label.colum: no such field", "did you mean 'column'?"]),
        ("column: late", "column: Late!", "label", ["label.column", "'Late!'"]),
        ("distance: {between: [0, 6000]}", "distance: {betwen: [0, 6]}", "distance",
         ["checks.distance.betwen: no such field", "did you mean 'between'?", "nulls"]),
        ("distance: {between: [0, 6000]}", "distance: {between: [9, 6]}", "distance",
         ["checks.distance.between", "low 9.0 is above high 6.0"]),
        ("distance: {between: [0, 6000]}", "min_row: 3", "distance",
         ["checks.min_row: unknown check 'min_row'", "did you mean 'min_rows'?", "or a column"]),
        ("distance: {between: [0, 6000]}", "distance: {matches: '['}", "distance", ["not a regular expression"]),
        ("distance: {between: [0, 6000]}", "columns: 3", "checks", ["`columns` is a mapping"]),
        ("temp: {nulls: 0.1}", "temp: {nulls: 1.5}", "temp", ["checks.weather.temp.nulls", "1.5"]),
        ("temp: {nulls: 0.1}", "temp: {nuls: 0.1}", "temp", ["checks.weather.temp.nuls", "did you mean 'nulls'?"]),
        ("auc: {min: 0.7}", "auk: {min: 0.7}", "auc", ["gate.auk: unknown metric 'auk'", "did you mean 'auc'?", "rmse"]),
        ("auc: {min: 0.7}", "auc: {mim: 0.7}", "auc", ["gate.auc.mim: no such field", "did you mean 'min'?"]),
        ("auc: {min: 0.7}", "auc: {}", "auc", ["gate.auc: give `min`, `max` or both"]),
        ("auc: {min: 0.7}", "auc: {min: .nan}", "auc", ["gate.auc.min", "'.nan'"]),
        ("auc: {min: 0.7}", "auc: {min: nan}", "auc", ["gate.auc.min", "finite", "'nan'"]),
        ("max: 0.1}\nretrain", "max: -1}\nretrain", "disparity", ["gate.disparity.max", "-1"]),
        ("on: [drift]", "on: [drift, quaterly]", "retrain", ["retrain.on.1", "'quaterly'", "did you mean 'quarterly'?"]),
        ("on: [drift]", "onn: [drift]", "retrain", ["retrain.onn", "did you mean 'on'?"]),
        ("partition: month}\n  weather", "partition: week}\n  weather", "flights:", ["'week'", "month"]),
        ("partition: month}\n  weather", "partition: day}\n  weather", "sources:", ["share one partition size", "day"]),
        ("flights/{partition}", "flights/{part}", "flights:", ["unknown placeholder ['part']", "{partition}"]),
        ("flights/{partition}", "flights/all", "flights:", ["needs {partition} in its uri"]),
        ("owner: ops\n", "", "version", ["owner: is missing and must be given"]),
        ("kind: model", "kind: modell", "kind", ["kind is 'modell'", "did you mean 'model'?"]),
        ("kind: model", "kind: [model]", "kind", ["kind is ['model']"]),
        ("retrain: {on: [drift]}", "retrain: {on: [drift]}\ntrain: {window: three}", "retrain",
         ["train.window", "'three'"]),
        ("auc: {min: 0.7}", "auc: 0.7", "auc", ["gate.auc: should be `key: value` lines (found 0.7)"]),
        ("column: late", "column: [late]", "label", ["label.column: should be text, not a list"]),
        ("on: [drift]", "on: {drift: 1}", "retrain", ["retrain.on: should be a list, such as [a, b], not a mapping"]),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(tmp_path: Path, old: str, new: str, line: str, parts: list[str]) -> None:
    message = refused(tmp_path, old, new)
    at = line_of(line) + (1 if "window: three" in new else 0)
    assert any(told.startswith(f"spec.yaml:{at}: ") for told in message.splitlines()), message
    for part in parts:
        assert part in message
    assert "pydantic" not in message


def test_every_problem_has_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC.replace("owner: ops", "ownr: ops").replace("task: binary", "task: 3"))
    with pytest.raises(SpecError) as e:
        spec.load(tmp_path)
    lines = str(e.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{tmp_path}/spec.yaml:") for line in lines)


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    assert len(refused(tmp_path, "task: binary", f"task: {'x' * 9000}")) < 10_000
    assert len(refused(tmp_path, "column: late", f"column: {'X' * 9000}")) < 400


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["expected `key: value` lines, found nothing"]),
        ("- a\n", ["expected `key: value` lines, found a list"]),
        ("a: 1\nb: [\n", [":3: not YAML"]),
        ("a: 1\nb: {c: 1}\na: 2\n", [":3: 'a' is given twice"]),
        ("a: {b: 1, c: 2, b: 3}\n", [":1: 'b' is given twice"]),
        ("a: !!python/object/apply:os.system [id]\n", [":1: not YAML: could not determine a constructor"]),
        ("a: &x [*x]\n", [":1: a YAML anchor contains itself"]),
        ("a: &x {b: *x}\n", [":1: a YAML anchor contains itself"]),
        ("- " * 300_000, [":1: nested too deeply"]),
        ("[" * 100_000, [":1: nested too deeply"]),
        ("a: " + "x" * (1 << 20), ["at most 1,048,576 are allowed"]),
        ("a: *nowhere\n", [":1: not YAML"]),
        ("a: 1\n---\nb: 2\n", ["not YAML"]),
        ("? [a, b]\n: 1\n", ["not YAML"]),
        ("a: \x00\n", ["not YAML"]),
    ],
)
def test_what_is_not_plain_yaml_is_refused(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as e:
        yamlfile.read(file)
    for part in parts:
        assert part in str(e.value)


def test_anchors_that_multiply_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "f.yaml").write_text("\n".join(lines))
    with pytest.raises(SpecError, match="100,000 fields"):
        yamlfile.read(tmp_path / "f.yaml")


def test_not_utf8_not_there_not_a_file(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    with pytest.raises(SpecError, match="there is no such file"):
        yamlfile.read(file)
    file.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(SpecError, match="not UTF-8"):
        yamlfile.read(file)
    with pytest.raises(SpecError, match="cannot be read"):
        yamlfile.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("NO", "NO"), ("y", "y"), ("TRUE", "TRUE"),
        ("true", True), ("False", False), ("2013-01-01", "2013-01-01"), ("2013-01-01T10:00:00Z", "2013-01-01T10:00:00Z"),
        ("2013-03", "2013-03"), ("12:30", "12:30"), ("1:2:3", "1:2:3"), ("007", "007"), ("0x1f", "0x1f"), ("1_000", "1_000"),
        ("0", 0), ("-12", -12), ("+3", 3), ("1.5", 1.5), (".5", 0.5), ("1.", 1.0), ("1e-3", 0.001), ("2E6", 2e6),
        (".nan", ".nan"), (".inf", ".inf"), (".", "."), ("-", None), ("~", None), ("null", None), ("e5", "e5"),
    ],
)  # fmt: skip
def test_scalars_are_what_they_look_like(tmp_path: Path, text: str, value: object) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(f"on: {text}\n" if text != "-" else "on:\n")
    data, lines = yamlfile.read(file)
    assert list(data) == ["on"]
    assert data["on"] == value
    assert type(data["on"]) is type(value)
    assert lines[("on",)] == 1


def test_merge_keys_may_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\n")
    data, lines = yamlfile.read(tmp_path / "f.yaml")
    assert data["b"] == {"x": 3, "y": 2}
    assert lines[("b", "x")] == 4


def test_short_forms_of_checks() -> None:
    checks = Checks.model_validate({"unique": "id", "distance": {"between": [0, None]}, "carrier": None})
    assert checks.unique == ("id",)
    assert checks.columns["distance"].between == (0, None)
    assert set(checks.columns) == {"distance", "carrier"}
    same = Checks.model_validate({"unique": ["id"], "columns": {"distance": {"between": [0, None]}, "carrier": {}}})
    assert same == checks
    assert Checks.model_validate({"a": {"in": ["x", 1]}}).columns["a"].values == ("x", 1)


def test_checks_belong_to_their_source(tmp_path: Path) -> None:
    loaded = load(tmp_path, SPEC)
    assert isinstance(loaded, ModelSpec)
    assert set(loaded.checks_of("flights").columns) == {"distance"}
    assert set(loaded.checks_of("weather").columns) == {"temp"}
    assert loaded.checks_of("flights").unique == ("id",)
    assert (loaded.grain, loaded.rows_source) == ("month", "flights")
    assert set(loaded.bounds) == {"auc"}
    assert loaded.disparity is not None and loaded.disparity.by == "carrier"
    assert loaded.retrain.on == ("drift",)


@pytest.mark.parametrize(
    "source",
    [
        "{table: orders, connection: shop}",
        "{table: orders, time_column: t}",
        '{uri: "x/{partition}", table: orders, connection: c, time_column: t}',
        '{table: "orders; drop table orders", connection: c, time_column: t}',
        '{table: "a.b.c", connection: c, time_column: t}',
        '{table: orders, connection: c, time_column: "t) --"}',
        "{}",
    ],
)
def test_a_table_needs_connection_and_time_column_and_plain_names(tmp_path: Path, source: str) -> None:
    with pytest.raises(SpecError, match="sources.flights"):
        load(tmp_path, SPEC.replace('{uri: "${data}/flights/{partition}.parquet", partition: month}', source))


def test_nothing_declared_can_be_changed(tmp_path: Path) -> None:
    loaded = load(tmp_path, SPEC)
    with pytest.raises(ValueError, match="frozen"):
        loaded.owner = "me"  # type: ignore[misc]


def test_the_json_schema_for_editors() -> None:
    schema = checking.json_schema()
    assert {d for d in schema["$defs"] if d.endswith("Spec")} == {"ModelSpec", "KnowledgeBaseSpec"}
    assert schema["$defs"]["ModelSpec"]["additionalProperties"] is False
    assert "retrain" in schema["$defs"]["ModelSpec"]["properties"]


def test_an_editor_accepts_what_we_accept_and_marks_typos() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    root, schema = Path(__file__).resolve().parents[2], checking.json_schema()
    specs = [*root.glob("include/projects/*/spec.yaml"), *root.glob("tests/projects/*/spec.yaml")]
    assert len(specs) >= 2
    for file in specs:
        document, _ = yamlfile.read(file)
        jsonschema.validate(document, schema)
        for wrong in ({"gate": {"auk": {"min": 0.5}}}, {"checks": {"distance": {"betwen": [0, 1]}}}, {"gates": {}}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({**document, **wrong}, schema)


@settings(max_examples=60, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
), st.sampled_from(["checks", "gate", "sources", "train", "label", "retrain", "features", "task", "kind", "split"]))  # fmt: skip
def test_no_value_of_a_field_makes_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, value: object, field: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    document = {**yaml.load(SPEC, yamlfile.Loader), field: value}
    (folder / "spec.yaml").write_text(yaml.safe_dump(document, allow_unicode=True))
    try:
        loaded = spec.load(folder)
    except SpecError as e:
        assert str(e).startswith(str(folder))
    else:
        assert isinstance(loaded, ModelSpec)
        assert all(math.isfinite(b.min or 0) for b in loaded.bounds.values())


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("15m", 900), ("2h", 7200), ("7d", 604800)])
def test_durations(text: str, value: int) -> None:
    assert spec.seconds(text) == value


def test_a_window_cannot_be_longer_than_the_longest(tmp_path: Path) -> None:
    from pydantic import ValidationError

    from orrery.spec import Train

    assert Train(window=3, longest=3).longest == 3
    with pytest.raises(ValidationError, match="`longest` 2 is below `window` 3"):
        Train(window=3, longest=2)

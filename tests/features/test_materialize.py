from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from features_house import FEATURES, Project, flights, labelled, weather

from orrery.errors import DataError, SpecError
from orrery.training.schema import infer

ROWS = labelled(flights(("JFK", 10.5), ("LGA", 9.5), ("JFK", 9.5), ("JFK", 0.5)))
REPORTS = weather(("JFK", 8, 9, 8.0), ("JFK", 9, 10, 9.0), ("LGA", 9, 9, 90.0))
BEFORE = weather(("JFK", -1, 0, 5.0), ("JFK", -2, -1, 4.0))


def test_a_partition_becomes_its_features_table(project: Project) -> None:
    february = project.clean("2013-02", flights=ROWS.slice(0, 0), weather=BEFORE)
    result = project.materialize(project.clean("2013-03", flights=ROWS, weather=REPORTS), february)
    found = project.table(result)
    assert found.column_names == [
        "key", "prediction_time", "label", "label_time", "origin", "weather__wind", "double_wind",
    ]  # fmt: skip
    assert found.select(["key", "label", "weather__wind", "double_wind"]).to_pydict() == {
        "key": ["f3", "f1", "f2", "f0"],
        "label": [1.0, 1.0, 0.0, 0.0],
        "weather__wind": [5.0, 90.0, 8.0, 9.0],
        "double_wind": [10.0, 180.0, 16.0, 18.0],
    }
    assert project.schema(result) == {"origin": "categorical", "weather__wind": "numeric", "double_wind": "numeric"}
    assert result.metrics == {"rows": 4.0, "features": 3.0, "labelled": 4.0}
    assert result.facts["known"] == {"weather": 1.0}


def test_twice_the_same_gives_the_same_bytes(project: Project) -> None:
    many = labelled(flights(*[("JFK" if i % 3 else "LGA", (i * 7 % 500) / 20) for i in range(2000)]))
    reports = weather(*[("JFK" if i % 2 else "LGA", i / 20, i / 20 + 0.5, float(i)) for i in range(1000)])
    shuffled = reports.take(pa.array([(i * 37) % 1000 for i in range(1000)]))
    results = [
        project.materialize(project.clean(key, flights=rows, weather=table))
        for key, rows, table in (("2013-03", many, reports), ("2013-04", many, reports), ("2013-05", many, shuffled))
    ]
    assert len({r.digest for r in results}) == 1


def test_without_a_view_feast_is_not_imported(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from features_house import FEATURES, Project, flights, labelled, weather
project = Project(Path({str(tmp_path)!r}))
project.features = FEATURES.split("@view")[0]
result = project.materialize(project.clean("2013-03", flights=labelled(flights(("JFK", 1))), weather=weather()))
assert project.schema(result) == {{"origin": "categorical"}}
print(*sorted({{m.split(".")[0] for m in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not {"feast", "ibis", "duckdb", "torch"} & set(done.stdout.splitlines()[-1].split())


def test_a_sample_has_whole_rows_of_the_same_keys(project: Project) -> None:
    rows = labelled(flights(*[("JFK", i / 100) for i in range(1000)]))
    clean = project.clean("2013-03", flights=rows, weather=REPORTS)
    small, again, whole = (project.table(project.materialize(clean, sample=s)) for s in (0.1, 0.1, 1.0))
    assert 50 < small.num_rows < 150
    assert small.equals(again)
    assert set(map(str, small.to_pylist())) < set(map(str, whole.to_pylist()))


def test_a_sample_that_leaves_nothing_says_so(project: Project) -> None:
    with pytest.raises(DataError, match=r"no rows are left of 4\n.*larger sample"):
        project.materialize(project.clean("2013-03", flights=ROWS, weather=REPORTS), sample=1e-6)


def test_a_source_without_partitions_is_not_read_twice(project: Project) -> None:
    project.spec = project.spec.replace('{partition}.parquet"}\n  weather', '{partition}.parquet"}\n  weather').replace(
        'weather/{partition}.parquet"}', 'weather.parquet", partition: none}'
    )
    project.features = FEATURES.replace(
        "def weather(raw):\n    return raw",
        "def weather(raw):\n    return raw.append_column('rows', pa.array([raw.num_rows] * raw.num_rows))",
    )
    february = project.clean("2013-02", flights=ROWS, weather=REPORTS)
    result = project.materialize(project.clean("2013-03", flights=ROWS, weather=REPORTS), february)
    assert set(project.table(result)["weather__rows"].to_pylist()) == {3, None}


def test_a_view_that_knows_nothing_is_pointed_out(project: Project) -> None:
    elsewhere = weather(("SFO", 9, 9, 1.0))
    result = project.materialize(project.clean("2013-03", flights=ROWS, weather=elsewhere))
    assert result.facts["known"] == {"weather": 0.0}
    assert result.reasons == ["view weather knew nothing for any row: see its `on` values, its ttl and its history"]


def test_partitions_whose_types_differ_are_refused(project: Project) -> None:
    february = project.clean("2013-02", flights=ROWS, weather=BEFORE.set_column(0, "origin", pa.array([1, 2])))
    with pytest.raises(DataError, match="source weather: its columns' types differ between 2013-02, 2013-03"):
        project.materialize(project.clean("2013-03", flights=ROWS, weather=REPORTS), february)


def test_a_label_known_too_early_ends_the_step_with_64(project: Project) -> None:
    leaking = ROWS.set_column(ROWS.schema.get_field_index("label_time"), "label_time", ROWS["prediction_time"])
    assert project.materialize(project.clean("2013-03", flights=leaking, weather=REPORTS)).metrics["rows"] == 4
    project.features = FEATURES.replace(
        "def flights(raw):\n    return raw",
        "def flights(raw):\n    early = pc.subtract(raw['prediction_time'], pa.scalar(1, pa.duration('us')))\n"
        "    return raw.set_column(raw.schema.get_field_index('label_time'), 'label_time', early)",
    )
    with pytest.raises(DataError, match="4 rows know their label before prediction_time") as error:
        project.materialize(project.clean("2013-04", flights=ROWS, weather=REPORTS))
    assert error.value.exit_code == 64


def test_text_that_a_partition_has_none_of_is_text_in_the_window(project: Project) -> None:
    """Rows and view have a text column that is empty in one partition, and so without a type there."""
    tables = []
    for key, texts, sky in (("2013-03", pa.nulls(4), pa.nulls(3)), ("2013-04", ["a", None, "b", "a"], ["x", "y", "z"])):
        clean = project.clean(
            key, flights=ROWS.append_column("text", [texts]), weather=REPORTS.append_column("sky", [sky])
        )
        result = project.materialize(clean)
        tables.append(project.table(result))
    assert project.schema(result)["text"] == project.schema(result)["weather__sky"] == "categorical"
    assert [t.schema.field("text").type for t in tables] == [pa.null(), pa.string()]
    for order in (tables, tables[::-1]):
        window = pa.concat_tables(order, promote_options="permissive")
        schema = infer(window, "binary")
        assert {"text", "weather__sky"} <= set(schema.vocabularies)
    assert schema.feed(tables[0])["categorical"][:, list(schema.vocabularies).index("text")].tolist() == [0] * 4


def test_a_join_on_a_column_without_any_value_finds_nothing(project: Project) -> None:
    nowhere = ROWS.set_column(ROWS.schema.get_field_index("origin"), "origin", pa.nulls(4))
    result = project.materialize(project.clean("2013-03", flights=nowhere, weather=REPORTS))
    assert project.table(result)["weather__wind"].null_count == 4


def test_a_project_without_rows_is_refused(project: Project) -> None:
    project.features = FEATURES.replace("@rows\n", "")
    with pytest.raises(SpecError, match="no function is marked with @rows"):
        project.materialize(project.clean("2013-03", flights=ROWS, weather=REPORTS))

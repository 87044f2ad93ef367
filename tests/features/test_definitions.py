from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from features_house import SPEC, definitions

from orrery.errors import SpecError
from orrery.features.inspection import inspect_features

HEAD = "from orrery.features import derive, rows, view\n"
ROWS = "@rows\ndef flights(raw):\n    return raw\n"
VIEW = "@view(on=['origin'], ttl='2h')\ndef weather(raw):\n    return raw\n"


def test_all_that_is_declared_is_collected_in_the_order_of_the_file(tmp_path: Path) -> None:
    more = "@view(on=('origin', 'dest'), ttl='3d', source='flights')\ndef delays(raw):\n    return raw\n"
    derives = "@derive\ndef b(rows):\n    return rows\n@derive\ndef a(rows):\n    return rows\n"
    found = definitions(HEAD + ROWS + VIEW + more + derives, tmp_path)
    assert found.rows.source == "flights"
    assert [(v.name, v.on, v.ttl, v.source) for v in found.views] == [
        ("weather", ("origin",), "2h", "weather"),
        ("delays", ("origin", "dest"), "3d", "flights"),
    ]
    assert found.views[1].ttl_us == 3 * 86_400_000_000
    assert [d.name for d in found.derives] == ["b", "a"]


def test_a_decorated_function_stays_what_it_was(tmp_path: Path) -> None:
    found = definitions(HEAD + ROWS, tmp_path)
    assert found.rows.function("anything") == "anything"  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"features\.py: no function is marked with @rows"),
        (
            ROWS + "@rows\ndef weather(raw):\n    return raw\n",
            r"2 are marked with @rows: flights .*py:2.* weather .*py:5",
        ),
        ("@rows\ndef flihgts(raw):\n    return raw\n", r"features\.py:2: @rows flihgts.*\n.*did you mean 'flights'"),
        ("@rows\ndef weather(raw):\n    return raw\n", r"first source of spec\.yaml, flights"),
        (
            ROWS + "@view(on=['o'], ttl='2h')\ndef wether(raw):\n    return raw\n",
            r"'wether'.*\n.*did you mean 'weather'",
        ),
        (
            ROWS + VIEW.replace("ttl='2h'", "ttl='2 hours'"),
            r"py:5: @view weather: ttl '2 hours' is not a duration\n.*\"2h\"",
        ),
        (ROWS + VIEW.replace(", ttl='2h'", ""), r"@view weather: ttl is missing"),
        (ROWS + VIEW.replace("on=['origin'], ", ""), r"@view weather: on is missing"),
        (ROWS + "@view\ndef weather(raw):\n    return raw\n", r"@view weather: ttl is missing"),
        (ROWS + VIEW.replace("['origin']", "'origin'"), r"on='origin' is not a list"),
        (ROWS + VIEW.replace("['origin']", "[]"), r"on=\[\] is not a list"),
        (ROWS + VIEW.replace("['origin']", "['a', 'a']"), r"a column is named twice"),
        (ROWS + VIEW.replace("['origin']", "['label']"), r"'label' cannot be joined on"),
        (
            ROWS + VIEW.replace("ttl='2h'", "ttl='2h', source='flights'").replace("weather", "Wind"),
            r"lower case letters",
        ),
        (ROWS + "@derive\ndef calendar(rows, clock):\n    return rows\n", r"@derive calendar takes 2 arguments"),
        (ROWS + "@derive\ndef calendar():\n    return 1\n", r"@derive calendar takes 0 arguments"),
        (ROWS + "@derive\nclass calendar:\n    pass\n", r"@derive calendar is a type, not a function"),
        (ROWS + VIEW + "again = weather\n", r"@view weather is also called again"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        definitions(HEAD + text, tmp_path)
    assert re.search(message, str(error.value)), str(error.value)


def test_inspecting_needs_no_data(tmp_path: Path) -> None:
    (tmp_path / "features.py").write_text(HEAD + ROWS + VIEW + "@derive\ndef a(rows):\n    return rows\n")
    (tmp_path / "spec.yaml").write_text(SPEC)
    assert inspect_features(tmp_path, "tiny") == {
        "rows": "flights",
        "views": [{"name": "weather", "on": ["origin"], "ttl": "2h", "source": "weather"}],
        "derives": ["a"],
    }


def test_the_decorators_import_nothing_heavy() -> None:
    code = "import sys, orrery.features.inspection; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pyarrow", "pandas", "numpy", "feast"} & set(loaded)

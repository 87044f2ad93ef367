"""What `orrery new` writes as a source's ending is what ingest reads."""

from orrery import scaffold
from orrery.data import files


def test_the_endings_are_the_same_and_the_longest_comes_first() -> None:
    assert set(scaffold.ENDINGS) == set(files.ENDINGS)
    for i, ending in enumerate(scaffold.ENDINGS):
        assert not any(longer.endswith(ending) for longer in scaffold.ENDINGS[i + 1 :])

"""How a generation is asked: as its evaluation did, or as the spec says; and what is said where that is not so."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
from serving_house import PROJECT, SPEC

from orrery.errors import UserError
from orrery.rag.abstention import CALIBRATION, LEXICON, Calibration, plain, write_lexicon
from orrery.rag.retrieval import Found
from orrery.rag.spec import KnowledgeBaseSpec
from orrery.serving.opening import NO_EFFECT, NO_RERANKER, RagOpener
from orrery.store import File, Manifest, Store, content_digest

# Sure of whatever is there, below the threshold all the same.
UNSURE = Calibration((), (), (), (), bias=0.0, threshold=0.9).to_json().encode()
FOUND = [Found("1", 0.03, "The dome closes.", "Dome", "dome.md", (), None, "1", "guides", 0.6, 2.0, 1, 1)]


def evaluation(store: Store, facts: dict[str, Any], calibration: bytes = UNSURE) -> str:
    """Put an evaluation, and return its manifest's path."""
    with tempfile.TemporaryDirectory() as folder:
        write_lexicon(Path(folder) / LEXICON, plain())
        held = {CALIBRATION: calibration, LEXICON: (Path(folder) / LEXICON).read_bytes()}
    files = {
        name: File(path=f"1/{name}", size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in held.items()
    }
    manifest = Manifest(
        project=PROJECT,
        verb="evaluate",
        key="2026-01-05",
        address=hashlib.sha256(repr((facts, calibration)).encode()).hexdigest()[:32],
        digest=content_digest(files),
        files=files,
        facts=facts,
    )
    for name, data in held.items():
        store.put(manifest.uri(name), data)
    store.put(manifest.path, manifest.model_dump_json().encode())
    return manifest.path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path / 'store'}")


def opener(**spec: Any) -> RagOpener:
    return RagOpener(KnowledgeBaseSpec.model_validate({**SPEC, **spec}), None, 1)


def test_settings_are_those_that_were_evaluated(store: Store, tmp_path: Path) -> None:
    it = opener(retrieval={"top_k": 9, "mmr": 0.5})
    evaluated = {"top_k": 3, "candidates": 20, "mmr": None, "reranker": None}
    asking = it.asking(store, evaluation(store, {"retrieval": evaluated}), tmp_path)
    assert asking.retrieval.model_dump(mode="json") == evaluated
    assert asking.abstainer is not None
    assert asking.abstainer.abstains("Does it close?", FOUND)
    assert asking.problems == ()
    # One that does not tell, or tells more than this version knows, and none at all: the spec's.
    for facts in ({}, {"retrieval": {"top_k": 3, "new": 1}}):
        assert it.asking(store, evaluation(store, facts), tmp_path).retrieval.top_k == 9
    alone = it.asking(store, None, tmp_path)
    assert (alone.retrieval.top_k, alone.abstainer) == (9, None)


def test_without_the_evaluated_reranker_its_calibration_is_dropped(store: Store, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    made = evaluation(store, {"retrieval": {"top_k": 3, "reranker": gone}})
    asking = opener().asking(store, made, tmp_path)
    assert (asking.retrieval.top_k, asking.reranker, asking.abstainer) == (6, None, None)
    assert asking.problems == (NO_RERANKER,)
    # Where the spec has it, too, there is nothing to go back to: the generation is refused, the one before answers.
    with pytest.raises(UserError, match="reranker"):
        opener(retrieval={"reranker": gone}).asking(store, made, tmp_path)


def test_a_threshold_without_a_calibration_is_told(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    it = opener(answers={"abstain": 0.2})
    for path in (None, evaluation(store, {}, b"null\n")):
        assert it.asking(store, path, tmp_path).problems == (NO_EFFECT,)
        assert capsys.readouterr().out.count("answers.abstain") == 1
    fitted = it.asking(store, evaluation(store, {}), tmp_path)
    assert fitted.problems == ()
    assert fitted.abstainer is not None
    assert not fitted.abstainer.abstains("Does it close?", FOUND)  # 0.5 is not below 0.2
    assert opener().asking(store, None, tmp_path).problems == ()

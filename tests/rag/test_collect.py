"""`collect`: what became of each document since the last time, and what is refused before anything is committed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import rag_house
from rag_house import DAY, PROJECT, House
from small_web import pdf

from orrery import fingerprint
from orrery.contract import Result
from orrery.errors import UserError
from orrery.rag import reading
from orrery.rag.collect import document_id
from orrery.rag.reading.pool import Pool

NEXT = "2026-01-06"
# Most tests lose documents on purpose.
LOOSE: dict[str, Any] = {
    "guides": {"uri": "documents/guides", "missing": 0.5},
    "team": {"uri": "documents/team", "groups": ["team"], "missing": 0.5},
}
PAGES = {f"guides/{name}.md": f"# {name.upper()}\n\nAll about {name}.\n" for name in "abcd"}
TEAM = {"team/secret.txt": "For the team alone."}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr("orrery.rag.collect.READERS_AT_ONCE", 1)  # each takes a while to start
    return rag_house.make(tmp_path, monkeypatch, {**PAGES, **TEAM}, sources=LOOSE)


def documents(house: House, key: str = DAY) -> dict[str, dict[str, Any]]:
    """Return the collected documents by uri."""
    lines = house.read("documents", "documents.jsonl", key).decode().splitlines()
    return {told["uri"]: told for told in map(json.loads, lines)}


def outcomes(house: House, key: str = DAY) -> dict[str, tuple[str, str | None]]:
    """Return what became of each document, and why, as it was committed."""
    lines = house.read("documents", "outcomes.jsonl", key).decode().splitlines()
    return {told["uri"]: (told["outcome"], told["why"]) for told in map(json.loads, lines)}


def today_of(house: House, key: str, run: str = "run-1") -> dict[str, tuple[str, str | None]]:
    """Return what became of each document in a run, also when it committed nothing."""
    path = f"{PROJECT}/runs/{run}/collect-{key}/1/evidence/outcomes.jsonl"
    told = map(json.loads, house.store.read(path).decode().splitlines())
    return {one["uri"]: (one["outcome"], one["why"]) for one in told}


def counts(result: Result) -> Mapping[str, float]:
    """Return the metrics that are not zero, but bytes."""
    return {name: value for name, value in result.metrics.items() if value and name != "bytes"}


def collect(house: House, key: str = DAY, run: str = "run-1", **options: Any) -> Result:
    return house.run("collect", key, run=run, **options)


# -- what is written -------------------------------------------------------------------------------------


def test_documents_are_written_with_source_groups_and_digest(house: House) -> None:
    house.document("guides/paper.pdf", pdf("One", "Two", title="Paper"))
    result = collect(house)
    assert counts(result) == {"documents": 6, "new": 6}
    assert result.reasons == ["guides: 5 documents (5 new)", "team: 1 document (1 new)"]
    found = documents(house)
    paper = found["documents/guides/paper.pdf"]
    assert paper == {
        "id": document_id("guides", "documents/guides/paper.pdf"),
        "source": "guides",
        "uri": "documents/guides/paper.pdf",
        "title": "Paper",
        "mime": "application/pdf",
        "groups": ["everyone"],
        "digest": paper["digest"],
        "bytes": (house.folder / "documents/guides/paper.pdf").stat().st_size,
        "sections": [{"heading": [], "text": "One", "page": 1}, {"heading": [], "text": "Two", "page": 2}],
    }
    assert found["documents/team/secret.txt"]["groups"] == ["team"]
    assert outcomes(house)["documents/guides/a.md"] == ("new", None)
    lines = house.read("documents", "documents.jsonl").decode().splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    assert ids == sorted(ids)
    assert all(fingerprint.canonical(json.loads(line)) == line for line in lines)


def test_the_same_sources_are_the_same_output_on_another_day_and_machine(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = collect(house)
    again = collect(house, NEXT)
    assert again.output == first.output
    assert again.skipped == (
        "the same documents are committed already: guides: 4 documents (4 same); team: 1 document (1 same)"
    )
    assert outcomes(house, NEXT) == outcomes(house)
    other = rag_house.make(tmp_path / "other", monkeypatch, {**PAGES, **TEAM}, sources=LOOSE)
    assert collect(other).digest == first.digest


def test_outcomes_from_one_day_to_the_next(house: House) -> None:
    collect(house)
    house.document("guides/a.md", "# A\n\nSomething else.\n")
    house.document("guides/b.md", None)
    house.document("guides/e.md", "# E\n\nAdded.\n")
    result = collect(house, NEXT)
    assert counts(result) == {"documents": 5, "new": 1, "changed": 1, "same": 3, "gone": 1}
    assert outcomes(house, NEXT) == {
        "documents/guides/a.md": ("changed", None),
        "documents/guides/b.md": ("gone", None),
        "documents/guides/c.md": ("same", None),
        "documents/guides/d.md": ("same", None),
        "documents/guides/e.md": ("new", None),
        "documents/team/secret.txt": ("same", None),
    }
    assert "documents/guides/b.md" not in documents(house, NEXT)
    assert result.facts["sources"]["guides"]["gone"] == 1


# -- taken over, kept, moved, doubled -------------------------------------------------------------------------


def test_what_is_unchanged_is_taken_over_without_reading_it(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    collect(house)

    def never(*args: object) -> None:
        raise AssertionError("a document was read again")

    monkeypatch.setattr("orrery.rag.reading.pool.Pool.read", never)
    assert counts(collect(house, NEXT, run="run-2")) == {"documents": 5, "new": 5}  # of the commit that stands


def test_one_process_reads_all_sources(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    begin = Pool._begin
    monkeypatch.setattr(Pool, "_begin", lambda self: (started.append(1), begin(self))[1])
    house.document("guides/broken.pdf", b"%PDF-1.7 cut short")
    assert counts(collect(house)) == {"documents": 5, "new": 5, "failed": 1}
    assert len(started) == 1


def test_another_reader_reads_all_again_and_what_reads_the_same_is_the_same(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = collect(house)
    monkeypatch.setattr(reading, "fingerprint_of", lambda bounds: "another")
    second = collect(house, NEXT)
    assert counts(second) == {"documents": 5, "same": 5}
    assert second.output != first.output
    assert second.facts["reader"] == "another"
    assert house.read("documents", "documents.jsonl", NEXT) == house.read("documents", "documents.jsonl")
    assert collect(house, NEXT, run="run-2").skipped


def test_bytes_that_read_the_same_are_no_other_document(house: House) -> None:
    first = collect(house)
    house.document("guides/a.md", "# A\n\n\nAll  about a.\n\n<!-- visitor 17 -->\n")
    second = collect(house, NEXT)
    assert second.output == first.output
    assert today_of(house, NEXT)["documents/guides/a.md"] == ("same", "its bytes have changed, its text has not")


def test_a_document_that_fails_today_stays_as_it_was(house: House) -> None:
    house.document("guides/paper.pdf", pdf("One"))
    collect(house)
    before = documents(house)["documents/guides/paper.pdf"]
    house.document("guides/paper.pdf", b"%PDF-1.7 cut short")
    house.document("guides/new.pdf", b"%PDF-1.7 cut short")
    house.document("guides/e.md", "# E\n\nAdded.\n")
    result = collect(house, NEXT)
    assert counts(result) == {"documents": 7, "new": 1, "same": 5, "failed": 2}
    assert documents(house, NEXT)["documents/guides/paper.pdf"] == before
    assert "documents/guides/new.pdf" not in documents(house, NEXT)
    fate, why = outcomes(house, NEXT)["documents/guides/paper.pdf"]
    assert fate == "failed"
    assert str(why).startswith("it is a broken PDF") and str(why).endswith("; it is kept as it was")
    assert any("documents/guides/paper.pdf: it is a broken PDF" in reason for reason in result.reasons)


def test_a_document_that_is_kept_follows_todays_groups(house: House) -> None:
    house.document("team/paper.pdf", pdf("One"))
    collect(house)
    house.document("team/paper.pdf", b"%PDF-1.7 cut short")
    house.spec(sources={**LOOSE, "team": {"uri": "documents/team", "groups": ["board"], "missing": 0.5}})
    collect(house, NEXT)
    found = documents(house, NEXT)
    assert found["documents/team/paper.pdf"]["groups"] == ["board"]
    assert found["documents/team/secret.txt"]["groups"] == ["board"]
    assert outcomes(house, NEXT)["documents/team/secret.txt"] == (
        "changed",
        "who may read it has changed: team → board",
    )


def test_a_document_that_moved_is_not_missed(house: House) -> None:
    house.spec(sources={**LOOSE, "guides": {"uri": "documents/guides", "missing": 0}})
    collect(house)
    for name in "abcd":
        house.document(f"guides/{name}.md", None)
        house.document(f"guides/moved/{name}.md", PAGES[f"guides/{name}.md"])
    assert counts(collect(house, NEXT)) == {"documents": 5, "new": 4, "same": 1, "gone": 4}
    assert outcomes(house, NEXT)["documents/guides/a.md"] == ("gone", "it is documents/guides/moved/a.md now")


def test_the_same_text_is_kept_once_in_one_source_and_never_across_groups(house: House) -> None:
    house.document("guides/a2.md", PAGES["guides/a.md"] + "\n")
    house.document("team/a.md", PAGES["guides/a.md"])
    result = collect(house)
    assert counts(result) == {"documents": 6, "new": 6, "duplicate": 1}
    assert outcomes(house)["documents/guides/a2.md"] == ("duplicate", "its text is that of documents/guides/a.md")
    assert outcomes(house)["documents/team/a.md"] == ("new", None)
    house.document("guides/a.md", None)
    house.document("guides/e.md", "# E")
    assert counts(collect(house, NEXT)) == {"documents": 7, "new": 2, "same": 5, "gone": 1}
    assert outcomes(house, NEXT)["documents/guides/a2.md"] == ("new", None)


def test_documents_of_a_source_that_was_taken_out_are_gone(house: House) -> None:
    collect(house)
    house.spec(sources={"guides": LOOSE["guides"]})
    result = collect(house, NEXT)
    assert counts(result) == {"documents": 4, "same": 4, "gone": 1}
    assert outcomes(house, NEXT)["documents/team/secret.txt"] == ("gone", "its source is not in spec.yaml any more")


# -- what is refused ----------------------------------------------------------------------------------------


def manifests(house: House) -> list[str]:
    return [name for name in house.store.names(f"{PROJECT}/collect") if not name.startswith("at-")]


def test_more_missing_than_allowed_stops_the_run_and_commits_nothing(house: House) -> None:
    collect(house)
    before = manifests(house)
    for name in "abc":
        house.document(f"guides/{name}.md", None)
    with pytest.raises(UserError) as caught:
        collect(house, NEXT)
    assert caught.value.message == (
        "source guides: 3 of the 4 documents known before are lost (75%, `missing` allows 50%): "
        "documents/guides/a.md (gone), documents/guides/b.md (gone), documents/guides/c.md (gone). "
        "Nothing was changed."
    )
    assert "trigger notes.reindex with `partial` (`orrery run notes collect --partial`)" in caught.value.hint
    assert manifests(house) == before
    assert house.store.latest(PROJECT, "documents", NEXT) is None
    assert today_of(house, NEXT)["documents/guides/a.md"] == ("gone", None)
    # Somebody has looked at it.
    assert counts(collect(house, NEXT, run="run-2", partial=True)) == {"documents": 2, "same": 2, "gone": 3}


def test_exactly_the_allowed_share_may_be_missing_and_failures_count(house: House) -> None:
    house.document("guides/c.md", None)
    house.document("guides/d.md", None)
    house.document("guides/p.pdf", pdf("p"))
    house.document("guides/q.pdf", pdf("q"))
    collect(house)
    house.document("guides/a.md", None)
    house.document("guides/p.pdf", b"%PDF-1.7 cut")
    collect(house, NEXT)
    house.document("guides/b.md", b"\x89PNG\r\n\x1a\n not read any more")
    house.document("guides/q.pdf", b"%PDF-1.7 cut")
    with pytest.raises(
        UserError, match=r"3 of the 3 .*b\.md \(its content is a PNG image\), .*p\.pdf \(it is a broken PDF"
    ):
        collect(house, "2026-01-07")


def test_pages_that_turn_into_one_notice_are_lost_and_a_single_duplicate_is_not_missed(house: House) -> None:
    house.spec(sources={**LOOSE, "guides": {"uri": "documents/guides", "missing": 0.2}})
    for name in "efgh":
        house.document(f"guides/{name}.md", f"# {name}\n\nAll about {name}.\n")
    collect(house)
    before = manifests(house)
    for name in "abcdefgh":
        house.document(f"guides/{name}.md", "# Sorry\n\nDown for maintenance.\n")
    with pytest.raises(UserError, match=r"7 of the 8 .* are lost .*b\.md \(its text has become that of .*/a\.md\)"):
        collect(house, NEXT)
    assert manifests(house) == before
    for name in "abcdefgh":
        house.document(f"guides/{name}.md", f"# {name}\n\nAll about {name}, again.\n")
    house.document("guides/h.md", "# g\n\nAll about g, again.\n")
    assert counts(collect(house, NEXT, run="run-2")) == {"documents": 8, "changed": 7, "same": 1, "duplicate": 1}


def test_a_document_whose_text_another_took_over_is_not_lost(house: House) -> None:
    house.spec(sources={**LOOSE, "guides": {"uri": "documents/guides", "missing": 0}})
    collect(house)
    house.document("guides/_first.md", PAGES["guides/a.md"])
    assert counts(collect(house, NEXT)) == {"documents": 5, "new": 1, "same": 4, "duplicate": 1}


@pytest.mark.parametrize("missing", [0.5, 1.0])
def test_a_source_that_is_empty_is_refused(house: House, missing: float) -> None:
    house.spec(sources={**LOOSE, "team": {"uri": "documents/team", "groups": ["team"], "missing": missing}})
    collect(house)
    house.document("team/secret.txt", None)
    house.document("team/picture.png", b"\x89PNG")
    with pytest.raises(UserError, match="source team"):
        collect(house, NEXT)
    assert counts(collect(house, NEXT, run="run-2", partial=True)) == {
        "documents": 4, "same": 4, "gone": 1, "skipped": 1,
    }  # fmt: skip


def test_a_source_that_never_had_a_document_is_refused_and_says_what_lies_there(house: House) -> None:
    house.document("team/secret.txt", b"\x89PNG\r\n")
    with pytest.raises(UserError, match=r"source team has no documents: documents/team/secret\.txt \(its content is"):
        collect(house)
    for name in "abcd":
        house.document(f"guides/{name}.md", "")
    with pytest.raises(UserError, match="no source has a document"):
        collect(house, partial=True, run="run-2")


def test_a_folder_that_is_not_there_is_refused(house: House) -> None:
    house.spec(sources={"guides": {"uri": "documents/guide"}})
    with pytest.raises(UserError, match="source guides: documents/guide is not there, or empty"):
        collect(house)
    house.spec(sources={"guides": {"uri": "../../.."}})
    with pytest.raises(UserError, match="leads out of the project folder"):
        collect(house, run="run-2")


@pytest.mark.parametrize("uri", ["http://example.org/docs", "memory://docs", "zip://*::file:///tmp/x.zip", "ftp://x/y"])
def test_what_fsspec_would_reach_beside_folders_and_buckets_is_refused(house: House, uri: str) -> None:
    house.spec(sources={"guides": {"uri": uri}})
    with pytest.raises(UserError, match="documents are not read from"):
        collect(house)


def test_more_documents_than_allowed_stop_the_run(house: House) -> None:
    house.spec(limits={"documents": 3})
    with pytest.raises(UserError, match="source guides: 4 documents; limits.documents allows 3"):
        collect(house)


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest"])
def test_without_the_documents_of_before_nobody_can_tell_what_is_missing(house: House, damage: str) -> None:
    collect(house)
    manifest = house.manifest("documents")
    file = Path(house.store.full(manifest.uri("documents.jsonl")))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "gone":
        file.unlink()
    else:
        file = Path(house.store.full(manifest.path))
        file.write_bytes(file.read_bytes()[:-40])
    house.document("guides/e.md", "# E\n\nAdded.\n")
    with pytest.raises(UserError, match="damaged|gone|not a manifest"):
        collect(house, NEXT)
    assert counts(collect(house, NEXT, run="run-2", partial=True)) == {"documents": 6, "new": 6}


# -- limits and hostile files ------------------------------------------------------------------------------


def test_limits_leave_out_what_is_beyond_them_and_say_why(house: House) -> None:
    house.spec(limits={"megabytes": 0.01, "pages": 1, "characters": 2000})
    house.document("guides/large.txt", "x" * 10_001)
    house.document("guides/pages.pdf", pdf("One", "Two"))
    house.document("guides/long.md", "word " * 900)
    house.document("guides/data.bin", b"\0\1\2")
    house.document("guides/noise.txt", bytes(range(256)))
    house.document("guides/empty.md", "")
    result = collect(house)
    assert counts(result) == {"documents": 5, "new": 5, "skipped": 6}
    why = {uri.rsplit("/", 1)[-1]: why for uri, (fate, why) in outcomes(house).items() if fate == "skipped"}
    assert why == {
        "large.txt": "it has 10,001 bytes; at most 10,000 are read (limits.megabytes)",
        "pages.pdf": "it has 2 pages; at most 1 are read",
        "long.md": "it has more than 2,000 characters of text",
        "data.bin": "files of the type .bin are not read (Markdown, HTML, PDF and plain text are)",
        "noise.txt": "its content is binary",
        "empty.md": "it is empty",
    }


def test_a_file_of_two_gigabytes_is_not_opened(house: House, tmp_path: Path) -> None:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "small.txt").write_text("small")
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(2 << 30)
    house.spec(sources={"guides": {"uri": str(folder)}})
    assert counts(collect(house)) == {"documents": 1, "new": 1, "skipped": 1}
    assert "2,147,483,648 bytes" in str(outcomes(house)["outside/huge.txt"][1])


def test_links_out_of_the_folder_pipes_and_odd_names(house: House, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.txt").write_text("secret")
    (folder / "inner" / "a.txt").write_text("a")
    (folder / "b.txt").symlink_to("inner/../inner/b.txt")
    (folder / "inner" / "b.txt").write_text("b")
    (folder / "out.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "up.txt").symlink_to("../secret.txt")
    (folder / "passwd").symlink_to("/etc/passwd")
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere.txt").symlink_to("nothing.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("hidden")
    (folder / "line\nbreak.txt").write_text("c")
    Path(os.fsdecode(os.fsencode(folder) + b"/not-utf8-\xff.txt")).write_text("d")
    (folder / "ümlaut & space?.txt").write_text("e")
    house.spec(sources={"docs": {"uri": f"file://{folder}"}})
    collect(house)
    assert {uri: fate for uri, (fate, _) in outcomes(house).items()} == {
        "docs/b.txt": "new",
        "docs/inner/a.txt": "new",
        "docs/inner/b.txt": "duplicate",
        "docs/line%0Abreak.txt": "new",
        "docs/not-utf8-%FF.txt": "new",
        "docs/ümlaut & space?.txt": "new",
        **dict.fromkeys(("docs/out.txt", "docs/up.txt", "docs/passwd", "docs/folder", "docs/loop"), "skipped"),
        **dict.fromkeys(("docs/nowhere.txt", "docs/pipe.txt"), "skipped"),
    }
    assert b"secret" not in house.read("documents", "documents.jsonl")


def test_no_name_of_a_folder_but_a_hidden_one_leaves_documents_out(house: House) -> None:
    for name in ("tests/howto.md", "__pycache__/odd.md", ".git/hidden.md"):
        house.document(f"guides/{name}", f"# {name}")
    collect(house)
    found = {uri.removeprefix("documents/guides/") for uri in documents(house)}
    assert found > {"tests/howto.md", "__pycache__/odd.md"}
    assert ".git/hidden.md" not in found


def test_patterns_choose_files(house: House) -> None:
    house.document("guides/drafts/x.md", "# X\n\ndraft")
    house.document("guides/deep/er/y.md", "# Y\n\ndeep")
    house.document("guides/z.html", "<p>z")
    house.spec(sources={"guides": {"uri": "documents/guides", "include": ["**/*.md"], "exclude": ["drafts/", "a*"]}})
    collect(house)
    assert sorted(uri.removeprefix("documents/guides/") for uri in documents(house)) == [
        "b.md", "c.md", "d.md", "deep/er/y.md",
    ]  # fmt: skip


def test_a_source_may_be_one_file(house: House) -> None:
    house.spec(sources={"page": {"uri": "documents/guides/a.md"}})
    collect(house)
    assert list(documents(house)) == ["documents/guides/a.md"]


def test_an_export_of_notion_loses_its_ids_in_titles_only(house: House, tmp_path: Path) -> None:
    folder = tmp_path / "Export"
    page = "Runbook 0123456789abcdef0123456789abcdef"
    (folder / page).mkdir(parents=True)
    (folder / f"{page}.md").write_text("# Runbook for Monday\n\nCall somebody.")
    (folder / page / "Sub page fedcba9876543210fedcba9876543210.md").write_text("Without a heading.")
    (folder / page / "Table 00112233445566778899aabbccddeeff.csv").write_text("Name,Who\nDisk,ops\n")
    house.spec(sources={"notion": {"notion": str(folder)}})
    collect(house)
    assert {uri.rsplit("/", 1)[-1]: told["title"] for uri, told in documents(house).items()} == {
        f"{page}.md": "Runbook for Monday",
        "Sub page fedcba9876543210fedcba9876543210.md": "Sub page",
        "Table 00112233445566778899aabbccddeeff.csv": "Table",
    }
    assert f"Export/{page}.md" in documents(house)


def test_a_bucket_is_a_source(house: House, s3_bucket: str) -> None:
    import fsspec

    fs, root = fsspec.core.url_to_fs(s3_bucket)
    for name, data in {
        "docs/a.md": b"# A\n\nIn a bucket.",
        "docs/../up.md": b"# Up\n\nOdd.",
        "docs/empty.txt": b"",
        "docs/large.txt": b"x" * 20_000,
        "docs/x.png": b"\x89PNG",
        "docs/.hidden/x.md": b"hidden",
        "other/b.md": b"not asked for",
    }.items():
        fs.pipe_file(f"{root}/{name}", data)
    house.spec(sources={"docs": {"uri": f"{s3_bucket}/docs"}}, limits={"megabytes": 0.01})
    collect(house)
    assert {uri.removeprefix(s3_bucket): fate for uri, (fate, _) in outcomes(house).items()} == {
        "/docs/a.md": "new",
        "/docs/empty.txt": "skipped",
        "/docs/large.txt": "skipped",
        "/docs/x.png": "skipped",
    }
    assert documents(house)[f"{s3_bucket}/docs/a.md"]["sections"][0]["text"] == "In a bucket."
    house.spec(sources={"docs": {"uri": f"{s3_bucket}/docs"}, "more": {"uri": f"{s3_bucket}/nothing"}})
    with pytest.raises(UserError, match="source more has no documents: nothing is there"):
        collect(house, NEXT)

"""Documents are read in processes that may be killed: none of them can hang, fill or end the run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from small_web import bomb

from orrery.rag.reading import HTML, MARKDOWN, PDF, TEXT, Bounds, Source, Unreadable
from orrery.rag.reading.pool import Pool

SLOW = Source(b"*a " * 300_000, MARKDOWN)  # minutes
QUICK = Source(b"quick", TEXT)


def pool(**more: Any) -> Pool:
    told: dict[str, Any] = {"seconds": 60.0, "memory": 2 << 30, "workers": 1}
    return Pool(Bounds(), **{**told, **more})


@pytest.fixture(scope="module")
def shared() -> Iterator[Pool]:
    with pool(workers=2) as running:
        yield running


def numbers(of: Pool) -> list[int]:
    """The processes of a pool."""
    return [worker._process.pid for worker in of._all]


def test_a_process_reads_one_document_after_another(shared: Pool) -> None:
    assert shared.read(QUICK).sections[0].text == "quick"
    before = numbers(shared)
    found = shared.read(Source("# Tïtle\n\n\U0001f680 ünï".encode(), MARKDOWN))
    assert (found.title, found.sections[0].heading, found.sections[0].text) == ("Tïtle", ("Tïtle",), "\U0001f680 ünï")
    with pytest.raises(Unreadable, match="broken PDF") as caught:
        shared.read(Source(b"%PDF-1.7 broken", PDF))
    assert not caught.value.skip
    with pytest.raises(Unreadable, match="no text") as caught:
        shared.read(Source(b"<p>", HTML))
    assert caught.value.skip
    assert numbers(shared) == before


def test_documents_are_read_beside_each_other_and_each_gets_its_own(shared: Pool) -> None:
    with ThreadPoolExecutor(6) as threads:
        texts = list(threads.map(lambda n: shared.read(Source(b"%d" % n, TEXT)).sections[0].text, range(200)))
    assert texts == [str(n) for n in range(200)]
    assert len(numbers(shared)) <= 2


def test_a_process_that_is_killed_costs_nothing(shared: Pool) -> None:
    shared.read(QUICK)
    for number in numbers(shared):
        os.kill(number, signal.SIGKILL)
    assert shared.read(QUICK).sections[0].text == "quick"
    assert shared.read(QUICK).sections[0].text == "quick"


def test_a_reader_sees_no_secret_and_follows_its_parent(shared: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-tell")
    monkeypatch.setenv("ORRERY_QDRANT_KEY", "do-not-tell")
    with pool() as fresh:
        fresh.read(QUICK)
        (number,) = numbers(fresh)
        assert b"do-not-tell" not in Path(f"/proc/{number}/environ").read_bytes()
        limits = Path(f"/proc/{number}/limits").read_text()
        assert next(row for row in limits.splitlines() if "address space" in row).split()[3] == str(2 << 30)
        assert next(row for row in limits.splitlines() if "file size" in row).split()[3] == "0"


def test_a_document_that_takes_too_long_is_given_up() -> None:
    with pool(seconds=2.0) as one:
        with pytest.raises(Unreadable, match="longer than 2 s") as caught:
            one.read(SLOW)
        assert not caught.value.skip
        assert one.read(QUICK).sections[0].text == "quick"


def test_a_document_that_takes_too_much_memory_is_given_up() -> None:
    with pool(memory=300 << 20) as one:
        one.read(QUICK)
        for source in (Source(b"<p>abc</p>" * 1_000_000, HTML), Source(bomb(200 << 20), PDF)):
            with pytest.raises(Unreadable):
                one.read(source)
        with pytest.raises(Unreadable, match="300 MiB of memory"):
            one.read(Source(b"<p>abc</p>" * 1_000_000, HTML))
        assert one.read(QUICK).sections[0].text == "quick"


def test_closing_ends_what_is_being_read() -> None:
    one, said = pool(), list[str]()
    with one:
        one.read(QUICK)
        numbers_then = numbers(one)

        def read() -> None:
            try:
                one.read(SLOW)
            except Unreadable as e:
                said.append(e.why)

        thread = threading.Thread(target=read)
        thread.start()
    thread.join()
    assert len(said) == 1
    assert not any(Path(f"/proc/{number}").exists() for number in numbers_then)
    with pytest.raises(Unreadable, match="stopped"):
        one.read(QUICK)

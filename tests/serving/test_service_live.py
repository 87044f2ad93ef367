"""Generations that change while questions are asked: none fails, none mixes two, what is damaged is refused."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

from serving_house import PROJECT, House, Passage, serving, wait_for

QUESTION = "How does the engine run?"


def generation(n: int) -> list[Passage]:
    return [Passage(f"The engine does run in way {n}, part {part}.", uri=f"guides/{part}.md") for part in range(4)]


class Askers:
    """Ask without a pause from some threads, and keep every answer and every failure."""

    def __init__(self, house: House, count: int = 3) -> None:
        self.answers: list[dict] = []
        self.failures: list[str] = []
        self._house, self._stop = house, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(count)]

    def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                if number == 0:
                    self.answers.append(self._house.events(QUESTION)[-1][1])
                else:
                    self.answers.append(self._house.ask(QUESTION))
            except Exception as e:
                self.failures.append(repr(e))

    def __enter__(self) -> Askers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)


def test_ten_switches_under_questions_fail_none_and_mix_none() -> None:
    with serving(passages=generation(0), abstain_below=None) as house:
        house.opener.delay = 0.005
        names = {house.service.live.current.name: 0}  # type: ignore[union-attr]
        with Askers(house) as askers:
            for n in range(1, 11):
                names[house.publish(generation(n))] = n
                house.wait_live(list(names)[-1])
                seen = len(askers.answers)
                wait_for(lambda s=seen: len(askers.answers) > s + 3)  # type: ignore[misc]
        assert askers.failures == []
        assert {names[a["generation"]] for a in askers.answers} == set(range(11))
        for answer in askers.answers:
            ways = {s["excerpt"].split("way ")[1].split(",")[0] for s in answer["sources"]}
            assert ways == {str(names[answer["generation"]])}
            assert f"way {names[answer['generation']]}," in answer["answer"]
        # The old ones are closed, the last is not, and their folders are gone.
        wait_for(lambda: [g.closed for g in house.opener.opened] == [True] * 10 + [False])
        wait_for(lambda: len(list((house.folder / "scratch").iterdir())) == 1)
        assert house.metric("orrery_serve_switches_total") == 11
        assert house.metric("orrery_serve_generation_info", generation=next(iter(names))) == 0


def test_a_question_that_began_before_a_switch_ends_with_its_own_generation() -> None:
    with serving(passages=generation(0), abstain_below=None) as house:
        old = house.service.live.current.name  # type: ignore[union-attr]
        house.opener.hold = threading.Event()
        answers: list[dict] = []
        asker = threading.Thread(target=lambda: answers.append(house.ask(QUESTION)))
        asker.start()
        wait_for(lambda: house.opener.at_work == 1)
        new = house.publish(generation(1))
        house.wait_live(new)
        assert not house.opener.opened[0].closed
        house.opener.hold.set()
        asker.join(10)
        assert answers[0]["generation"] == old
        assert house.ask(QUESTION)["generation"] == new
        wait_for(lambda: house.opener.opened[0].closed)


def test_a_damaged_generation_is_refused_and_the_one_before_answers(caplog: object) -> None:
    with serving(passages=generation(0), abstain_below=None) as house:
        old = house.service.live.current.name  # type: ignore[union-attr]
        root = Path(house.store.root)
        before = len(house.opener.opened)

        def refused() -> bool:
            return bool(house.get("/health/live").json()["problems"])

        # A file that is not what was committed; a manifest of another digest; one that is gone; a probe that fails.
        damaged = house.publish(generation(1))
        (root / PROJECT / "index" / damaged / "1" / "passages.jsonl").write_text("{}")
        wait_for(refused)
        bad = f"{PROJECT}/index/{damaged}/manifest.json"
        for path, digest in ((bad, "0" * 64), (f"{PROJECT}/index/{'f' * 32}/manifest.json", "0" * 64)):
            house.point(path, digest)
            wait_for(refused)
            assert house.ask(QUESTION)["generation"] == old
        house.publish([Passage("BROKEN")])
        wait_for(lambda: len(house.opener.opened) > before)
        for text in (b"", b"{", b"[]", b"\xff", b'{"version": 1}', b"[" * 100_000):
            house.store.put(f"{PROJECT}/live.json", text)
            wait_for(refused)
        health = house.get("/health/ready")
        assert health.status_code == 200
        assert health.json()["status"] == "degraded"
        assert health.json()["generation"] == old
        assert house.ask(QUESTION)["generation"] == old
        assert house.metric("orrery_serve_generation_problem") == 1
        assert house.metric("orrery_serve_generation_refused_total") >= 1
        assert not house.opener.opened[0].closed
        # What was damaged is tried again; once it is whole, or another is live, all is well.
        new = house.publish(generation(2))
        house.wait_live(new)
        assert house.get("/health/live").json() == {"status": "ok", "generation": new, "version": "6", "problems": []}
        assert house.metric("orrery_serve_generation_problem") == 0
        wait_for(lambda: all(g.closed for g in house.opener.opened[:-1]))


def test_a_damaged_generation_that_is_repaired_is_opened_then() -> None:
    with serving(passages=generation(0), abstain_below=None) as house:
        root = Path(house.store.root)
        name = house.publish(generation(1))
        file = root / PROJECT / "index" / name / "1" / "passages.jsonl"
        whole = file.read_bytes()
        file.write_bytes(b"")
        wait_for(lambda: house.service.live.refusal is not None)
        file.write_bytes(whole)
        house.wait_live(name)


def test_a_store_out_of_reach_changes_nothing_but_the_health() -> None:
    with serving(passages=generation(0), abstain_below=None) as house:
        outage = house.folder / "outage"
        os.environ["ORRERY_STORE_OUTAGE"] = str(outage)
        try:
            outage.touch()
            wait_for(lambda: house.service.live.outage is not None)
            old = house.ask(QUESTION)["generation"]
            assert house.get("/health/ready").json()["status"] == "degraded"
            outage.unlink()
            new = house.publish(generation(1))
            house.wait_live(new)
            assert house.get("/health/ready").json()["status"] == "ok"
            assert new != old
            # A pointer that has vanished leaves the present one, too.
            (Path(house.store.root) / PROJECT / "live.json").unlink()
            time.sleep(0.3)
            assert house.ask(QUESTION)["generation"] == new
        finally:
            del os.environ["ORRERY_STORE_OUTAGE"]


def test_before_anything_is_live_questions_are_told_to_wait() -> None:
    with serving(passages=None) as house:
        ready = house.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "starting")
        assert house.get("/health/live").status_code == 200
        done = house.post({"question": QUESTION})
        assert (done.status_code, done.headers["retry-after"]) == (503, "5")
        assert house.get("/info").json()["generation"] is None
        house.publish(generation(0))
        house.wait_live()
        assert house.get("/health/ready").status_code == 200
        assert house.ask(QUESTION)["sources"]


def test_another_evaluation_of_the_same_generation_changes_when_it_abstains_alone() -> None:
    with serving(passages=generation(0), abstain_below=None) as house:
        pointer = json.loads(house.store.read(f"{PROJECT}/live.json"))
        assert not house.ask(QUESTION)["abstained"]
        house.point(pointer["generation"], pointer["digest"], "0.99")
        wait_for(lambda: house.service.live.current.pointer.version == "2")  # type: ignore[union-attr]
        assert house.ask("an engine in the desert of another planet")["abstained"]
        assert len(house.opener.opened) == 1
        assert not house.opener.opened[0].closed

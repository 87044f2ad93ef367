"""The command line: messages instead of tracebacks, the right exit codes, and a light `orrery step`."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from core_house import SPEC, House

from orrery import checking, cli, commands, scaffold, spec, yamlfile
from orrery.errors import RequestError, SpecError, UserError
from orrery.ledger import Ledger
from orrery.spec import KnowledgeBaseSpec, ModelSpec

ORRERY = str(Path(sys.executable).parent / "orrery")


@pytest.fixture
def orrery(house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Call the command line as the shell does; return exit code and what was printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["orrery", *argv])
        code: object = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code or 0
        caught = capsys.readouterr()
        text = caught.out + caught.err
        assert "Traceback" not in text
        assert isinstance(code, int)
        return code, text

    return call


# -- orrery step -------------------------------------------------------------------------------------


def test_a_step_loads_nothing_for_people(house: House) -> None:
    """What `orrery step` imports is waited for by every step of every Dag."""
    code = (
        "import sys, orrery.cli\nsys.argv = ['orrery', 'step', *sys.argv[1:]]\n"
        "try:\n    orrery.cli.main()\nexcept SystemExit as e:\n    print(e.code)\n"
        "heavy = ('rich', 'typer', 'click', 'sqlalchemy', 's3fs', 'aiohttp', 'botocore', 'airflow', 'numpy', 'pyarrow', 'pandas')\n"
        "print([m for m in heavy if m in sys.modules], [m for m in ('orrery.plan', 'orrery.ledger') if m in sys.modules])\n"
    )
    argv = house.put(house.config().model_copy(update={"bundle": "none"}))
    done = subprocess.run([sys.executable, "-c", code, *argv[2:]], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] []"
    assert done.stdout.splitlines()[-2] == "64"  # `probe` is not in that process's catalogue
    assert "unknown step 'probe'" in done.stdout


def test_the_installed_command_runs_a_step(house: House) -> None:
    config = house.config().model_copy(update={"verb": "nothing"})
    done = subprocess.run([ORRERY, *house.put(config)[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert "unknown step 'nothing'" in done.stdout
    assert house.result(config).status == "user"
    assert "Traceback" not in done.stdout + done.stderr


def test_the_clock_of_a_step_starts_with_its_process() -> None:
    import time

    code = "import time; time.sleep(0.3); from orrery import cli; print(time.time() - cli._process_start())"
    began = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.28 <= float(done.stdout) <= time.time() - began + 0.05


# -- help and mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "run", "check", "new", "ledger", "rollback", "reproduce", "up", "down", "status"])
def test_help(orrery, name: str) -> None:  # type: ignore[no-untyped-def]
    code, text = orrery(*([name] if name else []), "--help")
    assert code == 0
    assert "Usage: orrery" in text
    if not name:
        assert all(
            c in text for c in ("run", "check", "new", "ledger", "rollback", "reproduce", "up", "down", "status")
        )


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["run", "delay", "ingest", "--partition", "2013-01"], 64, "did you mean 'delays'"),
        (["run", "../delays", "ingest", "--partition", "2013-01"], 64, "there is no project '../delays'"),
        (["run", "[red]", "ingest", "--partition", "2013-01"], 64, "there is no project '[red]'"),
        (["run", "delays", "ingst", "--partition", "2013-01"], 64, "did you mean 'ingest'"),
        (["run", "delays", "ingest"], 64, "give a partition or a window, not neither"),
        (["run", "delays", "ingest", "--partition", "2013-01", "--window", "2013-01..2013-02"], 64, "not both"),
        (["run", "delays", "ingest", "--partition", "2013"], 64, "partition '2013' is not a month"),
        (["run", "delays", "ingest", "--partition", "２０１３-０１"], 64, "is not a month"),
        (["run", "delays", "train", "--window", "2013-02..2013-01"], 64, "ends before it begins"),
        (
            ["run", "delays", "train", "--window", "2013-01..2013-02", "--sample", "0"],
            64,
            "--sample '0' is not a share",
        ),
        (["run", "delays", "validate", "--partition", "2013-01"], 64, "has no raw for 2013-01; there is none yet"),
        (["run", "delays", "promote", "--partition", "2013-01"], 64, "promote needs --version"),
        (["run", "delays", "trial", "--window", "2013-01..2013-02"], 64, "orrery run delays tune"),
        (["run", "delays", "tune", "--window", "2013-01..2013-02"], 64, "its spec.yaml has no `tune`"),
        (["run", "delays", "rollback", "--partition", "2013-01"], 64, "orrery rollback delays"),
        (["run", "delays", "train", "--partition", "2013-01", "--version", "1"], 64, "--version is for promote"),
        (["run", "delays"], 2, "Missing argument"),
        (["run", "delays", "train", "--colour", "red"], 2, "No such option"),
        (["check", "delay"], 64, "did you mean 'delays'"),
        (["ledger", "delays", "--at", "yesterday"], 64, "'yesterday' is not a time"),
        (["rollback", "delays"], 64, "has no champion"),
        (["reproduce", "delays", "3"], 64, "has no version '3'"),
        (["reproduce", "delays", "delays/runs/none/probe/1"], 64, "there is no such attempt"),
        (["reproduce", "delays", "../../etc/passwd"], 64, "is not a path of the store"),
        (["check", "[/x]"], 64, "✗ [/x]"),
        (["ledger", "[/x]"], 64, "there is no project '[/x]'"),
        (
            ["run", "delays", "promote", "--partition", "2013-01", "--version", "1", "--sample", "1%"],
            64,
            "tried on a sample",
        ),
        (["new", "Delays"], 64, "'Delays' is not a project name"),
        (["new", "../evil"], 64, "is not a project name"),
        (["new", "other", "--kind", "modell"], 64, "did you mean 'model'"),
        (["new", "other", "--task", "binry"], 64, "did you mean 'binary'"),
        (["new", "other", "--data", "flights"], 64, "is not NAME=URI"),
        (["new", "other", "--data", "class=x.parquet"], 64, "'class' is not a source name"),
        (["new", "other", "--data", "rows=x.parquet"], 64, "'rows' is not a source name"),
        (["new", "other", "--owner", 'x"""\nimport os'], 64, "is not an owner"),
        (["new", "delays"], 64, "exists already"),
        (["step"], 2, "--config"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_mistakes_are_told_without_a_traceback(orrery, argv: list[str], code: int, text: str) -> None:  # type: ignore[no-untyped-def]
    got, told = orrery(*argv)
    assert (got, text in told) == (code, True), told


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.5", 0.5), ("100%", 1.0), ("1", 1.0)])
def test_shares(text: str, value: float) -> None:
    assert commands.share(text) == value


@pytest.mark.parametrize("text", ["", "%", "0", "0%", "-1%", "101%", "1.5", "nan", "inf", "nan%", "half"])
def test_no_shares(text: str) -> None:
    with pytest.raises(RequestError, match="is not a share"):
        commands.share(text)


# -- doing things ------------------------------------------------------------------------------------


def test_run_says_how_it_ended_and_then_skips(orrery, house: House) -> None:  # type: ignore[no-untyped-def]
    code, text = orrery("run", "delays", "probe", "--window", "2013-01..2013-02")
    assert code == 0
    assert "✓ probe 2013-01: done" in text
    assert "✓ probe 2013-02: done" in text
    assert "value 1" in text
    code, text = orrery("run", "delays", "probe", "--partition", "2013-01")
    assert (code, "skipped, unchanged since" in text) == (0, True)
    assert "it was asked for" in text
    code, text = orrery("run", "delays", "probe", "--partition", "2013-01", "--force")
    assert (code, "✓ probe 2013-01: done" in text) == (0, True)
    assert len(house.manifests()) == 3


def test_the_ledger_shows_what_people_wrote_as_they_wrote_it(orrery, house: House) -> None:  # type: ignore[no-untyped-def]
    book = Ledger(os.environ["ORRERY_LEDGER"])
    payload = {"version": "7", "model": "m", "from": "6", "reason": "[/oops] because [bold]", "evidence": {"v": "a/b"}}
    book.record("delays", "promotion", "run-1", "intent", "eve [/red]", payload)
    code, text = orrery("ledger", "delays")
    assert code == 0
    assert "unfinished: promotion to version 7" in text
    assert "champion: none" in text
    book.record("delays", "promotion", "run-1", "done", "eve [/red]", payload)
    code, text = orrery("ledger", "delays")
    assert code == 0
    for part in ("[/oops] because [bold]", "eve [/red]", "6 → 7", "a/b", "champion: version 7"):
        assert part in text
    assert "unfinished" not in text
    code, text = orrery("ledger", "delays", "--at", "2000-01-01")
    assert "champion at 2000-01-01: none" in text
    code, text = orrery("ledger", "delays", "--json")
    assert [json.loads(line)["phase"] for line in text.splitlines()] == ["intent", "done"]


def test_rollback_goes_to_the_one_before_and_then_on_to_the_one_before_that(orrery, house: House) -> None:  # type: ignore[no-untyped-def]
    models = {v: house.verdict(f"2013-0{v}..2013-0{v}") for v in ("1", "2", "3", "4")}
    book = Ledger(os.environ["ORRERY_LEDGER"])

    def crowned(version: str) -> None:
        payload = {"version": version, "model": models[version].path}
        book.record("delays", "promotion", f"run-{version}", "done", "me", payload)

    for version in ("1", "2", "3"):
        crowned(version)
    code, text = orrery("rollback", "delays", "--to", "9")
    assert (code, "cannot roll back to version '9'" in text) == (64, True)
    code, text = orrery("rollback", "delays", "--to", "3")
    assert (code, "version 3 is the champion of delays already" in text) == (64, True), text
    code, text = orrery("rollback", "delays", "--reason", "it drifts")
    assert (code, "version 3 → 2" in text) == (0, True), text
    champion = book.champion("delays")
    assert champion is not None
    assert (champion.version, champion.model, champion.reason) == ("2", models["2"].path, "it drifts")
    assert house.store.read("alias") == b"2"
    # The version that was left must not come back by itself.
    code, text = orrery("rollback", "delays")
    assert (code, "version 2 → 1" in text) == (0, True), text
    code, text = orrery("rollback", "delays")
    assert (code, "no version was champion before version 1" in text) == (64, True), text
    crowned("4")
    assert book.champions("delays") == ["1", "4"]
    code, text = orrery("rollback", "delays", "--to", "2")
    assert (code, book.champions("delays")) == (0, ["1", "4", "2"])


def test_a_promotion_that_crashed_is_finished_by_the_next_one(orrery, house: House) -> None:  # type: ignore[no-untyped-def]
    house.verdict("2013-01..2013-01")
    house.store.put("crash-after-effect", b"")
    promote = ("run", "delays", "promote", "--partition", "2013-01", "--version", "1")
    assert orrery(*promote)[0] == 1
    assert "unfinished: promotion to version 1" in orrery("ledger", "delays")[1]
    house.store.remove("crash-after-effect")
    assert orrery(*promote)[0] == 0
    _, text = orrery("ledger", "delays")
    assert ("unfinished" in text, "champion: version 1" in text) == (False, True), text
    entries = Ledger(os.environ["ORRERY_LEDGER"]).find("delays", "promotion")
    assert [e.phase for e in entries] == ["intent", "done"]


def test_reproduce_repeats_an_attempt_and_leaves_what_counts_alone(orrery, house: House) -> None:  # type: ignore[no-untyped-def]
    config = house.config()
    house.tell(config)
    (before,) = house.manifests()
    code, text = orrery("reproduce", "delays", config.folder)
    assert (code, "✓ again" in text) == (0, True), text
    assert len(house.manifests()) == 2
    assert {m.digest for m in house.manifests()} == {before.digest}
    assert house.store.latest_manifest("delays", "probed", "2013-01") == before
    assert "note:" not in text
    (house.home / "docker" / "airflow" / "requirements.txt").write_text("numpy==3.0\n")
    (house.folder / "features.py").write_text("ANSWER = 1\n")
    code, text = orrery("reproduce", "delays", config.folder)
    assert (code, "note: environment airflow has changed since" in text) == (0, True), text
    assert "the code of" not in text
    assert orrery("reproduce", "delays", f"{config.folder}/config.json")[0] == 0
    Path(house.store.full(f"bundles/{config.bundle}.tar")).unlink()
    code, text = orrery("reproduce", "delays", config.folder)
    assert (code, "code of that time" in text) == (64, True)


def test_a_failed_step_says_how_to_repeat_it(orrery, house: House) -> None:  # type: ignore[no-untyped-def]
    """The command that is printed does what it says."""
    house.store.put("no-probe", b"")
    code, text = orrery("run", "delays", "probe", "--partition", "2013-01")
    assert (code, "it may not be probed" in text) == (64, True), text
    (command,) = [line.split("repeat it: orrery ")[1] for line in text.splitlines() if "repeat it: " in line]
    assert command.startswith("reproduce delays delays/runs/cli--")
    code, text = orrery(*command.split())
    assert (code, "it may not be probed" in text) == (64, True), text
    house.store.remove("no-probe")
    assert orrery(*command.split())[0] == 0


def test_what_the_file_system_refuses_is_told(orrery, house: House, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Wherever it happens: an unreadable file, a folder that may not be written."""
    for error, code, part in (
        (PermissionError(13, "Permission denied", "/srv/var/run"), 64, "/srv/var/run: Permission denied"),
        (OSError(30, "Read-only file system", "/srv/x"), 64, "/srv/x: the file system is read-only"),
        (OSError(28, "No space left on device", "/srv/x"), 75, "/srv/x: no space left"),
        (FileNotFoundError(2, "No such file or directory", "/srv/x"), 64, "/srv/x: there is no such file"),
    ):

        def refuse(*args: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr("orrery.servers.down", refuse)
        got, text = orrery("down")
        assert (got, part in text) == (code, True), text


def test_a_path_too_long_to_pack_is_told(orrery, house: House) -> None:  # type: ignore[no-untyped-def]
    long = house.folder / ("x" * 120 + ".py")
    long.write_text("")
    code, text = orrery("run", "delays", "probe", "--partition", "2013-01")
    assert (code, "name is too long" in text, long.name in text) == (64, True, True), text


def test_a_sound_project_stays_sound_when_its_data_are_stale_or_away(  # type: ignore[no-untyped-def]
    orrery, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"epochs": {"value": 5, "tunable": None}}
    found = {"features": {"rows": "flights", "views": []}, "model": {"kind": "fit", "params": params}}
    monkeypatch.setattr(checking, "inspect", lambda *a: found)
    raw = house.commit("ingest", "raw", "2013-01")
    clean = house.commit("validate", "clean", "2013-01", inputs={"raw": (raw.ref,)})
    house.commit("materialize", "features", "2013-01", inputs={"clean": (clean.ref,)})
    house.commit("ingest", "raw", "2013-01", text="again")
    code, text = orrery("check", "delays")
    assert (code, "✓ delays" in text, "✗" in text) == (0, True, False), text
    assert "model.py: fit; epochs 5" in text
    assert "cannot be told: clean of 2013-01 was made from raw data that landed again" in text
    # But a step that fails on real rows is the project's own fault.
    wrong = UserError("features.py: no", details={"config": "x"})
    monkeypatch.setattr(checking, "feature_changes", lambda project: (_ for _ in ()).throw(wrong))
    code, text = orrery("check", "delays")
    assert (code, "✗ delays" in text, "✓" in text) == (64, True, False), text
    # A store that has lost a file is not, and the other projects are told all the same.
    lost = FileNotFoundError("features/a1/schema.json")
    monkeypatch.setattr(checking, "feature_changes", lambda project: (_ for _ in ()).throw(lost))
    code, text = orrery("check", "delays")
    assert (code, "✓ delays" in text, "✗" in text) == (0, True, False), text
    assert f"cannot be told: {house.uri}: features/a1/schema.json" in text


def test_check_asks_params_of_the_model_and_names_the_line(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    spec_file = house.folder / "spec.yaml"
    spec_file.write_text(SPEC + "train:\n  params:\n    epoks: 5\n")
    answer = {"error": "train.params.epoks: model.py's Params has no 'epoks'", "hint": "allowed: epochs"}

    def run(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(argv)
        return subprocess.CompletedProcess(argv, 0, json.dumps(answer), "")

    monkeypatch.setattr(checking.subprocess, "run", run)
    monkeypatch.setattr(checking, "interpreter", lambda environment: "python")
    declared = spec.load(house.folder)
    assert isinstance(declared, ModelSpec)
    with pytest.raises(SpecError) as e:
        checking.inspect("delays", declared)
    line = spec_file.read_text().splitlines().index("    epoks: 5") + 1
    assert e.value.message == f"{spec_file}:{line}: {answer['error']}"
    assert json.loads(asked[0][-1]) == {"epoks": 5}


@pytest.mark.parametrize(
    ("uri", "ending"),
    [("a/b.csv.gz", ".csv.gz"), ("a/b.CSV", ".CSV"), ("a.b.parquet", ".parquet"), ("x.pq", ".pq"), ("x", ".parquet")],
)
def test_a_new_source_ends_as_its_sample_does(uri: str, ending: str) -> None:
    assert scaffold._ending(uri) == ending


GPU = """\
version: 1
environments: {airflow: {image: "a/ml:1"}}
compute: {cpu-small: {}, gpu-firm: {gpu: 1}, gpu-small: {gpu: 1, image: "a/ml:1-gpu"}}
"""


def said(orrery: Callable[..., tuple[int, str]]) -> tuple[int, str]:
    """Return what checking the project answers, without line ends: a terminal's width decides on them."""
    code, text = orrery("check", "delays")
    return code, " ".join(text.split())


def test_check_names_a_gpu_class_whose_image_has_torch_for_cpus(  # type: ignore[no-untyped-def]
    orrery, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = house.home / "include" / "platform.yaml"
    file.write_text(GPU)
    spot = "train: {compute: gpu-small, spot: {fallback: gpu-firm}}\n"
    (house.folder / "spec.yaml").write_text(SPEC + spot)
    found = {"features": {"rows": "flights", "views": []}, "model": {"kind": "fit", "params": {}}}
    monkeypatch.setattr(checking, "inspect", lambda *a: found)
    code, text = said(orrery)
    assert (code, "✓ delays" in text) == (0, True), text
    assert "in a pod, compute class 'gpu-firm' has a GPU and the image a/ml:1" in text and "a/ml:1-gpu" in text
    assert "'gpu-small'" not in text and "is a folder" not in text
    monkeypatch.setenv("ORRERY_PROFILE", "kubernetes")
    code, text = said(orrery)
    assert (code, "✗ delays" in text) == (64, True), text
    line = len(SPEC.splitlines()) + 1
    assert f"spec.yaml:{line}: compute class 'gpu-firm' has a GPU" in text
    # The environment's own tag, written out, is no other image; a digest that the class names is believed.
    digest = "a/ml@sha256:" + "0" * 64
    for class_, environment, sound in (("a/ml:1", "a/ml:1", False), (digest, digest, True), ("b/x:1", "a/ml:1", True)):
        other = GPU.replace("gpu-firm: {gpu: 1", f'gpu-firm: {{gpu: 1, image: "{class_}"')
        file.write_text(other.replace('airflow: {image: "a/ml:1"', f'airflow: {{image: "{environment}"'))
        code, text = said(orrery)
        assert (code == 0) is sound, text


def test_check_doubts_a_folder_as_the_store_of_pods(  # type: ignore[no-untyped-def]
    orrery, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"features": {"rows": "flights", "views": []}, "model": {"kind": "fit", "params": {}}}
    monkeypatch.setattr(checking, "inspect", lambda *a: found)
    assert "is a folder" not in said(orrery)[1]
    monkeypatch.setenv("ORRERY_PROFILE", "kubernetes")
    code, text = said(orrery)
    assert code == 0 and f"store {house.uri} is a folder" in text and "ORRERY_STORE" in text, text
    monkeypatch.setenv("ORRERY_STORE", "s3://bucket/prefix")
    monkeypatch.setattr(checking, "feature_changes", lambda project: [])
    assert "is a folder" not in said(orrery)[1]


def test_check_prints_the_schema(orrery) -> None:  # type: ignore[no-untyped-def]
    code, text = orrery("check", "--schema")
    assert code == 0
    assert "ModelSpec" in json.loads(text)["$defs"]


def test_check_warns_of_pages_that_steps_on_kubernetes_cannot_reach(orrery, house: House) -> None:  # type: ignore[no-untyped-def]
    folder = house.folder.parent / "docs"
    folder.mkdir()
    told = "version: 1\nkind: knowledge_base\nowner: me\nsources:\n  site: {pages: [%s]}\n"
    plain = "http://docs.example.org/a"
    (folder / "spec.yaml").write_text(told % f"{plain}, http://docs.example.org/b, https://docs.example.org/c")
    code, text = orrery("check", "docs")
    assert code == 0
    assert f"site: on Kubernetes steps reach port 443 alone, and {plain} and 1 more has 80" in " ".join(text.split())
    (folder / "spec.yaml").write_text(told % "https://docs.example.org/c")
    assert "443" not in orrery("check", "docs")[1]


def test_check_tells_each_project_that_is_wrong(orrery, house: House) -> None:  # type: ignore[no-untyped-def]
    (house.folder / "spec.yaml").write_text(SPEC.replace("task: binary", "task: binry"))
    other = house.folder.parent / "docs"
    (other / "x").mkdir(parents=True)
    (other / "spec.yaml").write_text("version: 1\nkind: knowledge_base\nowner: me\nsources: {documents: {uri: x}}\n")
    code, text = orrery("check")
    assert code == 64
    assert "✗ delays" in text
    assert "spec.yaml:4: task: 'binry' is not allowed" in text
    assert "✓ docs: knowledge base, documents; 0 2 * * *" in text
    assert "1 of 2 projects: delays" in text


def test_check_reads_a_knowledge_bases_questions_as_evaluate_does(orrery, house: House) -> None:  # type: ignore[no-untyped-def]
    folder = house.folder.parent / "docs"
    (folder / "x").mkdir(parents=True)
    told = "version: 1\nkind: knowledge_base\nowner: me\nsources: {documents: {uri: x}}\nquestions: q.jsonl\n"
    (folder / "spec.yaml").write_text(told)
    good = (
        '{"id": "q1", "question": "What\u2028now?", "answerable": true, "passages": [{"uri": "a.md", "quote": "this"}]}'
    )
    for content, said in (
        (b"\xe4\xff\n", "is not UTF-8"),
        (b"", "no answerable question"),
        (good.replace("true", '"no"').encode(), "answerable"),
        (good.replace('"question"', '"quesion"').encode(), "unknown field 'quesion'"),
        (f"{good}\n{good}".encode(), "stands in line 1, too"),
    ):
        (folder / "q.jsonl").write_bytes(content)
        code, text = orrery("check", "docs")
        assert (code, said in " ".join(text.split())) == (64, True), text
        assert "Traceback" not in text
    (folder / "q.jsonl").write_text(good, encoding="utf-8")
    code, text = orrery("check", "docs")
    assert code == 0 and "1 answerable, 0 not; when to abstain is learned from 20 and 10" in " ".join(text.split()), (
        text
    )


def test_check_says_that_a_folder_is_not_there(orrery, house: House) -> None:  # type: ignore[no-untyped-def]
    folder = house.folder.parent / "docs"
    folder.mkdir()
    told = "version: 1\nkind: knowledge_base\nowner: me\nsources: {documents: {uri: /nowhere/at/all}}\n"
    (folder / "spec.yaml").write_text(told)
    assert "documents: there is no folder /nowhere/at/all on this machine" in " ".join(
        orrery("check", "docs")[1].split()
    )


@pytest.mark.parametrize("field", ["embedder.model", "retrieval.reranker"])
def test_check_says_that_a_models_folder_is_not_there(orrery, house: House, field: str) -> None:  # type: ignore[no-untyped-def]
    folder = house.folder.parent / "docs"
    (folder / "documents").mkdir(parents=True)
    (folder / "mine").mkdir()
    told = "version: 1\nkind: knowledge_base\nowner: me\nsources: {{documents: {{uri: documents}}}}\n{}: {{{}: {}}}\n"
    outcomes = {}
    for value in ("mine", "minne", "/nowhere/at/all", "file:///nowhere/at/all", "s3://bucket/model"):
        (folder / "spec.yaml").write_text(told.format(*field.split("."), value))
        code, text = orrery("check", "docs")
        outcomes[value] = code, " ".join(text.split())
    assert [code for code, _ in outcomes.values()] == [0, 64, 0, 0, 0]
    assert f"{field}: there is no folder 'minne' in" in outcomes["minne"][1]
    assert [f"{field}: there is no folder /nowhere/at/all on this machine" in t for _, t in outcomes.values()] == [
        False, False, True, True, False,
    ]  # fmt: skip


# -- orrery new --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_a_new_model_is_sound(orrery, house: House, task: str) -> None:  # type: ignore[no-untyped-def]
    code, text = orrery("new", "fresh", "--task", task, "--owner", "Ops & Co, (x)")
    assert code == 0
    folder = house.folder.parent / "fresh"
    made = {str(p.relative_to(house.home)) for p in [*folder.iterdir(), *(house.home / "dags").iterdir()]}
    base = "include/projects/fresh"
    assert made == {*(f"{base}/{f}" for f in ("spec.yaml", "features.py", "model.py", "README.md")), "dags/fresh.py"}
    assert all(path in text for path in made)
    loaded = spec.load(folder)
    assert isinstance(loaded, ModelSpec)
    assert (loaded.task, loaded.owner) == (task, "Ops & Co, (x)")
    for path in (folder / "features.py", folder / "model.py", house.home / "dags" / "fresh.py"):
        assert ast.get_docstring(ast.parse(path.read_text()))
    assert "Ops & Co" in (house.home / "dags" / "fresh.py").read_text()
    assert orrery("new", "fresh")[0] == 64
    assert orrery("run", "fresh", "ingest", "--partition", "2013")[0] == 64


@pytest.mark.parametrize("owner", ["ops", "null", "123", "@ops", "- x", "yes", "ärzte"])
def test_a_new_knowledge_base_is_sound(orrery, house: House, owner: str) -> None:  # type: ignore[no-untyped-def]
    assert orrery("new", "docs", "--kind", "knowledge_base", "--owner", owner)[0] == 0
    loaded = spec.load(house.folder.parent / "docs")
    assert isinstance(loaded, KnowledgeBaseSpec)
    assert loaded.owner == owner
    assert 'lifecycle("docs", __doc__)' in (house.home / "dags" / "docs.py").read_text()
    assert "questions.jsonl" in (house.folder.parent / "docs" / "README.md").read_text()
    assert orrery("check", "docs")[0] == 0
    assert orrery("new", "more", "--kind", "knowledge_base", "--data", "x=y.csv")[0] == 64


def test_names_of_columns_stay_text(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = 'a"; import os; "'
    drafted = {
        "checks": {"unique": evil},
        "columns": {"flights": {evil: "timestamp", "Zeit\n": "number", '2"Label\\': "number"}},
    }
    monkeypatch.setattr(scaffold, "_draft", lambda data: drafted)
    scaffold.create("evil", "model", {"flights": "x.parquet"}, "binary", "ops")
    tree = ast.parse((house.folder.parent / "evil" / "features.py").read_text())
    assigned = {
        t.id: ast.literal_eval(n.value)
        for n in tree.body if isinstance(n, ast.Assign)
        for t in n.targets if isinstance(t, ast.Name)
    }  # fmt: skip
    assert (assigned["KEY"], assigned["TIME"], assigned["LABEL"]) == (evil, evil, '2"Label\\')
    document, _ = yamlfile.read(house.folder.parent / "evil" / "spec.yaml")
    assert document["label"]["column"] == "label_"
    assert document["checks"]["unique"] == evil


def test_columns_that_a_spec_cannot_name_are_told_in_it(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = ["Order Id", "a\nowner: evil"]
    drafted = {"checks": {"min_rows": 1}, "columns": {"flights": {"Order Id": "string"}}, "left_out": {"flights": odd}}
    monkeypatch.setattr(scaffold, "_draft", lambda data: drafted)
    scaffold.create("odd", "model", {"flights": "x.parquet"}, "binary", "ops")
    folder = house.folder.parent / "odd"
    assert 'these columns of flights: "Order Id", "a\\nowner: evil".' in (folder / "spec.yaml").read_text()
    assert spec.load(folder).owner == "ops"


def test_an_unwritable_home_is_told(house: House) -> None:
    (house.folder.parent / "fresh").write_text("a file")
    with pytest.raises(UserError, match="check that the folder exists"):
        scaffold.create("fresh", "model", {}, "binary", "ops")

"""The two local servers: what `up` refuses, what `down` finds, and one real start and end of both."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from orrery import servers
from orrery.airflow_api import AirflowApi
from orrery.errors import OrreryError, RequestError, SpecError, TryAgain, UserError
from orrery.servers import config, processes, settings
from orrery.servers.processes import Process

ROOT = Path(__file__).resolve().parents[2]
CALL = "import sys; from pathlib import Path; from orrery import servers; servers.{}(Path(sys.argv[1]))"
VENVS = Path(os.environ.get("ORRERY_VENVS") or ROOT / ".venvs")
DAG = '''"""An airflow dag for the test."""
from airflow.sdk import CronPartitionTimetable, dag, task

@dag(schedule=CronPartitionTimetable("0 0 1 * *", timezone="UTC", key_format="%Y-%m"), catchup=False)
def probe():
    @task(pool="orrery-light")
    def say(dag_run=None):
        if dag_run.partition_key == "2013-04":
            raise ValueError("april is refused")
        return dag_run.partition_key
    say()

probe()
'''


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give an empty home with free ports, and leave nothing running in it."""
    for name in [n for n in os.environ if n.startswith(("ORRERY_", "AIRFLOW_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ORRERY_VENVS", str(VENVS))
    monkeypatch.setenv("ORRERY_AIRFLOW_PORT", str(free_port()))
    monkeypatch.setenv("ORRERY_MLFLOW_PORT", str(free_port()))
    for folder in ("dags", "plugins"):
        (tmp_path / folder).mkdir()
    yield tmp_path
    for name in servers.SERVERS:
        processes.end(partial(processes.family, config.marker(tmp_path, name)), grace=5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def sleeper(home: Path, *, session: bool = True) -> subprocess.Popen[bytes]:
    """Start a process that bears the marker of home's Airflow and ignores SIGTERM."""
    code = (
        "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, processes.MARKER: config.marker(home, "airflow")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, start_new_session=session, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


# ports


def test_a_taken_port_is_named_with_its_holder_before_anything_starts(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", config.port("mlflow")))
        taken.listen()
        with pytest.raises(UserError) as caught:
            servers.up(home, console=quiet())
    assert f"port {config.port('mlflow')}, which MLflow needs, is taken by process {os.getpid()}" in str(caught.value)
    assert "ORRERY_MLFLOW_PORT" in caught.value.hint
    assert [item.state for item in servers.statuses(home)] == ["stopped", "stopped"]


def test_two_servers_on_one_port_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_MLFLOW_PORT", os.environ["ORRERY_AIRFLOW_PORT"])
    with pytest.raises(UserError, match="both servers have port"):
        servers.up(home, console=quiet())


@pytest.mark.parametrize("text", ["http", "0", "65536", "-1", "80.5"])
def test_a_port_that_cannot_be_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ORRERY_AIRFLOW_PORT", text)
    with pytest.raises(UserError, match="ORRERY_AIRFLOW_PORT is"):
        config.port("airflow")


# the environment and its secrets


def test_the_password_of_another_mlflow_is_not_shown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_MLFLOW", "https://me:hunter2@mlflow.example.org/x")
    console = quiet()
    assert servers._wanted(console) == ["airflow"]
    servers.status(home, console=console)
    assert "hunter2" not in printed(console)
    assert printed(console).count("https://***@mlflow.example.org/x") == 2


def test_secrets_are_private_stable_and_not_in_the_environment(home: Path) -> None:
    old = os.umask(0)
    try:
        first = servers.airflow_environment(home)
    finally:
        os.umask(old)
    state = home / "var" / "airflow"
    files = [state / "passwords.json", *(state / "secrets").iterdir()]
    assert len(files) == 4
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        assert not any(file.read_text().strip() in value for value in first.values())
    assert config.admin_password(home) not in "".join(first.values())
    before = [file.read_bytes() for file in files]
    assert servers.airflow_environment(home) == first
    assert [file.read_bytes() for file in files] == before


def test_everything_follows_the_port_and_stays_on_loopback(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_AIRFLOW_PORT", "18999")
    environment = servers.airflow_environment(home)
    assert environment["AIRFLOW__API__PORT"] == "18999"
    assert environment["AIRFLOW__API__BASE_URL"] == "http://127.0.0.1:18999"
    assert environment["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] == "http://127.0.0.1:18999/execution/"
    assert "0.0.0.0" not in "".join(environment.values())


def test_your_own_taste_wins_but_not_over_the_frame(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES", "7")
    monkeypatch.setenv("AIRFLOW__API__HOST", "0.0.0.0")
    environment = servers.airflow_environment(home)
    assert environment["AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES"] == "7"
    assert environment["AIRFLOW__API__HOST"] == "127.0.0.1"


def test_a_database_url_is_not_shown_by_ps(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_MLFLOW_DB", "postgresql://me:hush@db/mlflow")
    command = config.mlflow_command(home)
    assert "hush" not in " ".join(command.argv)
    assert command.environment["MLFLOW_BACKEND_STORE_URI"].endswith("@db/mlflow")


# who runs


def test_a_plain_postgresql_url_takes_the_driver_that_mlflow_has(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_MLFLOW_DB", "postgresql://me:hunter2@db/mlflow")
    monkeypatch.setattr(config, "program", lambda *names: Path("/bin/true"))
    stored = config.mlflow_command(home).environment["MLFLOW_BACKEND_STORE_URI"]
    assert stored == "postgresql+psycopg://me:hunter2@db/mlflow"


@pytest.mark.parametrize(("answers", "ended"), [(1, False), (10_000, True)])
def test_a_sick_server_is_waited_for_and_its_end_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, answers: int, ended: bool
) -> None:
    """What it runs would end with it: a moment of silence must not cost a training."""
    process = sleeper(home)
    found = processes.identify(process.pid)
    assert found is not None
    record = servers.Record(process.pid, found.start, config.port("airflow"), was_healthy=True)
    servers._record_file(home, "airflow").parent.mkdir(parents=True)
    servers._write(home, "airflow", record)
    left = [answers]

    def problem(name: str, record: servers.Record) -> str | None:
        left[0] -= 1
        return "is busy" if left[0] >= 0 else None

    monkeypatch.setattr(servers, "_problem", problem)
    monkeypatch.setattr(servers, "RECOVERY_S", 0.4)
    monkeypatch.setattr(servers, "_end", lambda home, name: ends.append(name))
    ends: list[str] = []
    console = quiet()
    assert servers._running(home, "airflow", console) == (None if ended else record)
    assert ends == (["airflow"] if ended else [])
    assert "Airflow is busy: waiting up to" in printed(console)
    assert ("is ended, with what it runs" in printed(console)) is ended
    process.kill()
    process.wait()


def test_a_recycled_pid_is_never_killed(home: Path) -> None:
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        (home / "var" / "run").mkdir(parents=True)
        record = {"pid": bystander.pid, "start": 1, "port": 1}
        (home / "var" / "run" / "airflow.json").write_text(json.dumps(record))
        assert servers.statuses(home)[0].state == "stopped"
        servers.down(home, console=quiet())
        Process(bystander.pid, 1).signal(signal.SIGKILL)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("note", ["", "{", "[]", '{"pid": 1}'])
def test_a_broken_note_is_no_obstacle(home: Path, note: str) -> None:
    (home / "var" / "run").mkdir(parents=True)
    (home / "var" / "run" / "airflow.json").write_text(note)
    servers.down(home, console=quiet())
    assert not (home / "var" / "run" / "airflow.json").exists()


def test_strays_are_found_by_their_marker_wherever_they_went(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strays = [sleeper(home), sleeper(home, session=False)]
    other = sleeper(home / "elsewhere")
    monkeypatch.setattr(processes.end, "__defaults__", (0.5,))
    try:
        assert "left behind: 2 processes" in servers.statuses(home)[0].detail
        console = quiet()
        servers.down(home, console=console)
        assert "Airflow: ended 2 processes" in printed(console)
        assert [stray.wait(timeout=5) for stray in strays] == [-signal.SIGKILL] * 2
        assert other.poll() is None
        servers.down(home, console=console)
        assert "Airflow: was not running" in printed(console)
    finally:
        other.kill()
        other.wait()


def test_a_marked_shell_can_call_down_without_ending_itself(home: Path) -> None:
    code = CALL.format("down") + "; print('alive')"
    environment = {**os.environ, processes.MARKER: config.marker(home, "airflow")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(home)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "alive" in done.stdout


def test_a_server_that_ends_at_once_shows_its_last_words(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = home / "venvs"
    for environment, name in (("airflow", "airflow"), ("ml", "mlflow")):
        file = fake / environment / "bin" / name
        file.parent.mkdir(parents=True)
        file.write_text("#!/bin/sh\necho the sky fell down\nexit 3\n")
        file.chmod(0o755)
    monkeypatch.setenv("ORRERY_VENVS", str(fake))
    with pytest.raises(UserError, match=r"ended while it was starting(.|\n)*the sky fell down") as caught:
        servers.up(home, console=quiet())
    assert str(home / "var" / "log") in str(caught.value)


def test_a_server_that_never_answers_is_left_to_wait_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = home / "venvs"
    for environment, name in (("airflow", "airflow"), ("ml", "mlflow")):
        file = fake / environment / "bin" / name
        file.parent.mkdir(parents=True)
        file.write_text("#!/bin/sh\necho hm\nexec sleep 600\n")
        file.chmod(0o755)
    monkeypatch.setenv("ORRERY_VENVS", str(fake))
    monkeypatch.setattr(servers, "PATIENCE", {"airflow": 0.5, "mlflow": 0.5})
    with pytest.raises(UserError, match=r"is not healthy after .* s \(does not answer\)") as caught:
        servers.up(home, console=quiet())
    assert "orrery down" in caught.value.hint
    assert [item.state for item in servers.statuses(home)] == ["starting", "starting"]
    console = quiet()
    servers.down(home, console=console)
    assert "Airflow: ended 1" in printed(console)
    assert "MLflow: ended 1" in printed(console)


def test_what_cannot_be_ended_is_named() -> None:
    forever = processes.identify(os.getpid())
    assert forever is not None
    with pytest.raises(OrreryError, match=f"could not be ended:\n  {os.getpid()}"):
        processes.end(lambda: [forever], grace=-11)


def test_a_missing_environment_says_how_to_make_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_VENVS", str(home / "none"))
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="there is no such program") as caught:
        config.program(home, "ml", "mlflow")
    assert "docker/venv.py ml" in caught.value.hint


# airflow_settings.yaml


def test_the_repository_s_settings_are_right() -> None:
    pools = {pool.pool_name: pool.pool_slot for pool in settings.read(ROOT).pools}
    assert pools == {"orrery-light": 4, "orrery-heavy": 2, "orrery-release": 1}


def test_no_settings_are_empty_settings(home: Path) -> None:
    assert settings.read(home) == settings.AirflowObjects()


def test_references_are_put_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "hush")
    monkeypatch.setenv("DB_PORT", "5432")
    write(
        home,
        "connections: [{conn_id: db, conn_type: postgres, conn_password: '${DB_PASSWORD}', conn_port: '${DB_PORT}',"
        " conn_extra: {region: eu, secret_key: '${DB_PASSWORD}'}}]",
    )
    connection = settings.read(home).connections[0]
    assert (connection.conn_password, connection.conn_port) == ("hush", "5432")
    assert connection.conn_extra == {"region": "eu", "secret_key": "hush"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("connections: [{conn_id: a, conn_type: b, conn_password: hush}]", "conn_password: a password must not stand"),
        ("connections: [{conn_id: a, conn_type: b, conn_password: 4711}]", "a password must not stand"),
        ("connections: [{conn_id: a, conn_type: b, conn_password: 'x${A}'}]", "a password must not stand"),
        ("connections: [{conn_id: a, conn_type: b, conn_host: 'http://u:hush@h'}]", "must not stand in a URL"),
        ("connections: [{conn_id: a, conn_type: b, conn_extra: {api_key: hush}}]", "api_key looks like a secret"),
        ('connections: [{conn_id: a, conn_type: b, conn_extra: \'{"x": {"token": "hush"}}\'}]', "token looks like"),
        ("connections: [{conn_id: a, conn_type: b, conn_extra: 'no json'}]", "expected a mapping"),
        ("connections: [{conn_id: a, conn_type: b, conn_port: 70000}]", "70000 is not a port"),
        ("connections: [{conn_id: a, conn_type: b, conn_hots: h}]", "did you mean 'conn_host'"),
        ("connections: [{conn_type: b}]", "conn_id: is missing"),
        ("connections: [{conn_id: a, conn_type: b, conn_host: '${NOT_SET}'}]", "the variable NOT_SET is not set"),
        ("pools: [{pool_name: p, pool_slot: 0}]", "runs nothing"),
        ("pools: [{pool_name: p, pool_slot: many}]", "pool_slot"),
        ("pools: [{pool_name: p, pool_slot: 1}, {pool_name: p, pool_slot: 2}]", "pool_name p is given twice"),
        ("variables: [{variable_name: api_token, variable_value: hush}]", "api_token looks like a secret"),
        ("variables: {a: b}", "variables"),
        ("pool: []", "did you mean 'pools'"),
    ],
)
def test_wrong_settings_name_file_line_and_what_is_allowed(home: Path, body: str, message: str) -> None:
    file = write(home, body)
    with pytest.raises(SpecError) as caught:
        servers.up(home, console=quiet())  # before anything starts
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{file}:")
    assert "hush" not in str(caught.value)
    assert "4711" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "airflow: [", "airflow:\n  pools: []\n  pools: []\n", "other: 1"])
def test_a_file_that_is_no_settings_at_all(home: Path, text: str) -> None:
    (home / settings.FILE).write_text(text)
    with pytest.raises(SpecError):
        settings.read(home)


def write(home: Path, body: str) -> Path:
    file = home / settings.FILE
    file.write_text(f"airflow:\n  {body}\n")
    return file


# the client


def test_no_airflow_means_try_again(home: Path) -> None:
    with AirflowApi.of(home) as api, pytest.raises(TryAgain, match="does not answer"):
        api.dag_ids()


# the real thing


def marked(home: Path) -> list[Process]:
    return [process for name in servers.SERVERS for process in processes.family(config.marker(home, name))]


def listening(family: list[Process]) -> set[str]:
    """Return the addresses, as /proc writes them, on which these processes listen for TCP."""
    owned = set()
    for process in family:
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(OSError):
                owned.add(str(fd.readlink()))
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return {fields[1] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in owned}


def refuse_hostile_requests(api: AirflowApi) -> None:
    """What REST lets through (an unknown key) ends 64 at the first task; the rest is a 400."""
    api.wait_for_dags("flight_delay.ingest")
    for value in ("../../etc/passwd", "2013-01; touch pwned", "$(touch pwned)", "2013-1"):
        with pytest.raises(RequestError):
            api.trigger("flight_delay.ingest", {"partition": value})
    with pytest.raises(RequestError):
        api.trigger("flight_delay.ingest", {"partition": "2013-01", "force": "rm -rf /"})
    unknown = api.wait(api.trigger("flight_delay.ingest", {"partition": "2013-01", "$(touch pwned)": "x"}), timeout=180)
    assert unknown.state == "failed"
    tasks = {t.task_id: t for t in api.tasks(unknown)}
    assert tasks["ingest"].state == "failed" and tasks["ingest"].try_number == 1, "64 is never tried again"
    assert "unknown key" in api.failures(unknown)


def guard_evidence(api: AirflowApi, home: Path) -> None:
    """Evidence is for whom Airflow has logged in, and nothing else of the store is served."""
    path = "flight_delay/runs/r/validate/1/evidence/a.html"
    file = home / "var" / "store" / path
    file.parent.mkdir(parents=True)
    file.write_text("<script>alert(1)</script>")
    (home / "var" / "store" / "flight_delay" / "secret.json").write_text("{}")
    base, bearer = f"{api.url}/orrery/evidence/flight_delay.ingest", {"Authorization": f"Bearer {api._token}"}
    get = partial(httpx.get, trust_env=False, timeout=30)
    assert get(f"{base}/{path}").status_code == httpx.codes.UNAUTHORIZED
    assert get(f"{base}/{path}", headers={"Authorization": "Bearer x"}).status_code in (401, 403)
    shown = get(f"{base}/{path}", headers=bearer)
    assert shown.status_code == httpx.codes.OK and shown.text.startswith("<script>")
    assert shown.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    for other in ("flight_delay/secret.json", "..%2f..%2fetc%2fpasswd", f"{path}/..%2f..%2f..%2f..%2f..%2fsecret.json"):
        assert get(f"{base}/{other}", headers=bearer).status_code == httpx.codes.NOT_FOUND, other
    elsewhere = base.replace("flight_delay.ingest", "probe")
    assert get(f"{elsewhere}/{path}", headers=bearer).status_code == httpx.codes.NOT_FOUND


@pytest.mark.slow
def test_up_run_down_and_a_launcher_killed_half_way(home: Path) -> None:
    (home / "dags" / "probe.py").write_text(DAG)
    (home / settings.FILE).write_text((ROOT / settings.FILE).read_text())
    for name in ("include", "docker"):
        (home / name).symlink_to(ROOT / name)
    (home / "plugins" / "orrery_plugin.py").symlink_to(ROOT / "plugins" / "orrery_plugin.py")
    (home / "dags" / "flight_delay.py").write_text((ROOT / "dags" / "flight_delay.py").read_text())

    # A launcher that is killed half-way leaves its servers starting; the next `up` takes them over.
    launch = [sys.executable, "-c", CALL.format("up")]
    killed = subprocess.Popen([*launch, str(home)], stdout=subprocess.DEVNULL)
    while len(marked(home)) < 4:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    console = quiet()
    servers.up(home, console=console)
    assert "Airflow is already starting" in printed(console)
    assert servers.status(home, console=console)

    # Healthy, on loopback only, the settings loaded, and tasks run in a pool of theirs.
    addresses = listening(marked(home))
    assert addresses
    assert all(address.startswith("0100007F:") for address in addresses), addresses
    with AirflowApi.of(home) as api:
        api.wait_for_dags("probe")
        good = api.wait(api.trigger("probe", partition_key="2013-03"), timeout=180)
        assert good.ok, api.failures(good)
        assert api.xcom(good, "say") == "2013-03"
        assert api.wait_for_partition("probe", "2013-03").run_id == good.run_id
        bad = api.wait(api.trigger("probe", partition_key="2013-04"), timeout=180)
        assert bad.state == "failed"
        assert "ValueError: april is refused" in api.failures(bad)
        with pytest.raises(RequestError, match="key_format"):
            api.trigger("probe", partition_key="gibberish")
        with pytest.raises(RequestError, match="it exists already"):
            api.trigger("probe", run_id=good.run_id)
        refuse_hostile_requests(api)
        guard_evidence(api, home)
    tracking = config.url("mlflow")
    made = httpx.post(f"{tracking}/api/2.0/mlflow/experiments/create", json={"name": "e"}, trust_env=False, timeout=30)
    assert made.status_code == httpx.codes.OK, made.text

    # Twice is once; half up is made whole.
    console = quiet()
    servers.up(home, console=console)
    assert "Airflow already runs" in printed(console)
    assert "MLflow already runs" in printed(console)
    before = {item.name: item.pid for item in servers.statuses(home)}
    for process in processes.family(config.marker(home, "mlflow")):
        process.signal(signal.SIGKILL)
    servers.up(home, console=quiet())
    after = {item.name: item.pid for item in servers.statuses(home)}
    assert after["airflow"] == before["airflow"]
    assert after["mlflow"] != before["mlflow"]

    # Standalone killed by force leaves orphans; `down` finds them all.
    leader = before["airflow"]
    assert leader is not None
    os.kill(leader, signal.SIGKILL)
    servers.down(home, console=quiet())
    assert marked(home) == []
    assert [item.state for item in servers.statuses(home)] == ["stopped", "stopped"]
    for name in servers.SERVERS:
        assert processes.port_holder(config.port(name)) is None


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.05, 0.3, 1.0, 4.0])
def test_down_after_a_launcher_killed_at_any_moment(home: Path, after: float) -> None:
    launch = [sys.executable, "-c", CALL.format("up")]
    launcher = subprocess.Popen([*launch, str(home)], stdout=subprocess.DEVNULL)
    time.sleep(0.4 + after)
    launcher.kill()
    launcher.wait()
    servers.down(home, console=quiet())
    assert marked(home) == []

"""One Spark session for one step: quick to start, quiet, and gone when the step is gone.

Spark talks to a JVM of its own through a pipe and sockets. The whole conversation runs in a thread beside the
main one, which only waits: so SIGTERM is answered at once (py4j would swallow the exception of a signal handler),
and what is left to do then is to end the JVM. When this process is killed outright, the pipe closes and the JVM
ends by itself; its Python workers hang on the JVM in the same way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from orrery.errors import OrreryError
from orrery.scoring import executors, java

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

T = TypeVar("T")

# The JVM only hands out work here, so it is tuned for a short life: the first compiler and one collector thread
# take 11 s of CPU from start to end where the defaults take 25 s (2 cores, measured with an empty job).
JVM_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:-UsePerfData"
DEFAULTS = {
    "spark.app.name": "orrery",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.catalogImplementation": "in-memory",
    "spark.sql.adaptive.enabled": "false",
    # The one query is a list of part numbers: compiling Java for it takes longer than interpreting it.
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    # A worker process keeps its ONNX session from task to task.
    "spark.python.worker.reuse": "true",
    # A crash in native code leaves the worker's Python stack in the log.
    "spark.python.worker.faulthandler.enabled": "true",
    "spark.driver.memory": "1g",
}
LOOPBACK = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
LOG4J = """rootLogger.level = error
rootLogger.appenderRef.stderr.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss} %-5p %c{1}: %m%n%ex
"""
TICK_S = 0.2
STOP_S = 2.0  # within the four seconds that a local step has between SIGTERM and SIGKILL
LOG_TAIL = 30


class SparkFailed(OrreryError):
    """Spark could not start, or its job failed for a reason that is none of ours; the message has its log's end."""


@dataclass
class Conversation(Generic[T]):
    """What the thread that speaks with Spark leaves behind."""

    log: Path
    value: T | None = None
    error: BaseException | None = None
    process: subprocess.Popen[bytes] | None = None
    done: threading.Event = field(default_factory=threading.Event)


def with_spark(
    master: str, conf: Mapping[str, str], scratch: Path, use: Callable[[SparkSession], T], wait: Callable[[], None]
) -> T:
    """Start Spark, let `use` work with the session, stop it, return what `use` returned.

    `wait` is called five times a second meanwhile, in the caller's thread. Spark writes its log to
    `scratch/spark.log`. A session that this process has already is used and left running. Raises what `use`
    raises, `UserError` when there is no Java, `SparkFailed` when Spark itself fails.
    """
    talk: Conversation[T] = Conversation(scratch / "spark.log")
    target = _converse(talk, master, conf, scratch, use)
    thread = threading.Thread(target=target, name="spark", daemon=True)
    thread.start()
    try:
        while not talk.done.wait(TICK_S):
            wait()
    except BaseException:
        logging.getLogger("py4j").setLevel(logging.CRITICAL)  # its sockets are about to break, and it would say so
        if talk.process is not None:
            end(talk.process)
        raise
    thread.join(STOP_S)
    if talk.error is not None:
        raise _told(talk.error, talk)
    return talk.value  # type: ignore[return-value]


def _converse(
    talk: Conversation[T], master: str, conf: Mapping[str, str], scratch: Path, use: Callable[[SparkSession], T]
) -> Callable[[], None]:
    def target() -> None:
        try:
            with opened(talk, master, conf, scratch) as spark:
                talk.value = use(spark)
        except BaseException as e:
            talk.error = e
        finally:
            talk.done.set()

    return target


@contextlib.contextmanager
def opened(talk: Conversation[Any], master: str, conf: Mapping[str, str], scratch: Path) -> Iterator[SparkSession]:
    """Start Spark and stop it at the end; a session that this process has already is lent, and left running."""
    from pyspark import SparkConf, SparkContext
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import SparkSession

    if SparkContext._active_spark_context is not None:
        yield SparkSession.builder.getOrCreate()
        return
    settings = SparkConf().setAll(list(spark_settings(master, conf, scratch).items()))
    with _environment(master), talk.log.open("wb") as log:
        gateway = launch_gateway(settings, {"stdout": log, "stderr": log})
        talk.process = gateway.proc
        context = SparkContext(gateway=gateway, conf=settings)
    try:
        yield SparkSession(context)
    finally:
        with contextlib.suppress(Exception):
            context.stop()
        end(gateway.proc)
        gateway.shutdown()
        SparkContext._gateway = SparkContext._jvm = None  # a second session in this process needs a JVM of its own


def spark_settings(master: str, conf: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Return Spark's settings: the defaults here, then those of platform.yaml over them.

    Raises `UserError` for executors as pods that this process cannot be the driver of.
    """
    properties = scratch / "log4j2.properties"
    properties.write_text(LOG4J)
    settings = {**DEFAULTS, "spark.master": master}
    if is_local(master):
        settings |= {**LOOPBACK, "spark.local.dir": str(scratch / "spark")}
    if executors.is_kubernetes(master):
        settings |= executors.settings(master, conf, scratch, os.environ)
    options = f"-Dlog4j2.configurationFile={properties.as_uri()} {JVM_OPTIONS}"
    name = "spark.driver.extraJavaOptions"
    return {**settings, **conf, name: f"{options} {conf.get(name, '')}".strip()}


def is_local(master: str) -> bool:
    """Tell whether driver and workers are all on this machine, in one JVM."""
    return re.match(r"local(\[|$)", master) is not None


@contextlib.contextmanager
def _environment(master: str) -> Iterator[None]:
    """Set what pyspark reads from the environment while it starts: this Python, this pyspark, a Java that will do."""
    import pyspark

    wanted = {
        "JAVA_HOME": str(java.find_home(os.environ)),
        "PYSPARK_PYTHON": os.environ.get("PYSPARK_PYTHON", sys.executable) if not is_local(master) else sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "SPARK_HOME": str(Path(pyspark.__file__).parent),  # another Spark on this machine speaks another dialect
        "PYSPARK_SUBMIT_ARGS": "pyspark-shell",
    }
    if is_local(master):
        wanted["SPARK_LOCAL_IP"] = "127.0.0.1"
    before = {name: os.environ.get(name) for name in (*wanted, "PYSPARK_GATEWAY_PORT")}
    os.environ.pop("PYSPARK_GATEWAY_PORT", None)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def end(process: subprocess.Popen[bytes]) -> None:
    """End the JVM: it leaves when its input closes; what has not left in two seconds is killed."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _told(error: BaseException, talk: Conversation[Any]) -> BaseException:
    """Return what to raise for an error of the conversation: ours as it is, Spark's with the end of its log."""
    if isinstance(error, OrreryError) or not _is_sparks(error):
        return error
    code = talk.process.poll() if talk.process is not None else None
    # A worker that dies is reported by the JVM; a JVM that dies breaks the line to it.
    lost = code is not None or isinstance(error, OSError) or type(error).__module__.startswith("py4j")
    what = f"its JVM ended (exit code {code})" if lost else summary(str(error))
    hint = "often out of memory: look at the machine's log" if lost else "Spark's log is linked"
    lines = talk.log.read_text(errors="replace").splitlines()[-LOG_TAIL:] if talk.log.exists() else []
    return SparkFailed(f"Spark: {what}", hint=hint, details={"error": str(error)[-4000:], "log": lines})


def summary(text: str) -> str:
    """Return the line that tells what happened: the end of a Python traceback where there is one, else the first."""
    lines = text.split("JVM stacktrace:", maxsplit=1)[0].strip().splitlines() or ["no message"]
    ends = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Fault|Invalid\w*)\b.*:", line)]
    return (ends[-1] if "Traceback (most recent call last):" in text and ends else lines[0])[:500]


def _is_sparks(error: BaseException) -> bool:
    module = type(error).__module__.split(".")[0]
    return module in ("pyspark", "py4j") or isinstance(error, OSError)


__all__ = ["Conversation", "SparkFailed", "end", "is_local", "opened", "spark_settings", "with_spark"]

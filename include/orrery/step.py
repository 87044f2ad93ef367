"""One attempt of one step, as its own process: read the config, do the work apart, commit once, leave a result.

    orrery step --config URI --result URI

Killed anywhere, nothing of it is visible; run twice, it changes nothing. See `contract` for the documents.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from orrery import bundle, fingerprint, imports, lastwords, log
from orrery.catalogue import verb_of
from orrery.contract import STATUS_OF_CODE, Node, Result, StepConfig, StepError, Verb
from orrery.errors import BUG, DONE, INTERRUPTED, Interrupted, OrreryError, RequestError, TryAgain, UserError
from orrery.lease import Lease
from orrery.spec import KnowledgeBaseSpec, ModelSpec, load_knowledge, load_model
from orrery.store import File, Manifest, Store, content_digest, trouble

T = TypeVar("T")
# For how long what is finished is offered to a store that is away, in seconds. An error's document is worth less, and
# after SIGTERM there is little time.
COMMITTING_S = 300.0
TELLING_S, TELLING_AN_ERROR_S = 10.0, 2.0


class Work:
    """What a verb's `run(work, params)` has at hand: config, spec, inputs, and a place to write apart."""

    def __init__(self, config: StepConfig, store: Store, scratch: Path) -> None:
        self.config, self.store, self.scratch = config, store, scratch
        self.verb: Verb = verb_of(config)
        self.node = Node.here(os.environ)
        self.log = log.get()
        self.address = config.address or ""
        self._attempt = f"a{config.attempt}-{os.urandom(4).hex()}"
        self._paths: dict[str, Path] = {}
        self._adopted: dict[str, File] = {}
        self._lease: Lease | None = None
        self._committing = False
        self._evidence: dict[str, str] = {}
        self._afterwards: list[Callable[[], None]] = []

    # -- what is given ---------------------------------------------------------------------------

    @cached_property
    def project_folder(self) -> Path:
        """The project folder, unpacked from its bundle."""
        return bundle.fetch(self.store, self.config.bundle, self.scratch / "project")

    @cached_property
    def spec(self) -> ModelSpec:
        """The project's spec, of a model."""
        return load_model(self.project_folder)

    @cached_property
    def knowledge(self) -> KnowledgeBaseSpec:
        """The project's spec, of a knowledge base."""
        return load_knowledge(self.project_folder)

    def module(self, name: str) -> Any:
        """Import the project's `features` or `model` module."""
        return bundle.load_module(self.project_folder, self.config.project, name)

    def inputs(self, name: str) -> list[Manifest]:
        """Return the manifests of an input, each checked against the digest that was planned with."""
        return [self.store.need(ref) for ref in self.config.inputs.get(name, ())]

    def input(self, name: str) -> Manifest:
        """Return the one manifest of an input. Raises `RequestError` when there is not exactly one."""
        found = self.inputs(name)
        if len(found) != 1:
            raise RequestError(f"{self.config.verb} needs one input {name!r}, was given {len(found)}")
        return found[0]

    def open_input(self, manifest: Manifest, name: str) -> Path:
        """Return a local path of one file of an input."""
        path = manifest.uri(name)
        try:
            return self.store.local(path, self.scratch / "inputs")
        except FileNotFoundError:
            raise UserError(
                f"{self.store.uri}/{path} is gone, its manifest is not", hint="run the step that makes it again"
            ) from None

    def progress(self, label: str, total: float, unit: str = "") -> contextlib.AbstractContextManager[log.Tick]:
        """Show progress; see `log.progress`."""
        return log.progress(label, total, unit)

    # -- what is made ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def at(self, address: str) -> Iterator[bool]:
        """For a verb that learns its address only while it works (`ingest`): False when that is committed already."""
        self.address = address
        yield self.committed() is None

    def committed(self) -> Manifest | None:
        """Return what is already committed at this address, its files verified, or None."""
        found = self.store.manifest(f"{self.config.project}/{self.config.verb}/{self.address}/manifest.json")
        if found is None:
            return None
        problems = self.store.missing_files(found)
        if problems:
            raise UserError(
                f"{self.store.uri}/{found.path} is committed but damaged: {'; '.join(problems)}",
                hint="delete that folder and run the step again: it makes the same bytes",
            )
        return found

    @property
    def attempt_folder(self) -> str:
        """Store path below which this attempt writes; nobody reads it before the commit."""
        return f"{self.config.project}/{self.config.verb}/{self.address}/{self._attempt}"

    def path(self, name: str) -> Path:
        """Return a local path to write the output file `name` to; the commit takes it up."""
        if name not in self._paths:
            target = self.scratch / "out" / name
            if self.store.is_local and self.address and self.node.leads:
                target = Path(self.store.full(f"{self.attempt_folder}/{name}"))
            with trouble(str(target)):
                target.parent.mkdir(parents=True, exist_ok=True)
            self._paths[name] = target
        return self._paths[name]

    def write(self, name: str, data: bytes) -> Path:
        """Write a small output file."""
        path = self.path(name)
        with trouble(str(path)):
            path.write_bytes(data)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write an output file of canonical JSON."""
        return self.write(name, (fingerprint.canonical(value) + "\n").encode())

    def adopt(self, name: str, relative: str, size: int, sha256: str) -> None:
        """Take up a file that others (Spark's workers) wrote below `attempt_folder`."""
        self._adopted[name] = File(path=f"{self._attempt}/{relative}", size=size, sha256=sha256)

    def evidence(self, name: str, data: bytes | Path) -> str:
        """Keep a file for people (a report, a plot) with the attempt, also when it fails; return its path."""
        path = f"{self.config.folder}/evidence/{name}"
        if isinstance(data, Path):
            self.store.upload(data, path)
        else:
            self.store.put(path, data)
        self._evidence[name] = path
        return path

    def evidence_folder(self, name: str, folder: Path) -> str:
        """Keep a whole folder for people; return its store path."""
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.evidence(f"{name}/{file.relative_to(folder).as_posix()}", file)
        return f"{self.config.folder}/evidence/{name}"

    def afterwards(self, clean: Callable[[], None]) -> None:
        """Do something once the output is committed: remove what was kept only to go on after an interruption."""
        self._afterwards.append(clean)

    def clean(self) -> None:
        """Do what `afterwards` was asked for; what cannot be removed costs nothing but room."""
        for clean in self._afterwards:
            with contextlib.suppress(OrreryError, OSError):
                clean()

    def discard(self) -> None:
        """Remove what this attempt wrote for nothing: retries on a full disk must not make it fuller.

        Once the manifest is on its way, whatever came back, it may stand and name these files: then they stay.
        """
        if not self.address:
            return
        with contextlib.suppress(OrreryError, OSError):  # the error that led here is the one to tell
            manifest = f"{self.config.project}/{self.config.verb}/{self.address}/manifest.json"
            # A bucket may still take what it did not answer to; what a folder has not got will not come.
            if self._committing and (not self.store.is_local or self.store.exists(manifest)):
                return
            self.store.remove(self.attempt_folder)

    def fence(self) -> None:
        """Raise `Fenced` when a newer attempt has taken over; before anything that a commit cannot undo."""
        if self._lease:
            self._lease.check()

    def commit(self, result: Result) -> Manifest:
        """Put the manifest. The first commit at an address wins; a later one is given the first's."""
        files = dict(self._adopted)
        for name, path in sorted(self._paths.items()):
            done = self.store.upload(path, f"{self.attempt_folder}/{name}")
            files[name] = File(path=f"{self._attempt}/{name}", size=done.size, sha256=done.sha256)
        config = self.config
        manifest = Manifest(
            project=config.project,
            verb=config.verb,
            key=config.key,
            address=self.address,
            digest=content_digest(files),
            files=files,
            inputs=config.inputs,
            fingerprint=config.fingerprint,
            facts=result.facts,
            result=json.loads(result.model_dump_json(exclude={"seconds", "skipped"})),
            run=config.run,
            attempt=config.folder,
            created=_now(),
        )
        # Written before the manifest: an entry without a manifest is ignored, a manifest without entry is lost.
        for ref in {r.path: r for refs in config.inputs.values() for r in refs}.values():
            address = ref.path.split("/")[-2]
            self.store.put_if_absent(f"{config.project}/dependents/{address}/{config.verb}.{self.address}", b"")
        self.fence()
        self._committing = True
        if not self.store.put_if_absent(manifest.path, manifest.model_dump_json(indent=1).encode()):
            winner = self.store.manifest(manifest.path)
            if winner is not None and winner.attempt == config.folder:
                return winner  # ours, put by a try whose answer was lost
            self._committing = False
            if winner is None:
                raise TryAgain(f"{self.store.uri}/{manifest.path}: somebody's commit came first and is gone again")
            self.log.warning("another attempt has committed this output first; its result stands", other=winner.attempt)
            return winner
        return manifest

    def publish(self, manifest: Manifest, result: Result) -> None:
        """Make the output its dataset's partition, and list what a superseded one had been used for."""
        config, dataset = self.config, self.verb.dataset
        if dataset is None or not config.publish:
            return
        before = self.store.publish(config.project, dataset, config.key, manifest, _now(), self.fence)
        old = self.store.manifest(before.manifest) if before else None
        if old is not None and old.digest != manifest.digest:
            stale = self.store.dependents(old)
            result.facts["supersedes"] = old.path
            result.facts["stale"] = sorted({f"{m.verb} {m.key}" for m in stale})
            # A warning is for someone to act on: nobody need when nothing was made from the earlier version.
            say = self.log.warning if stale else self.log.info
            say(
                f"{dataset} {config.key} supersedes an earlier version",
                earlier=old.created,
                stale=", ".join(result.facts["stale"]) or "nothing",
            )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def execute(config: StepConfig, store: Store, scratch: Path, seconds: dict[str, float]) -> Result:
    """Run one attempt to its committed result. Raises what the verb raises."""
    verb = verb_of(config)
    try:
        params = verb.params.model_validate(config.params)
    except ValidationError as e:
        first = e.errors()[0]
        raise RequestError(f"{config.verb}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    work = Work(config, store, scratch)
    if work.node.of > 1 and not verb.spreads:
        raise RequestError(
            f"{config.verb} cannot be spread over {work.node.of} pods", hint="a compute class with one pod"
        )
    if not work.node.leads:
        with _timed(seconds):
            return _along(work, verb, params)
    if config.address and (found := work.committed()) is not None:
        return _again(work, found)
    if verb.effect:
        with _timed(seconds):
            return _done(work, verb, params)
    slot = config.address or f"at-{config.key}"
    owner = f"{config.run}/{config.task}"
    with Lease(store, f"{config.project}/{config.verb}/{slot}/lease", owner, config.folder) as lease:
        work._lease = lease
        if config.address and (found := work.committed()) is not None:
            return _again(work, found)
        try:
            with _timed(seconds):
                result = _done(work, verb, params)
            began = time.monotonic()
            manifest = work.committed() or patiently("committed", lambda: work.commit(result), COMMITTING_S)
        except BaseException:
            work.discard()
            raise
        if manifest.attempt != config.folder:
            result = _other(work, manifest, result)
        patiently("published", lambda: work.publish(manifest, result), COMMITTING_S)
        work.clean()
        seconds["commit"] = time.monotonic() - began
    result.output, result.digest = manifest.path, manifest.digest
    return result


def patiently(what: str, act: Callable[[], T], longest: float) -> T:
    """Do what a store refuses that is away for a moment, again for up to `longest` seconds; then raise `TryAgain`.

    What comes at the end of a step: hours of work are worth some minutes.
    """
    try:
        return act()
    except TryAgain as e:
        log.get().warning(f"not {what} yet, it is tried again for {longest:.0f} s: {e.message}")
    from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

    again = Retrying(
        retry=retry_if_exception_type(TryAgain),
        stop=stop_after_delay(longest),
        wait=wait_exponential(multiplier=0.5, max=10),
        reraise=True,
    )
    return again(act)


def _along(work: Work, verb: Verb, params: Any) -> Result:
    """Do the part of a node that does not lead: without a lease, and with nothing to commit."""
    found = work.committed()
    if found is not None:
        return Result(skipped=f"the same output is committed already ({found.created})")
    return _done(work, verb, params)


def _done(work: Work, verb: Verb, params: Any) -> Result:
    """Do the verb's work: whatever it imports, at its top or where it needs it, is imported here."""
    run: Callable[[Work, Any], Result] = importlib.import_module(verb.module).run
    with bundle.one_process(f"{work.config.verb} {work.config.key}"):
        result = run(work, params)
    result.drop_not_finite()
    return result


@contextlib.contextmanager
def _timed(seconds: dict[str, float]) -> Iterator[None]:
    """Tell imports from work."""
    began, before = time.monotonic(), imports.spent()
    yield
    seconds["import"] = imports.spent() - before
    seconds["work"] = time.monotonic() - began - seconds["import"]


def _other(work: Work, manifest: Manifest, ours: Result) -> Result:
    """Return the result of the attempt whose commit stands: figures and links must be those of the output."""
    work.discard()
    result = Result.model_validate(manifest.result)
    result.skipped = ours.skipped or f"the same output is committed already ({manifest.created})"
    return result


def _again(work: Work, found: Manifest) -> Result:
    """Return the result of what is committed already; publish it too, in case a kill came in between."""
    result = Result.model_validate(found.result)
    result.skipped = f"unchanged since {found.created}: same code, project, environment, config and inputs"
    result.output, result.digest = found.path, found.digest
    work.publish(found, result)
    with contextlib.suppress(OrreryError, OSError):  # a kill between the commit and the tidying up has left them
        work.store.remove(f"{found.project}/{found.verb}/{found.address}/checkpoints")
    return result


def main(argv: list[str], started: float) -> int:
    """Entry of `orrery step`; `started` is when the process began (time.time())."""
    import argparse

    parser = argparse.ArgumentParser(prog="orrery step", description="Run one attempt of one step (for machines).")
    parser.add_argument("--config", required=True, metavar="URI", help="the attempt's config document")
    parser.add_argument("--result", required=True, metavar="URI", help="where the result document goes")
    args = parser.parse_args(argv)
    imports.watch()
    log.configure()
    # onnxruntime uploads usage events unless told not to before it is imported; nobody asked our users.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # Asked otherwise whether there is a GPU, CUDA could not be used any more by the ranks that are forked from here.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return attempt(args.config, args.result, started)


class _Stopped(BaseException):
    """SIGTERM has come. No `Exception`, so that a library's or a model's broad `except` cannot swallow it."""

    told = Interrupted("SIGTERM: told to stop", hint="the next attempt does the work again, or finds it committed")


def _on_sigterm(signum: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_for_certain()
    raise _Stopped


def end_for_certain() -> None:
    """Once told to stop, end within `ORRERY_OUTLIVE` seconds, whatever hangs: who started the step may be gone."""
    try:
        limit = float(os.environ.get("ORRERY_OUTLIVE", ""))
    except ValueError:
        return
    timer = threading.Timer(limit, _end)
    timer.daemon = True
    timer.start()


def _end() -> None:
    if os.getsid(0) == os.getpid():  # a session of its own: everything in it is the step's
        os.killpg(0, signal.SIGKILL)
    os._exit(INTERRUPTED)


def attempt(config_uri: str, result_uri: str, started: float) -> int:
    """Run the attempt that a config document describes; write the result document; return the exit code."""
    seconds: dict[str, float] = {"start": time.time() - started}
    words = lastwords.begin(started)
    try:
        signal.signal(signal.SIGTERM, _on_sigterm)
        code, result = _guarded(config_uri, seconds)
    except _Stopped:  # outside of the work: while it was set up, or an error was being told
        code, result = INTERRUPTED, failed(_Stopped.told)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the result is being written; the end is near anyway
    seconds["total"] = time.time() - started
    result.seconds = {k: round(v, 4) for k, v in seconds.items()}
    try:
        root, _, name = result_uri.rpartition("/")
        document = result.model_dump_json(indent=1).encode()
        patiently("told", lambda: Store(root).put(_of_node(name), document), TELLING_AN_ERROR_S if code else TELLING_S)
    except Exception as e:  # the result cannot be told; the exit code and the log still are
        log.get().error(f"the result could not be written to {result_uri}: {e}")
        code = code or getattr(e, "exit_code", BUG)
    if words:
        words.end(result)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    return code


def _of_node(name: str) -> str:
    """Return what the result document is called: `result.json`, and `result-1.json` of a node that does not lead."""
    try:
        node = Node.here(os.environ)
    except RequestError:  # which is what the document tells
        return name
    return name if node.leads else f"{name.removesuffix('.json')}-{node.number}.json"


def _guarded(config_uri: str, seconds: dict[str, float]) -> tuple[int, Result]:
    """Do the work, whatever happens; return the exit code and the result document."""
    logger, scratch, project = log.get(), None, ""
    try:
        with trouble(tempfile.gettempdir()):
            scratch = Path(tempfile.mkdtemp(prefix="orrery-"))
        config = _read_config(config_uri)
        project = config.project
        result = execute(config, Store(config.store), scratch, seconds)
        _say(config, result)
        return DONE, result
    except OrreryError as e:
        # The bundle was unpacked into a folder that is gone by now: name the file that the user has.
        e.message = e.message.replace(f"{scratch}/project/", f"projects/{project}/")
        logger.error(str(e))
        return e.exit_code, failed(e)
    except _Stopped:
        logger.error(str(_Stopped.told))
        return INTERRUPTED, failed(_Stopped.told)
    except KeyboardInterrupt:
        return INTERRUPTED, failed(Interrupted("interrupted from the keyboard"))
    except (Exception, SystemExit) as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            full = TryAgain(f"no space left: {e}", hint="free some space, and it can run again")
            logger.error(str(full))
            return full.exit_code, failed(full)
        logger.error(f"{type(e).__name__}: {e}", exc_info=True)
        return BUG, failed(e)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def failed(error: BaseException) -> Result:
    """Return the result document of an attempt that ended with `error`."""
    code = error.exit_code if isinstance(error, OrreryError) else BUG
    details: dict[str, Any] = (
        error.details if isinstance(error, OrreryError) else {"traceback": traceback.format_exc()[-4000:]}
    )
    document = StepError(
        kind=type(error).__name__,
        message=error.message if isinstance(error, OrreryError) else str(error),
        hint=error.hint if isinstance(error, OrreryError) else "",
        details=json.loads(json.dumps(details, default=str)),
    )
    links = details.get("links") if isinstance(details, dict) else None
    return Result(
        status=STATUS_OF_CODE.get(code, "bug"), error=document, links=dict(links) if isinstance(links, dict) else {}
    )


def _read_config(uri: str) -> StepConfig:
    root, _, name = uri.rpartition("/")
    try:
        return StepConfig.model_validate_json(Store(root).read(name))
    except FileNotFoundError:
        raise RequestError(f"there is no config document at {uri}") from None
    except ValidationError as e:
        first = e.errors()[0]
        raise RequestError(f"{uri}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _say(config: StepConfig, result: Result) -> None:
    """Say in one line how it ended."""
    shown = dict(list(result.metrics.items())[:6])
    if result.skipped:
        log.get().info(f"{config.verb} {config.key}: skipped, {result.skipped}")
    else:
        log.get().info(f"{config.verb} {config.key}: {result.verdict or 'done'}", **shown)
    for reason in result.reasons:
        log.get().info(f"  {reason}")

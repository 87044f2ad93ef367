"""A kubelet that runs a container's command as a process of this machine, and reports it as a kubelet does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.objects import (
    CONFIG_MAPS,
    PODS,
    SECRETS,
    Change,
    Object,
    Refused,
    is_over,
    now,
    quantity,
    set_condition,
)

if TYPE_CHECKING:
    from cluster.api import Cluster

ROOT = Path(__file__).resolve().parents[2]
# A process of this pod, whatever session it made for itself: what a container's end kills.
MARK = "ORRERY_TEST_CONTAINER"
Say = Callable[[str], None]
Play = Callable[[Object, Say], Awaitable[int]]
PULL_AGAIN_S, PULL_LONGEST_S = 10.0, 300.0
SYNC_S = 1.0  # how often what is missing (a Secret) is looked for
GONE_S = 0.02  # from a deleted pod's last status to its end
LONGEST_MESSAGE = 4096
DEADLINE = "Pod was active on the node longer than the specified deadline"


class Waiting(Exception):
    """A container cannot be started; the kubelet tries again."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


@dataclass
class Container:
    """One container from its start to its end, with its log."""

    spec: Object
    lines: list[tuple[str, bytes]] = field(default_factory=list)
    started: str = ""
    finished: str = ""
    code: int | None = None
    reason: str = ""
    waiting: tuple[str, str] = ("ContainerCreating", "")
    message_file: Path | None = None
    message: str = ""
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: asyncio.subprocess.Process | None = None
    task: asyncio.Task[int] | None = None
    pumped: asyncio.Task[None] | None = None
    forced: int | None = None  # the exit code that a test wants
    cut: bool = False  # it was removed while it ran: its log ends
    silent: bool = False  # its node is off: nobody hears any more of it

    def status(self) -> Object:
        state: Object
        if self.code is not None:
            ended = {"exitCode": self.code, "reason": self.reason, "startedAt": self.started or None}
            state = {"terminated": {**ended, "finishedAt": self.finished, "containerID": self.containerd}}
            if self.message:
                state["terminated"]["message"] = self.message
        elif self.started:
            state = {"running": {"startedAt": self.started}}
        else:
            reason, message = self.waiting
            state = {"waiting": {"reason": reason, **({"message": message} if message else {})}}
        on = self.code is None and bool(self.started)
        return {
            "name": self.spec["name"], "state": state, "lastState": {}, "ready": on, "started": on, "restartCount": 0,
            "image": self.spec["image"], "imageID": "", "containerID": self.containerd if self.started else "",
        }  # fmt: skip

    @property
    def containerd(self) -> str:
        return f"containerd://{self.identity}"

    def say(self, line: str) -> None:
        self.lines.append((now(nanoseconds=True), line.encode() + b"\n"))

    def terminate(self) -> None:
        """SIGTERM to the container's first process. As its number is 1, the kernel spares it if it has no handler."""
        if self.task is not None:
            self.task.cancel("SIGTERM")
        elif self.process is not None and self.code is None and _catches(self.process.pid, signal.SIGTERM):
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to all that runs in it."""
        if self.task is not None:
            self.task.cancel("SIGKILL")
        if self.process is not None:
            _kill_marked(self.identity)

    async def wait(self) -> int:
        """Return the exit code, once nothing of it runs any more."""
        if self.task is not None:
            try:
                return await asyncio.shield(self.task)
            except asyncio.CancelledError as e:
                if not self.task.done():
                    raise
                return 137 if e.args == ("SIGKILL",) else 143
        assert self.process is not None and self.pumped is not None
        await _exited(self.process.pid)  # asyncio's own wait is for the end of the output too, which a child may hold
        _kill_marked(self.identity)
        code = await self.process.wait()
        await self.pumped
        return 128 - code if code < 0 else code


class Worker:
    """One pod on its node."""

    def __init__(self, kubelet: Kubelet, pod: Object) -> None:
        self.kubelet, self.pod = kubelet, pod
        self.objects = kubelet.cluster.objects
        meta, spec = pod["metadata"], pod["spec"]
        self.folder = kubelet.cluster.state / "pods" / f"{meta['namespace']}-{meta['name']}-{meta['uid'][:8]}"
        self.first = [Container(c) for c in spec.get("initContainers") or []]
        self.main = [Container(c) for c in spec["containers"]]
        self.stopping: asyncio.Task[None] | None = None
        self.why: tuple[str, str] | None = None  # status.reason and message of a pod that the kubelet itself ends
        self.condition: tuple[str, str] | None = None
        self.mounts: list[tuple[str, Path]] = []
        self.off = False
        self.task = asyncio.get_running_loop().create_task(self._run())
        self.timers: list[asyncio.TimerHandle] = []

    # -- what others do to it ---------------------------------------------------------------------

    def stop(self, grace: float, why: tuple[str, str] | None = None, condition: tuple[str, str] | None = None) -> None:
        """End the pod: SIGTERM, and SIGKILL after `grace` seconds."""
        if self.stopping is None:
            self.why, self.condition = why, condition
            self.stopping = asyncio.get_running_loop().create_task(self._stop(grace))

    async def _stop(self, grace: float) -> None:
        if not any(c.started and c.code is None for c in (*self.first, *self.main)):
            self.task.cancel("stopped before its start")
        for container in (*self.first, *self.main):
            if container.started and container.code is None:
                if grace > 0:
                    container.terminate()
                self.timers.append(asyncio.get_running_loop().call_later(grace, container.kill))

    def vanish(self, silent: bool = True) -> None:
        """All is dead at once, and nobody reports it: the power is cut (`silent`: a log that is followed just stops)."""
        self.off = True
        for container in (*self.first, *self.main):
            container.silent = silent and container.code is None
            container.cut = not silent
            if container.code is None:
                container.kill()

    async def close(self) -> None:
        self.off = True
        for timer in self.timers:
            timer.cancel()
        for container in (*self.first, *self.main):
            container.kill()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        for container in (*self.first, *self.main):
            if container.process is not None and container.pumped is not None:
                await asyncio.gather(container.process.wait(), container.pumped)
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- its life ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await self._live()
        finally:
            for timer in self.timers:
                timer.cancel()
        if not self.off:
            self._finish()
            if self.pod["metadata"].get("deletionTimestamp"):
                await asyncio.sleep(GONE_S)
                if not self.off:
                    self.objects.remove(PODS, self.pod)

    async def _live(self) -> None:
        spec = self.pod["spec"]
        self._report(startTime=now())
        if deadline := spec.get("activeDeadlineSeconds"):
            ends = asyncio.get_running_loop().call_later(
                float(deadline), self.stop, _grace(self.pod), ("DeadlineExceeded", DEADLINE)
            )
            self.timers.append(ends)
        self._mount()
        for container in self.first:
            await self._start(container)
            await self._ended(container)
            if container.code:
                return
        for container in self.main:
            await self._start(container)
        self._report()
        await asyncio.gather(*(self._ended(c) for c in self.main))

    async def _ended(self, container: Container) -> None:
        if container.code is None:
            code = await container.wait()
            code = code if container.forced is None else container.forced
            if self.off:
                return
            container.message = _last_words(container, code)
            container.reason = container.reason or ("Completed" if code == 0 else "Error")
            container.finished, container.code = now(), code
        self.kubelet.wake()
        if not all(c.code is not None for c in self.main):
            self._report()

    async def _start(self, container: Container) -> None:
        """Start a container, trying again as a kubelet does for as long as it cannot."""
        again = PULL_AGAIN_S
        while True:
            try:
                await self._pull(container)
                await self._launch(container)
                return
            except Waiting as e:
                self.event("Failed" if "Image" in e.reason else "FailedMount", e.message, "Warning")
                self._wait(container, e.reason, e.message)
                if e.reason == "ErrImagePull":
                    await asyncio.sleep(min(0.2, SYNC_S * self.kubelet.cluster.pace))
                    image = container.spec["image"]
                    self._wait(container, "ImagePullBackOff", f'Back-off pulling image "{image}": ErrImagePull: {e}')
                    await asyncio.sleep(again * self.kubelet.cluster.pace)
                    again = min(2 * again, PULL_LONGEST_S)
                else:
                    await asyncio.sleep(SYNC_S * self.kubelet.cluster.pace)

    def _wait(self, container: Container, reason: str, message: str) -> None:
        container.waiting = (reason, message)
        self._report()

    async def _pull(self, container: Container) -> None:
        image, policy = container.spec["image"], container.spec.get("imagePullPolicy", "IfNotPresent")
        if not re.fullmatch(r"[a-z0-9._:/-]+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", image):
            message = f'Failed to apply default image tag "{image}": couldn\'t parse image name "{image}": invalid reference format'
            raise Waiting("InvalidImageName", message)
        trouble = self.kubelet.images.get(image)
        if trouble and time.monotonic() < trouble[1]:
            raise Waiting("ErrImagePull", trouble[0])
        if self.kubelet.play is not None or self.kubelet.environment_of(image) is not None:
            return
        if policy == "Never":
            raise Waiting("ErrImageNeverPull", f'Container image "{image}" is not present with pull policy of Never')
        name = image if "." in image.partition("/")[0] else f"docker.io/{image}"
        message = f'failed to pull and unpack image "{name}": failed to resolve reference "{name}": {name}: not found'
        raise Waiting("ErrImagePull", f'rpc error: code = NotFound desc = failed to pull image "{image}": {message}')

    async def _launch(self, container: Container) -> None:
        env = self._environment(container)
        if self.kubelet.play is not None:
            container.task = asyncio.get_running_loop().create_task(self.kubelet.play(self.pod, container.say))
            container.started = now()
            return
        argv = self._argv(container, env)
        folder = self.folder / container.spec["name"]
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.which(argv[0], path=env["PATH"]) is None:
            message = f'failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: exec: "{argv[0]}": executable file not found in $PATH: unknown'
            container.reason, container.message = "StartError", message
            container.started = "1970-01-01T00:00:00Z"
            container.finished, container.code = now(), 128
            return
        # A session of its own, and an end with the cluster's process, however that one ends.
        container.process = await asyncio.create_subprocess_exec(
            "setpriv", "--pdeathsig", "KILL", "--", *argv, env=env, cwd=folder, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        container.started = now()
        container.pumped = asyncio.get_running_loop().create_task(self._pump(container))

    async def _pump(self, container: Container) -> None:
        """Keep the log, line by line."""
        assert container.process is not None and container.process.stdout is not None
        rest = b""
        while chunk := await container.process.stdout.read(1 << 16):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                container.lines.append((now(nanoseconds=True), line + b"\n"))
            if whole:
                self.kubelet.wake()
        if rest:
            container.lines.append((now(nanoseconds=True), rest))

    # -- its surroundings -------------------------------------------------------------------------

    def _mount(self) -> None:
        """Make a folder of each volume."""
        volumes = {v["name"]: v for v in self.pod["spec"].get("volumes") or []}
        for name, volume in volumes.items():
            (self.folder / "volumes" / name).mkdir(parents=True, exist_ok=True)
            if secret := volume.get("secret"):
                found = self._data(SECRETS, secret["secretName"], bool(secret.get("optional")))
                for key, value in found.items():
                    (self.folder / "volumes" / name / key).write_text(value)

    def _places(self, container: Container) -> list[tuple[str, Path]]:
        mounts = [
            (m["mountPath"].rstrip("/"), self.folder / "volumes" / m["name"])
            for m in container.spec.get("volumeMounts") or []
        ]
        return sorted(mounts, key=lambda m: -len(m[0]))

    def _data(self, kind: Any, name: str, optional: bool = False) -> dict[str, str]:
        """Return what is in a Secret or a ConfigMap. Raises `Waiting` when it is not there."""
        import base64

        found = self.objects.find(kind, self.pod["metadata"]["namespace"], name)
        if found is None:
            if optional:
                return {}
            raise Waiting("CreateContainerConfigError", f'{kind.name.lower()} "{name}" not found')
        data = found.get("data") or {}
        if kind is SECRETS:
            data = {k: base64.b64decode(v).decode() for k, v in data.items()} | (found.get("stringData") or {})
        return dict(data)

    def _environment(self, container: Container) -> dict[str, str]:
        """Return a container's environment: what its pod says, and nothing of this machine but PATH."""
        spec, cluster = container.spec, self.kubelet.cluster
        image = self.kubelet.environment_of(spec["image"])
        told: dict[str, str] = {}
        for source in spec.get("envFrom") or []:
            kind, key = (SECRETS, "secretRef") if "secretRef" in source else (CONFIG_MAPS, "configMapRef")
            data = self._data(kind, source[key]["name"], bool(source[key].get("optional")))
            told |= {f"{source.get('prefix', '')}{k}": v for k, v in data.items()}
        for variable in spec.get("env") or []:
            value = self._value(variable, container)
            if value is not None:
                told[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda m: told.get(m[1], m[0]), value)
        told = {k: self.kubelet.resolved(self._placed(v, container), self.pod) for k, v in told.items()}
        folder = self.folder / spec["name"]
        temporary = dict(self._places(container)).get("/tmp", folder / "tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        binaries = f"{image}/bin:" if image else ""
        own = {
            "PATH": f"{binaries}{os.environ['PATH']}", "HOME": str(folder), "TMPDIR": str(temporary),
            "HOSTNAME": self.pod["spec"].get("hostname") or self.pod["metadata"]["name"],
            "KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(cluster.port),
        }  # fmt: skip
        return {**own, **told, **self.kubelet.given, MARK: container.identity}

    def _placed(self, text: str, container: Container) -> str:
        """Return a path in the container as the path of its folder here."""
        path = container.spec.get("terminationMessagePath", "/dev/termination-log")
        container.message_file = self.folder / container.spec["name"] / "termination-log"
        if text == path:
            container.message_file.parent.mkdir(parents=True, exist_ok=True)
            container.message_file.touch()
            return str(container.message_file)
        for mount, folder in self._places(container):
            if text == mount or text.startswith(f"{mount}/"):
                return f"{folder}{text[len(mount) :]}"
        return text

    def _value(self, variable: Object, container: Container) -> str | None:
        source = variable.get("valueFrom")
        if not source:
            return str(variable.get("value") or "")
        if field_ := source.get("fieldRef"):
            return _field(self._now(), field_["fieldPath"])
        if resource := source.get("resourceFieldRef"):
            where, _, name = resource["resource"].partition(".")
            amount = ((container.spec.get("resources") or {}).get(where) or {}).get(name, 0)
            return str(int(quantity(amount) / quantity(resource.get("divisor") or 1)))
        for key, kind in (("secretKeyRef", SECRETS), ("configMapKeyRef", CONFIG_MAPS)):
            if reference := source.get(key):
                optional = bool(reference.get("optional"))
                data = self._data(kind, reference["name"], optional)
                if reference["key"] not in data and not optional:
                    where_ = f"{kind.name} {self.pod['metadata']['namespace']}/{reference['name']}"
                    raise Waiting("CreateContainerConfigError", f"couldn't find key {reference['key']} in {where_}")
                return data.get(reference["key"])
        raise Refused(422, "Invalid", f"valueFrom of {variable['name']} is not known here")

    def _now(self) -> Object:
        found = self.objects.find(PODS, self.pod["metadata"]["namespace"], self.pod["metadata"]["name"])
        return found or self.pod

    def _argv(self, container: Container, env: Mapping[str, str]) -> list[str]:
        """Return what is run. An image's entry point is `orrery`, which is its environment's."""
        spec = container.spec
        argv = [*(spec.get("command") or ["orrery"]), *(spec.get("args") or [])]
        argv = [re.sub(r"\$\((\w+)\)", lambda m: env.get(m[1], m[0]), a) for a in argv]
        argv = [self._placed(a, container) for a in argv]
        image = self.kubelet.environment_of(spec["image"])
        assert image is not None
        if argv[0] == "orrery" and not (image / "bin" / "orrery").exists():
            return [str(image / "bin" / "python"), "-m", *argv]
        own = image / "bin" / Path(argv[0]).name
        return [str(own), *argv[1:]] if own.exists() else argv

    # -- what it reports --------------------------------------------------------------------------

    def _report(self, **more: Any) -> None:
        if self.off:
            return
        started = bool(self.main) and all(c.started for c in self.main) and self.stopping is None

        def edit(pod: Object) -> None:
            if is_over(pod):
                return
            status = pod["status"]
            status |= {k: v for k, v in more.items() if k not in status}
            status["hostIP"] = status["podIP"] = "127.0.0.1"
            if all(c.started for c in self.main):
                status["phase"] = "Running"
            status["containerStatuses"] = [c.status() for c in self.main]
            if self.first:
                status["initContainerStatuses"] = [c.status() for c in self.first]
            set_condition(pod, "PodReadyToStartContainers", "True")
            set_condition(pod, "Initialized", "True")
            for type_ in ("Ready", "ContainersReady"):
                names = [c.spec["name"] for c in self.main]
                not_yet = ("ContainersNotReady", f"containers with unready status: [{' '.join(names)}]")
                set_condition(pod, type_, *(("True",) if started else ("False", *not_yet)))

        self.pod = self.objects.change(PODS, self.pod, edit) or self.pod

    def _finish(self) -> None:
        """Report the end."""
        over = [c for c in (*self.first, *self.main) if c.code is not None]
        good = len(over) == len(self.first) + len(self.main) and not any(c.code for c in over) and self.why is None
        for container in self.main:
            if container.code is None and not container.started:
                container.waiting = ("ContainerCreating", "")

        def edit(pod: Object) -> None:
            status = pod["status"]
            status["phase"] = "Succeeded" if good else "Failed"
            status["containerStatuses"] = [c.status() for c in self.main]
            if self.first:
                status["initContainerStatuses"] = [c.status() for c in self.first]
            if self.why:
                status["reason"], status["message"] = self.why
            if self.condition:
                set_condition(pod, "DisruptionTarget", "True", *self.condition)
            for type_ in ("Ready", "ContainersReady"):
                set_condition(pod, type_, "False", "PodCompleted" if good else "PodFailed")

        self.pod = self.objects.change(PODS, self.pod, edit) or self.pod
        self.kubelet.wake()

    def event(self, reason: str, message: str, type_: str = "Normal") -> None:
        self.kubelet.cluster.controllers.event(self.pod, reason, message, type_, "kubelet")


class Kubelet:
    """The kubelets of all nodes."""

    def __init__(self, cluster: Cluster, venvs: Path | None, environment: Mapping[str, str], play: Play | None) -> None:
        self.cluster, self.given, self.play = cluster, dict(environment), play
        self.venvs = venvs or Path(os.environ.get("ORRERY_VENVS") or ROOT / ".venvs")
        self.images: dict[str, tuple[str, float]] = {}
        self.workers: dict[str, Worker] = {}
        self._ports: dict[tuple[str, str], int] = {}
        self._news = asyncio.Event()

    def hear(self, change: Change) -> None:
        """Start what was placed on a node, end what is deleted."""
        if change.kind is not PODS:
            return
        pod, uid = change.object, change.object["metadata"]["uid"]
        worker = self.workers.get(uid)
        if change.type == "DELETED":
            if worker is not None and not worker.off:
                worker.vanish(silent=not self.cluster.nodes.is_on(pod["spec"].get("nodeName", "")))
            self.wake()
            return
        node = pod["spec"].get("nodeName")
        if worker is None and node and not is_over(pod) and self.cluster.nodes.is_on(node):
            self.workers[uid] = worker = Worker(self, pod)
        if worker is None:
            return
        worker.pod = pod
        if (deleted := pod["metadata"].get("deletionTimestamp")) and not worker.off:
            del deleted
            worker.stop(float(pod["metadata"].get("deletionGracePeriodSeconds") or 0))

    def environment_of(self, image: str) -> Path | None:
        """Return the environment that an image holds, None when there is no such image."""
        found = re.search(r"(?:^|/)([a-z][a-z0-9_-]*)(?:[:@].*)?$", image)
        folder = self.venvs / found[1] if found else None
        return folder if folder is not None and (folder / "bin" / "python").exists() else None

    def resolved(self, text: str, pod: Object) -> str:
        """Return a text with the names of pods of the pod's headless service as addresses of this machine.

        All pods share this machine, so each service's port is given another one that is free.
        """

        def one(match: re.Match[str]) -> str:
            if match["service"] != pod["spec"].get("subdomain"):
                return match[0]
            owners = pod["metadata"].get("ownerReferences") or [{}]
            owner = owners[0].get("uid") or match["service"]
            return f"127.0.0.1:{self.port_of(owner, match['port'])}" if match["port"] else "127.0.0.1"

        pattern = r"\b(?P<pod>[a-z0-9-]+)\.(?P<service>[a-z0-9-]+)(?:\.[a-z0-9-]+\.svc[a-z.]*)?(?::(?P<port>\d+))?"
        return re.sub(pattern, one, text)

    def port_of(self, owner: str, port: str) -> int:
        """Return the port of this machine that stands for one of a Job's."""
        if (owner, port) not in self._ports:
            self._ports[owner, port] = _free_port()
        return self._ports[owner, port]

    def wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def log(self, pod: Object, query: Mapping[str, str]) -> AsyncIterator[bytes]:
        """Return a container's log as its lines come; an empty one now and then. Raises `Refused` (400)."""
        worker = self.workers.get(pod["metadata"]["uid"])
        name = query.get("container") or pod["spec"]["containers"][0]["name"]
        container = None
        if worker is not None:
            container = next((c for c in (*worker.first, *worker.main) if c.spec["name"] == name), None)
            if container is None:
                message = f"container {name} is not valid for pod {pod['metadata']['name']}"
                raise Refused(400, "BadRequest", message)
        if container is None or not container.started:
            reason = container.waiting[0] if container else "ContainerCreating"
            message = f'container "{name}" in pod "{pod["metadata"]["name"]}" is waiting to start: {reason}'
            raise Refused(400, "BadRequest", message)
        if container.silent and query.get("follow") != "true":
            message = (
                f'Get "https://10.0.0.1:10250/containerLogs/{name}": dial tcp 10.0.0.1:10250: connect: no route to host'
            )
            raise Refused(500, "InternalError", message)
        return self._lines(container, query)

    async def _lines(self, container: Container, query: Mapping[str, str]) -> AsyncIterator[bytes]:
        since = _since(query)
        follow = query.get("follow", "").lower() in ("1", "true")
        at = max(0, len(container.lines) - int(query["tailLines"])) if query.get("tailLines") else 0
        while True:
            over = container.code is not None or container.cut
            while at < len(container.lines):
                stamp, line = container.lines[at]
                at += 1
                if datetime.fromisoformat(stamp[:26] + "+00:00").timestamp() < since:
                    continue
                yield f"{stamp} ".encode() + line if query.get("timestamps", "").lower() in ("1", "true") else line
            if not follow or over:
                return
            event = self._news
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), 0.1 if self.play else 1.0)
            yield b""

    async def close(self) -> None:
        await asyncio.gather(*(w.close() for w in self.workers.values()))


def _since(query: Mapping[str, str]) -> float:
    if query.get("sinceSeconds"):
        return time.time() - float(query["sinceSeconds"])
    if not query.get("sinceTime"):
        return 0.0
    text = query["sinceTime"].replace("Z", "+00:00")
    text = re.sub(r"(\.\d{6})\d*", r"\1", text)
    return datetime.fromisoformat(text).timestamp()


def _last_words(container: Container, code: int) -> str:
    """Return the termination message."""
    text = ""
    if container.message_file is not None and container.message_file.exists():
        text = container.message_file.read_text(errors="replace")[-LONGEST_MESSAGE:]
    if not text and code and container.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
        text = b"".join(line for _, line in container.lines[-80:])[-2048:].decode(errors="replace")
    return text


def _field(pod: Object, path: str) -> str:
    """Return what the downward API says."""
    if found := re.fullmatch(r"metadata\.(labels|annotations)\['([^']+)'\]", path):
        return str((pod["metadata"].get(found[1]) or {}).get(found[2], ""))
    here: Any = pod
    for name in path.split("."):
        here = (here or {}).get(name)
    return "" if here is None else str(here)


def _grace(pod: Object) -> float:
    value = pod["spec"].get("terminationGracePeriodSeconds")
    return 30.0 if value is None else float(value)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def _exited(pid: int) -> None:
    """Wait for the end of a process, not for its output's."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop.add_reader(handle, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def _catches(pid: int, number: int) -> bool:
    """Tell whether a process has a handler for a signal."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)$", text, re.MULTILINE)
    return bool(found and int(found[1], 16) >> (number - 1) & 1)


def _kill_marked(identity: str) -> None:
    """Kill every process that was started in a container: its namespace ends with its first process."""
    wanted = f"{MARK}={identity}".encode()
    while True:
        found = [pid for pid in _numbers() if _holds(pid, wanted)]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return
        time.sleep(0.005)


def _numbers() -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()]


def _holds(pid: int, wanted: bytes) -> bool:
    try:
        return wanted in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False

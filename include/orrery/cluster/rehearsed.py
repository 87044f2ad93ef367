"""What a cluster would tell of a pod that meets a fault, in its own documents: the twin has the same judge read them.

So a rehearsal cannot be judged otherwise than the thing itself. Pure and light.
"""

from __future__ import annotations

import json
import time
from typing import Any

from orrery.cluster import answers, names
from orrery.cluster.judge import CONTAINER, Seen
from orrery.contract import StepConfig
from orrery.endings import Ending
from orrery.faults import Kind
from orrery.platform import Compute

NODE = "rehearsal"
QUOTA = (
    'pods "{unit}" is forbidden: exceeded quota: rehearsal, requested: requests.memory={memory}, '
    "used: requests.memory=0, limited: requests.memory=0"
)
NO_ROOM = (
    "0/1 nodes are available: 1 Insufficient memory. preemption: 0/1 nodes are available: "
    "1 No preemption victims found for incoming pod."
)
NO_IMAGE = (
    'rpc error: code = NotFound desc = failed to pull and unpack image "{image}": failed to resolve reference '
    '"{image}": {image}: not found'
)
# Who tells a pod to go: condition, its message, and what a node that is shut down leaves in the pod's status.
DISRUPTED: dict[Kind, tuple[str, str, str]] = {
    "preempt": ("TerminationByKubelet", "Pod was terminated in response to imminent node shutdown.", "Terminated"),
    "evict": ("EvictionByEvictionAPI", "Eviction API: evicting", ""),
    "taint": ("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint", ""),
}


class Pod:
    """The pod that an attempt would have in a cluster, and what becomes of it."""

    def __init__(self, config: StepConfig, compute: Compute, image: str, began: float | None = None) -> None:
        self.name, self.compute, self.image = names.unit(config), compute, image
        self.began = time.time() if began is None else began

    def refused(self, waited: float) -> tuple[str, Ending]:
        """Return why no pod is created for want of quota, and the ending once that has been so for `waited` seconds."""
        message = QUOTA.format(unit=self.name, memory=self.compute.memory)
        status = json.dumps({"kind": "Status", "reason": "Forbidden", "code": 403, "message": message})
        answer = answers.read(403, status, self.name)
        told = f"{self.name} was not created within {waited:.0f} s: {answer.message}"
        return answer.message, Ending(kind="unplaced", message=told, hint=answer.hint, by="Refused")

    def waits(self, waited: float) -> tuple[str, Ending]:
        """Return the scheduler's words, and the ending once they have been the same for `waited` seconds."""
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": NO_ROOM}
        seen = Seen(unit=self.name)
        seen.update(self._document({"phase": "Pending", "conditions": [condition]}, node=""), self.began)
        return seen.waiting(), _judged(seen, self.began + waited, wait_until=self.began + waited)

    def held(self, kind: Kind) -> Ending:
        """Return the ending of a pod whose container cannot be made: kind `image` or `config`."""
        image = {"reason": "ErrImagePull", "message": NO_IMAGE.format(image=self.image)}
        config = {"reason": "CreateContainerConfigError", "message": 'secret "rehearsal" not found'}
        state = {"waiting": image if kind == "image" else config}
        return self._end({"phase": "Pending", "containerStatuses": [{"name": CONTAINER, "state": state}]})

    def lost(self, silent: float) -> Ending:
        """Return the ending of a pod whose node has said nothing for `silent` seconds."""
        ready = {"type": "Ready", "status": "False", "reason": "NodeNotReady"}
        running = [{"name": CONTAINER, "state": {"running": {}}}]
        seen = Seen(unit=self.name)
        status = {"phase": "Running", "conditions": [ready], "containerStatuses": running}
        seen.update(self._document(status), self.began)
        return _judged(seen, self.began + silent, silent=silent)

    def ended(self, kind: Kind, code: int, words: str = "") -> Ending:
        """Return the ending of a pod whose container has ended; `words`: its termination message."""
        reason = "OOMKilled" if kind == "oom" else "Error" if code else "Completed"
        ended = {"terminated": {"exitCode": code, "reason": reason, "message": words}}
        status: dict[str, Any] = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"name": CONTAINER, "state": ended}],
        }
        if kind in DISRUPTED:
            by, message, told = DISRUPTED[kind]
            condition = {"type": "DisruptionTarget", "status": "True", "reason": by, "message": message}
            status |= {"conditions": [condition], **({"reason": told, "message": message} if told else {})}
        if kind == "deadline":
            late = "Pod was active on the node longer than the specified deadline"
            status |= {"phase": "Failed", "reason": "DeadlineExceeded", "message": late}
        return self._end(status, deleted=kind in ("evict", "taint", "delete"))

    def _end(self, status: dict[str, Any], deleted: bool = False) -> Ending:
        seen = Seen(unit=self.name)
        document = self._document(status)
        if deleted:
            document["metadata"]["deletionTimestamp"] = "2013-01-01T00:00:00Z"
        seen.update(document, self.began)
        if deleted:
            seen.removed(document, self.name, self.began)
        return _judged(seen, self.began)

    def _document(self, status: dict[str, Any], node: str = NODE) -> dict[str, Any]:
        container = {"name": CONTAINER, "image": self.image, "resources": {"limits": {"memory": self.compute.memory}}}
        return {
            "metadata": {"name": self.name, "uid": self.name},
            "spec": {"containers": [container], **({"nodeName": node} if node else {})},
            "status": status,
        }


def _judged(seen: Seen, now: float, *, wait_until: float | None = None, silent: float = 60.0) -> Ending:
    ending = seen.ending(now, wait_until=now + 1.0 if wait_until is None else wait_until, grace=30.0, silent=silent)
    assert ending is not None, "a rehearsed pod has ended"
    return ending

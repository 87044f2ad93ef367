"""What became of pods, from documents as a 1.32 cluster gives them: every way to lose one, and every way to end."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orrery.cluster.judge import EVENTS, HEARD_S, INDEX, MARGIN_S, SETTLE_S, Member, Seen, explained, readable, size
from orrery.contract import StepConfig
from orrery.endings import JUDGED, Ending, without_result

Doc = dict[str, Any]
NAME, UID, IMAGE = (
    "delays-train-0a1b2c3d4e5f-1",
    "6f3c1f0e-7a52-4a3e-9b1e-2f4a0c9d8e7f",
    "registry.local:5000/orrery/ml:1.4.0",
)
WAIT, GRACE, SILENT = 3600.0, 60.0, 60.0
BORN = "2026-11-29T10:00:00Z"


# -- documents as the API server tells them ---------------------------------------------------------


def condition(type_: str, status: str = "True", reason: str = "", message: str = "") -> Doc:
    told = {"type": type_, "status": status, "lastProbeTime": None, "lastTransitionTime": BORN}
    return told | ({"reason": reason} if reason else {}) | ({"message": message} if message else {})


def pod(name: str = NAME, uid: str = UID, index: int | None = None) -> Doc:
    """Return a pod as it is just after its creation."""
    meta: Doc = {
        "name": name, "namespace": "orrery", "uid": uid, "resourceVersion": "1001", "creationTimestamp": BORN,
        "labels": {"orrery/unit": NAME, "orrery/step": "train"}, "annotations": {"orrery/folder": "delays/runs/r/train/1"},
    }  # fmt: skip
    if index is not None:
        meta["labels"][INDEX] = meta["annotations"][INDEX] = str(index)
    container = {
        "name": "base", "image": IMAGE, "command": ["orrery"], "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File", "resources": {"limits": {"memory": "2Gi"}, "requests": {"memory": "2Gi"}},
    }  # fmt: skip
    spec = {"containers": [container], "restartPolicy": "Never", "terminationGracePeriodSeconds": 60}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": meta,
        "spec": spec,
        "status": {"phase": "Pending", "qosClass": "Guaranteed"},
    }


def unschedulable(doc: Doc, message: str) -> Doc:
    made = deepcopy(doc)
    made["status"]["conditions"] = [condition("PodScheduled", "False", "Unschedulable", message)]
    return made


def status(container: Doc, state: Doc, *, ready: bool = False) -> Doc:
    return {
        "name": container["name"], "image": container["image"], "imageID": "", "lastState": {}, "ready": ready,
        "restartCount": 0, "started": ready, "state": state,
    }  # fmt: skip


def scheduled(doc: Doc, waiting: str = "ContainerCreating", message: str = "") -> Doc:
    made = deepcopy(doc)
    made["spec"]["nodeName"] = "gpu-spot-1"
    state = {"waiting": {"reason": waiting} | ({"message": message} if message else {})}
    unready = "containers with unready status: [base]"
    made["status"] |= {
        "conditions": [
            condition("PodReadyToStartContainers"), condition("Initialized"),
            condition("Ready", "False", "ContainersNotReady", unready),
            condition("ContainersReady", "False", "ContainersNotReady", unready), condition("PodScheduled"),
        ],
        "hostIP": "10.0.0.7", "startTime": BORN,
        "containerStatuses": [status(c, state) for c in made["spec"]["containers"]],
    }  # fmt: skip
    return made


def running(doc: Doc) -> Doc:
    made = scheduled(doc)
    made["status"] |= {
        "phase": "Running", "podIP": "10.1.0.9",
        "conditions": [
            condition(t) for t in ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
        ],
        "containerStatuses": [
            status(c, {"running": {"startedAt": BORN}}, ready=True) for c in made["spec"]["containers"]
        ],
    }  # fmt: skip
    return made


def disrupted(doc: Doc, reason: str, message: str = "") -> Doc:
    made = deepcopy(doc)
    made["status"].setdefault("conditions", []).append(condition("DisruptionTarget", "True", reason, message))
    return made


def deleting(doc: Doc, grace: int = 60) -> Doc:
    made = deepcopy(doc)
    made["metadata"] |= {"deletionTimestamp": "2026-11-29T10:05:00Z", "deletionGracePeriodSeconds": grace}
    return made


def ended(
    doc: Doc, code: int, reason: str = "", message: str = "", phase: str | None = None, name: str = "base"
) -> Doc:
    """Return the pod with its container's end; `phase`: as the pod ends, unless told otherwise."""
    made = deepcopy(doc)
    told = {
        "exitCode": code, "reason": reason or ("Error" if code else "Completed"), "startedAt": BORN,
        "finishedAt": "2026-11-29T10:04:00Z", "containerID": "containerd://4f",
    }  # fmt: skip
    for each in made["status"]["containerStatuses"]:
        if each["name"] == name:
            each |= {
                "ready": False,
                "started": False,
                "state": {"terminated": told | ({"message": message} if message else {})},
            }
    made["status"]["phase"] = phase or ("Failed" if code else "Succeeded")
    made["status"]["conditions"] = [
        condition(c["type"], "False", "PodFailed" if code else "PodCompleted") if c["type"] in ("Ready", "ContainersReady") else c
        for c in made["status"]["conditions"]
    ]  # fmt: skip
    return made


def why(doc: Doc, reason: str, message: str) -> Doc:
    made = deepcopy(doc)
    made["status"] |= {"reason": reason, "message": message, "phase": "Failed"}
    return made


def unheard(doc: Doc) -> Doc:
    """Return the pod as the node controller leaves it when the node says nothing any more: the words stay old."""
    made = deepcopy(doc)
    for each in made["status"]["conditions"]:
        if each["type"] == "Ready":
            each["status"] = "False"
    return made


class Story:
    """What is told of a unit, one document after the other, and a clock."""

    def __init__(self, *docs: Doc, pods: int = 1) -> None:
        self.seen, self.now = Seen(unit=NAME, pods=pods), 1000.0
        self.began = self.now
        self.tell(*docs)

    def tell(self, *docs: Doc, after: float = 0.1) -> Story:
        for doc in docs:
            self.now += after
            self.seen.update(doc, self.now)
        return self

    def gone(self, doc: Doc | None = None, name: str = NAME) -> Story:
        self.now += 0.1
        self.seen.removed(doc, name, self.now)
        return self

    def later(self, seconds: float) -> Story:
        self.now += seconds
        return self

    @property
    def end(self) -> Ending | None:
        return self.seen.ending(self.now, wait_until=self.began + WAIT, grace=GRACE, silent=SILENT)

    @property
    def due(self) -> float | None:
        """Seconds from now until the judge wants to be asked again."""
        at = self.seen.due(self.now, wait_until=self.began + WAIT, grace=GRACE, silent=SILENT)
        return None if at is None else at - self.now

    @property
    def how(self) -> tuple[str, str]:
        end = self.end
        assert end is not None
        return end.kind, end.by


LIVES = running(pod())


# -- it ends by itself --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [(0, "exited"), (64, "exited"), (75, "exited"), (1, "exited"), (139, "exited"), (143, "interrupted")],
)
def test_exit_codes(code: int, kind: str) -> None:
    story = Story(pod(), scheduled(pod()), LIVES)
    assert story.end is None
    assert story.due is None
    story.tell(ended(LIVES, code))
    assert story.end is not None
    assert (story.end.kind, story.end.code) == (kind, code)
    assert NAME in story.end.message


def test_exit_0_does_not_wait_for_the_pods_phase() -> None:
    assert Story(LIVES, ended(LIVES, 0, phase="Running")).how == ("exited", "")


def test_a_kill_from_nowhere_waits_a_moment_for_a_reason() -> None:
    story = Story(LIVES, ended(LIVES, 137, phase="Running"))
    assert story.end is None
    assert story.due == pytest.approx(SETTLE_S)
    told = why(disrupted(ended(LIVES, 137), "TerminationByKubelet"), "Terminated", "Pod was terminated")
    assert deepcopy(story).tell(told).how == ("interrupted", "TerminationByKubelet")
    assert story.later(SETTLE_S).how == ("exited", "Error")
    assert story.due is None


def test_what_a_cluster_injects_beside_it_does_not_count() -> None:
    doc = pod()
    doc["spec"]["containers"] = [
        {"name": "mesh", "image": "mesh:1", "resources": {"limits": {"memory": "64Mi"}}}, *doc["spec"]["containers"]
    ]  # fmt: skip
    lives = running(doc)
    story = Story(lives, ended(lives, 1, phase="Running", name="mesh"))
    assert story.end is None
    broken = deepcopy(lives)
    broken["status"]["containerStatuses"][0]["state"] = {
        "waiting": {"reason": "ImagePullBackOff", "message": "not found"}
    }
    assert story.tell(broken).end is None
    # The mesh goes on for ever: the phase stays Running.
    assert story.tell(ended(lives, 0, phase="Running")).how == ("exited", "")
    starved = Story(lives, ended(lives, 137, "OOMKilled", phase="Running"))
    assert starved.end is not None
    assert "2.00 GiB" in starved.end.message


def test_a_pod_of_another_container_name() -> None:
    doc = running(pod())
    for part in (doc["spec"]["containers"], doc["status"]["containerStatuses"]):
        part[0]["name"] = "pytorch"
    assert Story(doc, ended(doc, 3, name="pytorch")).how == ("exited", "Error")


# -- told to go ---------------------------------------------------------------------------------------

DRAIN = ("EvictionByEvictionAPI", "Eviction API: evicting")
TAINT = ("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")
PREEMPTED = ("PreemptionByScheduler", "default-scheduler: preempting to accommodate a higher priority pod")
SHUTDOWN = "Pod was terminated in response to imminent node shutdown."


@pytest.mark.parametrize(("reason", "message"), [DRAIN, TAINT, PREEMPTED])
@pytest.mark.parametrize("code", [143, 137, 0, 1, None])
def test_drain_taint_and_preemption(reason: str, message: str, code: int | None) -> None:
    """The condition is seen while the pod lives; the object is gone at its end, mostly before the code is told."""
    marked = disrupted(LIVES, reason, message)
    story = Story(LIVES, marked, deleting(marked))
    assert story.end is None
    assert story.due is not None
    if code is None:
        story.gone()
    else:
        story.gone(ended(deleting(marked), code))
    assert story.how == ("interrupted", reason)
    assert story.end is not None
    assert story.end.code == code
    assert message in story.end.message


def test_a_condition_once_seen_is_remembered() -> None:
    story = Story(LIVES, disrupted(LIVES, *DRAIN), LIVES, deleting(LIVES)).gone(deleting(LIVES))
    assert story.how == ("interrupted", DRAIN[0])


def test_a_condition_that_is_taken_back() -> None:
    """Preemption may be called off: the condition turns False, and the pod goes on."""
    doc = disrupted(LIVES, *PREEMPTED)
    doc["status"]["conditions"][-1]["status"] = "False"
    assert Story(LIVES, doc, ended(LIVES, 1)).how == ("exited", "Error")
    assert Story(LIVES, disrupted(LIVES, *PREEMPTED), doc, ended(LIVES, 1)).how == ("exited", "Error")
    # Once it is being deleted, it is what it was.
    marked = disrupted(LIVES, *PREEMPTED)
    assert Story(LIVES, deleting(marked), deleting(doc)).gone().how == ("interrupted", PREEMPTED[0])


@pytest.mark.parametrize("code", [143, 137])
def test_kubelet_shutdown(code: int) -> None:
    marked = disrupted(LIVES, "TerminationByKubelet", SHUTDOWN)
    story = Story(LIVES, marked, why(ended(marked, code), "Terminated", SHUTDOWN))
    assert story.how == ("interrupted", "TerminationByKubelet")
    assert story.end is not None
    assert (story.end.code, SHUTDOWN in story.end.message) == (code, True)
    assert "gpu-spot-1" in story.end.message


@pytest.mark.parametrize("reason", ["Terminated", "NodeShutdown", "Preempting", "Shutdown"])
def test_a_status_without_the_condition(reason: str) -> None:
    assert Story(LIVES, why(ended(LIVES, 137), reason, "said so")).how == ("interrupted", reason)


def test_refused_by_a_node_that_shuts_down() -> None:
    story = Story(pod(), why(scheduled(pod()), "NodeShutdown", "Pod was rejected as the node is shutting down."))
    assert story.how == ("interrupted", "NodeShutdown")


@pytest.mark.parametrize(
    "message",
    [
        "The node was low on resource: memory. Threshold quantity: 100Mi, available: 51Mi. Container base was using 3Gi, "
        "request is 2Gi, has larger consumption of memory. ",
        "The node was low on resource: ephemeral-storage. Threshold quantity: 10Gi, available: 9Gi. ",
        "The node had condition: [DiskPressure]. ",
    ],
)
@pytest.mark.parametrize("code", [137, 143, None])
def test_evicted_by_the_kubelet_for_pressure(message: str, code: int | None) -> None:
    marked = disrupted(LIVES, "TerminationByKubelet", message)
    doc = why(marked if code is None else ended(marked, code), "Evicted", message)
    if code is None:
        doc["status"].pop("containerStatuses")
    story = Story(LIVES, doc)
    assert story.how == ("interrupted", "TerminationByKubelet")
    assert story.end is not None
    assert message.strip() in story.end.message


@pytest.mark.parametrize(
    "message",
    [
        "Pod ephemeral local storage usage exceeds the total limit of containers 10Gi. ",
        'Usage of EmptyDir volume "tmp" exceeds the limit "10Gi". ',
        "Container base exceeded its local ephemeral storage limit 10Gi. ",
    ],
)
def test_evicted_for_its_own_disk_is_no_interruption(message: str) -> None:
    """Each attempt would fill it again."""
    story = Story(LIVES, why(ended(LIVES, 137), "Evicted", message))
    assert story.how == ("config", "Evicted")
    assert story.end is not None
    assert "storage" in story.end.hint


# -- its machine is gone ------------------------------------------------------------------------------


def test_power_off_with_the_node_deleted() -> None:
    """Nothing for about 60 s, then the condition and the end at once; no exit code, the container still `running`."""
    collected = disrupted(LIVES, "DeletionByPodGC", "PodGC: node no longer exists")
    collected["status"]["phase"] = "Failed"
    story = Story(LIVES).tell(collected, after=60).gone(collected)
    assert story.how == ("interrupted", "DeletionByPodGC")
    assert story.end is not None
    assert story.end.code is None


def test_power_off_with_the_node_kept() -> None:
    """After 40 s the node is missed, after the toleration its pods are to be deleted, and then nothing, for ever."""
    story = Story(LIVES).tell(unheard(LIVES), after=40)
    assert story.end is None
    assert story.due == pytest.approx(SILENT)
    marked = disrupted(unheard(LIVES), *TAINT)
    story.tell(marked, deleting(marked), after=SILENT / 2 - 1)
    assert story.end is None
    assert story.later(2.0).how == ("node_lost", TAINT[0])
    assert story.end is not None
    assert "silent" in story.end.message


@pytest.mark.parametrize("status_", ["False", "Unknown"])
@pytest.mark.parametrize("reason", ["", "NodeNotReady", "NodeStatusUnknown"])
def test_a_silent_node(status_: str, reason: str) -> None:
    doc = unheard(LIVES)
    ready = next(c for c in doc["status"]["conditions"] if c["type"] == "Ready")
    ready |= {"status": status_} | ({"reason": reason} if reason else {})
    story = Story(LIVES, doc)
    assert story.later(SILENT - 1).end is None
    assert story.later(1).how == ("node_lost", "NodeNotReady")


def test_a_silent_node_that_comes_back_in_time() -> None:
    story = Story(LIVES, unheard(LIVES)).later(SILENT - 1).tell(LIVES)
    assert story.due is None
    assert story.later(SILENT).end is None


def test_unready_for_its_own_reasons_is_not_silent() -> None:
    doc = deepcopy(LIVES)
    for each in doc["status"]["conditions"]:
        if each["type"] in ("Ready", "ContainersReady"):
            each |= {"status": "False", "reason": "ContainersNotReady"}
    assert Story(LIVES, doc).later(10 * SILENT).end is None
    gate = deepcopy(LIVES)
    next(c for c in gate["status"]["conditions"] if c["type"] == "Ready").update(
        status="False", reason="ReadinessGatesNotReady"
    )
    assert Story(LIVES, gate).later(10 * SILENT).end is None


@pytest.mark.parametrize("marked", [LIVES, disrupted(LIVES, *TAINT)])
def test_told_to_go_and_never_heard_of_again(marked: Doc) -> None:
    story = Story(LIVES, deleting(marked, grace=30))
    assert story.due == pytest.approx(30 + MARGIN_S)
    assert story.later(29 + MARGIN_S).end is None
    assert story.later(2).how[0] == "node_lost"


def test_a_deletion_that_is_hurried() -> None:
    story = Story(LIVES, deleting(LIVES, grace=300)).tell(deleting(LIVES, grace=1))
    assert story.due is not None
    assert story.due < 2 + MARGIN_S


def test_a_silent_node_whose_pod_is_forced_away() -> None:
    assert Story(LIVES, unheard(LIVES)).gone(unheard(LIVES)).how == ("node_lost", "NodeNotReady")


def test_a_machine_that_has_restarted() -> None:
    doc = ended(LIVES, 137, "ContainerStatusUnknown", "The container could not be located when the pod was terminated")
    assert Story(LIVES, doc).how == ("node_lost", "ContainerStatusUnknown")
    # containerd's own words for what it finds dead after a power cycle, in time and late.
    back = ended(LIVES, 255, "Unknown")
    assert Story(LIVES, back).how == ("node_lost", "Unknown")
    assert Story(LIVES, unheard(LIVES), back).how == ("node_lost", "Unknown")
    assert Story(LIVES, ended(LIVES, 255)).how == ("exited", "Error")
    story = Story(LIVES, why(LIVES, "NodeAffinity", "Predicate NodeAffinity failed"))
    assert story.how == ("node_lost", "NodeAffinity")


def test_the_old_words_for_a_lost_node() -> None:
    doc = deepcopy(LIVES)
    doc["status"] |= {"reason": "NodeLost", "message": "Node gpu-spot-1 which was running pod is unresponsive"}
    assert Story(LIVES, doc).later(SILENT).how[0] == "node_lost"
    unknown = deepcopy(LIVES)
    unknown["status"]["phase"] = "Unknown"
    assert Story(LIVES, unknown).later(SILENT).how[0] == "node_lost"


# -- removed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (143, ("interrupted", "deleted")),
        (137, ("gone", "deleted")),
        (None, ("gone", "deleted")),
        (1, ("exited", "Error")),
    ],
)
def test_deleted_by_a_person(code: int | None, how: tuple[str, str]) -> None:
    last = deleting(LIVES) if code is None else ended(deleting(LIVES), code)
    assert Story(LIVES, deleting(LIVES)).gone(last).how == how


def test_gone_without_a_word() -> None:
    assert Story().gone(None).how == ("gone", "")
    assert Story(LIVES).gone(None).how == ("gone", "")
    assert Story(scheduled(pod())).gone(None).how == ("gone", "")
    assert Story(ended(LIVES, 0)).gone(None).how == ("exited", "")


@pytest.mark.parametrize(
    ("words", "how"),
    [
        ([], ("gone", "")),
        (["Scheduled: to a node", "Killing: Stopping container base"], ("gone", "")),
        (["Pulled: x", "TaintManagerEviction: Marking for deletion Pod orrery/x"], ("interrupted", TAINT[0])),
        (["Preempted: Preempted by pod 1 on node a"], ("interrupted", PREEMPTED[0])),
        (["Evicted: The node was low on resource: memory."], ("interrupted", "TerminationByKubelet")),
        (["NodeNotReady: Node is not ready"], ("node_lost", "NodeNotReady")),
    ],
)
def test_events_explain_what_is_gone(words: list[str], how: tuple[str, str]) -> None:
    end = Story(LIVES).gone(None).end
    assert end is not None
    found = explained(end, words)
    assert (found.kind, found.by) == how
    assert found.message.startswith(end.message)


def test_events_do_not_change_what_is_known() -> None:
    end = Story(LIVES, ended(LIVES, 1)).end
    assert end is not None
    assert explained(end, [f"{word}: x" for word in EVENTS]) == end


def test_the_last_of_an_earlier_pod_of_the_same_name() -> None:
    new = running(pod(uid="b"))
    story = Story(LIVES, new).gone(LIVES)
    assert story.end is None
    assert story.tell(ended(new, 0)).how == ("exited", "")


# -- memory and time ----------------------------------------------------------------------------------


def test_out_of_memory() -> None:
    words = json.dumps({"memory_peak": 2136997888, "memory_limit": 2 * 2**30, "at": 61.3})
    story = Story(LIVES, ended(LIVES, 137, "OOMKilled", words))
    assert story.how == ("out_of_memory", "OOMKilled")
    assert story.end is not None
    assert "the limit is 2.00 GiB, 1.99 GiB were in use 61 s after its start" in story.end.message
    assert "memory" in story.end.hint


@pytest.mark.parametrize("words", ["", "Killed", "{", "[1]", '{"memory_peak": "x", "at": null}', '{"a":' * 50_000])
def test_out_of_memory_without_last_words(words: str) -> None:
    story = Story(LIVES, ended(LIVES, 137, "OOMKilled", words, phase="Running"))
    assert story.end is not None
    assert "the limit is 2.00 GiB" in story.end.message
    assert "in use" not in story.end.message


def test_a_child_alone_was_out_of_memory() -> None:
    """containerd says OOMKilled of a container that lost a child to the kernel, and has ended by itself then."""
    assert Story(LIVES, ended(LIVES, 1, "OOMKilled")).how == ("out_of_memory", "OOMKilled")


@pytest.mark.parametrize("code", [143, 137])
def test_deadline(code: int) -> None:
    message = "Pod was active on the node longer than the specified deadline"
    story = Story(LIVES, why(ended(LIVES, code), "DeadlineExceeded", message))
    assert story.how == ("deadline", "DeadlineExceeded")
    assert story.end is not None
    assert message in story.end.message
    early = ended(LIVES, code, phase="Running")
    early["status"] |= {"reason": "DeadlineExceeded"}
    assert Story(LIVES, early).how == ("deadline", "DeadlineExceeded")


def test_what_the_step_said_last_is_told() -> None:
    words = json.dumps({"at": 3.0, "status": "bug", "kind": "ValueError", "message": "no such column"})
    story = Story(LIVES, ended(LIVES, 1, "Error", words))
    assert story.end is not None
    assert story.end.message.endswith("(exit code 1): no such column")


# -- it cannot be started -----------------------------------------------------------------------------

NO_GPU = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available: 3 No preemption victims found for incoming pod."
NO_NODE = "0/4 nodes are available: 1 node(s) had untolerated taint {spot: true}, 3 Insufficient nvidia.com/gpu."


def test_unschedulable() -> None:
    story = Story(pod())
    assert story.seen.waiting() == "Pending"
    assert story.tell(unschedulable(pod(), NO_GPU)).seen.waiting() == NO_GPU
    assert story.tell(unschedulable(pod(), NO_NODE)).seen.waiting() == NO_NODE
    assert story.end is None
    assert story.due == pytest.approx(WAIT - (story.now - story.began))
    assert story.later(WAIT - 1).end is None
    assert story.later(1).how == ("unplaced", "Unschedulable")
    assert story.end is not None
    assert NO_NODE in story.end.message


def test_a_place_is_found_in_the_end() -> None:
    story = Story(pod(), unschedulable(pod(), NO_GPU)).tell(scheduled(pod()), LIVES, after=100)
    assert story.seen.waiting() == ""
    assert story.later(WAIT).end is None


@pytest.mark.parametrize(
    "reason",
    ["OutOfcpu", "OutOfmemory", "OutOfnvidia.com/gpu", "OutOfpods", "UnexpectedAdmissionError", "NodeAffinity"],
)
def test_refused_by_its_node(reason: str) -> None:
    assert Story(pod(), why(pod(), reason, "Node didn't have enough resource")).how == ("unplaced", reason)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("ErrImageNeverPull", f'Container image "{IMAGE}" is not present with pull policy of Never'),
        ("InvalidImageName", 'Failed to apply default image tag "a b:1": couldn\'t parse image name'),
        ("ErrImagePull", f'rpc error: code = NotFound desc = failed to pull and unpack image "{IMAGE}": failed to resolve reference "{IMAGE}": {IMAGE}: not found'),
        ("ErrImagePull", f'failed to pull image "{IMAGE}": pull access denied, repository does not exist or may require authorization: server message: insufficient_scope: authorization failed'),
        ("ErrImagePull", "failed to authorize: failed to fetch anonymous token: unexpected status: 401 Unauthorized"),
        ("ErrImagePull", f'failed to do request: Head "https://{IMAGE}": tls: failed to verify certificate: x509: certificate signed by unknown authority'),
        ("ImagePullBackOff", f'Back-off pulling image "{IMAGE}": ErrImagePull: {IMAGE}: not found'),
        ("ImagePullBackOff", f'Back-off pulling image "{IMAGE}"'),
    ],
)  # fmt: skip
def test_an_image_that_is_not_there(reason: str, message: str) -> None:
    story = Story(pod(), scheduled(pod(), reason, message))
    assert story.how == ("image", reason)
    assert story.end is not None
    assert message in story.end.message


@pytest.mark.parametrize(
    "message",
    [
        f'failed to do request: Head "https://{IMAGE}": dial tcp 10.0.0.1:443: i/o timeout',
        "dial tcp 10.0.0.1:5000: connect: connection refused",
        "read tcp 10.1.1.1:3333->10.0.0.1:443: read: connection reset by peer",
        "net/http: TLS handshake timeout",
        "dial tcp: lookup registry.local on 10.96.0.10:53: no such host",
        "dial tcp: lookup registry.local: Temporary failure in name resolution",
        "unexpected status from HEAD request to https://registry.local/v2/x: 503 Service Unavailable",
        "unexpected status code [manifests 1.4.0]: 500",
        "toomanyrequests: You have reached your pull rate limit.",
        "failed to copy: httpReadSeeker: failed open: unexpected status code 429 Too Many Requests",
        "rpc error: code = DeadlineExceeded desc = context deadline exceeded",
        "failed to copy: unexpected EOF",
        "pull QPS exceeded",
    ],
)
@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff"])
def test_a_registry_that_does_not_answer_is_waited_for(message: str, reason: str) -> None:
    story = Story(pod(), scheduled(pod(), reason, message))
    assert story.end is None
    assert message in story.seen.waiting()
    # In between the kubelet only says that it holds back; what it said before is remembered.
    story.tell(scheduled(pod(), "ImagePullBackOff", f'Back-off pulling image "{IMAGE}"'))
    assert story.end is None
    assert message in story.seen.waiting()
    assert deepcopy(story).later(WAIT).how == ("unplaced", "ImagePullBackOff")
    assert story.tell(scheduled(pod(), "ErrImagePull", f"{IMAGE}: not found")).how == ("image", "ErrImagePull")


def test_an_images_own_name_is_no_sign_of_trouble() -> None:
    doc = pod()
    doc["spec"]["containers"][0]["image"] = image = "registry/connection-refused-timeout:500 Internal"
    assert Story(doc, scheduled(doc, "ErrImagePull", f"{image}: not found")).how == ("image", "ErrImagePull")


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("CreateContainerConfigError", 'secret "orrery-store" not found'),
        ("CreateContainerConfigError", "container has runAsNonRoot and image will run as root"),
        ("CreateContainerError", 'failed to generate container: no command specified'),
        ("RunContainerError", 'exec: "orrery": executable file not found in $PATH: unknown'),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_work(reason: str, message: str) -> None:
    story = Story(pod(), scheduled(pod(), reason, message))
    assert story.how == ("config", reason)
    assert story.end is not None
    assert message in story.end.message


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("CreateContainerConfigError", "failed to sync secret cache: timed out waiting for the condition"),
        ("CreateContainerError", 'failed to reserve container name "base_x": name "base_x" is reserved for "4f"'),
        ("CreateContainerError", "context deadline exceeded"),
    ],
)
def test_what_passes_is_waited_for(reason: str, message: str) -> None:
    assert Story(pod(), scheduled(pod(), reason, message)).end is None


def test_a_command_that_is_not_there() -> None:
    """With `restartPolicy: Never` it ends at once; the message is the runtime's."""
    message = 'failed to create containerd task: exec: "orrery": executable file not found in $PATH: unknown'
    story = Story(scheduled(pod()), ended(scheduled(pod()), 128, "StartError", message))
    assert story.how == ("config", "StartError")
    assert story.end is not None
    assert message in story.end.message


def test_creating_for_ever() -> None:
    """A volume that cannot be mounted is told in events alone."""
    story = Story(pod(), scheduled(pod()))
    assert story.seen.waiting() == "ContainerCreating"
    assert story.later(WAIT).how == ("unplaced", "ContainerCreating")


def test_nothing_there_at_all() -> None:
    story = Story()
    assert story.end is None
    assert story.seen.waiting() == "the pod is not there yet"
    assert story.due == pytest.approx(WAIT)
    assert story.later(WAIT).how == ("unplaced", "")


# -- containers before it -----------------------------------------------------------------------------


def before(doc: Doc, state: Doc, phase: str = "Pending") -> Doc:
    made = scheduled(doc, "PodInitializing")
    made["spec"]["initContainers"] = [{"name": "vault", "image": "vault:1"}]
    made["status"]["initContainerStatuses"] = [status({"name": "vault", "image": "vault:1"}, state)]
    made["status"]["phase"] = phase
    return made


def test_a_container_before_it_fails() -> None:
    runs = before(pod(), {"running": {"startedAt": BORN}})
    story = Story(pod(), runs)
    assert story.end is None
    story.tell(before(pod(), {"terminated": {"exitCode": 2, "reason": "Error", "message": "no token"}}, "Failed"))
    assert story.how == ("exited", "Init:Error")
    assert story.end is not None
    assert ("vault" in story.end.message, story.end.code) == (True, 2)


def test_a_container_before_it_has_no_image() -> None:
    waits = before(pod(), {"waiting": {"reason": "ErrImageNeverPull", "message": 'image "vault:1" is not present'}})
    assert Story(pod(), waits).how == ("image", "ErrImageNeverPull")


def test_one_before_it_that_was_killed_for_memory_is_not_the_steps_memory() -> None:
    doc = before(pod(), {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, "Failed")
    assert Story(pod(), doc).how == ("exited", "Init:OOMKilled")


def test_one_before_it_that_ended_well_or_serves_on() -> None:
    lives = running(before(pod(), {"terminated": {"exitCode": 0, "reason": "Completed"}}))
    assert Story(lives).end is None
    sidecar = deepcopy(lives)
    sidecar["status"]["initContainerStatuses"][0]["state"] = {"terminated": {"exitCode": 1, "reason": "Error"}}
    assert Story(lives, sidecar).end is None
    assert Story(lives, ended(sidecar, 0)).how == ("exited", "")


# -- many ranks ---------------------------------------------------------------------------------------


def rank(number: int, uid: str = "") -> Doc:
    return running(pod(f"{NAME}-{number}-x", uid or f"uid-{number}", number))


def ranks(count: int = 4) -> Story:
    return Story(*(rank(n) for n in range(count)), pods=count)


def test_the_leaders_end_is_the_end() -> None:
    story = ranks()
    assert story.end is None
    story.tell(ended(rank(2), 0), ended(rank(1), 0))
    assert story.end is None
    assert story.tell(ended(rank(0), 0)).how == ("exited", "")


@pytest.mark.parametrize("leader_code", [1, 75, 143, 137])
def test_one_is_evicted_and_the_others_follow(leader_code: int) -> None:
    story = ranks()
    marked = disrupted(rank(2), *DRAIN)
    story.tell(marked, deleting(marked)).gone(deleting(marked), marked["metadata"]["name"])
    assert story.end is None, "the leader is saving what it can"
    story.tell(ended(rank(1), 1), ended(rank(3), 1), ended(rank(0), leader_code))
    assert story.how == ("interrupted", DRAIN[0])
    assert story.end is not None
    assert "node 2" in story.end.message


def test_a_leader_that_does_not_follow() -> None:
    story = ranks().tell(disrupted(rank(2), *DRAIN)).gone(ended(disrupted(rank(2), *DRAIN), 143))
    assert story.due == pytest.approx(GRACE + MARGIN_S)
    assert story.later(GRACE + MARGIN_S).how == ("interrupted", DRAIN[0])


def test_the_leader_itself_is_evicted() -> None:
    story = (
        ranks()
        .tell(disrupted(rank(0), *DRAIN))
        .gone(ended(disrupted(rank(0), *DRAIN), 143), rank(0)["metadata"]["name"])
    )
    assert story.how == ("interrupted", DRAIN[0])


def test_one_runs_out_of_memory() -> None:
    story = ranks().tell(ended(rank(3), 137, "OOMKilled"), ended(rank(0), 1))
    assert story.how == ("out_of_memory", "OOMKilled")


def test_a_bug_of_one_is_not_the_interruption_that_the_job_makes_of_it() -> None:
    """When one pod has failed, the Job's controller deletes the others, which save and exit 143."""
    others = [0, 2, 3]
    story = ranks().tell(ended(rank(1), 1), *(deleting(rank(n)) for n in others))
    assert story.end is None, "nothing is known of the others yet"
    story.tell(*(ended(deleting(rank(n)), 143) for n in others))
    assert story.how == ("exited", "Error")
    assert story.end is not None
    assert ("node 1" in story.end.message, story.end.code) == (True, 1)


def test_the_peer_of_a_dead_node_ends_before_the_node_is_missed() -> None:
    """Keep-alive tells a rank of it after 20 s, the node controller the cluster after 40; the Job deletes the lost."""
    story = ranks(2).later(20).tell(ended(rank(0), 1), deleting(rank(1)))
    assert story.end is None
    assert story.due == pytest.approx(GRACE + MARGIN_S)
    story.tell(deleting(unheard(rank(1))), after=25)
    assert story.how == ("node_lost", "NodeNotReady")
    assert story.end is not None
    assert "node 1 of the training is why the others ended" in story.end.message


def test_the_leaders_own_node_is_dead() -> None:
    story = ranks(2).later(20).tell(ended(rank(1), 1), deleting(rank(0)))
    began = story.now
    story.tell(deleting(unheard(rank(0))), after=30)
    while story.end is None:
        assert story.due is not None
        story.later(story.due)
    assert story.how == ("node_lost", "NodeNotReady")
    assert story.now <= began + GRACE + MARGIN_S
    # So it is where the cluster never says that the node is silent: it does not let go of the pod.
    story = ranks(2).tell(ended(rank(1), 1), deleting(rank(0)))
    while story.end is None:
        assert story.due is not None
        story.later(story.due)
    assert story.how == ("node_lost", "")


@pytest.mark.parametrize("grace", [5, 120])
def test_what_is_waited_for_is_bounded(grace: int) -> None:
    """A rank that ended by itself, and another that goes on: nobody deletes it, its node is well."""
    story = ranks(2).tell(ended(rank(0), 1))
    assert story.due == pytest.approx(HEARD_S)
    assert story.later(HEARD_S).how == ("exited", "Error")
    slow = ranks(2).tell(ended(rank(0), 1), deleting(rank(1), grace))
    assert slow.due == pytest.approx(grace + MARGIN_S)
    slow.later(grace).gone(ended(deleting(rank(1), grace), 137), rank(1)["metadata"]["name"])
    assert slow.how == ("exited", "Error")
    assert slow.end is not None
    assert "node 0 of the training ended first" in slow.end.message


def test_one_that_has_never_run_is_not_waited_for() -> None:
    story = Story(rank(0), unschedulable(pod("b", "b", 1), NO_GPU), pods=2)
    assert story.tell(ended(rank(0), 75)).how == ("exited", "Error")


def test_one_that_is_told_to_go_before_and_after_the_first_end() -> None:
    story = ranks(2).tell(ended(rank(0), 1), disrupted(rank(1), *TAINT))
    assert story.how == ("interrupted", TAINT[0])
    assert story.end is not None
    assert TAINT[1] in story.end.message
    by_hand = ranks(2).tell(deleting(rank(1)), ended(rank(0), 1))
    assert by_hand.how == ("interrupted", "deleted")
    by_hand.tell(ended(deleting(rank(1)), 143))
    assert by_hand.how == ("interrupted", "deleted")
    # All at one moment, as from a list after the watch was away: the Job deleted it.
    story = ranks(2)
    story.tell(ended(rank(0), 1)).tell(deleting(rank(1)), after=0)
    assert story.end is None


def test_one_whose_node_has_restarted_explains_the_others() -> None:
    story = ranks(2).tell(ended(rank(0), 1), deleting(rank(1)), ended(deleting(rank(1)), 255, "Unknown"))
    assert story.how == ("node_lost", "Unknown")


def test_one_has_a_silent_node() -> None:
    story = ranks().tell(unheard(rank(1)))
    assert story.end is None
    assert story.later(SILENT).how == ("node_lost", "NodeNotReady")


def test_not_all_are_placed() -> None:
    story = Story(rank(0), unschedulable(pod("b", "b", 1), NO_GPU), pods=3)
    assert story.seen.waiting() == f"2 of 3 pods wait: {NO_GPU}; 2 of 3 pods are there"
    assert story.later(WAIT).how == ("unplaced", "Unschedulable")


def test_not_all_are_made() -> None:
    story = Story(rank(0), pods=2)
    assert story.due == pytest.approx(WAIT, abs=1)
    assert story.later(WAIT).how == ("unplaced", "")


def test_an_image_that_is_missing_ends_all_at_once() -> None:
    story = Story(rank(0), scheduled(pod("b", "b", 1), "ErrImageNeverPull", "not present"), pods=2)
    assert story.how == ("image", "ErrImageNeverPull")


@pytest.mark.parametrize(("codes", "how"), [((0, 0), ("exited", "")), ((0, 1), ("exited", "Error"))])
def test_no_one_is_known_to_lead(codes: tuple[int, int], how: tuple[str, str]) -> None:
    a, b = running(pod("a", "a")), running(pod("b", "b"))
    assert Story(a, b, ended(a, codes[0]), ended(b, codes[1]), pods=2).how == how


def test_kubeflow_says_who_leads_in_its_own_way() -> None:
    def replica(name: str, type_: str, index: int) -> Doc:
        doc = running(pod(name, name))
        doc["metadata"]["labels"] |= {
            "training.kubeflow.org/replica-type": type_,
            "training.kubeflow.org/replica-index": str(index),
        }
        return doc

    story = Story(replica("w1", "worker", 1), replica("w0", "worker", 0), replica("m", "master", 0), pods=3)
    assert {m.name: m.index for m in story.seen.members.values()} == {"m": 0, "w0": 1, "w1": 2}
    assert story.seen.leader is not None
    assert story.seen.leader.name == "m"


# -- small things -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("2Gi", 2**31), ("512Mi", 2**29), ("1.5Gi", 3 * 2**29), ("100M", 10**8), ("1000", 1000), (77, 77), ("1e3", 1000),
     ("500m", None), ("", None), (None, None), ("2GB", None), ("x", None)],
)  # fmt: skip
def test_sizes(text: object, bytes_: int | None) -> None:
    assert size(text) == bytes_


def test_sizes_as_people_read_them() -> None:
    assert [readable(n) for n in (2**31, 3 * 2**28, 1)] == ["2.00 GiB", "768 MiB", "0 MiB"]


def test_it_can_be_written_down_and_read_again() -> None:
    story = Story(LIVES, disrupted(LIVES, *DRAIN))
    story.seen = Seen.model_validate_json(story.seen.model_dump_json())
    assert story.gone().how == ("interrupted", DRAIN[0])


def test_every_ending_becomes_a_result() -> None:
    config = StepConfig.model_construct(verb="train", key="2013-01")
    for kind in JUDGED:
        assert without_result(Ending(kind=kind, message="m", by="b"), config).error is not None


# -- whatever is told ---------------------------------------------------------------------------------

KEYS = [
    "metadata", "status", "spec", "name", "uid", "labels", "annotations", "phase", "reason", "message", "conditions",
    "containerStatuses", "initContainerStatuses", "state", "lastState", "terminated", "waiting", "running", "exitCode",
    "type", "deletionTimestamp", "deletionGracePeriodSeconds", "containers", "image", "resources", "limits", "memory",
    "nodeName", INDEX,
]  # fmt: skip
VALUES = [
    "Ready",
    "True",
    "False",
    "Failed",
    "Running",
    "OOMKilled",
    "ErrImagePull",
    "base",
    "DisruptionTarget",
    "0",
    "2Gi",
    "",
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(VALUES), st.text(max_size=5)
)  # fmt: skip
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)),
    max_leaves=12,
)


@st.composite
def documents(draw: st.DrawFn) -> Doc:
    """Return a pod in some state, true to life but for what is torn out or replaced."""
    number = draw(st.integers(0, 2))
    doc = draw(st.sampled_from([pod, lambda *a: scheduled(pod(*a)), lambda *a: running(pod(*a))]))(
        f"{NAME}-{number}", f"uid-{number}", number
    )
    if draw(st.booleans()):
        doc = disrupted(doc, draw(st.sampled_from([DRAIN[0], TAINT[0], "DeletionByPodGC", "TerminationByKubelet"])))
    if draw(st.booleans()):
        doc = deleting(doc, draw(st.integers(0, 100)))
    if "containerStatuses" in doc["status"] and draw(st.booleans()):
        phase = draw(st.sampled_from([None, "Running"]))
        doc = ended(
            doc, draw(st.sampled_from([0, 1, 64, 75, 137, 143])), draw(st.sampled_from(["", "OOMKilled"])), "", phase
        )
    if draw(st.booleans()):
        doc = unheard(doc) if "conditions" in doc["status"] else doc
    if draw(st.booleans()):
        doc = why(doc, draw(st.sampled_from(["Evicted", "DeadlineExceeded", "Terminated", "OutOfcpu"])), "words")
    for _ in range(draw(st.integers(0, 2))):
        part: Any = doc
        while isinstance(part, dict) and part:
            key = draw(st.sampled_from(sorted(part)))
            if not isinstance(part[key], dict) or draw(st.booleans()):
                part[key] = draw(JUNK)
                break
            part = part[key]
    return doc


def taken_back(doc: Doc) -> bool:
    """Tell whether a document says in so many words that its pod is not told to go any more."""
    part = doc.get("status")
    found = part.get("conditions") if isinstance(part, dict) else None
    each = [c for c in found if isinstance(c, dict)] if isinstance(found, list) else []
    return any(c.get("type") == "DisruptionTarget" and c.get("status") == "False" for c in each)


STEPS = st.lists(
    st.tuples(st.sampled_from(["seen", "seen", "seen", "gone", "lost"]), st.one_of(documents(), documents(), JUNK),
              st.sampled_from([0.1, 3.0, 100.0, 5000.0])), max_size=8,
)  # fmt: skip
# How well a kind is known, written down apart from the judge.
KNOWN = {"unplaced": 0, "gone": 0, "node_lost": 1, "exited": 2}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(STEPS, st.integers(1, 3))
def test_no_sequence_of_documents_raises_and_endings_only_get_better(
    steps: list[tuple[str, Any, float]], pods: int
) -> None:
    seen, now, before = Seen(unit=NAME, pods=pods), 0.0, None
    asked: dict[str, Any] = {"wait_until": 1000.0, "grace": 30.0, "silent": 60.0}
    targets: dict[str, str] = {}
    for what, doc, seconds in steps:
        now += seconds
        told = doc if isinstance(doc, dict) else {}
        if what == "seen":
            seen.update(told, now)
        else:
            seen.removed(told if what == "gone" else None, f"{NAME}-0", now)
        if taken_back(told):
            targets = {}
        targets = {uid: m.disruption or targets.get(uid, "") for uid, m in seen.members.items()}
        assert all(seen.members[uid].disruption for uid, reason in targets.items() if reason), (
            "a condition was forgotten"
        )
        end = seen.ending(now, **asked)
        if before is not None:
            assert end is not None
            same = end.kind == before.kind
            assert same or KNOWN.get(end.kind, 3) > KNOWN.get(before.kind, 3)
        before = end
        due = seen.due(now, **asked)
        assert due is None or isinstance(due, float)
        if end is None and due is not None:
            assert due > now, "there was something to say already"
        assert isinstance(seen.waiting(), str)
        seen = Seen.model_validate_json(seen.model_dump_json())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(STEPS)
def test_whoever_asks_when_due_hears_what_whoever_asks_always_hears(steps: list[tuple[str, Any, float]]) -> None:
    """Between documents nothing becomes true before the time that `due` tells."""
    seen, now = Seen(unit=NAME), 0.0
    asked: dict[str, Any] = {"wait_until": 1000.0, "grace": 30.0, "silent": 60.0}
    for what, doc, seconds in steps:
        told = doc if isinstance(doc, dict) else {}
        if what == "seen":
            seen.update(told, now)
        else:
            seen.removed(told, NAME, now)
        if seen.ending(now, **asked) is not None:
            return
        due = seen.due(now, **asked)
        until = now + seconds if due is None else min(due, now + seconds)
        early = seen.model_copy(deep=True)
        assert early.ending((now + until) / 2, **asked) is None
        if due is not None and due <= now + seconds:
            assert seen.ending(due, **asked) is not None
            return
        now += seconds


def test_a_member_says_nothing_of_words_that_are_no_document() -> None:
    assert Member(words="{" * 100_000).last_words == {}
    assert Member(words='{"message": 3}').last_words == {"message": 3}

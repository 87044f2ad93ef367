"""What the objects of one attempt are called in a cluster, and what their labels say. Pure and light.

One *unit* is what runs one attempt: a pod, or the Job of several. Its name follows from the attempt, so that the
same attempt cannot start two: the second creation is refused by the cluster itself (409).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from orrery.contract import StepConfig

UNIT = "orrery/unit"
SLOT = "orrery/slot"
PROJECT = "orrery/project"
STEP = "orrery/step"
RUN = "orrery/run"
ATTEMPT = "orrery/attempt"
PARTITION = "orrery/partition"
DRIVER = "orrery/driver"  # of an executor of Spark: the unit it works for
# Annotations, since a label's value is too short for a folder: where the attempt's documents are, and what it works at.
FOLDER = "orrery/folder"
WORK = "orrery/work"
# A Job's pods are `<unit>-<index>` as hosts and a Kubeflow job's `<unit>-worker-<index>`: both must fit into the 63
# characters of a DNS label.
LONGEST = 50
LONGEST_LABEL = 63
# What differs between two attempts at one work.
OF_ATTEMPT = {"attempt", "folder", "run", "task", "requested"}


def slot(store: str, folder: str) -> str:
    """Return what the units of all attempts at one task and key have in common, and no other's.

    `store` is its URI, `folder` that of one attempt: what stands before the attempt's number is the slot.
    """
    return hashlib.sha256(f"{store}/{folder.rpartition('/')[0]}".encode()).hexdigest()[:12]


def unit(config: StepConfig, again: int = 1) -> str:
    """Return the name of an attempt's unit: the same for the same attempt.

    `again` tells apart the units of one attempt that was started anew: a run that was deleted and made again, say.
    """
    end = f"{config.verb}-{slot(config.store, config.folder)}-{config.attempt}" + (f"-{again}" if again > 1 else "")
    project = re.sub(r"[^a-z0-9]+", "-", config.project.lower())[: LONGEST - len(end) - 1].strip("-")
    return f"{project}-{end}" if project else end


def labels(config: StepConfig, name: str) -> dict[str, str]:
    """Return the labels of a unit's objects: what people and our own selectors find them by."""
    return {
        UNIT: name,
        SLOT: slot(config.store, config.folder),
        PROJECT: label(config.project),
        STEP: label(config.verb),
        # A run id holds what a label may not (+00:00).
        RUN: label(config.run),
        ATTEMPT: str(config.attempt),
        PARTITION: label(config.key),
    }


def notes(config: StepConfig) -> dict[str, str]:
    """Return the annotations of a unit's objects."""
    return {FOLDER: config.folder, WORK: work(config)}


def work(config: StepConfig) -> str:
    """Return what attempts that make the same have in common: the output's address, or else all that they are told."""
    if config.address is not None:
        return config.address
    return hashlib.sha256(config.model_dump_json(exclude=OF_ATTEMPT).encode()).hexdigest()[:32]


def label(text: str) -> str:
    """Return `text` as a label's value; a safe one stays as it is, else a digest keeps two apart."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", text, flags=re.ASCII)
    plain = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9]+$", "", plain)
    if plain == text and len(plain) <= LONGEST_LABEL:
        return plain
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    short = plain[: LONGEST_LABEL - 9].rstrip("_.-")
    return f"{short}-{digest}" if short else digest


def selector(slots: Iterable[str]) -> str:
    """Return the label selector of all units of these slots."""
    return f"{SLOT} in ({','.join(slots)})"

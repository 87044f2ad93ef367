"""A cluster for each test, with the official client on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.api import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "cluster", pace=0.01) as served:
        yield served


@pytest.fixture
def core(cluster: Cluster) -> Iterator[Any]:
    """`kubernetes`' CoreV1Api."""
    from kubernetes import client, config

    with config.new_client_from_config_dict(cluster.kube_config()) as api:
        yield client.CoreV1Api(api)

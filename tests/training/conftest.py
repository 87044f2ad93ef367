"""What all tests of training share: no server of the machine, and slow imports done once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# The tests are of CPUs, also where there is a GPU; only those of `make test-gpu` want it.
if "ORRERY_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def _apart_from_the_machine() -> Iterator[None]:
    """No MLflow of the person who runs the tests; and what every export imports, once, before the forks."""
    import onnxscript  # noqa: F401
    import torch._dynamo  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield

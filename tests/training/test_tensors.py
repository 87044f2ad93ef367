"""weights.safetensors: the published format, and a digest that sees every difference."""

from __future__ import annotations

import json

import numpy as np
import pytest

from orrery.training.tensors import digest, to_safetensors

WEIGHTS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(3, dtype=np.int64), "m": np.array([True])}


def test_the_file_is_safetensors() -> None:
    data = to_safetensors(WEIGHTS)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert (8 + size) % 8 == 0
    body = data[8 + size :]
    kinds = {"F32": np.float32, "I64": np.int64, "BOOL": np.bool_}
    end = 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end  # no hole between two tensors
        end = stop
        read = np.frombuffer(body[start:stop], kinds[entry["dtype"]]).reshape(entry["shape"])
        np.testing.assert_array_equal(read, WEIGHTS[name])
    assert end == len(body) and set(header) == set(WEIGHTS)


def test_the_order_changes_nothing() -> None:
    turned = dict(reversed(WEIGHTS.items()))
    assert digest(turned) == digest(WEIGHTS) and to_safetensors(turned) == to_safetensors(WEIGHTS)
    strided = WEIGHTS | {"b": np.asfortranarray(WEIGHTS["b"])}
    assert digest(strided) == digest(WEIGHTS)


@pytest.mark.parametrize(
    "other",
    [
        {"b": WEIGHTS["b"].reshape(3, 2)},
        {"b": WEIGHTS["b"].view(np.int32)},
        {"b": np.nextafter(WEIGHTS["b"], np.float32(9))},
        {"c": np.zeros(0, np.float32)},
    ],
)
def test_the_digest_sees_every_difference(other: dict[str, np.ndarray]) -> None:
    assert digest(WEIGHTS | other) != digest(WEIGHTS)

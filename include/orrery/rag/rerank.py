"""A reranker: a cross-encoder in ONNX that looks at question and passage together.

Its folder holds `model.onnx` (input_ids, attention_mask and, where the model wants them, token_type_ids in; one logit a
pair out) and `tokenizer.json`, whose template for pairs is used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orrery.errors import UserError

MODEL, TOKENIZER = "model.onnx", "tokenizer.json"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LIMIT, BATCH = 512, 16


class CrossEncoder:
    """Scores passages for a question. Any number of threads may ask at once."""

    def __init__(self, tokenizer: Any, session: Any, inputs: tuple[str, ...], output: str) -> None:
        self._tokenizer, self._session, self._inputs, self._output = tokenizer, session, inputs, output

    @classmethod
    def open(cls, folder: Path, threads: int = 0) -> CrossEncoder:
        """Open a cross-encoder's folder. Raises `UserError` when it is none."""
        from tokenizers import Tokenizer

        for name in (MODEL, TOKENIZER):
            if not (folder / name).is_file():
                raise UserError(f"reranker: {folder / name} is not there", hint=f"it needs {MODEL} and {TOKENIZER}")
        try:
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as e:  # the library raises plain exceptions
            raise UserError(f"reranker: {folder / TOKENIZER} cannot be read ({e})") from None
        # Of the longer of the two: a question of 512 tokens leaves no room for a passage, and cannot be cut around.
        tokenizer.enable_truncation(LIMIT, strategy="longest_first")
        tokenizer.no_padding()
        session = _session(folder / MODEL, threads)
        inputs = tuple(one.name for one in session.get_inputs())
        if unknown := sorted(set(inputs) - set(INPUTS)):
            raise UserError(
                f"reranker: {folder / MODEL} wants the input {unknown[0]!r}", hint=f"known are {', '.join(INPUTS)}"
            )
        return cls(tokenizer, session, inputs, session.get_outputs()[0].name)

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """Return each passage's probability of answering the question; a pair beyond 512 tokens is cut."""
        encoded = self._tokenizer.encode_batch([(question[:LIMIT], text) for text in texts])
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i].ids))
        found = [0.0] * len(texts)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            for row, logit in zip(rows, self._logits([encoded[i] for i in rows]), strict=True):
                found[row] = 1 / (1 + math.exp(-max(-60.0, min(60.0, logit))))
        return found

    def _logits(self, encoded: list[Any]) -> list[float]:
        width = max(len(one.ids) for one in encoded)
        fed = {name: np.zeros((len(encoded), width), np.int64) for name in INPUTS}
        for row, one in enumerate(encoded):
            for name, values in zip(INPUTS, (one.ids, one.attention_mask, one.type_ids), strict=True):
                fed[name][row, : len(values)] = values
        logits = self._session.run([self._output], {name: fed[name] for name in self._inputs})[0]
        logits = np.asarray(logits, np.float64).reshape(len(encoded), -1)
        if logits.shape[1] != 1:
            raise UserError(f"reranker: {logits.shape[1]} logits a pair", hint="a cross-encoder for ranking has one")
        return [float(value) for value in logits[:, 0]]


def _session(model: Path, threads: int) -> Any:
    # onnxruntime uploads usage events unless told not to before it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(os.fspath(model), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's own tree of exceptions
        raise UserError(f"reranker: {model} cannot be loaded ({type(e).__name__})") from None


def open_reranker(uri: str, scratch: Path, threads: int = 0, *, folder: Path | None = None) -> CrossEncoder:
    """Open the cross-encoder of the spec (`retrieval.reranker`): a folder, or a bucket's whose files are fetched.

    A relative path is taken from `folder`, the project's, as that of the embedder. Raises `UserError`.
    """
    if "://" not in uri or uri.startswith("file://"):
        path = Path(uri.removeprefix("file://")).expanduser()
        if not path.is_absolute() and folder is None:
            told = f"retrieval.reranker: {uri} is relative, and no project folder is known"
            raise UserError(told, hint="an absolute path, or a bucket's URI")
        return CrossEncoder.open(folder / path if folder else path, threads)
    import fsspec

    from orrery.store import storage_options, trouble

    with trouble(uri):
        scratch.mkdir(parents=True, exist_ok=True)
        fs, root = fsspec.core.url_to_fs(uri, **storage_options(uri))
        for name in (MODEL, TOKENIZER):
            try:
                fs.get_file(f"{root.rstrip('/')}/{name}", str(scratch / name))
            except FileNotFoundError:
                raise UserError(f"reranker: {uri.rstrip('/')}/{name} is not there") from None
    return CrossEncoder.open(scratch, threads)

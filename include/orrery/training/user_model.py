"""A project's model.py: which of `build` and `fit` it has, and its Params with the values asked for."""

from __future__ import annotations

import contextlib
import errno
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from orrery import bundle
from orrery.errors import OrreryError, SpecError, nearest

if TYPE_CHECKING:
    from orrery.training import Dataset
    from orrery.training.schema import Schema

ARGUMENTS = {"build": ("schema", "params"), "fit": ("train", "valid", "params")}


class NoParams(BaseModel):
    """What a model.py without a `Params` of its own is given."""


@dataclass(frozen=True)
class UserModel:
    """The two things that training needs of a model.py."""

    kind: Literal["build", "fit"]
    function: Callable[..., Any]
    params: type[BaseModel]


def load(folder: Path, project: str) -> UserModel:
    """Import `<folder>/model.py`. Raises `SpecError` when it does not say what to train, or says it twice."""
    module = bundle.load_module(folder, project, "model")
    kind = _kind(module)
    function = getattr(module, kind)
    try:
        inspect.signature(function).bind(*ARGUMENTS[kind])
    except TypeError:
        wanted = f"{kind}({', '.join(ARGUMENTS[kind])})"
        raise SpecError(f"model.py: {kind}{inspect.signature(function)} cannot be called as {wanted}") from None
    params = getattr(module, "Params", NoParams)
    if not (isinstance(params, type) and issubclass(params, BaseModel)):
        raise SpecError("model.py: Params is not a pydantic model", hint="class Params(BaseModel): ...")
    return UserModel(kind, function, params)


def _kind(module: ModuleType) -> Literal["build", "fit"]:
    has = [name for name in ("build", "fit") if callable(getattr(module, name, None))]
    if len(has) != 1:
        found = "has both `build` and `fit`" if has else "has neither `build` nor `fit`"
        raise SpecError(
            f"model.py {found}; exactly one is wanted",
            hint="build(schema, params) -> torch module, or fit(train, valid, params) -> a model with to_onnx()",
        )
    return "build" if has[0] == "build" else "fit"


def values(model: UserModel, overrides: Mapping[str, Any]) -> BaseModel:
    """Return Params with `overrides` over its defaults. Raises `SpecError` for an unknown name or a wrong value."""
    for name in overrides:
        if name not in model.params.model_fields:
            raise SpecError(
                f"train.params.{name}: model.py's Params has no {name!r}", hint=nearest(name, model.params.model_fields)
            )
    try:
        return model.params.model_validate(dict(overrides))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        hint = "" if where in overrides else "give it a default in model.py, or a value under train.params in spec.yaml"
        raise SpecError(f"train.params.{where}: {first['msg']}, got {first['input']!r}", hint=hint) from None


@contextlib.contextmanager
def told(what: str, *, only_theirs: bool = False) -> Iterator[None]:
    """Turn whatever a project's code raises into a `SpecError` that names its line.

    Its mistakes are the same on the next attempt. What is raised on purpose (told to stop, try again) stays, and
    with `only_theirs` whatever did not pass through the project's code.
    """
    try:
        with bundle.one_process("model.py"):
            yield
    except (OrreryError, MemoryError):  # a machine's fault, not a line's
        raise
    except (Exception, SystemExit) as e:  # sys.exit() would end the process without a word, and be tried again
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        line = _line(e)
        if only_theirs and (not line or _of_the_machine(e)):
            raise
        raise SpecError(f"model.py: {what} failed{line}: {type(e).__name__}: {e}") from e


def _of_the_machine(error: BaseException) -> bool:
    """Tell an error of a collective or a device: sharded weights are gathered inside of a model's own forward."""
    if type(error).__name__ in ("AcceleratorError", "OutOfMemoryError"):
        return True
    deepest = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        deepest = frame.f_code.co_filename
    return "/torch/distributed/" in deepest or type(error).__name__.startswith("Dist")


def _line(error: BaseException) -> str:
    """Return the deepest line that is in the project's code, since the deepest of all is often in a library."""
    found = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).startswith("orrery_project_"):
            name = Path(frame.f_code.co_filename).name
            found = f" (line {number})" if name == "model.py" else f" ({name}, line {number})"
    return found


def module(model: UserModel, schema: Schema, params: BaseModel) -> Any:
    """Return the torch module that `build` makes. Raises `SpecError` when it fails, naming the line."""
    from torch import nn

    with told("build"):
        made = model.function(schema, params)
    if not isinstance(made, nn.Module):
        raise SpecError(f"model.py: build returned {type(made).__name__}, not a torch nn.Module")
    if not any(p.requires_grad for p in made.parameters()):
        raise SpecError("model.py: the module has no parameter to train")
    return made


def fitted(model: UserModel, train: Dataset, valid: Dataset, params: BaseModel) -> Any:
    """Return what `fit` made, written as ONNX (bytes or a ModelProto).

    Raises `SpecError` when it fails, naming the line, or has no `to_onnx`.
    """
    with told("fit"):
        made = model.function(train, valid, params)
    if not callable(getattr(made, "to_onnx", None)):
        raise SpecError(
            f"model.py: fit returned {type(made).__name__}, which has no to_onnx()",
            hint="its to_onnx() gives bytes or an onnx.ModelProto (see orrery.training.OnnxExportable)",
        )
    with told("to_onnx()"):
        return made.to_onnx()

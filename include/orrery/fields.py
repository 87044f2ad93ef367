"""What every file that a person writes is made of: names, durations, crons, and the base of its models. Light."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

from orrery import yamlfile
from orrery.partitions import Grain

NAME = r"^[a-z][a-z0-9_]{0,62}$"
Name = Annotated[str, StringConstraints(pattern=NAME)]
ComputeName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
COLUMN = r"[A-Za-z_][A-Za-z0-9_.]{0,126}"
Column = Annotated[str, StringConstraints(pattern=f"^{COLUMN}$")]
# The five fields of a cron, what each is called in an error, and its range; months and weekdays have names, too.
CRON_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of the month", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


def _cron(text: str) -> str:
    """Refuse what Airflow could not schedule by: a Dag file with such a cron would lose all of its Dags."""
    words = text.split()
    if len(words) != len(CRON_FIELDS):
        raise ValueError(f"a cron has five fields, such as '0 6 2 * *' (6:00 on each month's 2nd), not {len(words)}")
    for word, (name, low, high) in zip(words, CRON_FIELDS, strict=True):
        for part in word.split(","):
            span, _, step = part.partition("/")
            ends = [str(low), str(high)] if span == "*" else span.split("-")
            numbers = [_cron_number(end, name, low) for end in ends]
            fine = len(numbers) <= 2 and all(n is not None and low <= n <= high for n in numbers)
            if not fine or (step and not re.fullmatch("[1-9][0-9]*", step)) or part.endswith("/"):
                raise ValueError(f"cron: {name} {part!r} is not in {low} to {high}, *, a-b, or one of these with /step")
    return text


def _cron_number(text: str, field: str, low: int) -> int | None:
    names = {"month": MONTHS, "weekday": WEEKDAYS}.get(field, ())
    if text.lower() in names:
        return names.index(text.lower()) + low
    return int(text) if re.fullmatch("[0-9]{1,2}", text, flags=re.ASCII) else None


Cron = Annotated[str, AfterValidator(_cron)]
Duration = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,5}(s|m|h|d)$")]
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SCHEDULES: dict[Grain, str] = {"hour": "15 * * * *", "day": "0 6 * * *", "month": "0 6 2 * *", "year": "0 6 2 1 *"}


def seconds(duration: str) -> int:
    """Return a duration such as `90s`, `15m`, `2h` or `7d` in seconds."""
    return int(duration[:-1]) * UNITS[duration[-1]]


class Frozen(BaseModel):
    """Base of everything a person writes: immutable, and no key that we do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


F = TypeVar("F", bound=Frozen)


def part(model: type[F], value: Any, *at: str) -> F:
    """Check a part of the file whose model depends on its place; an error keeps that place."""
    try:
        return model.model_validate(value)
    except ValidationError as e:
        raise yamlfile.Inside(at, e, model) from None

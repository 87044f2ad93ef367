"""`python -m orrery.serving PROJECT` serves; `python -m orrery.serving token NAME --groups a,b` makes a token."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from datetime import UTC, date, datetime
from pathlib import Path

from orrery.errors import DONE, OrreryError, RequestError
from orrery.serving.tokens import VARIABLE


def run(argv: list[str]) -> int:
    """Do what is asked; return the exit code. Raises `OrreryError`."""
    return _token(argv[1:]) if argv[:1] == ["token"] else _serve(argv)


def _serve(argv: list[str]) -> int:
    from orrery.serving import main

    parser = argparse.ArgumentParser(prog="python -m orrery.serving", description="Answer questions, with sources.")
    parser.add_argument("project")
    parser.add_argument("--host", default="127.0.0.1", help="other than loopback it needs tokens")
    parser.add_argument("--port", type=int, default=8070, help="0: a free one, which the log tells")
    parser.add_argument("--tokens", type=Path, default=_file(), help=f"file of tokens ({VARIABLE})")
    args = parser.parse_args(argv)
    return main(args.project, args.host, args.port, args.tokens)


def _token(argv: list[str]) -> int:
    from orrery.serving.tokens import add

    parser = argparse.ArgumentParser(prog="python -m orrery.serving token", description="Make a bearer token.")
    parser.add_argument("name", help="who will have it; the log names it")
    parser.add_argument("--groups", default="", help="what it may read beside `everyone`, such as ops,support")
    parser.add_argument("--expires", type=_day, default=None, help="its last day, such as 2027-06-30")
    parser.add_argument("--tokens", type=Path, default=_file(), help=f"file of tokens ({VARIABLE})")
    args = parser.parse_args(argv)
    if args.tokens is None:
        raise RequestError("which file?", hint=f"name it by {VARIABLE} or --tokens; it is made when it is not there")
    token = add(args.tokens, args.name, [g.strip() for g in args.groups.split(",") if g.strip()], args.expires)
    sys.stderr.write(f"{args.name} is in {args.tokens}. The token, which is written down nowhere:\n")
    sys.stdout.write(f"{token}\n")
    return DONE


def _file() -> Path | None:
    given = os.environ.get(VARIABLE)
    return Path(given) if given else None


def _day(text: str) -> date:
    """Return a day. Raises `RequestError` for what is none, or is over."""
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise RequestError(f"--expires {text[:40]!r} is no day", hint="such as 2027-06-30") from None
    if day < datetime.now(UTC).date():
        raise RequestError(f"--expires {text}: that day is over, so the token would never be good")
    return day


def _leave(code: int) -> None:
    """End the process, also when a thread still waits for a store or an index that does not answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(t is not threading.main_thread() and not t.daemon for t in threading.enumerate()):
        os._exit(code)
    raise SystemExit(code)


def main() -> None:
    """Entry of `python -m orrery.serving`."""
    try:
        code = run(sys.argv[1:])
    except OrreryError as e:
        sys.stderr.write(f"error: {e.message}\n" + (f"  → {e.hint}\n" if e.hint else ""))
        code = e.exit_code
    _leave(code)


if __name__ == "__main__":
    main()

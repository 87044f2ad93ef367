"""A process that reads documents, one at a time, as `pool` sends them: `python -m orrery.rag.reading.worker`.

In: one JSON line {"kind", "charset", "size"}, then `size` bytes. Out: one JSON line. It ends with its input.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any


def main(memory: int, parent: int, pages: int, characters: int) -> None:
    """Serve until standard input ends. `memory` bounds the address space, in bytes."""
    from orrery.parent import follow

    follow(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it has nothing to write
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    from orrery.rag.reading import Bounds

    bounds = Bounds(pages, characters)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # the replies' channel is nobody else's
    target.write(b'{"ready": true}\n')
    target.flush()
    while header := source.readline():
        told = json.loads(header)
        data = source.read(told["size"])
        reply = json.dumps(_answer(data, told["kind"], told["charset"], bounds))
        del data
        target.write(reply.encode() + b"\n")
        target.flush()


def _answer(data: bytes, kind: str, charset: str | None, bounds: Any) -> dict[str, Any]:
    from orrery.rag.reading import Source, Unreadable, read

    try:
        found = read(Source(data, kind, charset), bounds)
    except Unreadable as e:
        return {"why": e.why, "skip": e.skip}
    except MemoryError:
        return {"memory": True}
    except Exception as e:  # a reader's own fault: it must cost one document, and be told
        return {"why": f"it could not be read: {type(e).__name__}: {str(e)[:200]}", "skip": False}
    sections = [[s.heading, s.text, s.page] for s in found.sections]
    return {"title": found.title, "sections": sections, "notes": found.notes}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))

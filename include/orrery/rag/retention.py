"""Which generations leave a Qdrant server: those that nobody may need any more. Embedded ones are housekeeping's.

A collection goes when its name is of this project, its generation is known to the store and more than a day old, it is
not among those to keep, and no alias names it. Whatever is unknown stays: another store's project may have the name.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any

from orrery.errors import OrreryError
from orrery.step import Work
from orrery.store import Manifest

YOUNG = timedelta(days=1)


def retire(work: Work, qdrant: str | None, keep: Collection[str]) -> list[str]:
    """Remove what has served its time but the generations at the paths `keep`; return the collections that went.

    A server that refuses keeps them until the next time: what is live is live all the same.
    """
    if qdrant is None:
        return []
    try:
        return _retire(work, qdrant, keep)
    except OrreryError as e:
        work.log.warning(f"old generations stay on the server: {e.message}")
        return []


def _retire(work: Work, qdrant: str, keep: Collection[str]) -> list[str]:
    from orrery.rag.engines.server import connect, remove, talking

    client = connect(qdrant)
    with talking(qdrant):
        named = {one.collection_name for one in client.get_aliases().aliases}
        there = {one.name for one in client.get_collections().collections} - named
    removed = []
    known = generations(work)
    for collection in sorted(there & set(known)):
        manifest = known[collection]
        if manifest.path in keep or young(manifest, datetime.now(UTC)):
            continue
        work.fence()
        if remove(client, collection, qdrant):
            work.log.info("an old generation is removed from the server", collection=collection, made=manifest.created)
            removed.append(collection)
    return removed


def generations(work: Work) -> dict[str, Manifest]:
    """Return this project's generations on a server, by the name of their collection."""
    project, found = work.config.project, {}
    for address in work.store.names(f"{project}/index"):
        if not re.fullmatch(r"[0-9a-f]{16,64}", address):
            continue
        manifest = work.store.manifest(f"{project}/index/{address}/manifest.json")
        collection: Any = manifest.facts.get("collection") if manifest is not None else None
        if manifest is not None and isinstance(collection, str):
            found[collection] = manifest
    return found


def young(manifest: Manifest, now: datetime) -> bool:
    """Tell whether a generation was made within the last day, or nobody knows when."""
    try:
        made = datetime.fromisoformat(manifest.created)
        return now - made < YOUNG
    except (ValueError, TypeError):
        return True

"""`python -m orrery` with the tests' verbs in the catalogue; stands in for an environment's Python."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import core_verbs

from orrery.cli import main

if __name__ == "__main__":
    core_verbs.register()
    sys.argv = ["orrery", *sys.argv[sys.argv.index("orrery") + 1 :]]
    main()

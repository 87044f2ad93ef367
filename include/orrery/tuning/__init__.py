"""Search of the parameters that model.py declares `tunable`: trials, each a step, and the step that decides."""

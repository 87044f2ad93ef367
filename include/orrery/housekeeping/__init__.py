"""What is no longer needed goes: attempts, checkpoints, outputs, leftovers, bundles, studies, pods. Light.

    inventory   what one listing of the store says, folded by unit
    references  what refers to what: from roots, over documents, to all that must stay (mark)
    decisions   what may go, and why: a pure function of both (sweep)
    sweep       reads, decides, refuses what looks wrong, removes; bounded, idempotent, one at a time
    units       which pods, Jobs and Services nobody will ask for again
    machine     what lies on this machine: temporary folders, studies, logs
    report      what was done, for people and for the ledger

An output is withdrawn first (its manifest is renamed) and its files go a day later: a reference that came up in
between brings it back.
"""

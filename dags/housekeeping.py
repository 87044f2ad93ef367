"""**If red at** a task, do this. Owner: **platform**.

| red at | means | do |
| --- | --- | --- |
| `store`, 64 | what was found looks wrong: a clock, a ledger of another store, a listing that lacks what is there, or a very large share. **Nothing was removed** | read the message and the list above it in the log. Mend what is wrong; if the list is right (the first run on an old store), trigger the Dag once with `share` 1 |
| `store`, 75 | store or ledger were out of reach, or another run is at it | it is tried again by itself; clear it later |
| `pods` | the cluster does not answer, or its Role does not allow to list or delete | `docker/kubernetes/rbac.yaml`; clear it. **Skipped** is no failure: under the local profile there are no pods |

An Airflow Dag file for the whole house: once a day what is no longer needed goes. How long what stays is `retention` in
`include/platform.yaml`; `orrery housekeeping --dry-run` shows what would go, and why, at any time. Trigger this Dag with
`dry_run` for the same in the log. An output is withdrawn first (`withdrawn.json` beside its files) and goes a day later:
until then, renaming it to `manifest.json` brings it back. Each removal with its reason: `_housekeeping/reports/` in the store.
"""

from orrery.orchestration.housekeeping import housekeeping

housekeeping(__doc__)

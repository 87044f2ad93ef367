"""**If red at** a task, do this. Owner: **platform**.

| red at | means | do |
| --- | --- | --- |
| `orrery.housekeeping` `store`, 64 | what was found looks wrong: a clock, a ledger of another store, a listing that lacks what is there, or a very large share. **Nothing was removed** | read the message and the list above it in the log. Mend what is wrong; if the list is right (the first run on an old store), trigger the Dag once with `share` 1 |
| `orrery.housekeeping` `store`, 75 | store or ledger were out of reach, or another run is at it | it is tried again by itself; clear it later |
| `orrery.orphans` `pods`, 64 | Airflow lacks the connection to the cluster, or its Role does not allow to list or delete | `kubernetes.connection` in `include/platform.yaml`, `docker/kubernetes/rbac.yaml`; clear it |
| `orrery.orphans` `pods`, 75 | the cluster does not answer | it is tried again by itself, and an hour later |

Two Airflow Dags for the whole house: `orrery.housekeeping` removes once a day what the store no longer needs, and
`orrery.orphans` each hour the pods and Jobs that nobody waits for any more (only of attempts in this store; under the
local profile there are none, and no such Dag). How long what stays is `retention` in `include/platform.yaml`; `orrery
housekeeping --dry-run` shows what would go from the store, and why, at any time. Trigger a Dag with `dry_run` for the
same in its log. An output is withdrawn first (`withdrawn.json` beside its files) and goes a day later: until then,
renaming it to `manifest.json` brings it back. Each removal with its reason: `_housekeeping/reports/` in the store.
"""

from orrery.orchestration.housekeeping import housekeeping, orphans

housekeeping(__doc__)
orphans(__doc__)

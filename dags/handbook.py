"""**If red at** a task, do this. Owner: **platform**.

| red at | means | do |
| --- | --- | --- |
| `collect`, 64 | a source is not there, or too many of its documents are gone or unreadable. **Nothing was deleted** | the message names the source and some of them; open **Sources** (tab *Details*). If they are gone for good, trigger the Dag with *Sources have shrunk* |
| `collect`, 75 | a source did not answer | it is tried again by itself |
| `chunk`, `embed` | the embedder does not fit, or the machine was too small | the message; what was embedded is not embedded again |
| `index` | Qdrant is away, or refuses | it is tried again by itself; clear it later |
| `evaluate`, `gate` | never red because a generation is worse: that is green, verdict `kept` | read the message |
| `promote` | the generation could not be opened, or another became live since | clear `evaluate` and what follows |
| `rollback` | nothing was live before, or that generation is gone | name another `version` |

The Airflow Dags of this knowledge base are made from `include/projects/handbook/`. What answers now stays as it is until
`promote` is green. A bad generation? Trigger `handbook.rollback`, or `orrery rollback handbook`.
"""

from orrery.orchestration import lifecycle

lifecycle("handbook", __doc__)

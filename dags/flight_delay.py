"""**If red at** a task, do this. Owner: **ops-ml**.

| red at | means | do |
| --- | --- | --- |
| `ingest` | the upstream file is not there, or cannot be read | see the message's URI; once it has landed, clear the task |
| `validate` | the month's data fail a check | open **Data Docs** (tab *Details* of the task): column, rule, rows. Upstream's fault: have it land again and clear `ingest`. A rule too strict: change `checks` in spec.yaml, clear `validate` |
| `materialize` | features.py does not fit the data, or the features are stale | the message names the view and the column; run `orrery check flight_delay` |
| `train` | model.py or its parameters are wrong, or the machine was lost | 64: read the message; else it is tried again by itself |
| `evaluate`, `gate` | never red because of a weak model: a refused candidate is **green** with verdict `kept` | a red one is a bug or a missing input: read the message |
| `register`, `promote` | MLflow is down | `make status`; they are tried again for ten to twenty minutes. After that, clear the task: the promotion happens once |
| `score` | the features of the partition are missing, or Spark could not start | clear it after `ingest` of that partition is green |

An Airflow Dag file: the three Dags of this project (`ingest`, `train`, `score`; will a flight arrive more than
15 minutes late?) are made from `include/projects/flight_delay/`. A bad champion? `orrery ledger flight_delay`, then `orrery rollback flight_delay`.
"""

from orrery.orchestration import lifecycle

lifecycle("flight_delay", __doc__)

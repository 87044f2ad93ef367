"""**If red at** a task, do this. Owner: **ops-ml**.

| red at | means | do |
| --- | --- | --- |
| `ingest` | the upstream file is not there, or cannot be read | see the message's URI; once it has landed, clear the task |
| `validate` | the month's data fail a check | open **Data Docs** (tab *Details* of the task): column, rule, rows. Upstream's fault: have it land again and clear `ingest`. A rule too strict: change `checks` in spec.yaml, clear `validate` |
| `materialize` | features.py does not fit the data, or the features are stale | the message names the view and the column; run `orrery check flight_delay` |
| `train` | model.py or its parameters are wrong, or a budget is spent | 64: read the message; else it goes on from its checkpoint by itself: the button *Attempts* says how often, why, and from which step |
| `trial`, `tune` | a trial's code is wrong (64), or the database of the study is away | read the message; clear it: what is done is not done again |
| `evaluate`, `gate` | never red because of a weak model: a refused candidate is **green** with verdict `kept` | a red one is a bug or a missing input: read the message |
| `register`, `promote` | MLflow is down | `make status`; they are tried again for ten to twenty minutes. After that, clear the task: the promotion happens once |
| `score` | the features of the partition are missing, or Spark could not start | clear it after `ingest` of that partition is green |
| `request` | the run asks for what cannot be (64), or the ledger was out of reach | read the message. **Skipped** is no failure: the note says why (window not complete, asked for already, verdict not `retrain`). Clearing it never asks twice |
| `approve` | nobody answered, or the answer was no | see the question under *Required Actions*; clear `approve` to be asked again |
| `labels` | the run names no month | *deferred* is its ordinary state: it waits until the labels are known, `label.delay` after the month ends |
| `monitor` | the month has no scores, or its features are stale | run `score` (or `ingest`) of the month, then clear it. Verdict `watch` or `retrain` is green |
| `report` | Evidently could not draw | verdict and request stand without it; clear it |
| `rollback` | there is no earlier champion, or the version could not score | the message says which; name another `version`. Clearing a green one does nothing: trigger a new run to go further back |
| `watch` | a source cannot be listed | credentials and address of the source; it goes on by itself |

An Airflow Dag file: the Dags of this project (will a flight arrive more than 15 minutes late?) are made from
`include/projects/flight_delay/`. `ingest` makes features; `request` asks for the first training when they complete a window (a
person can at any time: trigger `train`, or `request`); `train` takes up what was asked; `score`, `labels` and `monitor`
follow each month, and from then on `monitor` asks. Who asked for what, when and why: `orrery ledger flight_delay`. A bad
champion? Trigger `flight_delay.rollback`, or `orrery rollback flight_delay`.
"""

from orrery.orchestration import lifecycle

lifecycle("flight_delay", __doc__)

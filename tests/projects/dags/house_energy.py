"""**If red at** a task, do this. Owner: **grid-planning**.

| red at | means | do |
| --- | --- | --- |
| any task | a test found something | read its log |

The Airflow Dags of the tests' second project.
"""

from orrery.orchestration import lifecycle

lifecycle("house_energy", __doc__)

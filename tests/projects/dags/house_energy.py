"""
# house_energy

The Airflow Dags of the tests' second project. Owner: **grid-planning**.

| red at | means | do |
| --- | --- | --- |
| any task | a test found something | read its log |
"""

from orrery.orchestration import lifecycle

lifecycle("house_energy", __doc__)

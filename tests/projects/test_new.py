"""`orrery new` on a sample of data: the drafted project is sound and goes through its first steps as it stands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from loop import ORRERY, ROOT, VENVS

pytestmark = pytest.mark.slow

DATA = """
import sys, datetime as dt, pyarrow as pa, pyarrow.parquet as pq
start = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
rows = [{"customer_id": f"c{i:05d}", "signed_up": start + dt.timedelta(minutes=i), "plan": ["free", "team"][i % 2],
         "spend": float(i % 97), "target": float(i % 3 == 0)} for i in range(2000)]
pq.write_table(pa.Table.from_pylist(rows), sys.argv[1])
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("include", "docker"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "projects").mkdir()
    sample = tmp_path / "data" / "customers" / "2024-01.parquet"
    sample.parent.mkdir(parents=True)
    subprocess.run([str(VENVS / "ml" / "bin" / "python"), "-c", DATA, str(sample)], check=True)
    return tmp_path


def orrery(home: Path, *args: str, code: int = 0) -> str:
    env = {
        **os.environ,
        "ORRERY_HOME": str(home),
        "ORRERY_VENVS": str(VENVS),
        "ORRERY_PROJECTS": str(home / "projects"),
        "ORRERY_STORE": f"file://{home}/store",
        "ORRERY_LEDGER": f"sqlite:///{home}/ledger.db",
        "ORRERY_DATA": f"file://{home}/data",
    }
    done = subprocess.run([ORRERY, *args], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_a_drafted_project_is_sound_and_runs(home: Path) -> None:
    sample = home / "data" / "customers" / "2024-01.parquet"
    orrery(home, "new", "churn", "--data", f"customers={sample}")
    spec = (home / "projects" / "churn" / "spec.yaml").read_text()
    assert "unique: customer_id" in spec and "team" in spec
    assert (home / "dags" / "churn.py").exists()
    assert "rows customers" in orrery(home, "check", "churn")
    for step in ("ingest", "validate", "materialize"):
        orrery(home, "run", "churn", step, "--partition", "2024-01")
    assert "exists already" in orrery(home, "new", "churn", code=64)


def test_a_sample_that_is_not_there(home: Path) -> None:
    text = orrery(home, "new", "churn", "--data", f"customers={home}/data/customers/2024-02.parquet", code=64)
    assert "2024-02" in text and "Traceback" not in text
    assert not (home / "projects" / "churn").exists()

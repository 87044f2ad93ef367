"""The test cluster as a process: python tests/cluster/serve.py --port 21150 --state /tmp/cluster

Writes `kubeconfig.json` below the state folder, and plays a failure for each POST /_cluster/<failure>.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.api import Cluster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--state", type=Path, required=True, help="a folder for logs and the pods' own folders")
    parser.add_argument(
        "--venvs", type=Path, help="the environments that images stand for (default: ORRERY_VENVS, .venvs)"
    )
    parser.add_argument("--pace", type=float, default=1.0, help="factor for the times that are the cluster's own")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for every container")
    args = parser.parse_args()
    given = dict(text.split("=", 1) for text in args.env)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    cluster = Cluster(args.state, port=args.port, venvs=args.venvs, pace=args.pace, environment=given)
    with cluster:
        (args.state / "kubeconfig.json").write_text(json.dumps(cluster.kube_config()))
        print(f"a cluster at {cluster.url}", flush=True)
        stop.wait()


if __name__ == "__main__":
    main()

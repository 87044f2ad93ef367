"""MLflow's REST API, as far as versions, aliases and runs need it, over the standard library.

MLflow's own client takes 3 to 6 seconds to import on a small machine, in each of train, register, promote
and rollback; this takes none. The API is public and versioned (mlflow.org/docs/latest/rest-api.html);
tests/registry drives it against the pinned server and reads what it made with MLflow's own client.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit, urlunsplit

import fsspec

from orrery.errors import TryAgain, UserError
from orrery.uri import masked

# A server that is up accepts at once; one that is down must not hold up a training.
CONNECT_S = 3.0
ANSWER_S = 60.0
API = "/api/2.0/mlflow"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
ADDRESS_TAG = "orrery.address"


class Refused(UserError):
    """MLflow understood and said no; `code` is its error code, such as RESOURCE_DOES_NOT_EXIST."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Run:
    """One MLflow run."""

    id: str
    experiment: str
    artifacts: str
    started: int


@dataclass(frozen=True)
class Version:
    """One immutable version of a registered model. `source` is the URI of its folder."""

    number: int
    source: str
    run: str
    tags: Mapping[str, str] = field(default_factory=dict)


class Mlflow:
    """An MLflow server. Every call raises `TryAgain` when it cannot be reached, `UserError` when it refuses."""

    def __init__(self, uri: str, answer_s: float = ANSWER_S) -> None:
        self._parts = urlsplit(uri.rstrip("/"))
        if self._parts.scheme not in ("http", "https") or not self._parts.hostname:
            raise UserError(
                f"MLflow's address {masked(uri)!r} is not one of a server", hint="http://host:port; see ORRERY_MLFLOW"
            )
        host = self._parts.netloc.rpartition("@")[2]
        self.address = urlunsplit((self._parts.scheme, host, self._parts.path, "", ""))
        self._answer_s = answer_s

    # -- the wire ----------------------------------------------------------------------------------

    def call(self, method: str, endpoint: str, **fields: Any) -> dict[str, Any]:
        """Call one endpoint; GET sends the fields as a query, the rest as JSON. Returns the answer."""
        path, body = f"{API}/{endpoint}", None
        if method == "GET":
            path += f"?{urlencode(fields)}"
        else:
            body = json.dumps(fields).encode()
        answer = self._send(method, path, body, {"Content-Type": "application/json"})
        try:
            return dict(json.loads(answer or b"{}"))
        except (ValueError, TypeError):
            text = answer[:80].decode(errors="replace")
            raise UserError(
                f"{self.address} is no MLflow server: it answered {text!r}", hint="see ORRERY_MLFLOW"
            ) from None

    def _send(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
        connection = self._connection()
        try:
            connection.connect()
            connection.sock.settimeout(self._answer_s)
            connection.request(method, f"{self._parts.path}{path}", body, {**headers, **self._credentials()})
            answer = connection.getresponse()
            status, data = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as e:
            raise TryAgain(
                f"MLflow at {self.address} cannot be reached: {e or type(e).__name__}",
                hint="start it (`orrery up`) or correct ORRERY_MLFLOW; the step can simply run again",
            ) from None
        finally:
            connection.close()
        if status >= 400:
            self._refuse(status, data, path)
        return data

    def _connection(self) -> http.client.HTTPConnection:
        host = self._parts.hostname or ""
        if self._parts.scheme == "https":
            context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
            return http.client.HTTPSConnection(host, self._parts.port, timeout=CONNECT_S, context=context)
        return http.client.HTTPConnection(host, self._parts.port, timeout=CONNECT_S)

    def _credentials(self) -> dict[str, str]:
        """The variables that MLflow's own client reads, or user:password in the address."""
        if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            return {"Authorization": f"Bearer {token}"}
        user = os.environ.get("MLFLOW_TRACKING_USERNAME") or unquote(self._parts.username or "")
        password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or unquote(self._parts.password or "")
        if not user:
            return {}
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}

    def _refuse(self, status: int, data: bytes, path: str) -> None:
        try:
            document = json.loads(data)
            code, text = str(document["error_code"]), str(document["message"])
        except (ValueError, KeyError, TypeError):
            code, text = str(status), data[:200].decode(errors="replace")
        where = f"MLflow at {self.address} answered {status} to {path.partition('?')[0]}"
        if status in (401, 403):
            raise UserError(f"{where}: {text}", hint="set MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN")
        if status >= 500 or status in (408, 425, 429):
            raise TryAgain(f"{where}: {text}", hint="see the server's log; the step can simply run again")
        raise Refused(f"{where}: {text}", code)

    def _find(self, endpoint: str, **fields: Any) -> dict[str, Any] | None:
        """GET something that may not be there."""
        try:
            return self.call("GET", endpoint, **fields)
        except Refused as e:
            # An alias that is not set is INVALID_PARAMETER_VALUE in MLflow 3.
            if e.code == "RESOURCE_DOES_NOT_EXIST" or (endpoint.endswith("alias") and "not found" in e.message):
                return None
            raise

    # -- runs --------------------------------------------------------------------------------------

    def find_experiment(self, name: str) -> str | None:
        """Return the id of an experiment, or None."""
        found = self._find("experiments/get-by-name", experiment_name=name)
        return str(found["experiment"]["experiment_id"]) if found else None

    def experiment(self, name: str) -> str:
        """Return the id of an experiment, made when it is not there. Raises `UserError` when it was deleted."""
        found = self._find("experiments/get-by-name", experiment_name=name)
        if found is None:
            try:
                return str(self.call("POST", "experiments/create", name=name)["experiment_id"])
            except Refused as e:  # another step was quicker
                if e.code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self.call("GET", "experiments/get-by-name", experiment_name=name)
        if found["experiment"].get("lifecycle_stage") == "deleted":
            number = found["experiment"]["experiment_id"]
            raise UserError(
                f"MLflow's experiment {name!r} was deleted",
                hint=f"mlflow experiments restore -x {number}, or delete it for good with mlflow gc",
            )
        return str(found["experiment"]["experiment_id"])

    def find_run(self, experiment: str, tag: str, value: str) -> Run | None:
        """Return the oldest run with a tag, or None."""
        answer = self.call(
            "POST",
            "runs/search",
            experiment_ids=[experiment],
            filter=f"tags.`{tag}` = '{value}'",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        return next((_run(r) for r in answer.get("runs", ())), None)

    def create_run(self, experiment: str, name: str, tags: Mapping[str, str], started: int) -> Run:
        """Create a run; `started` is in milliseconds since 1970."""
        answer = self.call(
            "POST", "runs/create", experiment_id=experiment, run_name=name, start_time=started, tags=_pairs(tags)
        )
        return _run(answer["run"])

    def run(self, number: str) -> Run:
        """Return one run."""
        return _run(self.call("GET", "runs/get", run_id=number)["run"])

    def run_data(self, number: str) -> dict[str, Any]:
        """Return what is logged in a run: `metrics` (the last value of each, with its step), `params`, `tags`."""
        return dict(self.call("GET", "runs/get", run_id=number)["run"].get("data", {}))

    # -- artifacts ---------------------------------------------------------------------------------

    def put_file(self, uri: str, data: bytes) -> None:
        """Write a file of a run or a version: through the server when it serves artifacts, else where they lie."""
        if path := self._served(uri):
            self._send("PUT", path, data, {"Content-Type": "application/octet-stream"})
            return
        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            filesystem.pipe_file(path, data)
        except OSError as e:
            raise TryAgain(f"{uri} cannot be written: {e}", hint="MLflow's artifact store") from None

    def get_file(self, uri: str) -> bytes:
        """Read a file of a run or a version. Raises `UserError` when it is not there."""
        if path := self._served(uri):
            return self._send("GET", path, None, {})
        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
            return bytes(filesystem.cat_file(path))
        except FileNotFoundError:
            raise UserError(f"{uri} is gone from MLflow's artifact store") from None
        except OSError as e:
            raise TryAgain(f"{uri} cannot be read: {e}", hint="MLflow's artifact store") from None

    def _served(self, uri: str) -> str | None:
        parts = urlsplit(uri)
        return f"{ARTIFACTS}/{quote(parts.path.lstrip('/'))}" if parts.scheme == "mlflow-artifacts" else None

    # -- models ------------------------------------------------------------------------------------

    def ensure_model(self, name: str, description: str) -> None:
        """Create a registered model when it is not there."""
        if self._find("registered-models/get", name=name) is not None:
            return
        try:
            self.call("POST", "registered-models/create", name=name, description=description)
        except Refused as e:
            if e.code != "RESOURCE_ALREADY_EXISTS":
                raise

    def versions(self, name: str, address: str | None = None) -> list[Version]:
        """Return a model's versions, oldest first; with `address`, those made from that training."""
        query = f"name = '{name}'" + (f" AND tags.`{ADDRESS_TAG}` = '{address}'" if address else "")
        found: list[Version] = []
        token = ""
        while True:
            answer = self.call("GET", "model-versions/search", filter=query, max_results=1000, page_token=token)
            found += [_version(v) for v in answer.get("model_versions", ())]
            token = answer.get("next_page_token", "")
            if not token:
                return sorted(found, key=lambda v: v.number)

    def version(self, name: str, number: str) -> Version | None:
        """Return one version, or None."""
        found = self._find("model-versions/get", name=name, version=number) if number.isdecimal() else None
        return _version(found["model_version"]) if found else None

    def create_version(self, name: str, source: str, run: str, tags: Mapping[str, str], description: str) -> Version:
        """Create the next version, tags and all in one call: it is never there without them."""
        answer = self.call(
            "POST", "model-versions/create", name=name, source=source, run_id=run, tags=_pairs(tags),
            description=description,
        )  # fmt: skip
        return _version(answer["model_version"])

    def delete_version(self, name: str, number: int) -> None:
        """Delete one version."""
        self.call("DELETE", "model-versions/delete", name=name, version=str(number))

    def tag_version(self, name: str, number: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        for key, value in tags.items():
            self.call("POST", "model-versions/set-tag", name=name, version=str(number), key=key, value=value)

    def alias(self, name: str, alias: str) -> int | None:
        """Return the version that an alias names, or None."""
        found = self._find("registered-models/alias", name=name, alias=alias)
        return int(found["model_version"]["version"]) if found else None

    def set_alias(self, name: str, alias: str, number: int) -> None:
        """Make an alias name a version; it is moved when it named another."""
        self.call("POST", "registered-models/alias", name=name, alias=alias, version=str(number))

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias."""
        self.call("DELETE", "registered-models/alias", name=name, alias=alias)

    # -- pages -------------------------------------------------------------------------------------

    def run_page(self, run: Run) -> str:
        """Return the URL of a run for people."""
        return f"{self.address}/#/experiments/{run.experiment}/runs/{run.id}"

    def version_page(self, name: str, number: int) -> str:
        """Return the URL of a version for people."""
        return f"{self.address}/#/models/{name}/versions/{number}"


def from_environment(answer_s: float = ANSWER_S) -> Mlflow | None:
    """Return the server that MLFLOW_TRACKING_URI names, or None when it is not set."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return Mlflow(uri, answer_s) if uri else None


def needed() -> Mlflow:
    """Return the server that MLFLOW_TRACKING_URI names. Raises `UserError` when it is not set."""
    found = from_environment()
    if found is None:
        raise UserError("MLFLOW_TRACKING_URI is not set", hint="the engine sets it from platform.yaml: mlflow")
    return found


def _pairs(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": k, "value": v} for k, v in tags.items()]


def _run(answer: dict[str, Any]) -> Run:
    info = answer["info"]
    return Run(info["run_id"], str(info["experiment_id"]), info["artifact_uri"], int(info["start_time"]))


def _version(answer: dict[str, Any]) -> Version:
    tags = {t["key"]: t.get("value", "") for t in answer.get("tags", ())}
    return Version(int(answer["version"]), answer.get("source", ""), answer.get("run_id", ""), tags)

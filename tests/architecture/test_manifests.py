"""docker/kubernetes, docker/compose.yaml, Prometheus' rules and Grafana's board: valid, hardened, and naming what is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
VENVS = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs"))
KUBERNETES = "1.32"
NO_MANIFEST = {"airflow-values.yaml", "platform.yaml"}
COMPOSE = ROOT / "docker" / "compose.yaml"
REQUIRED = re.compile(r"^[^$]*\$\{[A-Z0-9_]+:\?[^}]+\}[^$]*$")


def manifests() -> list[Path]:
    return sorted(p for p in FOLDER.rglob("*.yaml") if p.name not in NO_MANIFEST and p.name != "kustomization.yaml")


def documents(*files: Path) -> Iterator[dict[str, Any]]:
    for file in files or manifests():
        yield from (d for d in yaml.safe_load_all(file.read_text()) if d)


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [d for d in documents() if d["kind"] in kinds]


def names(kind: str) -> set[str]:
    return {d["metadata"]["name"] for d in of_kind(kind)}


# -- Kubernetes ----------------------------------------------------------------------------------


def test_every_manifest_is_valid() -> None:
    """Against the API's own schema, with fields that it does not know refused."""
    program = VENVS / "dev" / "bin" / "kubernetes-validate"
    if not program.exists():
        pytest.skip("kubernetes-validate is not in the dev environment: make test-environments")
    argv = [str(program), "--kubernetes-version", KUBERNETES, "--strict", *map(str, manifests())]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("passed for resource") == len(list(documents())), said
    assert "WARN" not in said and "ERROR" not in said, said


def test_kustomizations_name_every_file_and_no_other() -> None:
    for file in FOLDER.rglob("kustomization.yaml"):
        said = yaml.safe_load(file.read_text())
        there = {p.name for p in file.parent.glob("*.yaml")} - NO_MANIFEST - {"kustomization.yaml"}
        assert set(said["resources"]) == there, file
        for generated in said.get("configMapGenerator", []):
            for name in generated["files"]:
                assert (file.parent / name.rpartition("=")[2]).is_file(), name


def test_nothing_is_in_a_namespace_that_is_not_made() -> None:
    made = names("Namespace")
    for document in documents():
        namespace = document["metadata"].get("namespace")
        assert namespace in made or document["kind"] in ("Namespace", "PriorityClass"), document["metadata"]


def test_both_namespaces_enforce_the_restricted_standard() -> None:
    for namespace in of_kind("Namespace"):
        labels = namespace["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
        assert labels["pod-security.kubernetes.io/enforce-version"] == f"v{KUBERNETES}"


@pytest.mark.parametrize("workload", of_kind("StatefulSet", "Deployment"), ids=lambda d: d["metadata"]["name"])
def test_a_workload_is_restricted_bounded_and_probed(workload: dict[str, Any]) -> None:
    spec = workload["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["serviceAccountName"] in names("ServiceAccount")
    assert spec["priorityClassName"] in names("PriorityClass")
    pod = spec["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    mounted = {v["name"] for v in spec["volumes"]} | {
        v["metadata"]["name"] for v in workload["spec"].get("volumeClaimTemplates", [])
    }
    for container in spec["containers"]:
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"] is True
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["requests"])
        assert {"memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        assert {m["name"] for m in container["volumeMounts"]} <= mounted
        assert "/tmp" in {m["mountPath"] for m in container["volumeMounts"]}
    assert workload["spec"].get("serviceName", workload["metadata"]["name"]) in names("Service")
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()


def images() -> list[str]:
    found = [
        c["image"] for w in of_kind("StatefulSet", "Deployment") for c in w["spec"]["template"]["spec"]["containers"]
    ]
    found += [s["image"] for s in compose()["services"].values()]
    values = helm_values()
    found += [f"{i['repository']}:{i['tag']}" for i in values["images"].values() if isinstance(i, dict)]
    return [*found, *(c["image"] for c in values["apiServer"]["extraInitContainers"])]


def test_every_image_has_a_version() -> None:
    for image in images():
        assert re.search(r":v?\d+\.\d+(\.\d+)?[\w.-]*$", image), image


def test_our_images_are_those_of_the_environments() -> None:
    """Manifests, values, compose.yaml and both platform.yaml name the same versions."""
    platforms = [ROOT / "include" / "platform.yaml", FOLDER / "platform.yaml"]
    first, second = (yaml.safe_load(p.read_text())["environments"] for p in platforms)
    assert first == second
    ours = {e["image"] for e in first.values()} | {"orrery/machine:" + first["airflow"]["image"].rpartition(":")[2]}
    assert {i for i in images() if i.startswith("orrery/")} <= ours


def test_one_version_of_each_server() -> None:
    tags: dict[str, set[str]] = {}
    for image in images():
        name, _, tag = image.rpartition(":")
        tags.setdefault(name, set()).add(tag)
    assert {n: t for n, t in tags.items() if len(t) > 1} == {}


def secrets_used(part: object) -> Iterator[str]:
    """Return the names of all Secrets that a document refers to, in whatever way."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key in ("secretKeyRef", "secretRef") and isinstance(value, dict):
                yield value["name"]
            elif key.endswith(("SecretName", "secretName")) or key == "jwtSecretName":
                if isinstance(value, str):
                    yield value
            else:
                yield from secrets_used(value)
    elif isinstance(part, list):
        for value in part:
            yield from secrets_used(value)
    elif isinstance(part, str) and "secretRef" in part:  # the chart's templated strings
        yield from secrets_used(yaml.safe_load(part))


def test_secrets_are_named_and_never_written() -> None:
    """Each is told in README.md with its keys; not one document is a Secret, or holds what looks like one."""
    assert of_kind("Secret") == []
    page = (FOLDER / "README.md").read_text()
    platform = yaml.safe_load((FOLDER / "platform.yaml").read_text())
    used = {*secrets_used(list(documents())), *secrets_used(helm_values()), platform["kubernetes"]["secret"]}
    ours = {"postgres", "mlflow", "qdrant", "vllm", "airflow-keys", "airflow-auth", "orrery-airflow", "orrery-step"}
    ours |= {"serve-tokens", "orrery-serve"}
    assert used == ours
    for name in used:
        assert f"`{name}`" in page, name
    for workload in of_kind("StatefulSet", "Deployment"):
        for container in workload["spec"]["template"]["spec"]["containers"]:
            for variable in container["env"]:
                secret = re.search(r"PASSWORD|SECRET|API_KEY|STORE_URI", variable["name"])
                assert not secret or "valueFrom" in variable, variable["name"]
                if key := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert f"`{key['key']}`" in page, key


def test_network_policies_begin_with_nothing() -> None:
    policies = {(d["metadata"]["namespace"], d["metadata"]["name"]): d["spec"] for d in of_kind("NetworkPolicy")}
    assert policies["orrery", "nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert policies["orrery-platform", "nothing-in"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for (namespace, name), spec in policies.items():
        for rule in spec.get("ingress", []):
            assert rule["from"], f"{namespace}/{name}: from everywhere"
            # What may reach a step is a step: a rank another rank, an executor its driver.
            if namespace == "orrery":
                assert all(set(peer) == {"podSelector"} for peer in rule["from"]), name
        for rule in spec.get("egress", []):
            assert rule["to"], f"{namespace}/{name}: to everywhere"
            for peer in rule["to"]:
                if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0":
                    assert "169.254.0.0/16" in peer["ipBlock"]["except"], "the machine's metadata are reachable"


def test_policies_select_labels_that_pods_have() -> None:
    from orrery.cluster import gang
    from orrery.cluster import names as cluster_names

    served = {
        (d["metadata"]["labels"]["app.kubernetes.io/name"], p["containerPort"])
        for d in of_kind("StatefulSet", "Deployment")
        for c in d["spec"]["template"]["spec"]["containers"]
        for p in c["ports"]
    }
    for policy in of_kind("NetworkPolicy"):
        for rule in policy["spec"].get("egress", []):
            for peer in rule["to"]:
                name = peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/name")
                for port in rule.get("ports", []) if name else []:
                    assert (name, port["port"]) in served, (policy["metadata"]["name"], name, port)
    text = (FOLDER / "network.yaml").read_text()
    assert cluster_names.UNIT in text
    assert gang.INDEX.startswith("batch.kubernetes.io/") and "batch.kubernetes.io/job-name" in text


def test_sparks_ports_are_those_that_its_policies_name() -> None:
    from orrery.scoring import executors

    (spark,) = (p for p in manifests() if p.parent.name == "spark")
    ports = {
        p["port"]
        for d in documents(spark)
        if d["kind"] == "NetworkPolicy"
        for r in d["spec"]["ingress"]
        for p in r["ports"]
    }
    assert ports == {int(executors.DRIVER_PORT), int(executors.BLOCKS_PORT)}


def test_the_clusters_platform_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from orrery import platform

    for variable in (*platform.ADDRESSES.values(), "ORRERY_FEAST", "ORRERY_STAGE"):
        monkeypatch.delenv(variable, raising=False)
    read = platform.load(FOLDER / "platform.yaml")
    assert read.kubernetes.namespace in names("Namespace")
    assert read.kubernetes.service_account in names("ServiceAccount")
    assert {c.priority_class for c in read.compute.values()} <= names("PriorityClass")
    home = yaml.safe_load((ROOT / "include" / "platform.yaml").read_text())
    assert set(read.compute) == set(home["compute"])
    # docker/images.py builds torch with CUDA under a tag of its own; the environment's image has it for CPUs.
    cuda = {name: read.environments["ml"].image + "-gpu" for name, c in read.compute.items() if c.gpu}
    assert cuda and {name: read.compute[name].image for name in cuda} == cuda
    assert {name: home["compute"][name].get("image") for name in cuda} == cuda
    pools = json.loads((FOLDER / "pools.json").read_text())
    assert {c.pool for c in read.compute.values()} <= set(pools)
    settings = yaml.safe_load((ROOT / "airflow_settings.yaml").read_text())
    assert {p["pool_name"] for p in settings["airflow"]["pools"]} == set(pools)


def test_the_service_is_told_what_it_needs_and_scales_by_itself() -> None:
    (serve,) = (d for d in of_kind("Deployment") if d["metadata"]["name"] == "serve")
    (container,) = serve["spec"]["template"]["spec"]["containers"]
    # The pods' number is the autoscaler's: a number here would undo its work at each apply.
    assert "replicas" not in serve["spec"]
    (scaler,) = of_kind("HorizontalPodAutoscaler")
    assert (scaler["spec"]["scaleTargetRef"]["kind"], scaler["spec"]["scaleTargetRef"]["name"]) == (
        "Deployment",
        "serve",
    )
    selected = serve["spec"]["selector"]["matchLabels"]
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        (one,) = (d["spec"] for d in of_kind(kind) if d["metadata"]["name"] == "serve")
        selector = one.get("podSelector", one.get("selector"))
        assert selector.get("matchLabels", selector) == selected, kind
    (port,) = (p["containerPort"] for p in container["ports"])
    assert container["args"][-2:] == ["--port", str(port)]
    # A file of tokens is named and mounted, and its folder read-only: without one it would not listen beyond loopback.
    tokens = next(v["value"] for v in container["env"] if v["name"] == "ORRERY_SERVE_TOKENS")
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    assert mounts[str(Path(tokens).parent)]["readOnly"] is True
    # Sleep before the end, then the questions that have begun: the grace holds both.
    grace = serve["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    settings = (ROOT / "include/orrery/serving/settings.py").read_text()
    stop = re.search(r"^    stop: float = ([\d.]+)$", settings, re.MULTILINE)
    assert stop is not None
    assert grace >= container["lifecycle"]["preStop"]["sleep"]["seconds"] + float(stop[1]) + 5
    exposed = re.search(r"^EXPOSE (\d+)$", (ROOT / "docker/serve/Dockerfile").read_text(), re.MULTILINE)
    assert exposed is not None and int(exposed[1]) == port
    assert compose()["services"]["serve"]["command"][-1] == str(port)


# -- Airflow's chart -------------------------------------------------------------------------------

# The top-level keys of chart 1.22.0 that we use; Helm refuses an unknown one.
CHART = {
    *("useStandardNaming", "airflowVersion", "defaultAirflowRepository", "defaultAirflowTag", "images", "executor"),
    *("uid", "gid", "securityContexts", "rbac", "allowPodLaunching", "data", "fernetKeySecretName", "statsd", "env"),
    *("apiSecretKeySecretName", "jwtSecretName", "extraEnvFrom", "volumes", "volumeMounts", "config", "scheduler"),
    *("triggerer", "dagProcessor", "apiServer", "migrateDatabaseJob", "createUserJob", "postgresql", "redis"),
    *("flower", "pgbouncer", "workers"),
}


def helm_values() -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / "airflow-values.yaml").read_text()))


def test_the_charts_values_bring_no_default_password_and_no_server_that_is_not_wanted() -> None:
    values = helm_values()
    assert set(values) <= CHART
    assert values["createUserJob"] == {"enabled": False}
    assert not any(values[name]["enabled"] for name in ("postgresql", "redis", "flower", "pgbouncer"))
    assert values["executor"] == "LocalExecutor"
    assert values["rbac"] == {"create": False}
    text = (FOLDER / "airflow-values.yaml").read_text()
    assert not re.search(r"(?i)^\s*-?\s*(password|fernetKey|apiSecretKey|jwtSecret):", text, re.MULTILINE)


def test_airflows_version_is_the_one_that_is_pinned() -> None:
    pins = (ROOT / "docker" / "airflow" / "requirements.txt").read_text()
    assert f"apache-airflow=={helm_values()['airflowVersion']}\n" in pins


def test_airflow_knows_each_setting_and_the_values_name_accounts_that_exist() -> None:
    from airflow.configuration import conf

    values = helm_values()
    known = conf.configuration_description
    for section, options in values["config"].items():
        unknown = set(options) - set(known[section]["options"])
        assert unknown == set(), section
    for service in compose()["services"].values():
        for name in service.get("environment") or {}:
            if found := re.fullmatch(r"AIRFLOW__([A-Z_]+?)__([A-Z0-9_]+)", name):
                assert found[2].lower() in known[found[1].lower()]["options"], name
    for component in ("scheduler", "triggerer"):
        assert values[component]["serviceAccount"] == {"create": False, "name": "orrery-airflow"}
    assert {
        c["priorityClassName"] for c in values.values() if isinstance(c, dict) and "priorityClassName" in c
    } <= names("PriorityClass")


def test_the_log_of_a_waiting_step_is_asked_of_an_address_that_is_reachable() -> None:
    """The api-server asks the triggerer's log server by the name that the triggerer has given of itself."""
    from airflow.utils import net

    name = helm_values()["config"]["core"]["hostname_callable"]
    assert name == f"{net.__name__}.{net.get_host_ip_address.__name__}"
    # Compose resolves services by name, and a container's own name is its `hostname`.
    services = {n: s for n, s in compose()["services"].items() if n.startswith("airflow-") and n != "airflow-init"}
    assert {n: s["hostname"] for n, s in services.items()} == {n: n for n in services}
    assert not any("HOSTNAME_CALLABLE" in v for s in services.values() for v in s["environment"])


def test_the_page_gives_a_training_the_time_that_it_needs_to_save() -> None:
    """The kubelet takes what critical pods get from the whole, and what is left replaces the pod's own grace."""
    from orrery import planner
    from orrery.spec import Checkpoint, seconds

    page = (FOLDER / "README.md").read_text()
    rows = re.findall(
        r"^.*`shutdownGracePeriod: (\d+)s`, `shutdownGracePeriodCriticalPods: (\d+)s`.*$", page, re.MULTILINE
    )
    shortened = re.search(r"checkpoint: \{within: (\d+)s\}", page)
    assert len(rows) == 2 and shortened
    for (whole, critical), within in zip(rows, (seconds(Checkpoint().within), int(shortened[1])), strict=True):
        assert int(whole) - int(critical) >= within + 2 * planner.ENDING_S
    assert "kubectl drain NODE --ignore-daemonsets --force --delete-emptydir-data" in page


# -- compose.yaml ----------------------------------------------------------------------------------


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text()))


@pytest.mark.parametrize("name", sorted(compose()["services"]))
def test_a_service_of_compose_is_hardened_and_watched(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service
    assert name == "airflow-init" or service["healthcheck"]["test"][0] == "CMD"
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), f"{name}: {port} is open to the network"
    for mount in service.get("volumes", []):
        source, _, rest = mount.partition(":")
        if source.startswith("."):
            assert (COMPOSE.parent / source).exists(), mount
            assert rest.endswith(":ro"), mount
        else:
            assert source in compose()["volumes"], mount
    for other in service.get("depends_on", {}):
        assert other in compose()["services"]


def test_compose_has_every_server() -> None:
    wanted = {"postgres", "s3", "mlflow", "qdrant", "prometheus", "grafana", "airflow-scheduler", "airflow-triggerer"}
    assert wanted <= set(compose()["services"])


def test_compose_starts_only_with_passwords_and_knows_none() -> None:
    required = set(re.findall(r"\$\{([A-Z0-9_]+):\?", COMPOSE.read_text()))
    made = subprocess.run(["sh", str(ROOT / "docker" / "compose-secrets")], capture_output=True, text=True, check=True)
    lines = dict(line.split("=", 1) for line in made.stdout.splitlines())
    assert set(lines) == required
    assert len(set(lines.values())) == len(lines), "two passwords are alike"
    assert all(re.fullmatch(r"[A-Za-z0-9_=-]{32,}", v) for v in lines.values()), "one would need escaping in a URL"
    for name, service in compose()["services"].items():
        for variable, value in (service.get("environment") or {}).items():
            if re.search(r"PASSWORD$|SECRET|_KEY$|API_KEY|SQL_ALCHEMY_CONN|LEDGER|STORE_URI", variable):
                named = variable in ("AWS_ACCESS_KEY_ID",)
                assert named or REQUIRED.match(value), f"{name}: {variable}"


def test_the_made_fernet_key_is_one() -> None:
    from cryptography.fernet import Fernet

    made = subprocess.run(["sh", str(ROOT / "docker" / "compose-secrets")], capture_output=True, text=True, check=True)
    (key,) = re.findall(r"^AIRFLOW_FERNET_KEY=(.*)$", made.stdout, re.MULTILINE)
    assert Fernet(key).decrypt(Fernet(key).encrypt(b"x")) == b"x"


# -- metrics ---------------------------------------------------------------------------------------


def airflow_metrics() -> set[str]:
    """Return what the StatsD exporter shows of all metrics that this Airflow has, by its own registry."""
    import airflow

    file = Path(airflow.__file__).parent / "_shared/observability/metrics/metrics_template.yaml"
    found = set()
    for metric in yaml.safe_load(file.read_text())["metrics"]:
        name = "airflow_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric["name"])
        found |= {name} if metric["type"] in ("counter", "gauge") else {name, f"{name}_count", f"{name}_sum"}
    return found


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\bairflow_[a-z0-9_]+", expression))


def expressions() -> list[str]:
    board = json.loads((ROOT / "docker/grafana/dashboards/airflow.json").read_text())
    rules = yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())
    found = [t["expr"] for panel in board["panels"] for t in panel.get("targets", [])]
    return found + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def test_board_and_alerts_ask_only_for_metrics_that_airflow_has() -> None:
    known = airflow_metrics()
    asked = set().union(*(metrics_in(e) for e in expressions()))
    assert len(asked) > 15
    assert asked <= known, asked - known


def test_labels_that_the_board_groups_by_are_tags_of_the_metric() -> None:
    import airflow

    file = Path(airflow.__file__).parent / "_shared/observability/metrics/metrics_template.yaml"
    tags = {
        "airflow_" + re.sub(r"[^a-zA-Z0-9_]", "_", m["name"]): set(m.get("name_variables") or [])
        for m in yaml.safe_load(file.read_text())["metrics"]
    }
    for expression in expressions():
        for grouped in re.findall(r"by \(([a-z_, ]+)\)", expression) if metrics_in(expression) else ():
            (metric,) = metrics_in(expression)
            metric = re.sub(r"_(count|sum)$", "", metric)
            assert set(grouped.split(", ")) <= tags[metric], expression


def test_the_board_asks_the_source_that_is_provisioned() -> None:
    source = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yaml").read_text())
    (only,) = source["datasources"]
    for file in (ROOT / "docker/grafana/dashboards").glob("*.json"):
        board = json.loads(file.read_text())
        assert {t["datasource"]["uid"] for p in board["panels"] for t in p.get("targets", [])} == {only["uid"]}, file
    assert only["url"].split("//")[1].split(":")[0] in compose()["services"]
    scraped = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"]
    hosts = {t.split(":")[0] for job in scraped for c in job.get("static_configs", []) for t in c["targets"]}
    hosts |= {n for job in scraped for c in job.get("dns_sd_configs", []) for n in c["names"]}
    assert hosts - {"127.0.0.1"} <= set(compose()["services"])

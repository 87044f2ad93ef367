"""vLLM's spec: what it refuses, the command that it means, and manifests that a cluster takes."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orrery import platform
from orrery.errors import SpecError
from orrery.llm import vllm
from orrery.llm.cli import app

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
VENVS = Path(os.environ.get("ORRERY_VENVS") or ROOT / ".venvs")
MINIMAL = {"model": "org/model-7b", "served_name": "model"}


def spec(**fields: Any) -> vllm.VllmSpec:
    return vllm.VllmSpec.model_validate({**MINIMAL, **fields})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> platform.Platform:
    for variable in [n for n in os.environ if n.startswith("ORRERY_")]:
        monkeypatch.delenv(variable)
    return platform.load(FOLDER / "platform.yaml")


def flags(argv: list[str]) -> dict[str, str]:
    """Return options and their values; a switch has none."""
    pairs = zip(argv, [*argv[1:], "--"], strict=True)
    return {a: "" if b.startswith("--") else b for a, b in pairs if a.startswith("--")}


# the command


def test_the_command_says_what_the_spec_says() -> None:
    argv = vllm.command(
        spec(
            revision="0123abc",
            tensor_parallel_size=2,
            gpu_memory_utilization=0.85,
            max_model_len=8192,
            max_num_seqs=32,
            quantization="awq",
            dtype="float16",
            port=9000,
            enable_prefix_caching=False,
            extra={"max-num-queued-reqs": 100, "enforce-eager": True, "enable-chunked-prefill": False},
        )
    )
    assert argv[:3] == ["vllm", "serve", "org/model-7b"]
    assert flags(argv) == {
        **{"--served-model-name": "model", "--host": "127.0.0.1", "--port": "9000", "--revision": "0123abc"},
        **{"--tensor-parallel-size": "2", "--gpu-memory-utilization": "0.85", "--max-model-len": "8192"},
        **{"--max-num-seqs": "32", "--no-enable-prefix-caching": "", "--quantization": "awq", "--dtype": "float16"},
        **{"--shutdown-timeout": "30", "--disable-uvicorn-access-log": "", "--max-num-queued-reqs": "100"},
        **{"--enforce-eager": "", "--no-enable-chunked-prefill": ""},
    }


def test_by_default_it_listens_on_loopback_and_leaves_to_the_model_what_is_the_models() -> None:
    found = flags(vllm.command(spec()))
    assert found["--host"] == "127.0.0.1"
    assert "--enable-prefix-caching" in found
    assert not {"--max-model-len", "--quantization", "--revision", "--api-key", "--trust-remote-code"} & set(found)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "--trust-remote-code"}, "model"),
        ({"model": "org/model; rm -rf /"}, "model"),
        ({"model": "/models/../etc"}, "no `..`"),
        ({"model": "s3://key:hush@bucket/x"}, "model"),
        ({"model": "https://example.org/x"}, "model"),
        ({"served_name": "-x"}, "served_name"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"gpu_memory_utilization": 1.2}, "gpu_memory_utilization"),
        ({"quantization": "bitsandbytes"}, "quantization"),
        ({"dtype": "int4"}, "dtype"),
        ({"image": "vllm/vllm-openai" + ":latest"}, "not :latest"),
        ({"image": "vllm/vllm-openai"}, "tag or a digest"),
        ({"port": 80}, "port"),
        ({"extra": {"trust-remote-code": True}}, "not among the flags"),
        ({"extra": {"api-key": "hush"}}, "not among the flags"),
        ({"extra": {"seed": True}}, "must be a value of kind int"),
        ({"extra": {"enforce-eager": 1}}, "must be a value of kind bool"),
        ({"extra": {"load-format": "--x"}}, "letters, digits"),
        ({"model": "s3://bucket/x", "revision": "abc"}, "`revision` is for a model of the hub"),
        ({"replicas": 2, "claim": "weights"}, "leave `claim` out"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_what_cannot_be_is_refused_with_file_and_line(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    file = tmp_path / "vllm.yml"
    file.write_text(yaml.safe_dump({**MINIMAL, **fields}))
    with pytest.raises(SpecError) as caught:
        vllm.read(file)
    assert str(caught.value).startswith(f"{file}:")
    assert said in str(caught.value)


@pytest.mark.parametrize("model", ["gpt2", "org/model_1.5-x", "/models/mine/v1", "s3://bucket/models/mine", "gs://b/m"])
def test_models_that_can_be(model: str) -> None:
    assert vllm.command(spec(model=model))[2] == model


# Kubernetes


def by_kind(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [d for d in documents if d["kind"] == kind]


def server(documents: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the pod's spec and the container's."""
    (deployment,) = by_kind(documents, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def test_the_folders_manifest_is_that_of_its_spec(cluster: platform.Platform) -> None:
    found = vllm.read(FOLDER / "vllm" / "spec.yml")
    written = vllm.to_yaml(vllm.manifest(found, cluster), vllm.heading(found))
    assert (FOLDER / "vllm" / "vllm.yaml").read_text() == written


def test_gpus_memory_and_place_come_from_the_compute_class(cluster: platform.Platform) -> None:
    pod, container = server(vllm.manifest(spec(compute="gpu-small"), cluster))
    compute = cluster.compute["gpu-small"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["resources"]["requests"]["memory"] == compute.memory
    assert pod["nodeSelector"] == {"orrery.dev/gpu": "true", "orrery.dev/spot": "true"}, (
        "it is a class of spot machines"
    )
    assert {t["key"] for t in pod["tolerations"]} == {"nvidia.com/gpu", "orrery.dev/spot"}
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": compute.shared_memory}
    claimed, _ = server(vllm.manifest(spec(claim="weights"), cluster))
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": "weights"}} in claimed["volumes"]


def test_a_class_with_other_gpus_is_refused(cluster: platform.Platform) -> None:
    with pytest.raises(SpecError, match="has 1 GPUs, and the server wants 2"):
        vllm.manifest(spec(tensor_parallel_size=2), cluster)
    with pytest.raises(SpecError, match="has 0 GPUs"):
        vllm.manifest(spec(compute="cpu-small"), cluster)
    with pytest.raises(SpecError, match="is not in platform.yaml"):
        vllm.manifest(spec(compute="gpu-huge"), cluster)


def test_keys_come_by_reference_and_only_where_they_are_needed(cluster: platform.Platform) -> None:
    def secrets(model: str) -> set[str]:
        _, container = server(vllm.manifest(spec(model=model), cluster))
        return {e["name"] for e in container["env"] if "valueFrom" in e}

    assert secrets("org/model") == {"VLLM_API_KEY", "HF_TOKEN"}
    assert secrets("/cache/model") == {"VLLM_API_KEY"}
    assert secrets("s3://b/m") == {
        *("VLLM_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"),
    }


def test_who_may_reach_it_and_where_it_may_go(cluster: platform.Platform) -> None:
    own, steps = (d["spec"] for d in by_kind(vllm.manifest(spec(port=9000), cluster), "NetworkPolicy"))
    (rule,) = own["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 9000}]
    assert {"podSelector": {"matchLabels": {vllm.ASKS: "true"}}} in rule["from"]
    assert steps["egress"][0]["ports"] == rule["ports"]
    local, _ = (d["spec"] for d in by_kind(vllm.manifest(spec(model="/cache/m"), cluster), "NetworkPolicy"))
    assert local["egress"] == [], "a model that is there needs nobody"


def test_a_job_brings_its_own_server_and_is_not_repeated_for_a_users_mistake(cluster: platform.Platform) -> None:
    cluster = cluster.model_copy(
        update={"environments": {**cluster.environments, "rag": platform.Environment(image="orrery/rag:0.1.0")}}
    )
    documents = vllm.job(spec(), cluster, prompts="s3://b/p.jsonl", answers="s3://b/a.jsonl", max_tokens=64)
    (job,) = by_kind(documents, "Job")
    pod = job["spec"]["template"]["spec"]
    (sidecar,), (asking,) = pod["initContainers"], pod["containers"]
    assert sidecar["restartPolicy"] == "Always" and "startupProbe" in sidecar
    assert flags(sidecar["command"])["--host"] == "127.0.0.1"
    assert not any(e["name"] == "VLLM_API_KEY" for e in sidecar["env"])
    assert asking["command"][:3] == ["python", "-m", "orrery.llm.batch"]
    assert flags(asking["command"])["--url"] == "http://127.0.0.1:8000/v1"
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [64]
    for uri in ("/prompts.jsonl", "s3://me:hush@b/p"):
        with pytest.raises(SpecError, match="a pod reaches a bucket only"):
            vllm.job(spec(), cluster, prompts=uri, answers="s3://b/a.jsonl")


def test_a_cluster_takes_what_is_printed(tmp_path: Path, cluster: platform.Platform) -> None:
    program = VENVS / "dev" / "bin" / "kubernetes-validate"
    if not program.exists():
        pytest.skip("kubernetes-validate is not in the dev environment: make test-environments")
    file = tmp_path / "spec.yml"
    file.write_text(yaml.safe_dump({**MINIMAL, "claim": "weights", "quantization": "fp8"}))
    runner = CliRunner()
    for name, options in (
        ("manifest", ["--platform", str(FOLDER / "platform.yaml")]),
        (
            "batch",
            ["--platform", str(ROOT / "include" / "platform.yaml"), "--prompts", "s3://b/p", "--answers", "s3://b/a"],
        ),
    ):
        done = runner.invoke(app, [name, str(file), *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        printed = tmp_path / f"{name}.yaml"
        printed.write_text(done.output)
        argv = [str(program), "--kubernetes-version", "1.32", "--strict", str(printed)]
        checked = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_command_is_printed_for_a_shell(tmp_path: Path) -> None:
    file = tmp_path / "spec.yml"
    file.write_text(yaml.safe_dump(MINIMAL))
    done = CliRunner().invoke(app, ["command", str(file)], catch_exceptions=False)
    words = shlex.split(done.output)
    assert words[:2] == ["VLLM_NO_USAGE_STATS=1", "DO_NOT_TRACK=1"]
    assert words[2:] == vllm.command(spec())

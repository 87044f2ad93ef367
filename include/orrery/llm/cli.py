"""`orrery llm command FILE`, `manifest FILE`, `batch FILE`: what a vLLM spec means, printed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from orrery import platform
from orrery.llm import vllm

app = typer.Typer(name="llm", no_args_is_help=True, help="vLLM as a server of one's own: its command and manifests.")
File = Annotated[Path, typer.Argument(help="A vLLM spec, such as docker/kubernetes/vllm/spec.yml.")]
PlatformFile = Annotated[
    Path | None, typer.Option("--platform", help="The platform.yaml of the cluster; without: this machine's.")
]


@app.command("command")
def command(file: File, host: Annotated[str, typer.Option(help="Where it listens.")] = "127.0.0.1") -> None:
    """Print the command that starts the server, its variables before it, for a shell."""
    spec = vllm.read(file)
    words = [f"{name}={value}" for name, value in vllm.environment().items()]
    typer.echo(shlex.join([*words, *vllm.command(spec, host=host)]))


@app.command("manifest")
def manifest(file: File, where: PlatformFile = None) -> None:
    """Print the server for Kubernetes: Deployment, Service, ServiceAccount, NetworkPolicies."""
    spec = vllm.read(file)
    typer.echo(vllm.to_yaml(vllm.manifest(spec, platform.load(where)), vllm.heading(spec)), nl=False)


@app.command("batch")
def batch(
    file: File,
    prompts: Annotated[str, typer.Option(help="JSON lines in a bucket: s3://…")],
    answers: Annotated[str, typer.Option(help="Where the answers go: s3://…")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 256,
    parallel: Annotated[int, typer.Option(min=1, max=1024, help="Prompts at a time.")] = 32,
    where: PlatformFile = None,
) -> None:
    """Print a Job that answers a file of prompts with a vLLM of its own, and then gives the GPU back."""
    spec = vllm.read(file)
    documents = vllm.job(
        spec, platform.load(where), prompts=prompts, answers=answers, max_tokens=max_tokens, parallel=parallel
    )
    typer.echo(vllm.to_yaml(documents), nl=False)

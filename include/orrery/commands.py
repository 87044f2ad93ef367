"""What people type: `orrery run`, `check`, `new`, `ledger`, `cost`, `rollback`, `housekeeping`, `up`, `down`, …"""

from __future__ import annotations

import getpass
import json
import os
import secrets
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from orrery import platform
from orrery.catalogue import NAMES
from orrery.contract import Result
from orrery.errors import STOPPED, RequestError, UserError, nearest
from orrery.ledger import Ledger, moment, unfinished
from orrery.llm.cli import app as llm_app
from orrery.partitions import key_of, parse
from orrery.plan import Planner
from orrery.planner import BasePlanner, Plan, Request
from orrery.planners import planner_of
from orrery.spec import load_knowledge, load_model
from orrery.store import Store

app = typer.Typer(
    name="orrery",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Keeps machine-learning models turning. `orrery COMMAND --help` tells more.",
)
out = Console(highlight=False, soft_wrap=True)
app.add_typer(llm_app, name="llm")
Project = Annotated[str, typer.Argument(help="A folder of include/projects/.")]


def actor() -> str:
    """Return who types: the operating system's user name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _run_name(now: datetime) -> str:
    """Return what a run of the command line is called in store and ledger."""
    return f"cli--{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def share(text: str, option: str = "--sample") -> float:
    """Return `1%` or `0.01` as a share between 0 and 1. Raises `RequestError`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise RequestError(f"{option} {text!r} is not a share", hint="such as 1% or 0.01, above 0 and at most 100%")
    return value


@app.command()
def run(
    project: Project,
    step: Annotated[
        str, typer.Argument(help=f"One of: {', '.join(NAMES)}; or `reindex`: all steps of a knowledge base.")
    ],
    partition: Annotated[
        str | None, typer.Option(help="Such as 2013-03. Of a knowledge base the day; today when not given.")
    ] = None,
    window: Annotated[str | None, typer.Option(help="First and last partition, such as 2013-01..2013-03.")] = None,
    sample: Annotated[
        str, typer.Option(help="Share of the rows, such as 1%; below 100% nothing is published.")
    ] = "100%",
    reason: Annotated[str, typer.Option(help="Why; goes into the ledger.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Do the work although nothing changed.")] = False,
    version: Annotated[str | None, typer.Option(help="Model version, for promote.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="collect: more documents may be gone than `missing` allows.")
    ] = False,
) -> None:
    """Run one step here and now, without Airflow, its inputs taken from the store."""
    planner = planner_of(project)
    try:
        if isinstance(planner, Planner):
            _run_model(planner, step, partition, window, share(sample), reason, force, version)
            return
        if window or version:
            raise RequestError("--window and --version are for models", hint="a knowledge base has days: --partition")
        _run_knowledge(planner, step, partition, share(sample), reason, force, partial)
    except KeyboardInterrupt:
        out.print("[yellow]stopped[/]: what was finished is kept; the same command goes on from there")
        raise typer.Exit(STOPPED) from None


def _run_model(
    planner: Planner,
    step: str,
    partition: str | None,
    window: str | None,
    sample: float,
    reason: str,
    force: bool,
    version: str | None,
) -> None:
    """Run one step of a model: for each partition, or for a window."""
    from orrery import faults, twin

    project = planner.project
    if step not in planner.verbs:
        raise RequestError(f"unknown step {step!r}", hint=nearest(step, planner.verbs))
    if step == "trial":
        raise RequestError("a trial is one of a search", hint=f"orrery run {project} tune --window …")
    if step == "rollback":
        raise RequestError("rollback is a command of its own", hint=f"orrery rollback {project}")
    if version and step != "promote":
        raise RequestError(f"--version is for promote, not for {step}")
    if step == "promote" and not version:
        raise RequestError("promote needs --version", hint="the number that register gave")
    rehearsed = faults.read(os.environ.get(faults.VARIABLE, ""), planner.platform, platform.profile())
    keys = planner.partitions_of(partition, window)
    whole = planner.verbs[step].scope == "window"
    name = _run_name(datetime.now(UTC))
    for group in [keys] if whole else [(k,) for k in keys]:
        request = Request(
            project=project,
            verb=step,
            partitions=group,
            run=name,
            task=step,
            sample=sample,
            actor=actor(),
            reason=reason,
            force=force,
            options={"version": version} if version else {},
        )
        if step == "tune":
            from orrery.tuning.search import Search

            show(step, request.key, Search(request, say, rehearsed).run())
            continue
        show(step, request.key, twin.run(planner, request, rehearsed, say, _secrets_note))


def _run_knowledge(
    planner: BasePlanner, step: str, day: str | None, sample: float, reason: str, force: bool, partial: bool
) -> None:
    """Run one step of a knowledge base, or all that make a generation and bring it live."""
    from orrery import faults, twin

    chain = [name for name in planner.verbs if name != "rollback"]
    if step == "rollback":
        raise RequestError("rollback is a command of its own", hint=f"orrery rollback {planner.project}")
    if step != "reindex" and step not in chain:
        raise RequestError(f"unknown step {step!r}", hint=nearest(step, ["reindex", *chain]))
    if partial and step not in ("reindex", "collect"):
        raise RequestError(f"--partial is for collect, not for {step}")
    now = datetime.now(UTC)
    # It names the generation; what is read is what the sources hold now, whatever the day is called.
    keys = planner.partitions_of(day or key_of(now, planner.grain), None)
    rehearsed = faults.read(os.environ.get(faults.VARIABLE, ""), planner.platform, platform.profile())
    name = _run_name(now)
    for verb in chain if step == "reindex" else [step]:
        request = Request(
            project=planner.project,
            verb=verb,
            partitions=keys,
            run=name,
            task=verb,
            sample=sample,
            actor=actor(),
            reason=reason,
            force=force,
            options={"partial": partial} if verb == "collect" else {},
            kind=planner.kind,
        )
        show(verb, request.key, twin.run(planner, request, rehearsed, say, _secrets_note))


def say(line: str) -> None:
    """Print a line as it is."""
    out.print(line, markup=False)


def _secrets_note(plan: Plan) -> None:
    """Fill a SQL source's secret from this shell: on Airflow it is a connection."""
    for source in plan.config.params.get("sources", {}).values():
        name = source.get("secret_env")
        if name and name not in os.environ:
            raise UserError(
                f"the source needs the environment variable {name}",
                hint="a SQLAlchemy URL, such as postgresql+psycopg://…",
            )


def show(step: str, key: str, result: Result) -> None:
    """Print how a step ended."""
    if result.skipped:
        out.print(f"[green]✓[/] {step} {escape(key)}: skipped, {escape(result.skipped)}")
    else:
        spent = ", ".join(f"{k} {v:.1f} s" for k, v in result.seconds.items() if k in ("import", "work", "total"))
        out.print(f"[green]✓[/] {step} {escape(key)}: {escape(result.verdict or 'done')} ({spent})")
    if result.skipped:  # else the step's own log, above, has told the reasons
        for reason in result.reasons:
            out.print(f"    {reason}", markup=False)
    for name, value in result.metrics.items():
        out.print(f"    {name} {value:.5g}", markup=False)
    planner_store = platform.load().store
    for name, target in result.links.items():
        out.print(f"    {name}: {target if '://' in target else f'{planner_store}/{target}'}", markup=False)
    if result.output:
        out.print(f"    {planner_store}/{result.output}", markup=False)


@app.command()
def check(
    projects: Annotated[list[str] | None, typer.Argument(help="Projects; all when none is given.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of spec.yaml, for editors.")] = False,
) -> None:
    """Check specs, and that features.py and model.py import in their environment; show what changed in the features."""
    from orrery import checking

    if schema:
        print(json.dumps(checking.json_schema(), indent=2))  # noqa: T201  a document for a file, not for reading
        return
    names = projects or platform.project_names()
    if not names:
        raise UserError(f"there are no projects in {platform.projects_folder()}", hint="orrery new NAME")
    wrong = [name for name in names if not checking.report(name, out)]
    if wrong:
        raise UserError(f"{len(wrong)} of {len(names)} projects: {', '.join(wrong)}", hint="mend what is listed above")


@app.command()
def new(
    project: Annotated[str, typer.Argument(help="Name of the new folder in include/projects/.")],
    kind: Annotated[str, typer.Option(help="model or knowledge_base.")] = "model",
    data: Annotated[list[str] | None, typer.Option(help="NAME=URI of a sample of a source; drafts its checks.")] = None,
    task: Annotated[str, typer.Option(help="binary, multiclass or regression.")] = "binary",
    owner: Annotated[str, typer.Option(help="The team that is called when it is red.")] = "",
) -> None:
    """Make a project's folder and Dag file, its checks drafted from data."""
    from orrery import scaffold

    for path in scaffold.create(project, kind, dict(_pair(d) for d in data or ()), task, owner or actor()):
        out.print(f"[green]✓[/] {escape(str(path))}")
    out.print(f"next: fill in what is marked in its files, then [bold]orrery check {project}[/]")


def _pair(text: str) -> tuple[str, str]:
    name, equals, uri = text.partition("=")
    if not equals or not uri:
        raise RequestError(
            f"--data {text!r} is not NAME=URI", hint="such as flights=var/upstream/flights/2013-01.parquet"
        )
    return name, uri


@app.command()
def ledger(
    project: Project,
    at: Annotated[str | None, typer.Option(help="Only what was true at this time (ISO 8601, UTC).")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every run of a step as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Lines of JSON.")] = False,
) -> None:
    """Show who asked for what and promoted what, when and why; what was true at a time; what is unfinished."""
    from orrery import ledger_text

    platform.project_folder(project)
    book = Ledger(platform.load().ledger)
    if at:
        moment(at)
    entries = [e for e in book.find(project, at=at) if all_ or e.kind != "run"]
    if as_json:
        for e in entries:
            print(json.dumps(e.__dict__, sort_keys=True))  # noqa: T201
        return
    for e in entries:
        if head := ledger_text.line(e, entries):
            out.print(f"{e.at[:19].replace('T', ' ')}  [bold]{e.kind}[/]{escape(f' {head}')}")
            for line in ledger_text.details(e):
                out.print(f"    {line}", markup=False)
    now = book.champion(project, at)
    out.print(
        f"champion{escape(f' at {at}') if at else ''}: "
        + (escape(f"version {now.version} since {now.since[:19]}, by {now.actor}") if now else "none")
    )
    for e in unfinished(entries):
        change = f"{e.kind} to version {e.payload['version']} of {e.at[:19]}"
        again = "clear its task, or promote again" if e.kind == "promotion" else f"orrery rollback {project}"
        out.print(f"[yellow]unfinished:[/] {escape(f'{change}: {again}')}")


@app.command()
def cost(
    project: Project,
    version: Annotated[str | None, typer.Option(help="The attempts that this model version was trained by.")] = None,
    run_: Annotated[str | None, typer.Option("--run", help="The attempts of this run, as the ledger names it.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON: times in seconds, money as platform.yaml has it.")
    ] = False,
) -> None:
    """Show what trainings took and cost: useful, lost, saved by spot; of a version or a run each attempt."""
    from orrery import cost_report, cost_text, costs

    if version and run_:
        raise RequestError("--version and --run are two questions", hint="give one")
    spec, place = load_model(platform.project_folder(project)), platform.load()
    book = Ledger(place.ledger)
    spent = costs.read(book.find(project, "run", phase="done"))
    versions, champion = {**book.registered(project), **book.versions(project)}, book.champion(project)
    told: dict[str, Any] = {"project": project}
    if version or run_:
        told["attempts"] = (
            cost_report.version(spent, versions, version) if version else cost_report.run(spent, str(run_))
        )
        table, below = cost_text.attempts(told["attempts"]), []
    else:
        prices = costs.rates(place, spec.train.spot.fallback)
        told |= cost_report.project(spent, prices, versions)
        now = champion.version if champion else None
        table, below = cost_text.trainings(told["trainings"], now), cost_text.lines(told)
    if as_json:
        print(json.dumps(told, indent=1))  # noqa: T201
        return
    out.print(table)
    for line in below:
        out.print(line, markup=False)


@app.command()
def rollback(
    project: Project,
    to: Annotated[str | None, typer.Option(help="The version; the one before this when not given.")] = None,
    reason: Annotated[str, typer.Option(help="Why; goes into the ledger.")] = "",
) -> None:
    """Make an earlier version the champion again (or a generation live), once it has answered a probe."""
    from orrery.champions import rollback_request
    from orrery.local import LocalProcess
    from orrery.runner import run as carry

    planner = planner_of(project)
    name = _run_name(datetime.now(UTC))
    request = rollback_request(planner, to, run=name, actor=actor(), reason=reason)
    show("rollback", request.key, carry(planner, request, LocalProcess()))
    before, after = request.options["previous"], request.options["version"]
    what = "champion" if planner.kind == "model" else "live generation"
    out.print(f"{what} of {project}: version {escape(f'{before} → {after}')}")


@app.command()
def reproduce(
    project: Project,
    what: Annotated[
        str, typer.Argument(help="A model version, or an attempt's folder in the store (from the ledger or a log).")
    ],
) -> None:
    """Repeat a failed attempt from its recorded config, or retrain a version and compare the weights."""
    from orrery import reproducing

    planner = planner_of(project)

    def say(line: str) -> None:
        out.print(f"[yellow]note:[/] {escape(line)}")

    if "/" in what:
        show("again", what, reproducing.attempt(planner, what, say))
        return
    was, now = reproducing.version(planner, what, say)
    if was != now:
        raise UserError(
            f"version {what} has weights {was[:16]}, the retrained ones are {now[:16]}",
            hint="other hardware or library builds?",
        )
    out.print(f"[green]✓[/] version {what} retrained to the same weights: {now}")


@app.command(name="faults")
def faults_(
    text: Annotated[str, typer.Argument(help="What ORRERY_FAULTS would hold; what it holds when not given.")] = "",
) -> None:
    """List what a cluster does to steps and how to rehearse it here, or check a text and say what it would do.

    Such as: ORRERY_FAULTS='train: preempt@step=120; *: quota@for=20s' orrery run PROJECT train --window …
    """
    from orrery import faults
    from orrery.faults_text import kinds, options

    given = text or os.environ.get(faults.VARIABLE, "")
    if not text:
        out.print(kinds())
        out.print(options())
    if why := faults.refusal(platform.load(), platform.profile()):
        out.print(f"[yellow]off:[/] {escape(why)}")
    for fault in faults.parse(given, "the text" if text else faults.VARIABLE) if given else ():
        out.print(f"[green]✓[/] {escape(fault.text)}")
        out.print(f"    {fault.said()}", markup=False)


@app.command()
def housekeeping(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and why; remove nothing.")] = False,
    project: Annotated[str | None, typer.Option(help="Only this project's; the whole store when not given.")] = None,
    share_: Annotated[
        str | None,
        typer.Option("--share", help="Of a project's outputs, or attempts, this run may remove, such as 100%."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON; sizes in bytes.")] = False,
) -> None:
    """Remove what is no longer needed from store and machine: `retention` in platform.yaml. Pods: the Dag's task."""
    from orrery.housekeeping import house

    name = _run_name(datetime.now(UTC))
    asked = house.Asked(name, actor(), dry_run, project, share(share_, "--share") if share_ else None)
    told = house.keep(asked, (lambda line: None) if as_json else (lambda line: out.print(line, markup=False)))
    if as_json:
        print(json.dumps(told, indent=1))  # noqa: T201


@app.command()
def up(
    llm: Annotated[bool, typer.Option("--llm", help="A small language model too, for answers without a GPU.")] = False,
) -> None:
    """Start Airflow and MLflow on loopback."""
    from orrery import servers

    servers.up(llm=llm)


@app.command()
def down() -> None:
    """Stop them, and everything they started."""
    from orrery import servers

    servers.down()


@app.command()
def status() -> None:
    """Say what runs, where, and how to log in."""
    from orrery import servers

    if not servers.status():
        raise typer.Exit(1)


@app.command()
def serve(
    project: Project,
    host: Annotated[str, typer.Option(help="Where it listens; other than loopback wants tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one, which the log tells.")] = 8070,
    tokens: Annotated[
        str | None, typer.Option(help="File of bearer tokens (ORRERY_SERVE_TOKENS); `orrery token` adds to it.")
    ] = None,
) -> None:
    """Answer questions from a knowledge base's live generation, with sources: an API and a small page."""
    load_knowledge(platform.project_folder(project))
    argv = [project, "--host", host, "--port", str(port), *(["--tokens", tokens] if tokens else [])]
    _serving(argv)


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="Who will have it; the service's log names it.")],
    groups: Annotated[str, typer.Option(help="What it may read beside `everyone`, such as oncall,support.")] = "",
    expires: Annotated[str | None, typer.Option(help="Its last day, such as 2027-06-30.")] = None,
    tokens: Annotated[str | None, typer.Option(help="The file of tokens (ORRERY_SERVE_TOKENS).")] = None,
) -> None:
    """Make a bearer token for the service; it is shown once, and written down nowhere but as a digest."""
    given = [("--groups", groups), ("--expires", expires), ("--tokens", tokens)]
    _serving(["token", name, *(part for option, value in given if value for part in (option, value))])


@app.command()
def feedback(
    project: Project,
    since: Annotated[str, typer.Option(help="Only those since this day, such as 2026-01-05.")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Lines for the questions file, for a person to complete.")
    ] = False,
) -> None:
    """Show the thumbs that readers gave, with their comments: candidates for labelled questions."""
    from orrery.rag.thumbs import candidates, thumbs

    load_knowledge(platform.project_folder(project))
    if since:
        parse(since, "day")
    found = thumbs(Store(platform.load().store), project, since)
    if as_json:
        for told in candidates(found):
            print(json.dumps(told, ensure_ascii=False))  # noqa: T201
        return
    for entry in found:
        sign = {"up": "[green]+[/]", "down": "[red]-[/]"}.get(str(entry["thumb"]), "?")
        said = "abstained" if entry.get("abstained") else str(entry.get("answer", ""))[:120]
        out.print(f"{sign} {escape(str(entry['at'])[:10])}  {escape(str(entry['question']))}")
        out.print(f"    {said}", markup=False)
        if entry.get("comment"):
            out.print(f"    comment: {entry['comment']}", markup=False)
    out.print(f"{len(found)} answers have a thumb; with --json as lines for the questions file")


def _serving(argv: list[str]) -> None:
    """Become the service's process, in its environment."""
    from orrery.local import interpreter

    python = interpreter("serve")
    env = {"ORT_DISABLE_TELEMETRY": "1", **os.environ}
    os.execve(python, [str(python), "-m", "orrery.serving", *argv], env)  # noqa: S606  our own environment's program


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def airflow(context: typer.Context) -> None:
    """Run Airflow's own command line on the local Airflow, such as `orrery airflow backfill create --help`."""
    from orrery.local import venvs
    from orrery.servers import airflow_environment

    program = venvs() / "airflow" / "bin" / "airflow"
    env = {**os.environ, **airflow_environment(platform.home())}
    os.execve(program, ["airflow", *context.args], env)  # noqa: S606  our own environment's program, no shell wanted


@app.command(hidden=True)
def step() -> None:
    """Run one attempt of one step (for machines): `orrery step --config URI --result URI`."""
    raise RequestError("`orrery step` needs --config and --result")

"""A person's yes before a promotion: the task `approve` between gate and register, by Airflow's own HITL.

The task waits without a worker (state `awaiting_input`) until one of the spec's approvers has answered, in the UI or
by REST, or until the time is over. Airflow refuses anybody else's answer (403), and this task does so again: an
Airflow in which everybody is an admin asks nobody's name. What counts afterwards is the ledger (`orrery.approvals`):
register and promote look there, so a task that was marked a success by hand has approved nothing.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Param
from airflow.sdk.exceptions import AirflowSkipException

from orrery import approvals, partitions, requests
from orrery.alerts import clean
from orrery.errors import RequestError, TryAgain, UserError
from orrery.orchestration import notify, params
from orrery.plan import Planner, safe_name
from orrery.spec import METRICS, PRIMARY, ModelSpec, seconds
from orrery.store import Manifest

if TYPE_CHECKING:
    from airflow.sdk import Context

    from orrery.ledger import Entry

MAX_REASONS = 20
MODELS = {"candidate": "", "champion": "champion_", "baseline": "baseline_"}


class ApproveOperator(ApprovalOperator):
    """Asks whether the gate's challenger may be promoted; nobody is asked when the gate kept the champion."""

    # Made while the task runs, from what projects wrote: never a template.
    template_fields = ()

    def __init__(self, *, project: str, spec: ModelSpec, **kwargs: Any) -> None:
        terms = spec.approval
        if terms is None:
            raise ValueError(f"{project} asks for no approval")
        super().__init__(
            subject=f"{project}: promote the challenger?",
            defaults=self.APPROVE if terms.otherwise == "promote" else self.REJECT,
            response_timeout=timedelta(seconds=seconds(terms.within)),
            assigned_users=[{"id": name, "name": name} for name in spec.approvers],
            **kwargs,
        )
        self.project = project

    def execute(self, context: Context) -> Any:
        """Ask; what follows is `execute_complete`. Skipped when there is nothing to promote."""
        planner = Planner(self.project)
        asked = params.read(context, planner)
        # What the run took up, as its steps do: one partition may mean a longer window by now.
        served = requests.of_run(planner.ledger, self.project, params.first_name(context["dag_run"]))
        window = served[0].window if served else partitions.window_name(asked.partitions)
        verdict = planner.store.latest_manifest(self.project, "verdict", window)
        if verdict is None:
            raise RequestError(f"there is no verdict of the gate for {window}", hint="run gate first")
        if verdict.result["verdict"] != "promote":
            raise AirflowSkipException(f"the gate kept the champion for {window}: nobody is asked")
        terms, evaluation = planner.spec.approval, planner.store.need(verdict.inputs["evaluation"][0])
        if terms is None:
            raise AirflowSkipException("the spec asks for no approval any more: clear the run's register")
        question = approvals.ask(
            planner.ledger,
            self.project,
            run=params.run_name(context["dag_run"]),
            window=window,
            verdict=verdict,
            candidate=evaluation.inputs["candidate"][0].path,
            terms=terms,
            approvers=planner.spec.approvers,
            actor=asked.actor,
            now=datetime.now(UTC),
        )
        known = approvals.answered(planner.ledger, question)
        if known is not None:  # answered, and the worker was lost before it could say so
            return self._go_on(context, known)
        self.subject = clean(f"{self.project}: promote the challenger of {window}?", 200)
        self.body = body(planner.spec, verdict, evaluation)
        self.response_timeout = datetime.fromisoformat(question.payload["until"]) - datetime.now(UTC)
        if self.response_timeout <= timedelta(0):
            self.response_timeout = timedelta(seconds=1)
        self._put(context)
        return super().execute(context)

    def _put(self, context: Context) -> None:
        """Put the question to Airflow, and see that it is this one that people are shown.

        Airflow 3.3 keeps a cleared task's earlier question, its text and its people; an answer to it would be
        about another candidate.
        """
        from airflow.sdk.api.datamodels._generated import HITLUser
        from airflow.sdk.execution_time.comms import CreateHITLDetailPayload
        from airflow.sdk.execution_time.task_runner import SUPERVISOR_COMMS

        shown: Any = SUPERVISOR_COMMS.send(
            msg=CreateHITLDetailPayload(
                ti_id=context["task_instance"].id,
                options=self.options,
                subject=self.subject,
                body=self.body,
                defaults=self.defaults,
                params=self.serialized_params,
                multiple=self.multiple,
                assigned_users=[HITLUser(**user) for user in self.assigned_users],
            )
        )
        people = sorted(user.id for user in shown.assigned_users or [])
        asked = sorted(user["id"] for user in self.assigned_users)
        if (shown.subject, shown.body, list(shown.defaults or []), people) != (
            self.subject,
            self.body,
            self.defaults,
            asked,
        ):
            raise UserError(
                "Airflow still shows the question that this run asked earlier, about another verdict or other people",
                hint=f"start a new run of {self.project}.train for this window: it asks anew",
            )

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Record the answer (or the deadline's default), once, and go on or skip the release."""
        if "error" in event:
            self.process_trigger_event_error(event)
        planner = Planner(self.project)
        question = self._question(context, planner)
        user = event.get("responded_by_user")
        by = str(user["id"]) if user else None
        if by is not None and by not in question.payload["approvers"]:
            raise UserError(
                f"{clean(by, 100)} answered, and is not an approver of {self.project}",
                hint=f"approvers: {', '.join(question.payload['approvers'])}; clear this task to ask again",
            )
        chosen = event["chosen_options"]
        if chosen not in ([self.APPROVE], [self.REJECT]):
            raise UserError(
                f"the answer is {clean(chosen, 100)}", hint="answer Approve or Reject; clear the task to ask again"
            )
        given = approvals.Answer(
            approved=chosen == [self.APPROVE],
            by=by,
            at=_iso(event["responded_at"]),
            comment=clean((event.get("params_input") or {}).get("comment") or ""),
        )
        return self._go_on(context, approvals.answer(planner.ledger, question, given))

    def _question(self, context: Context, planner: Planner) -> Entry:
        """Return what this run asked last: the answer is to that, whatever the store says by now."""
        run = params.run_name(context["dag_run"])
        mine = planner.ledger.find(self.project, "approval", phase="intent", prefix=f"{run}/")
        if not mine:
            raise TryAgain(f"the question of run {run} is not in the ledger", hint="clear this task to ask again")
        return mine[-1]

    def _go_on(self, context: Context, answer: Entry) -> dict[str, Any]:
        """Note the answer on the run; a rejection skips the release."""
        approved = answer.payload["approved"]
        self._note(context, answer)
        self.log.info("%s", "; ".join(approvals.told(answer)))
        if not approved:
            self.skip(ti=context["ti"], tasks=self.get_direct_relatives(upstream=False))
        return {"verdict": "approved" if approved else "rejected", "reasons": approvals.told(answer)}

    def _note(self, context: Context, answer: Entry) -> None:
        """Write the end of this task as the steps' ends are written: the run's note is made of these."""
        ti, window = context["ti"], answer.payload["window"]
        folder = f"{self.project}/runs/{params.run_name(context['dag_run'])}"
        attempt = f"{folder}/{safe_name(f'{ti.task_id}-{window}')}/{ti.try_number}"
        payload = {
            "verb": "approve",
            "key": window,
            "attempt": attempt,
            "status": "done",
            "verdict": "approved" if answer.payload["approved"] else "rejected",
            "skipped": None,
            "reasons": approvals.told(answer),
            "metrics": {},
            "output": None,
        }
        Planner(self.project).ledger.record(self.project, "run", attempt, "done", answer.actor, payload)


def body(spec: ModelSpec, verdict: Manifest, evaluation: Manifest) -> str:
    """Return what the approver reads: Markdown in which everything from a project is escaped.

    It follows from the verdict, the evaluation and the spec alone, so that asking again asks the same.
    """
    terms = spec.approval
    metrics = evaluation.result.get("metrics", {})
    there = {
        name: prefix for name, prefix in MODELS.items() if not prefix or any(m.startswith(prefix) for m in metrics)
    }
    lines = [
        f"The gate would **promote** the candidate of **{escape(verdict.key)}**.",
        "",
        f"| | {' | '.join(there)} |",
        f"|---|{'---|' * len(there)}",
    ]
    primary = PRIMARY[spec.task]
    for metric in [primary, *(m for m in METRICS if m != primary and m in metrics)]:
        numbers = [_number(metrics.get(f"{prefix}{metric}")) for prefix in there.values()]
        lines.append(f"| {escape(metric)} | {' | '.join(numbers)} |")
    for name in ("champion", "baseline"):
        delta = [metrics.get(f"{name}_{end}") for end in ("delta", "low", "high")]
        if all(isinstance(d, int | float) for d in delta):
            lines += ["", f"Better than the {name} by {delta[0]:+.4f} (95 %: {delta[1]:+.4f} to {delta[2]:+.4f})."]
    reasons = list(verdict.result.get("reasons", ()))
    lines += ["", *(f"- {escape(clean(reason, 300))}" for reason in reasons[:MAX_REASONS])]
    if len(reasons) > MAX_REASONS:
        lines.append(f"- and {len(reasons) - MAX_REASONS} more")
    if terms is not None:
        end = "it is promoted" if terms.otherwise == "promote" else "the champion is kept"
        lines += ["", f"Without an answer within {terms.within}, {end}."]
    lines += ["", f"Verdict {escape(verdict.digest[:12])}, owner {escape(clean(spec.owner, 100))}."]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Return a text that Markdown shows as it is: no markup, no HTML, no link (also none made of a bare address)."""
    escaped = re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))
    # What looks like an address becomes a link even when it is escaped; a zero-width space takes it apart.
    return re.sub(r"(?i)(\\:\\/|www|\\@)", "\\1\u200b", escaped)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "–"


def _iso(value: Any) -> str:
    return str(value.isoformat() if hasattr(value, "isoformat") else value)


def approve_task(project: str, spec: ModelSpec, **kwargs: Any) -> ApproveOperator:
    """Return the task `approve`. It waits in no pool: only asking and recording take a slot and a worker."""
    return ApproveOperator(
        task_id="approve",
        project=project,
        spec=spec,
        # Given from outside: Airflow marks these as the task's own, which alone are in the form of the question. One
        # that may not be null has to be filled in before the UI lets anybody answer.
        params={
            "comment": Param(
                None, type=["null", "string"], maxLength=500, title="Comment", description="For the ledger."
            )
        },
        execution_timeout=timedelta(minutes=10),
        # Told when it asks: a task that begins to wait has not ended, so none of its callbacks is called.
        notifiers=notify.OrreryNotifier(project),
        doc_md="Asks one of the spec's `approvers`, in the tab *Required Actions* or by REST (`…/hitlDetails`).",
        **notify.task_callbacks(project, "approve"),
        **kwargs,
    )

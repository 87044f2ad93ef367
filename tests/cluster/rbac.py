"""Who may do what: bearer tokens of service accounts, judged by the Role and RoleBinding objects of the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cluster.objects import BINDINGS, CLUSTER_BINDINGS, CLUSTER_ROLES, ROLES, Object, Objects, Refused

ACCOUNT = "system:serviceaccount:"


class Asked(NamedTuple):
    """One use of the API, in RBAC's words; `resource` is `pods` or `pods/log`."""

    verb: str
    group: str
    resource: str
    namespace: str
    name: str = ""


class Rbac:
    """Answers 401 and 403 as the API server does, once it is `on`."""

    def __init__(self, objects: Objects) -> None:
        self.objects, self.on = objects, False
        self._users: dict[str, str] = {}

    def token(self, namespace: str, account: str) -> str:
        """Return the bearer token of a service account."""
        token = f"{namespace}.{account}"
        self._users[token] = f"{ACCOUNT}{namespace}:{account}"
        return token

    def user(self, authorization: str) -> str:
        """Return who is asking. Raises `Refused` (401)."""
        if not self.on:
            return self._users.get(authorization.removeprefix("Bearer "), "system:admin")
        try:
            return self._users[authorization.removeprefix("Bearer ")]
        except KeyError:
            raise Refused(401, "Unauthorized", "Unauthorized") from None

    def check(self, user: str, asked: Asked) -> None:
        """Raise `Refused` (403) unless a role grants it."""
        if not self.on or any(_grants(rule, asked) for rule in self.rules(user, asked.namespace)):
            return
        main, _, _ = asked.resource.partition("/")
        title = f"{main}.{asked.group}" if asked.group else main
        name = f' "{asked.name}"' if asked.name else ""
        where = f' in the namespace "{asked.namespace}"' if asked.namespace else " at the cluster scope"
        message = f'{title}{name} is forbidden: User "{user}" cannot {asked.verb} resource "{asked.resource}" in API group "{asked.group}"{where}'
        raise Refused(403, "Forbidden", message, {"name": asked.name, "group": asked.group, "kind": main})

    def rules(self, user: str, namespace: str) -> Iterator[Object]:
        """Return the rules that hold for a user in a namespace."""
        for binding in self.objects.list(BINDINGS, namespace) if namespace else []:
            if _binds(binding, user):
                yield from self._rules_of(binding, namespace)
        for binding in self.objects.list(CLUSTER_BINDINGS):
            if _binds(binding, user):
                yield from self._rules_of(binding, "")

    def _rules_of(self, binding: Object, namespace: str) -> list[Object]:
        reference = binding["roleRef"]
        kind = CLUSTER_ROLES if reference["kind"] == "ClusterRole" else ROLES
        role = self.objects.find(kind, namespace, reference["name"])
        return (role or {}).get("rules") or []


def _binds(binding: Object, user: str) -> bool:
    for subject in binding.get("subjects") or []:
        if subject["kind"] == "ServiceAccount":
            own = binding["metadata"].get("namespace", "")
            if user == f"{ACCOUNT}{subject.get('namespace', own)}:{subject['name']}":
                return True
        elif subject["kind"] == "User":
            if subject["name"] == user:
                return True
        elif _in_group(user, subject["name"]):
            return True
    return False


def _in_group(user: str, group: str) -> bool:
    if not user.startswith(ACCOUNT):
        return group == "system:authenticated"
    namespace = user.removeprefix(ACCOUNT).partition(":")[0]
    return group in ("system:authenticated", "system:serviceaccounts", f"system:serviceaccounts:{namespace}")


def _grants(rule: Object, asked: Asked) -> bool:
    def listed(field: str, value: str) -> bool:
        values = rule.get(field) or []
        return "*" in values or value in values

    _, _, sub = asked.resource.partition("/")
    resources = rule.get("resources") or []
    named = asked.resource in resources or "*" in resources or bool(sub and f"*/{sub}" in resources)
    names = rule.get("resourceNames") or []
    return (
        listed("verbs", asked.verb)
        and listed("apiGroups", asked.group)
        and named
        and (not names or asked.name in names)
    )

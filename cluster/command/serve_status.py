"""What Serve's REST API says about the applications, in sentences."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ranklet.cluster.command.causes import last_cause


@dataclass(frozen=True)
class ServeStatus:
    """Attributes: applications is Serve's answer, by name; None while it does not answer."""

    applications: Mapping[str, Any] | None

    @property
    def is_running(self) -> bool:
        statuses = [application["status"] for application in (self.applications or {}).values()]
        return bool(statuses) and all(status == "RUNNING" for status in statuses)

    @property
    def failure(self) -> str | None:
        """Why an application cannot be deployed; None if it may yet run."""
        for application in (self.applications or {}).values():
            if application["status"] == "DEPLOY_FAILED":
                failed = [each["message"] for each in application["deployments"].values() if each["message"]]
                return last_cause(failed[0] if failed else application["message"])
        return None

    @property
    def waits_for(self) -> str:
        """What is missing until all deployments are healthy."""
        if self.applications is None:
            return "Ray's dashboard does not answer"
        lines = [line for _, line, is_healthy in self.deployments() if not is_healthy]
        return "; ".join(lines) or ", ".join(
            f"{name}: {each['status']}" for name, each in self.applications.items() if each["status"] != "RUNNING"
        )

    def deployments(self) -> Iterator[tuple[str, str, bool]]:
        """Yield each deployment's name, a line about it, and whether it is healthy."""
        for application in (self.applications or {}).values():
            for name, each in application["deployments"].items():
                states = Counter(replica["state"] for replica in each["replicas"])
                wanted = each.get("target_num_replicas") or each["deployment_config"].get("num_replicas") or 1
                others = [f"{count} {state.lower()}" for state, count in sorted(states.items()) if state != "RUNNING"]
                counts = ", ".join([f"{states['RUNNING']} of {wanted} run", *others])
                message = f" ({last_cause(each['message'])})" if each["message"] else ""
                yield name, f"{name}: {each['status'].lower()}, {counts}{message}", each["status"] == "HEALTHY"

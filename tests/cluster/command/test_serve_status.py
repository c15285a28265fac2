"""Serve's status and its tracebacks in sentences."""

from typing import Any

import pytest

from ranklet.cluster.command.causes import last_cause
from ranklet.cluster.command.serve_status import ServeStatus

TRACEBACK = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:ranklet:Replica.initialize_and_get_metadata() (pid=1, ip=192.0.2.2)
  File "/x/replica.py", line 7, in initialize
    await self._init()
  File "/x/deployment.py", line 70, in __init__
    raise ModelError(message)
ranklet.replicas.errors.ModelError: config.json: expected a supported architecture, got 'Bert'
- one finding
- another

During handling of the above exception, another exception occurred:
"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (TRACEBACK, "config.json: expected a supported architecture, got 'Bert'\n- one finding\n- another"),
        (
            "Traceback (most recent call last):\n  File \"x\", line 1\nRuntimeError: first\n\nKeyError: 'last'\n",
            "'last'",
        ),
        ("Traceback:\n  raise TimeoutError\nTimeoutError\n", "TimeoutError"),
        ("ray::Worker.run() RuntimeError: boom", "boom"),
        ("Local node IP: 192.0.2.2\nstarted\n\n", "started"),
        ("", ""),
    ],
)
def test_the_cause_is_the_last_exception(text: str, cause: str) -> None:
    assert last_cause(text) == cause


def application(status: str, *deployments: tuple[str, str, str, int]) -> dict[str, Any]:
    described = {
        name: {
            "status": state, "message": message, "target_num_replicas": 2,
            "replicas": [{"state": "RUNNING"}] * running + [{"state": "STARTING"}] * (2 - running),
        }
        for name, state, message, running in deployments
    }  # fmt: skip
    return {"ranklet": {"status": status, "message": "", "deployments": described}}


def test_a_healthy_application_runs() -> None:
    status = ServeStatus(application("RUNNING", ("Gateway", "HEALTHY", "", 2)))
    assert (status.is_running, status.failure, status.waits_for) == (True, None, "")
    assert [line for _, line, _ in status.deployments()] == ["Gateway: healthy, 2 of 2 run"]


def test_an_update_names_the_deployment_that_it_waits_for() -> None:
    message = "Deployment 'Replica' has 2 replicas that have taken more than 30s to be scheduled."
    status = ServeStatus(
        application("DEPLOYING", ("Gateway", "HEALTHY", "", 2), ("Replica", "UPDATING", message, 1)),
    )
    assert (status.is_running, status.failure) == (False, None)
    assert status.waits_for == f"Replica: updating, 1 of 2 run, 1 starting ({message})"


def test_a_failure_is_its_cause_without_the_traceback() -> None:
    status = ServeStatus(application("DEPLOY_FAILED", ("Replica", "DEPLOY_FAILED", TRACEBACK, 0)))
    assert status.failure == last_cause(TRACEBACK)
    assert not status.is_running
    early = application("DEPLOY_FAILED")
    early["ranklet"]["message"] = "Deploying app failed with exception:\nTraceback:\n  x\nImportError: no module"
    assert ServeStatus(early).failure == "no module"


def test_no_answer_is_no_state() -> None:
    for status in (ServeStatus(None), ServeStatus({})):
        assert (status.is_running, status.failure) == (False, None)
    assert "does not answer" in ServeStatus(None).waits_for

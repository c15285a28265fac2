"""Processes that die and clients that disconnect, over HAProxy."""

import pytest

from tests.cluster import load
from tests.cluster.service import Service


@pytest.mark.parametrize("victim", [0, 1])
def test_a_replica_killed_under_load_loses_no_request(service: Service, victim: int) -> None:
    before = service.processes("Replica")
    seen = load.kill_replica_under_load(service, victim)
    assert seen["wrong"] == 0
    assert seen["right"] > 20
    assert seen["refused"] < seen["right"]
    load.wait_for_recovery(service)
    assert len(set(service.processes("Replica").values()) - set(before.values())) == 1


def test_a_request_is_answered_although_its_replica_died(service: Service) -> None:
    load.kill_during_request(service)
    load.wait_for_recovery(service)


def test_work_for_a_client_that_disconnected_is_dropped(service: Service) -> None:
    load.disconnect_early(service)
    assert service.embed("legal-v2", "still here").shape == (1, 128)

"""A real Prometheus evaluates every panel, rule and alert while it scrapes a cluster under load."""

import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import yaml

from deploy.grafana import board
from tests.assets.broken import BROKEN
from tests.cluster.service import BASE, Service, eventually, own_configuration, serving
from tests.deploy.prometheus import DEPLOY, Prometheus, finite, scraping
from tests.needs import needs

MODELS = (BASE, "legal-v2", "medical", "support-rs", "finance-mlp", "code-mixed", "catalog-embed", "broken", "nobody")
BEGINNING = "these words begin every prompt " * 40  # more than a page, so that it is looked up in the prefix cache
LARGEST = {"percentunit": 1.0001, "s": 600.0, "reqps": 1e6, "ops": 1e9, "bytes": 1e12, "short": 1e9}

pytestmark = needs("prometheus")


@pytest.fixture(scope="module")
def watched(
    runs_ray: None, model_dir: Path, adapters_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Prometheus]]:
    """Yield a service and its Prometheus. Six adapters share two slots and some requests fail, so no panel is empty.

    One third of the requests are for streamed texts.
    """
    folder = tmp_path_factory.mktemp("boards")
    content = own_configuration(model_dir, adapters_dir, folder)
    BROKEN["nan"].make(model_dir, folder / "adapters" / "broken")
    content["applications"][0]["args"]["engine"] |= {"slots": 2, "kv_cache_bytes": 1 << 24}
    with serving(content, folder) as service, scraping(service.url, folder) as prometheus:
        eventually(
            "all three processes are scraped", lambda: [each["health"] for each in prometheus.targets()] == ["up"] * 3
        )
        stop = Event()
        loading = [Thread(target=_send_requests, args=(service, stop, turn)) for turn in range(3)]
        for each in loading:
            each.start()
        try:
            yield service, prometheus
        finally:
            stop.set()
            for each in loading:
                each.join()


def _send_requests(service: Service, stop: Event, turn: int) -> None:
    for number in itertools.count(turn):
        if stop.wait(0.1):
            return
        model, text = MODELS[number % len(MODELS)], f"text {number}"
        if number // len(MODELS) % 3:
            service.post(model, [text, "and another one"])
        else:
            prompt = f"{BEGINNING} {text}"
            service.http.post(
                "/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": 8, "stream": True}
            )


PANELS = [(row, panel) for row, panels in board.ROWS.items() for panel in panels]


def test_the_committed_board_is_up_to_date() -> None:
    assert board.JSON.read_text() == board.board()
    drawn = [panel for panel in json.loads(board.JSON.read_text())["panels"] if panel["type"] != "row"]
    assert [panel["title"] for panel in drawn] == [panel.title for _, panel in PANELS]
    assert all(target["expr"] for panel in drawn for target in panel["targets"])


def test_every_process_is_scraped(watched: tuple[Service, Prometheus]) -> None:
    service, prometheus = watched
    up = {(found["labels"]["role"], found["labels"]["replica"]): found["health"] for found in prometheus.targets()}
    assert set(up.values()) == {"up"}
    assert {id for role, id in up if role == "replica"} == set(service.processes("Replica"))


@pytest.mark.parametrize(
    ("row", "panel"),
    [pytest.param(row, panel, id=f"{row}: {panel.title}") for row, panel in PANELS],
)
def test_a_panel_shows_data_of_its_unit(watched: tuple[Service, Prometheus], row: str, panel: board.Panel) -> None:
    _, prometheus = watched
    for legend, expr in panel.exprs.items():
        found = prometheus.panel_data(expr)
        assert all(0 <= value <= LARGEST[panel.unit] for value in finite(found)), (legend, found)
        labels = [name for name in ("adapter", "replica", "tier", "code") if f"{{{{{name}}}}}" in legend]
        assert all(sample["metric"].get(name) for sample in found for name in labels), (legend, found[0]["metric"])


def test_prometheus_counts_the_requests_that_clients_sent(watched: tuple[Service, Prometheus]) -> None:
    service, prometheus = watched
    before = sum(_values(prometheus, 'sum(ranklet_requests_total{adapter="support-rs",status="200"})'))
    for _ in range(30):
        service.embed("support-rs", "one more")
    expr = 'sum(ranklet_requests_total{adapter="support-rs",status="200"})'
    eventually("they are counted", lambda: sum(_values(prometheus, expr)) >= before + 30)


def test_prometheus_counts_texts_and_clients_that_leave(watched: tuple[Service, Prometheus]) -> None:
    service, prometheus = watched
    whole = 'sum(ranklet_text_choices_total{adapter="medical",reason="length"})'
    left = 'sum(ranklet_text_cancelled_total{adapter="medical",reason="client_gone"})'
    before = sum(_values(prometheus, whole))
    request = {"model": "medical", "prompt": "a", "max_tokens": 4, "ignore_eos": True, "n": 2}
    for _ in range(5):
        assert service.http.post("/v1/completions", json=request).status_code == 200
    eventually("both choices of each are counted", lambda: sum(_values(prometheus, whole)) >= before + 10)
    before = sum(_values(prometheus, left))
    endless = {**request, "max_tokens": 2000, "stream": True}
    with service.http.stream("POST", "/v1/completions", json=endless) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    eventually("the client is counted", lambda: sum(_values(prometheus, left)) == before + 1)


def test_rules_and_alerts_evaluate(watched: tuple[Service, Prometheus]) -> None:
    _, prometheus = watched
    eventually("all rules are evaluated", lambda: {rule["health"] for rule in prometheus.rules()} == {"ok"})
    rules = prometheus.rules()
    for rule in rules:
        if rule["type"] == "recording":
            prometheus.panel_data(rule["name"])
    # Clients request an adapter whose folder is broken.
    eventually("an alert", lambda: bool(_rule(prometheus, "RankletAdapterFailed")["alerts"]))
    assert not _rule(prometheus, "RankletNoReplica")["alerts"]


def _rule(prometheus: Prometheus, name: str) -> dict[str, Any]:
    (rule,) = [rule for rule in prometheus.rules() if rule["name"] == name]
    return rule


def _values(prometheus: Prometheus, expr: str) -> list[float]:
    return [float(sample["value"][1]) for sample in prometheus.query(expr)]


def test_promtool_accepts_rules_alerts_and_configuration() -> None:
    for words in (["check", "rules", "rules.yml", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(["promtool", *words], cwd=DEPLOY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    checked = subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"], cwd=DEPLOY, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_has_a_section_in_the_runbook() -> None:
    (group,) = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    runbook = (DEPLOY / "README.md").read_text()
    tested = (DEPLOY / "alerts_test.yml").read_text()
    for rule in group["rules"]:
        assert f"\n### {rule['alert']}\n" in runbook
        assert rule["annotations"]["runbook"] == f"deploy/README.md#{rule['alert'].lower()}"
        assert f"alertname: {rule['alert']}" in tested

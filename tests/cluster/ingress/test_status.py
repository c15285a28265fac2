"""The status page in a real browser."""

import re
from pathlib import Path

from tests.cluster.ingress.browser import browser
from tests.cluster.service import Service, eventually
from tests.needs import needs

pytestmark = needs("chromium")


def test_the_page_shows_replicas_adapters_and_refusals(service: Service, tmp_path: Path) -> None:
    secret = "a text that is nobody's business"
    for _ in range(3):
        service.embed("legal-v2", secret)
    service.post("never-heard-of", secret)
    service.post("legal-v2", [secret, 7])
    home = service.post("legal-v2", "where").headers["x-ranklet-replica"]
    service.deploy({"adaptors": {}})
    eventually("the fault is known", lambda: bool(service.http.get("/v1/status").json()["refused_settings"]))
    with browser(service.url + "/", tmp_path) as opened:
        opened.wait_for("/\\d/.test(document.getElementById('rate').textContent)")  # the page has refreshed once
        page = opened.run("document.documentElement.outerHTML")
        opened.picture(tmp_path / "status.png")
    service.deploy(None)
    for replica in service.processes("Replica"):
        assert f"<td>{replica}</td>" in page
    assert "did you mean 'adapters'" in page.partition('id="refused"')[2].partition("</table>")[0]
    eventually("the fault is gone", lambda: not service.http.get("/v1/status").json()["refused_settings"])
    row = re.search(r"<tr><td>legal-v2</td>(.*?)</tr>", page)
    assert row, page[-3000:]
    heads = re.findall(r"<th>([^<]+)</th>", page.partition('id="adapters"')[2].partition("</tr>")[0])
    tiers = re.findall(r'class="t (\w*)"', row[1])
    assert dict(zip(heads[1:], tiers, strict=True))[home] == "gpu"
    assert "model_not_found" in page
    assert secret not in page
    assert re.search(r'id="message"[^>]*></p>', page), "the page shows no error"
    assert (tmp_path / "status.png").stat().st_size > 10_000


def test_the_pages_data_has_replicas_counts_and_errors(service: Service) -> None:
    status = service.http.get("/v1/status").json()
    assert {each["id"] for each in status["replicas"]} == set(service.processes("Replica"))
    assert status["requests"] >= status["refused"] >= 0
    assert all(set(each) == {"at_s", "status", "code", "message"} for each in status["errors"])

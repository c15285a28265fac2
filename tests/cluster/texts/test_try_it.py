"""The panel of the status page that tries models, in a real browser."""

import re
from pathlib import Path

from tests.cluster.ingress.browser import Page, browser
from tests.cluster.service import Service
from tests.needs import needs

pytestmark = needs("chromium")


ASK = """
document.getElementById('model').value = {model!r};
document.getElementById('text').value = 'Hello';
document.getElementById('most').value = 12;
document.getElementById('send').click()
"""


def ask(page: Page, model: str) -> None:
    page.wait_for("document.getElementById('model').options.length > 2")
    page.run(ASK.format(model=model))


def test_an_answer_streams_with_its_rate_and_headers(service: Service, tmp_path: Path) -> None:
    with browser(service.url + "/", tmp_path) as page:
        ask(page, "legal-v2")
        page.wait_for("!document.getElementById('send').disabled && document.getElementById('facts').textContent")
        facts = page.run("document.getElementById('facts').textContent")
        page.picture(tmp_path / "try.png")
    assert re.match(r"\d+ tokens, first after \d+ ms, then [\d.]+ tokens/s; ", facts), facts
    assert service.processes("Replica").keys() & set(re.findall(r"replica (\w+)", facts)), facts
    assert (tmp_path / "try.png").stat().st_size > 10_000


def test_an_error_is_shown(service: Service, tmp_path: Path) -> None:
    with browser(service.url + "/", tmp_path) as page:
        ask(page, "support-rs")
        page.wait_for("document.getElementById('facts').textContent")
        assert "only users may speak" in page.run("document.getElementById('facts').textContent")

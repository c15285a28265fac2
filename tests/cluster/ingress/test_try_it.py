"""The panel of the status page that tries models, in a real browser."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.chat_models import make_chat_models
from tests.cluster.ingress.browser import Page, browser
from tests.cluster.service import Service, local_configuration, serving
from tests.needs import needs, require

pytestmark = needs("chromium")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, list[str]]]:
    """Return the service and the names of its adapters; the template of the third refuses every chat."""
    require("haproxy")
    folder = tmp_path_factory.mktemp("texts")
    names = [spec.path.name for spec in make_chat_models(folder)]
    with serving(local_configuration(folder / "model", folder / "adapters"), folder) as service:
        yield service, names


ASK = """
document.getElementById('model').value = {model!r};
document.getElementById('text').value = 'Hello';
document.getElementById('most').value = 12;
document.getElementById('send').click()
"""


def ask(page: Page, model: str) -> None:
    page.wait_for("document.getElementById('model').options.length > 2")
    page.run(ASK.format(model=model))


def test_an_answer_streams_with_its_rate_and_headers(texts: tuple[Service, list[str]], tmp_path: Path) -> None:
    service, names = texts
    with browser(service.url + "/", tmp_path) as page:
        ask(page, names[0])
        page.wait_for("!document.getElementById('send').disabled && document.getElementById('facts').textContent")
        facts = page.run("document.getElementById('facts').textContent")
        page.picture(tmp_path / "try.png")
    assert re.match(r"\d+ tokens, first after \d+ ms, then [\d.]+ tokens/s; ", facts), facts
    assert service.processes("Replica").keys() & set(re.findall(r"replica (\w+)", facts)), facts
    assert (tmp_path / "try.png").stat().st_size > 10_000


def test_an_error_is_shown(texts: tuple[Service, list[str]], tmp_path: Path) -> None:
    service, names = texts
    with browser(service.url + "/", tmp_path) as page:
        ask(page, names[2])
        page.wait_for("document.getElementById('facts').textContent")
        assert "only users may speak" in page.run("document.getElementById('facts').textContent")

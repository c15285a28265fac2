"""Templates that take too much time or memory, or that try to leave the sandbox, harm nobody but themselves."""

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path

import pytest

from ranklet.cluster.text.render_process import RenderProcess, TemplateFailedError, TrustedRenderer
from ranklet.cluster.text.template import ChatTemplate
from ranklet.cluster.text.template_language import render
from ranklet.replicas.errors import InternalError, InvalidRequest
from tests.cluster.text.templates import TEMPLATES

MESSAGES = [{"role": "user", "content": "héllo \ud800"}]
LIMIT_S = 0.5
SLACK_S = 20.0  # a loaded machine starts a process late
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CALLS = "{% macro f() %}{% for i in range(99999) %}{% endfor %}{% endmacro %}"
LIST = "{% set ns = namespace(x=[]) %}"
NESTED = "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}"


@pytest.fixture(name="process", scope="module")
def _process() -> Iterator[RenderProcess]:
    process = RenderProcess(LIMIT_S)
    process.render("", {})  # starts it
    yield process
    process.stop()


def failure(process: RenderProcess, source: str) -> str:
    """Return why a template fails. It must fail in time, and leave this process's memory as it is."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start_s = time.monotonic()
    with pytest.raises(TemplateFailedError) as raised:
        process.render(source, {"messages": MESSAGES})
    assert time.monotonic() - start_s < LIMIT_S + 1 + SLACK_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    return str(raised.value)


@pytest.mark.parametrize(
    "source",
    [
        ENDLESS,
        CALLS + "{% for i in range(99999) %}{{ f() }}{% endfor %}",
        NESTED + "{{ n.a == (n.a | list) }}{{ n.a }}",
        NESTED + "{{ n.a | tojson }}",
        "{{ 7 ** 9999999 % 10 ** 99999 }}",
        "{% set ns = namespace(x='a') %}{% for i in range(99999) %}{% set ns.x = ns.x ~ i %}{{ ns.x | length }}"
        + ENDLESS
        + "{% endfor %}",
    ],
)
def test_a_slow_template_is_late(process: RenderProcess, source: str) -> None:
    assert f"more than {LIMIT_S:g} s" in failure(process, source) or "memory" in failure(process, source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10 ** 9 }}",
        "{{ 'x' * (messages | length * 10 ** 9) }}",
        "{{ [1] * 10 ** 9 }}",
        "{% set ns = namespace(x='x') %}{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ 'x'.center(10 ** 9) }}",
        LIST + "{% for i in range(9999) %}{% set ns.x = ns.x + ['x' * 10 ** 6 ~ i] %}{% endfor %}",
    ],
)
def test_a_large_template_gets_no_memory(process: RenderProcess, source: str) -> None:
    said = failure(process, source)
    assert "memory" in said or "more than" in said


def test_a_long_text_is_refused() -> None:
    process = RenderProcess(30.0)  # a loaded machine needs more than LIMIT_S
    with pytest.raises(TemplateFailedError, match="at most 8388608 characters"):
        process.render("{{ 'x' * 2 ** 23 }}{{ messages }}", {"messages": MESSAGES})
    assert len(process.render("{{ 'é' * 2 ** 23 }}", {})) == 1 << 23
    process.stop()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "nested too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ (''|attr('__class__')).mro() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ dict.__class__.x }}", "unsafe"),
        ("{{ namespace.__init__ }}{{ namespace.mro().x }}", "unsafe|undefined|mro"),
        ("{{ namespace(__class__=1) }}", "underscore"),
        ("{{ __import__('os') }}", "undefined"),
        ("{{ ''.format.__globals__.x }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{% include 'other' %}", "loader"),
        ("{{ raise_exception('no') }}", "no"),
        ("{% if %}", "expression"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ missing.field }}", "undefined"),
    ],
)
def test_a_template_that_fails_says_why(process: RenderProcess, source: str, says: str) -> None:
    said = failure(process, source)
    assert any(part in said for part in says.split("|")), said


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_the_gateways_process(process: RenderProcess, name: str) -> None:
    variables = {"messages": MESSAGES, "tools": None, "add_generation_prompt": True, "bos_token": "<s>"}
    assert process.render(TEMPLATES[name], variables) == TrustedRenderer().render(TEMPLATES[name], variables)


def test_others_are_served_after_a_template_that_hangs(process: RenderProcess) -> None:
    with ThreadPoolExecutor(4) as threads:
        late = [threads.submit(failure, process, ENDLESS + "{# other #}") for _ in range(3)]
        served = threads.submit(process.render, "{{ messages | length }}", {"messages": MESSAGES})
        assert served.result(LIMIT_S + 1 + SLACK_S) == "1"
        # Only the first of them takes its time: the others are refused at once.
        assert all("more than" in each.result(LIMIT_S + 1 + SLACK_S) for each in late)


def test_large_and_deep_variables_are_refused(process: RenderProcess) -> None:
    with pytest.raises(TemplateFailedError, match="at most 16777216 bytes, got"):
        process.render("", {"x": "x" * (1 << 24)})
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TemplateFailedError, match="nested less deeply"):
        process.render("", {"x": deep})


def test_a_late_template_is_refused_for_a_minute() -> None:
    now_s = 0.0
    process = RenderProcess(0.2, clock=lambda: now_s)
    try:
        assert failure(process, ENDLESS) == "it takes more than 0.2 s"
        assert failure(process, ENDLESS) == "it takes more than 0.2 s. It is refused for 60 s"
        now_s = 61.0
        assert failure(process, ENDLESS) == "it takes more than 0.2 s"
    finally:
        process.stop()


def child_pids() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_a_killed_process_is_replaced() -> None:
    before = child_pids()
    process = RenderProcess(LIMIT_S)
    try:
        assert process.render("a", {}) == "a"
        (pid,) = child_pids() - before
        threading.Timer(0.1, os.kill, (pid, signal.SIGKILL)).start()
        assert "ended the process" in failure(process, ENDLESS)
        assert process.render("b", {}) == "b"
        (pid,) = child_pids() - before
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert process.render("c", {}) == "c"
    finally:
        process.stop()
    assert child_pids() == before


def test_a_process_that_does_not_start_is_no_fault_of_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    process = RenderProcess(LIMIT_S)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for _ in range(2):
        with pytest.raises(InternalError, match="does not start"):
            process.render("", {})


def test_the_process_ends_with_the_gateway() -> None:
    ours, theirs = Pipe()
    with theirs:
        command = [sys.executable, "-m", "ranklet.cluster.text.render_worker", str(theirs.fileno()), "1", str(1 << 29)]
        worker = subprocess.Popen(
            command, pass_fds=(theirs.fileno(),), env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        )
    assert ours.poll(30)
    ours.close()
    assert worker.wait(10) == 0


def test_a_failure_is_an_invalid_request(process: RenderProcess) -> None:
    with pytest.raises(InvalidRequest, match=r"the chat template refuses them: it takes more than 0\.5 s") as raised:
        ChatTemplate(ENDLESS + "{# mine #}", {}, process).prompt([{"role": "user", "content": "x"}])
    assert raised.value.param == "messages"


def test_compiled_templates_keep_nothing_between_requests() -> None:
    source = (
        "{% set ns = namespace(seen=false) %}{{ ns.seen }}{% set ns.seen = true %}{{ x is defined }}{% set x = 1 %}"
    )
    assert [render(source, {}, 100) for _ in range(2)] == ["FalseFalse", "FalseFalse"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_the_process_ends_with_its_owner() -> None:
    before = child_pids()
    renderer = RenderProcess()
    assert renderer.render("a {{ b }}", {"b": 1}) == "a 1"
    assert len(child_pids() - before) == 1
    del renderer
    gc.collect()
    assert child_pids() == before

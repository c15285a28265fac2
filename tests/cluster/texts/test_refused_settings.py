"""A slip in `user_config` changes nothing for texts: streams, adapters and quotas go on as before."""

from tests.cluster.service import BASE, Service, eventually
from tests.cluster.text_client import COMPLETIONS, PROMPT, TextService

FIELDS = {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True}


def test_a_faulty_user_config_changes_nothing_for_texts(service: Service) -> None:
    text = TextService(service.http)

    def status(model: str) -> int:
        return service.http.post(COMPLETIONS, json={"model": model, **FIELDS}).status_code

    def reasons() -> list[str]:
        return [each["reason"] for each in service.http.get("/v1/status").json()["refused_settings"]]

    folder = str(service.adapters / "legal-v2")
    service.deploy({"adapters": {"free-a": folder, "paid": folder}, "tokens_per_minute": {"free-*": 10}})
    eventually("the quota is in force", lambda: status("free-a") == 429)
    before = service.processes("Gateway") | service.processes("Replica")
    long = {"model": "paid", **FIELDS, "max_tokens": 600, "stream": True}
    with service.http.stream("POST", COMPLETIONS, json=long) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        service.deploy({"tokens_per_minute": {"free-*": 0}}, of_replicas={"tokens_per_minute": {}})
        eventually("both refuse it", lambda: len(reasons()) == 2)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert not any("error" in line for line in rest)
    assert (status("paid"), status("free-a"), status(BASE)) == (200, 429, 200)
    assert text.whole(COMPLETIONS, {"model": "paid", **FIELDS})["usage"]["completion_tokens"] == 20
    service.deploy(None)
    eventually("nothing is refused", lambda: reasons() == [])
    assert (status("paid"), status(BASE)) == (404, 200)
    assert service.processes("Gateway") | service.processes("Replica") == before

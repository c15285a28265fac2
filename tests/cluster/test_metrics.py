"""Metrics at the endpoints that http_sd lists, against the requests that were sent."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.assets.oracle import encode
from tests.cluster.service import BASE, Service, eventually


def test_http_sd_lists_every_process(service: Service) -> None:
    groups = service.targets()
    listed = {(group["labels"]["role"], group["labels"]["replica"]) for group in groups}
    assert {replica for role, replica in listed if role == "replica"} == set(service.processes("Replica"))
    assert {replica for role, replica in listed if role == "gateway"} == set(service.processes("Gateway"))
    assert sorted(group["labels"]["rank"] for group in groups if "rank" in group["labels"]) == ["0", "1"]
    assert all(isinstance(value, str) for group in groups for value in group["labels"].values())


def test_requests_prompts_and_tokens_are_counted(service: Service) -> None:
    texts = ["one", "two words", "three words here"]
    before = service.samples("gateway", adapter="finance-mlp"), service.samples("replica", adapter="finance-mlp")
    for _ in range(4):
        service.embed("finance-mlp", texts)
    after = service.samples("gateway", adapter="finance-mlp"), service.samples("replica", adapter="finance-mlp")

    def grown(process: int, name: str) -> float:
        return after[process][name] - before[process].get(name, 0.0)

    assert grown(0, "ranklet_requests_total") == 4
    assert grown(0, "ranklet_request_seconds_count") == 4
    assert grown(1, "ranklet_prompts_total") == 12
    assert grown(1, "ranklet_tokens_total") == 4 * sum(len(encode(service.model_dir, text)) for text in texts)


def test_choices_of_the_router_are_counted(service: Service) -> None:
    """On an idle cluster, every request goes to the replica that has reported its adapter."""

    def growth(requests: int) -> dict[str, float]:
        before = service.samples("gateway")
        for _ in range(requests):
            service.embed("medical", ["a"])
        after = service.samples("gateway")
        choices = {name: after[f"ranklet_{name}_total"] - before[f"ranklet_{name}_total"] for name in names}
        assert choices["affinity_hits"] + choices["affinity_misses"] == requests
        return choices

    names = ("affinity_hits", "affinity_misses", "spills")
    eventually("a replica has reported the adapter", lambda: growth(1)["affinity_hits"] == 1)
    assert growth(5) == {"affinity_hits": 5, "affinity_misses": 0, "spills": 0}


def test_refusals_are_counted_by_status_and_code(service: Service) -> None:
    labels = {"status": "404", "code": "model_not_found", "adapter": "unknown"}
    before = service.samples("gateway", **labels).get("ranklet_requests_total", 0.0)
    for number in range(3):
        service.post(f"never-heard-of-{number}", "a")
    assert service.samples("gateway", **labels)["ranklet_requests_total"] == before + 3


def test_batches_add_up(service: Service) -> None:
    for model in (BASE, "legal-v2"):
        service.embed(model, ["a", "b"])
    samples = service.samples("replica")
    assert samples["ranklet_batches_total"] == samples["ranklet_batch_tokens_count"]
    assert samples["ranklet_batch_tokens_sum"] == samples["ranklet_tokens_total"]
    assert samples["ranklet_queue_wait_seconds_count"] == samples["ranklet_prompts_total"]
    assert samples["ranklet_waiting_requests"] == 0
    assert samples["ranklet_pool_bytes"] > 0


def test_resident_adapters_are_exported_under_vllms_names(service: Service) -> None:
    service.embed("medical", "a")
    assert service.samples("replica", adapter_name="medical", level="gpu", rank="16")["vllm:lora_adapter_loaded"] >= 1
    assert service.samples("replica", max_lora="8", waiting_lora_adapters="")["vllm:lora_requests_info"] > 1e9


def test_every_series_is_well_formed_and_bounded(service: Service) -> None:
    for group in service.targets():
        text = httpx.get(f"http://{group['targets'][0]}/metrics", trust_env=False).text
        families = list(text_string_to_metric_families(text))
        assert all(family.name.startswith(("ranklet_", "vllm:", "process_")) for family in families)
        assert all(family.documentation for family in families)
        assert sum(len(family.samples) for family in families) < 1000

"""The Grafana board as code. `python deploy/grafana/board.py` writes dashboards/ranklet.json, which Grafana reads."""

from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, timeseries
from grafana_foundation_sdk.builders import prometheus as queries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

JSON = Path(__file__).with_name("dashboards") / "ranklet.json"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
_WIDTH, _HEIGHT = 24, 7


@dataclass(frozen=True)
class Panel:
    """One graph. `exprs` maps each legend to its query; `{{label}}` in a legend shows the label's value."""

    title: str
    unit: str  # Grafana's: reqps, s, percentunit, bytes, short, ...
    exprs: dict[str, str]
    description: str = ""


def _quantiles(metric: str, by: str = "") -> dict[str, str]:
    grouped = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return {
        f"p{round(100 * q)}{legend}": (
            f"histogram_quantile({q}, sum by ({grouped}) (rate({metric}_bucket[$__rate_interval])))"
        )
        for q in (0.5, 0.95, 0.99)
    }


def _rate(metric: str, by: str = "", where: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{where}[$__rate_interval]))"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Cluster": (
        Panel("Requests", "reqps", {"all": _rate("ranklet_requests_total")}),
        Panel("Prompts", "ops", {"all": _rate("ranklet_prompts_total")}),
        Panel("Tokens", "ops", {
            "of prompts": _rate("ranklet_tokens_total"), "generated": _rate("ranklet_generated_tokens_total"),
        }),
        Panel("Latency", "s", _quantiles("ranklet_request_seconds"), "From the headers of a request to its embeddings"),
        Panel("Refusals, by code", "reqps", {"{{code}}": _rate("ranklet_requests_total", "code", '{code!=""}')}),
        Panel("Up", "short", {"{{role}}s": 'count by (role) (up{job="ranklet"} == 1)'}),
        Panel("Refused settings", "short", {
            "{{setting}} of {{role}}s": "sum by (role, setting) (ranklet_setting_refused)",
        }, "Processes that refused the newest content: see RankletSettingRefused"),
    ),
    "Text": (
        Panel("Time to first token", "s", _quantiles("ranklet_text_first_token_seconds"),
              "From the headers of a streamed request to its first token"),
        Panel("Time between tokens", "s", _quantiles("ranklet_text_token_gap_seconds"), "As they arrive at a gateway"),
        Panel("Time of a text", "s", _quantiles("ranklet_text_duration_seconds"), "From the headers to the end"),
        Panel("Generated tokens", "ops", {
            "{{adapter}}": f"topk(20, {_rate('ranklet_generated_tokens_total', 'adapter')})"
        }),
        Panel("Prompt tokens", "ops", {
            "of texts": _rate("ranklet_text_prompt_tokens_total"),
            "found in the prefix cache": _rate("ranklet_prefix_cache_shared_tokens_total"),
        }),
        Panel(
            "p99 of the time to first token", "s",
            {"{{adapter}}": "topk(20, histogram_quantile(0.99, sum by (le, adapter) "
             "(rate(ranklet_text_first_token_seconds_bucket[$__rate_interval])) ))"},
        ),
        Panel("Sequences", "short", {
            "running": "sum (ranklet_running_sequences)", "waiting": "sum (ranklet_waiting_sequences)",
        }, "Choices of texts, and prompts for embeddings. Those that wait need pages, a row or their turn"),
        Panel("Pages of keys and values", "short", {"{{state}}": "sum by (state) (ranklet_kv_pages)"}),
        Panel("Tokens found in the prefix cache", "percentunit", {
            "{{replica}}": f"{_rate('ranklet_prefix_cache_shared_tokens_total', 'replica')} / "
            f"({_rate('ranklet_prefix_cache_asked_tokens_total', 'replica')} > 0)"
        }),
        Panel("Preemptions", "ops", {"{{replica}}": _rate("ranklet_preemptions_total", "replica")},
              "Sequences that lost their pages and are computed again: see RankletPreemptions"),
        Panel("Ended early", "ops", {"{{reason}}": _rate("ranklet_text_cancelled_total", "reason")}),
        Panel("Finish reasons", "ops", {"{{reason}}": _rate("ranklet_text_choices_total", "reason")}),
    ),
    "Adapters": (
        Panel("Requests", "reqps", {"{{adapter}}": f"topk(20, {_rate('ranklet_requests_total', 'adapter')})"}),
        Panel("Tokens", "ops", {"{{adapter}}": f"topk(20, {_rate('ranklet_tokens_total', 'adapter')})"}),
        Panel(
            "p99 latency", "s",
            {"{{adapter}}": "topk(20, histogram_quantile(0.99, sum by (le, adapter) "
             "(rate(ranklet_request_seconds_bucket[$__rate_interval])) ))"},
        ),
    ),
    "Affinity and loading": (
        Panel(
            "Sent to where the adapter is", "percentunit",
            {"of all": f"{_rate('ranklet_affinity_hits_total')} / ({_rate('ranklet_affinity_hits_total')} + "
             f"{_rate('ranklet_affinity_misses_total')} > 0)"},
        ),
        Panel("Found in", "percentunit", {
            "{{tier}}": f"{_rate('ranklet_tier_hits_total', 'tier')} / ignoring (tier) group_left () "
            f"({_rate('ranklet_tier_hits_total')} > 0)"
        }),
        Panel("Sent away from home", "reqps", {"{{reason}}": _rate("ranklet_spills_total", "reason")}),
        Panel("Loads", "ops", {"{{tier}}, {{outcome}}": _rate("ranklet_adapter_loads_total", "tier, outcome")}),
        Panel("Load time", "s", _quantiles("ranklet_adapter_load_seconds", "tier")),
        Panel("Evictions", "ops", {"{{replica}}": _rate("ranklet_adapter_evictions_total", "replica")},
              "More than a few per second, for minutes: too few slots"),
    ),
    "Replicas": (
        Panel("Tokens", "ops", {"{{replica}}": _rate("ranklet_tokens_total", "replica")}),
        Panel("Device busy", "percentunit", {"{{replica}}": _rate("ranklet_device_busy_seconds_total", "replica")}),
        Panel("Waiting tokens", "short", {"{{replica}}": "sum by (replica) (ranklet_waiting_tokens)"}),
        Panel("Queue wait", "s", _quantiles("ranklet_queue_wait_seconds")),
        Panel("Requests in gateways", "short", {"{{replica}}": "sum by (replica) (ranklet_requests_in_flight)"}),
        Panel("Repeated, dropped, over quota", "ops", {
            "repeated elsewhere": _rate("ranklet_retries_total"),
            "of these, texts continued": _rate("ranklet_continuations_total"),
            "client gone": _rate("ranklet_client_gone_total"),
            "over the {{by}}'s quota": _rate("ranklet_quota_rejections_total", "by"),
        }),
    ),
    "Memory": (
        Panel("Adapter pools", "bytes", {"{{replica}} {{pool}}": "sum by (replica, pool) (ranklet_pool_bytes)"}),
        Panel("Slots in use", "percentunit", {
            "{{replica}}": "sum by (replica) (ranklet_resident_adapters) / sum by (replica) (ranklet_slots)"
        }),
        Panel("Processes", "bytes", {
            "{{role}} {{replica}}": 'process_resident_memory_bytes{job="ranklet"}',
            "engine {{replica}}": 'ranklet_engine_process_resident_memory_bytes{job="ranklet"}',
        }),
    ),
    "Kernels": (
        Panel("Batches, by LoRA backend", "ops", {"{{backend}}": _rate("ranklet_batches_total", "backend")}),
        Panel("Time of a batch", "s", _quantiles("ranklet_batch_compute_seconds", "backend")),
        Panel("Tokens in a batch", "short", _quantiles("ranklet_batch_tokens")),
        Panel("Adapters in a batch", "short", _quantiles("ranklet_batch_adapters")),
    ),
}  # fmt: skip


def board() -> str:
    """Return the board in Grafana's JSON."""
    built = (
        dashboard.Dashboard("ranklet")
        .uid("ranklet")
        .tags(["ranklet", "lora"])
        .refresh("10s")
        .time("now-30m", "now")
        .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
    )
    for title, panels in ROWS.items():
        built = built.with_row(dashboard.Row(title))
        for panel in panels:
            built = built.with_panel(_build_panel(panel))
    encoded: str = JSONEncoder(sort_keys=True, indent=1).encode(built.build())
    return encoded + "\n"


def _build_panel(panel: Panel) -> timeseries.Panel:
    built = timeseries.Panel().title(panel.title).unit(panel.unit).datasource(_SOURCE).min(0)
    built = built.description(panel.description).span(_WIDTH // 3).height(_HEIGHT)
    for legend, expr in panel.exprs.items():
        built = built.with_target(queries.Dataquery().expr(expr).legend_format(legend).datasource(_SOURCE))
    return built


if __name__ == "__main__":
    JSON.parent.mkdir(exist_ok=True)
    JSON.write_text(board())

"""Columns of the tables of tests/bench/results/README.md: headings, and how values are written."""

from collections.abc import Callable
from typing import Any

Column = Callable[[Any], str]


def number(digits: int = 0, scale: float = 1.0, unit: str = "") -> Column:
    return lambda value: "" if value in ("", None) else f"{value * scale:,.{digits}f}{unit}"


def failures(by_code: dict[str, int]) -> str:
    return str(sum(by_code.values()))


COUNT, MS, RATIO, PERCENT, TEXT = number(), number(1), number(2), number(0, 100.0, " %"), str
FINE_MS, NATS, EXACT_PERCENT = number(3), number(4), number(2, 100.0, " %")
RUN: dict[str, tuple[str, Column]] = {
    "prompts": ("prompts x tokens", TEXT), "adapters": ("adapters", TEXT), "backend": ("backend", TEXT),
    "tokens_per_s": ("tokens/s", COUNT),
}  # fmt: skip
HTTP: dict[str, tuple[str, Column]] = {
    "work": ("prompts x tokens", TEXT), "tokens_per_s": ("tokens/s", COUNT),
    "of the engine alone": ("of the engine's throughput", RATIO), "device busy": ("GPU busy", PERCENT),
    "p50_ms": ("p50 ms", COUNT), "p99_ms": ("p99 ms", COUNT),
}  # fmt: skip
CLUSTER: dict[str, tuple[str, Column]] = {
    "replicas": ("GPUs", TEXT), "work": ("work", TEXT), "tokens_per_s": ("tokens/s", COUNT),
    "of one replica": ("all GPUs / one GPU", RATIO), "of 64 adapters": ("of the rate with 64 adapters", RATIO),
    "least busy": ("least busy GPU", PERCENT), "busiest": ("busiest GPU", PERCENT),
    "found on the device": ("adapter in a slot", PERCENT),
}  # fmt: skip
FIDELITY: dict[str, tuple[str, Column]] = {
    "backend": ("backend", TEXT), "adapter": ("adapter", TEXT), "least cosine": ("least cosine", TEXT),
}  # fmt: skip
SOAK: dict[str, tuple[str, Column]] = {
    "answers": ("answers", COUNT), "failed": ("failed", failures), "median cosine": ("median cosine", TEXT),
    "least cosine": ("least cosine", TEXT), "tokens_per_s": ("tokens/s", COUNT),
}  # fmt: skip
FAIR: dict[str, tuple[str, Column]] = {
    "flood": ("flood", TEXT), "tokens": ("tokens", TEXT), "batch_tokens": ("tokens of a batch", COUNT),
    "p50_ms": ("p50 ms", COUNT), "p99_ms": ("p99 ms", COUNT), "p99_ratio": ("p99, times without flood", RATIO),
}  # fmt: skip
FAIR_TEXTS: dict[str, tuple[str, Column]] = {
    "share": ("the 17 are", TEXT), "steady": ("steady", TEXT), "flood": ("flood", TEXT),
    "wait_p99_ms": ("first token or vector p99 ms", COUNT), "wait ratio": ("p99, times without flood", RATIO),
    "gap_p99_ms": ("gap p99 ms", MS), "gap p99 ratio": ("gap p99, times without flood", RATIO),
}  # fmt: skip
HOT_TEXTS: dict[str, tuple[str, Column]] = {
    "work": ("requested", TEXT), "in flight": ("in flight", COUNT), "start together": ("start together", TEXT),
    "requests from one adapter": ("requests from one adapter", PERCENT), "running": ("texts at once", COUNT),
    "tokens_per_s": ("generated tokens/s", COUNT), "rate ratio": ("times evenly requested", RATIO),
    "gap_p50_ms": ("gap p50 ms", MS), "first_p50_ms": ("first token p50 ms", COUNT),
    "first_p99_ms": ("p99 ms", COUNT),
}  # fmt: skip
SYSTEM_PROMPTS: dict[str, tuple[str, Column]] = {
    "run": ("run", COUNT), "half": ("half of the requests", TEXT), "tokens_per_s": ("generated tokens/s", COUNT),
    "cached share": ("of the prompts from the cache", EXACT_PERCENT), "first_p50_ms": ("first token p50 ms", COUNT),
    "gap_p50_ms": ("gap p50 ms", MS),
}  # fmt: skip
SYSTEM_PROMPTS_P99 = SYSTEM_PROMPTS | {"first_p99_ms": ("first token p99 ms", COUNT)}
COMPARED: dict[str, tuple[str, Column]] = {
    "benchmark": ("benchmark", TEXT), "work": ("work", TEXT), "measured": ("measured", TEXT),
    "runs before": ("runs before", TEXT), "runs after": ("runs after", TEXT),
    "gain": ("after / before, more is better", RATIO),
}  # fmt: skip
RULES: dict[str, tuple[str, Column]] = {
    "case": ("case", TEXT), "rule": ("rule", TEXT), "hit rate": ("adapter in a slot", EXACT_PERCENT),
    "p50_ms": ("p50 wait ms", MS), "p99_ms": ("p99 wait ms", MS), "mean_ms": ("mean wait ms", MS),
    "loads_per_s": ("loads/s", COUNT),
}  # fmt: skip
CHOICES: dict[str, tuple[str, Column]] = {
    "replicas": ("replicas", COUNT), "adapters": ("adapters", COUNT), "choose_us": ("mean us", COUNT),
    "choose_p50_us": ("p50 us", COUNT), "choose_p99_us": ("p99 us", COUNT),
}  # fmt: skip
TOKEN_ROWS: dict[str, tuple[str, Column]] = {
    "adapters": ("adapters", TEXT), "slot_mb": ("memory of a slot MB", MS), "slot_share": ("of plain", RATIO),
    "disk_ms": ("load from disk ms", MS), "disk_share": ("of plain from disk", RATIO),
    "host_ms": ("load from the host ms", FINE_MS), "host_share": ("of plain from the host", RATIO),
}  # fmt: skip
TEXT_CHOICES = CHOICES | {
    "embedding_us": ("for an embedding: mean us", COUNT), "embedding_p50_us": ("for an embedding: p50 us", COUNT),
    "p50 by embedding": ("p50 by that of embeddings", RATIO),
}  # fmt: skip
TEXT_RULES: dict[str, tuple[str, Column]] = {
    "rule": ("rule", TEXT), "first_p50_ms": ("p50 first token ms", MS), "first_p99_ms": ("p99 first token ms", MS),
    "gap_p50_ms": ("p50 gap ms", MS), "gap_p99_ms": ("p99 gap ms", MS), "goodput_per_s": ("goodput texts/s", COUNT),
    "adapter hits": ("adapter in a slot", PERCENT), "prefix hits": ("prompt tokens from the cache", PERCENT),
    "of one cache": ("of those of one infinite cache", PERCENT), "busiest / mean": ("busiest / mean replica", RATIO),
    "preemptions": ("preemptions", COUNT),
}  # fmt: skip
TEXT_RULES_BY_CASE: dict[str, tuple[str, Column]] = {"case": ("case", TEXT)} | TEXT_RULES
GENERATED: dict[str, tuple[str, Column]] = {
    "shapes": ("shapes", TEXT), "work": ("requests x prompt/output", TEXT), "adapters": ("adapters", COUNT),
    "tokens_per_s": ("generated tokens/s", COUNT), "must": ("target tokens/s", COUNT),
    "peer": ("vLLM 0.26.0 tokens/s", COUNT), "step_ms": ("median step ms", FINE_MS),
    "first_p50_ms": ("median first token ms", COUNT),
}  # fmt: skip
GENERATED_FEW = GENERATED | {"first_p50_ms": ("median first token ms", MS)}
LOGPROBS: dict[str, tuple[str, Column]] = {
    "model": ("model", TEXT), "adapter": ("adapter", TEXT), "prefill": ("as a prompt", NATS),
    "decode": ("as generated", NATS), "self": ("between these two", NATS),
    "transformers": ("transformers + PEFT in bf16", NATS),
}  # fmt: skip
TEXT_CLUSTER: dict[str, tuple[str, Column]] = {
    "replicas": ("GPUs", COUNT), "work": ("work", TEXT), "settled tokens_per_s": ("generated tokens/s", COUNT),
    "settled of one replica": ("of one GPU", RATIO), "tokens_per_s": ("in the whole run", COUNT),
    "of one replica": ("of one GPU in the whole run", RATIO), "embedding tokens_per_s": ("embeddings tokens/s", COUNT),
    "gap_p50_ms": ("gap p50 ms", MS), "failed": ("failed", TEXT), "least busy": ("least busy", PERCENT),
}  # fmt: skip
TEXT_CLUSTER_CACHED: dict[str, tuple[str, Column]] = TEXT_CLUSTER | {
    "of one cache": ("from caches, of one cache", RATIO), "of texts": ("of `texts`", RATIO),
}  # fmt: skip
TEXT_CLUSTER_CORES: dict[str, tuple[str, Column]] = TEXT_CLUSTER_CACHED | {
    "busy cores": ("busy cores", RATIO), "stolen cores": ("stolen cores", RATIO),
}  # fmt: skip
BUCKETS: dict[str, tuple[str, Column]] = {
    "batch": ("prompts x tokens", TEXT), "adapters": ("adapters", COUNT), "launched_ms": ("launched ms", MS),
    "exact_ms": ("own graph ms", MS), "bucket_ms": ("bucket's graph ms", MS),
    "bucket_device_ms": ("of it on the device ms", MS),
}  # fmt: skip
BUCKETS_TRAFFIC: dict[str, tuple[str, Column]] = {
    "batch": ("batch", TEXT), "graphs": ("graphs", COUNT), "ms": ("mean ms", MS),
    "later_p50_ms": ("p50 of the second half ms", MS), "later_p99_ms": ("p99 ms", MS),
    "capture_ms": ("capture of a graph ms", MS), "reserved_mib": ("memory reserved MiB", COUNT),
}  # fmt: skip
LOADS: dict[str, tuple[str, Column]] = {
    "beside": ("other traffic", TEXT), "tier": ("adapter in", TEXT), "adapter_MB": ("adapter MB", COUNT),
    "p50_ms": ("p50 ms", MS), "p99_ms": ("p99 ms", MS), "start_s": ("start of the engine s", MS),
}  # fmt: skip
STREAM_FAULTS: dict[str, tuple[str, Column]] = {
    "fault": ("fault", TEXT), "streams": ("streams", COUNT), "right": ("right", COUNT), "wrong": ("wrong", COUNT),
    "failed": ("failed", COUNT), "continued": ("calls continued", COUNT),
    "longest_pause_s": ("longest pause s", number(2)), "took_s": ("until all is replaced s", COUNT),
}  # fmt: skip
THRASH: dict[str, tuple[str, Column]] = {
    "adapters": ("adapters", TEXT), "slots": ("slots", TEXT), "tokens_per_s": ("tokens/s", COUNT),
    "of all resident": ("of the rate with 64 adapters", RATIO), "loads_per_s": ("loads/s", COUNT),
}  # fmt: skip
RERANK: dict[str, tuple[str, Column]] = {
    "documents": ("requests x documents x tokens", TEXT), "dtype": ("dtype", TEXT),
    "embeddings_tokens_per_s": ("embeddings tokens/s", COUNT), "rerank_tokens_per_s": ("reranking tokens/s", COUNT),
    "rerank/embeddings": ("of the rate of embeddings", RATIO),
    "most score difference": ("largest difference of a score", NATS),
    "of transformers in this dtype": ("that of transformers", NATS),
}  # fmt: skip
TEXT_HTTP: dict[str, tuple[str, Column]] = {
    "work": ("requests x prompt/output", TEXT), "gateways": ("gateways", COUNT),
    "tokens_per_s": ("generated tokens/s", COUNT), "engine tokens_per_s": ("the engine alone", COUNT),
    "of the engine": ("of the engine", RATIO), "failed": ("failed", failures),
}  # fmt: skip
TEXT_SOAK: dict[str, tuple[str, Column]] = {
    "texts": ("texts", COUNT), "embeddings": ("embeddings", COUNT), "failed": ("failed", failures),
    "left": ("clients that left", COUNT), "replaced": ("adapters replaced", COUNT),
    "preempted": ("preempted", COUNT), "tokens compared": ("tokens compared", COUNT),
    "largest difference": ("largest difference of logprobs", number(4)), "p99 difference": ("p99", number(4)),
    "mean difference": ("mean", number(4)),
}  # fmt: skip
GRAMMAR: dict[str, tuple[str, Column]] = {
    "what": ("what", TEXT), "tokens_per_s": ("generated tokens/s", COUNT),
    "of none": ("of the rate without grammars", RATIO), "must": ("target", TEXT),
    "gap of none": ("gap of the others, of that without", RATIO), "p50_ms": ("p50 ms", MS), "p99_ms": ("p99 ms", MS),
}  # fmt: skip
DECODE_STEP: dict[str, tuple[str, Column]] = {
    "shapes": ("shapes", TEXT), "batch": ("requests", COUNT), "context": ("context", COUNT),
    "adapters": ("adapters", COUNT), "ms": ("ms", FINE_MS),
    "floor_ms": ("time to read each byte once ms", FINE_MS), "of base": ("of the step without LoRA", RATIO),
    "tokens_per_s": ("tokens/s", COUNT),
}  # fmt: skip
DECODE_ATTENTION: dict[str, tuple[str, Column]] = {
    "model": ("heads of", TEXT), "what": ("sequences x tokens", TEXT), "us": ("us", COUNT),
    "rate": ("of the rate of a copy", RATIO),
}  # fmt: skip
SHARED_ATTENTION: dict[str, tuple[str, Column]] = {
    "model": ("heads of", TEXT), "what": ("sequences x tokens, system prompts", TEXT),
    "us": ("in groups us", COUNT), "alone_us": ("each alone us", COUNT),
    "rate": ("of the rate of a copy of each page once", RATIO),
}  # fmt: skip
PREFILL_ATTENTION: dict[str, tuple[str, Column]] = {
    "model": ("heads of", TEXT), "what": ("pieces x tokens behind tokens in pages", TEXT), "us": ("us", COUNT),
    "rate": ("TFLOP/s", COUNT),
}  # fmt: skip
COMMON_BEGINNING: dict[str, tuple[str, Column]] = {
    "work": ("requests x prompt/output", TEXT), "adapters": ("adapters", COUNT),
    "prefix_cache": ("prefix cache", TEXT), "cached share": ("prompt tokens from the cache", PERCENT),
    "tokens_per_s": ("generated tokens/s", COUNT), "ratio": ("of the rate without", RATIO),
}  # fmt: skip
GAPS: dict[str, tuple[str, Column]] = {
    "beside": ("other work", TEXT), "p50_ms": ("p50 ms", MS), "p99_ms": ("p99 ms", MS),
    "max_ms": ("longest ms", COUNT), "p99 ratio": ("p99, times the median without", RATIO),
    "tokens_per_s": ("generated tokens/s", COUNT), "long prompt tokens_per_s": ("long prompts tokens/s", COUNT),
    "embedding tokens_per_s": ("embeddings tokens/s", COUNT),
}  # fmt: skip

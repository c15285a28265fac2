"""The tables of tests/bench/results/README.md: which columns and rows of each result file it shows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.bench import notes
from tests.bench.columns import (
    BUCKETS,
    BUCKETS_TRAFFIC,
    CHOICES,
    CLUSTER,
    COMMON_BEGINNING,
    COMPARED,
    COUNT,
    DECODE_ATTENTION,
    DECODE_STEP,
    EXACT_PERCENT,
    FAIR,
    FAIR_TEXTS,
    FIDELITY,
    FINE_MS,
    GAPS,
    GENERATED,
    GENERATED_FEW,
    GRAMMAR,
    HOT_TEXTS,
    HTTP,
    LOADS,
    LOGPROBS,
    MS,
    PERCENT,
    PREFILL_ATTENTION,
    RATIO,
    RERANK,
    RULES,
    RUN,
    SHARED_ATTENTION,
    SOAK,
    STREAM_FAULTS,
    SYSTEM_PROMPTS,
    SYSTEM_PROMPTS_P99,
    TEXT,
    TEXT_CHOICES,
    TEXT_CLUSTER,
    TEXT_CLUSTER_CACHED,
    TEXT_CLUSTER_CORES,
    TEXT_HTTP,
    TEXT_RULES,
    TEXT_RULES_BY_CASE,
    TEXT_SOAK,
    THRASH,
    TOKEN_ROWS,
    Column,
    number,
)


@dataclass(frozen=True)
class ResultTable:
    """One section of the page: a result file, its columns with headings and formats, and the rows to leave out."""

    title: str
    file: str
    columns: dict[str, tuple[str, Column]]
    without: Callable[[dict[str, Any]], bool] = lambda row: False
    note: str = ""  # a paragraph above the table


def _is_sample(row: dict[str, Any]) -> bool:
    return bool(row["minute"] != "all")


TABLES = (
    ResultTable("Throughput of the engine", "engine-h200", RUN, note=notes.ENGINE_NOTE),
    ResultTable("Throughput of the engine, an earlier commit with `backend: fastest`", "engine-h200-fastest", RUN),
    ResultTable("Throughput of the engine, an earlier commit with `backend: native`", "engine-h200-native", RUN),
    ResultTable(
        "Latency of the engine, one prompt at a time", "engine-h200-alone",
        {"prompt tokens": ("tokens", TEXT), "adapters": ("adapters", TEXT), "p50_ms": ("p50 ms", MS),
         "p99_ms": ("p99 ms", MS)},
    ),
    ResultTable(
        "One step that makes one token a request, rank-16 adapters on all seven projections", "decode-step-h200",
        DECODE_STEP,
    ),
    ResultTable(
        "Attention of one new token of each sequence over pages, 128-wide heads", "attention-h200",
        DECODE_ATTENTION,
        lambda row: row["part"] != "decode",
    ),
    ResultTable(
        "The same for sequences that begin with one of some system prompts", "attention-h200",
        SHARED_ATTENTION,
        lambda row: row["part"] != "shared", notes.SHARED_ATTENTION_NOTE,
    ),
    ResultTable(
        "Attention of pieces of prompts over pages, 128-wide heads", "attention-h200",
        PREFILL_ATTENTION,
        lambda row: row["part"] != "prefill", notes.ATTENTION_NOTE,
    ),
    ResultTable(
        "Generated text, requests x tokens of prompt/output, rank-16 adapters on all seven projections",
        "generate-h200", GENERATED, note=notes.GENERATE_NOTE,
    ),
    ResultTable("One text and 16 texts at once", "generate-h200-short", GENERATED_FEW),
    ResultTable("The same, before `RowDecoder` computed prompts", "generate-h200-short-before", GENERATED_FEW),
    ResultTable("Generated text, Llama-3.1-8B", "generate-8b-h200", GENERATED, note=notes.GENERATE_8B_NOTE),
    ResultTable(
        "Prompts with a common beginning", "generate-h200-shared",
        COMMON_BEGINNING,
    ),
    ResultTable(
        "Gaps between the tokens of 64 texts beside other work", "generate-h200-gaps",
        GAPS,
        note=notes.GAPS_NOTE,
    ),
    ResultTable(
        "Generated text over HTTP", "text-http-h200", TEXT_HTTP, note=notes.TEXT_HTTP_NOTE,
    ),
    ResultTable(
        "The same with fewer gateways, an hour before on another host", "text-http-h200-gateways", TEXT_HTTP
    ),
    ResultTable(
        "CPU time of a token, us", "text-http-h200",
        {"work": ("requests x prompt/output", TEXT), "gateways": ("gateways", COUNT),
         **{f"{name} us": (name, number(1)) for name in ("gateway", "actor", "engine", "haproxy", "client")},
         "gateway busiest": ("busiest gateway, of a core", PERCENT), "device busy": ("device busy", PERCENT)},
    ),
    ResultTable(
        "Time to the first token, and what HTTP, Ray and gateways add", "text-http-h200-first",
        {"load": ("load", TEXT), "gateways": ("gateways", COUNT), "client p50_ms": ("p50 ms", MS),
         **{f"added p{p}_ms": (f"added p{p} ms", MS) for p in (50, 90, 99)}, "must": ("target ms", TEXT)},
    ),
    ResultTable(
        "Median gap between the tokens of one text, over HTTP and of the engine", "text-http-h200-gaps",
        {"gateways": ("gateways", COUNT), "gap_p50_ms": ("ms", FINE_MS), "engine gap_p50_ms": ("engine ms", FINE_MS),
         "added ms": ("added ms", FINE_MS)},
    ),
    ResultTable(
        "Largest differences of logprobs of generated text to transformers + PEFT in float32", "fidelity-text-h200",
        LOGPROBS, note=notes.FIDELITY_TEXT_NOTE,
    ),
    ResultTable(
        "The same of a model with trained weights", "fidelity-text-smollm-h200", LOGPROBS,
        note=notes.FIDELITY_SMOLLM_NOTE,
    ),
    ResultTable("Texts with grammars among others on one engine", "grammar-h200", GRAMMAR, note=notes.GRAMMAR_NOTE),
    ResultTable(
        "DoRA beside plain LoRA", "dora-h200",
        {"adapters": ("adapters", TEXT), "tokens": ("tokens of a prompt", COUNT), "tokens_per_s": ("tokens/s", COUNT),
         "share": ("of the rate of plain LoRA", RATIO)},
        note=notes.DORA_NOTE,
    ),
    ResultTable(
        "Reranking with one adapter", "rerank-h200", RERANK, note=notes.RERANK_NOTE,
    ),
    ResultTable("The same in float32", "rerank-h200-float32", RERANK),
    ResultTable(
        "Slots and loads of adapters with trained tokens", "token-rows-h200", TOKEN_ROWS, note=notes.TOKEN_ROWS_NOTE
    ),
    ResultTable("Over HTTP: HAProxy, 8 gateways and one replica", "http-h200", HTTP),
    ResultTable("Over HTTP with 16 gateways", "http-h200-512", HTTP),
    ResultTable("Over HTTP with 8 processes of the load client", "http-h200-p8", HTTP),
    ResultTable("Over HTTP before files moved into the folders of 2026-11-26", "http-h200-before", HTTP),
    ResultTable("Over HTTP after files moved, on the same machine in the same hour", "http-h200-after", HTTP),
    ResultTable(
        "Engine and loads before and after files moved, medians of three and of two runs in turn", "compare-h200",
        COMPARED,
    ),
    ResultTable("CPU time of one routing decision before and after, six runs in turn", "compare-policy", COMPARED),
    ResultTable("Two GPUs behind one app, 128 adapters on 64 slots of each GPU", "cluster-2xh200", CLUSTER),
    ResultTable(
        "Texts on two GPUs behind one app and on one of them, prompts of 512 tokens, 256 generated",
        "text-cluster-2xh200", TEXT_CLUSTER_CORES, note=notes.TEXT_CLUSTER_NOTE,
    ),
    ResultTable(
        "Texts of 126 to 384 tokens, two works", "text-cluster-2xh200-lengths", TEXT_CLUSTER_CORES,
        note=notes.TEXT_CLUSTER_LENGTHS_NOTE,
    ),
    ResultTable(
        "Equal texts again on another machine, cut off before its last row", "text-cluster-2xh200-again",
        TEXT_CLUSTER_CORES,
    ),
    ResultTable("Texts beside embeddings on a third machine", "text-cluster-2xh200-beside", TEXT_CLUSTER_CORES),
    ResultTable(
        "The same on another machine, the lowest ratios of all runs", "text-cluster-2xh200-lowest", TEXT_CLUSTER_CACHED,
        note=notes.TEXT_CLUSTER_LOWEST_NOTE,
    ),
    ResultTable(
        "All works, before attention read common pages once", "text-cluster-2xh200-before", TEXT_CLUSTER_CACHED,
        note=notes.TEXT_CLUSTER_BEFORE_NOTE,
    ),
    ResultTable(
        "Longer runs of two works at an earlier commit", "text-cluster-2xh200-settled", TEXT_CLUSTER,
        note=notes.TEXT_CLUSTER_SETTLED_NOTE,
    ),
    ResultTable(
        "Texts with system prompts of 64 adapters on one engine", "system-prompts-h200", SYSTEM_PROMPTS_P99,
        note=notes.SYSTEM_PROMPTS_NOTE,
    ),
    ResultTable(
        "The same at an earlier commit", "system-prompts-h200-before", SYSTEM_PROMPTS,
        note=notes.SYSTEM_PROMPTS_BEFORE_NOTE,
    ),
    ResultTable("The same of 32 adapters on a CPU, the same commit", "system-prompts-cpu-before", SYSTEM_PROMPTS_P99),
    ResultTable("The same on a CPU after it, in the same hour", "system-prompts-cpu", SYSTEM_PROMPTS_P99),
    ResultTable("Four GPUs behind one app, an earlier commit, 256 adapters, 64 slots each", "cluster-4xh200", CLUSTER),
    ResultTable("More adapters than slots on one engine", "thrash-h200", THRASH),
    ResultTable("64 and 128 adapters on 64 slots in turn", "thrash-h200-five", THRASH, note=notes.THRASH_NOTE),
    ResultTable(
        "One batch launched kernel by kernel, from a graph of its lengths, and from its bucket's graph",
        "buckets-h200-fixed", BUCKETS,
    ),
    ResultTable(
        "Random batches of up to 2,000 tokens each prompt, without graphs and with those of buckets",
        "buckets-h200-traffic", BUCKETS_TRAFFIC,
    ),
    ResultTable(
        "First answer for an adapter on all seven projections", "loads-h200", LOADS,
    ),
    ResultTable("Cosine to transformers + PEFT in float32, bf16 on the GPU", "fidelity-h200", FIDELITY),
    ResultTable("Cosine to transformers + PEFT in float32, float32 on a CPU", "fidelity-cpu-float32", FIDELITY),
    ResultTable("Six minutes at saturation: 1-8192 tokens, 80 adapters on 64 slots", "soak-h200", SOAK, _is_sample),
    ResultTable("Three and a half minutes at saturation", "soak-h200-memory", SOAK, _is_sample),
    ResultTable(
        "Eight minutes at saturation: texts and embeddings, 80 adapters on 64 slots", "text-soak-h200",
        TEXT_SOAK, _is_sample, notes.TEXT_SOAK_NOTE,
    ),
    ResultTable("Four minutes at saturation on a CPU, 6 adapters on 4 slots", "soak-cpu", SOAK, _is_sample),
    ResultTable(
        "Slots and loads of adapters with trained or added tokens, on a CPU", "token-rows-cpu",
        TOKEN_ROWS | {"first_ms": ("first load ms", MS)}, note=notes.TOKEN_ROWS_CPU_NOTE,
    ),
    ResultTable(
        "Adapters loaded, replaced and unloaded while clients send requests, on a CPU", "churn-cpu",
        {"what": ("what", TEXT), "count": ("count", COUNT)}, lambda row: "count" not in row,
    ),
    ResultTable(
        "Memory during these loads", "churn-cpu",
        {"what": ("what", TEXT), "first": ("first", MS), "last": ("last", MS), "grown": ("growth", EXACT_PERCENT)},
        lambda row: "grown" not in row,
    ),
    ResultTable(
        "Streams while replicas die, hang, drain and change, on a CPU", "stream-faults-cpu",
        STREAM_FAULTS, note=notes.STREAM_FAULTS_NOTE,
    ),
    ResultTable(
        "Random texts that must follow 500 JSON schemas, on a CPU", "grammar-schemas-cpu",
        {"model": ("model", TEXT), "texts": ("texts", COUNT), "valid": ("valid", COUNT),
         "cut": ("cut at the limit", COUNT), "invalid": ("invalid", COUNT)},
        note=notes.GRAMMAR_SCHEMAS_NOTE,
    ),
    ResultTable("A flood on one of 17 adapters, the others at 80 % of the capacity, 6144 tokens", "fair-h200", FAIR),
    ResultTable("A flood on one of 17 adapters, 512 tokens", "fair-h200-512", FAIR),
    ResultTable("A flood on one of 17 adapters, on two CPU cores", "fair-cpu", FAIR),
    ResultTable(
        "A flood beside texts or embeddings of 16 others at 80 % of the capacity, simulated", "fair-texts-simulated",
        FAIR_TEXTS, note=notes.FAIR_TEXTS_NOTE,
    ),
    ResultTable(
        "Texts of 64 adapters, evenly, mostly of one, with system prompts or more than run at once, simulated",
        "hot-texts-simulated", HOT_TEXTS, note=notes.HOT_TEXTS_NOTE,
    ),
    ResultTable(
        "Clients written for OpenAI's API", "clients-cpu",
        {"client": ("client", TEXT), "version": ("version", TEXT), "passed": ("checks passed", COUNT),
         "failed": ("failed", COUNT), "not applicable": ("not applicable", COUNT),
         "refused by name": ("refused by name, as expected", TEXT), "measured": ("measured", TEXT),
         "seconds": ("s", COUNT)},
        note=notes.CLIENTS_NOTE,
    ),
    ResultTable(
        "1,000 adapter folders, on a CPU", "listing-cpu",
        {"path": ("GET", TEXT), "p50_ms": ("p50 ms", MS), "p99_ms": ("p99 ms", MS),
         "registered_s": ("first listing ms", number(0, 1000.0))},
    ),
    ResultTable("CPU time of one routing decision", "policy", CHOICES),
    ResultTable("CPU time of one routing decision for a text, if all replicas are full", "policy-text", TEXT_CHOICES),
    ResultTable(
        "CPU time of the hashes of a prompt's pages", "policy-prefix",
        {"pages": ("pages", COUNT), "hash_us": ("mean us", COUNT), "hash_p50_us": ("p50 us", COUNT)},
    ),
    ResultTable("Routing rules, 1,000 replicas and 10,000 adapters, simulated", "simulate-steady", RULES),
    ResultTable("One adapter suddenly takes 30 % of the traffic, simulated", "simulate-flash", RULES),
    ResultTable("Replicas lost and added, simulated", "simulate-faults", RULES),
    ResultTable("Uniform traffic (replicas x adapters), simulated", "simulate-uniform", RULES),
    ResultTable("Late state reports, 100 replicas and 1,000 adapters, simulated", "simulate-stale", RULES),
    ResultTable(
        "Conversations, 200 replicas and 2,000 adapters, simulated", "simulate-text", TEXT_RULES,
        note=notes.CONVERSATIONS_NOTE,
    ),
    ResultTable(
        "The same conversations, 24 replicas and 240 adapters, simulated", "simulate-text-stress", TEXT_RULES_BY_CASE
    ),
    ResultTable(
        "The same with late reports, and without loads in answers, simulated", "simulate-text-late", TEXT_RULES_BY_CASE
    ),
    ResultTable(
        "LoRA on the projections, rank 64", "kernels-h200",
        {"what": ("adapters x rows", TEXT), "measured": ("added by LoRA ms", FINE_MS), "base": ("base ms", FINE_MS)},
        lambda row: row["unit"] != "ms",
    ),
    ResultTable(
        "Rounding errors of the LoRA backends, and the CPU time of the plan", "kernels-h200",
        {"what": ("what", TEXT), "measured": ("measured", number(4)), "unit": ("unit", TEXT)},
        lambda row: row["unit"] == "ms",
    ),
    ResultTable(
        "Head and sampler in a step of one token a row, an earlier commit", "sampler-h200",
        {"what": ("what", TEXT), "logits": ("logits", TEXT), "rows": ("rows", COUNT), "ms": ("ms", FINE_MS),
         "tokens as on the CPU": ("tokens as on the CPU", TEXT)},
    ),
    ResultTable(
        "Stages of a batch with 4 adapters", "profile-h200",
        {"prompts": ("prompts x tokens", TEXT), "stage": ("stage", TEXT), "ms": ("base ms", FINE_MS),
         "floor_ms": ("roofline floor ms", FINE_MS), "bound": ("bound by", TEXT),
         "lora_ms": ("added by LoRA ms", FINE_MS)},
    ),
)  # fmt: skip

"""Paragraphs above the tables of tests/bench/results/README.md: what the result files do not say."""

GENERATE_NOTE = """\
One engine without a server: greedy, all requests submitted at once, random tokens, no prefix cache. Each number is the
better of two runs, as for vLLM on an H200. A step is the time between two tokens of a text. All targets are reached."""
GENERATE_8B_NOTE = """\
At commit 5391fa9, one run each, weights in the shapes of Llama-3.1-8B; a script around the benchmark noted each step's
size. The targets of one text at a time are reached, the others are missed by 2 to 14 %. With 16 texts, a step takes
4.86 ms, of which reading weights, keys and values takes 4.1. With 256 texts, the layers' products take 6.5 ms of a
step, and would take 6.1 with cuBLAS (`kernels/NOTES.md`); reading keys and values takes 2.3 ms at 288 tokens and 5.1 at
640. Steps with prompts reach 710 TFLOP/s."""
GAPS_NOTE = """\
64 texts of 512 prompt tokens and 1,024 generated ones. The target for p99 is 2.5 times the median without other
work."""
TEXT_HTTP_NOTE = """\
256 texts run at the same time, with 32 adapters of rank 16; the best run counts. The target is 0.92 of the engine. With
fewer gateways, the texts of a burst wait longer for their first token: each passes through one actor, which takes about
0.5 ms. The first token of a request on its own comes 5.7 ms later than in the engine on one host and 6.7 to 8.1 on two
others, of which the target is 6. The engine's own part also differed between these hosts, from 5.2 to 5.9 ms."""
TEXT_SOAK_NOTE = """\
The logprobs that came with sampled tokens, in batches of up to 256 texts and after preemptions, against those of the
same tokens as one prompt, sent alone at the end. In bf16 both differ from float32 by up to 0.031. No page was lost or
held at the end. The GPU's memory grew by 1.1 % from the first minute on, of which 0.3 % in the last three, and the
engine's by 8 % and 2 %. The cause was not measured; it may be CUDA graphs of new sizes, of which 512 are kept."""
ENGINE_NOTE = """\
All prompts are submitted at once by a thread of the same process. In the same call, two runs of this commit and two of
e1bea1a, before text, had 336,857 to 343,072 and 339,918 to 340,822 tokens/s without adapters at 6144 tokens; 504,836,
466,925 and 424,589, 489,610 with four adapters at 512; and 417,340, 386,671 and 504,092, 446,387 at 128. Two runs of
one commit differ more than the commits do, except perhaps in the last."""
FIDELITY_TEXT_NOTE = """\
At commit 2798a18, in bf16, with six prompts of 1 to 1,000 random tokens and 48 generated tokens each. The target for
logprobs of the text as a prompt, 0.016, is missed; that for logprobs that came with the tokens, 0.031, is reached. The
weights are random, so the measure is the last column: the engine is closer to float32 than transformers + PEFT in
bf16."""
FIDELITY_SMOLLM_NOTE = """\
At commit 5391fa9, SmolLM2-135M-Instruct, with trained weights: questions in its chat format and 64 generated tokens
each. The adapters are random. Differences are larger where a token is unlikely, in all of them. The targets of 0.016
and 0.031 are out of the reach of bf16 here; the engine is closer to float32 than transformers + PEFT in bf16. Mean
differences are 0.014 as a prompt, 0.005 as generated, and 0.036 for transformers."""
CLIENTS_NOTE = """\
Published clients, unchanged, against one replica with SmolLM2-135M-Instruct and four trained adapters, in float32 on
a CPU. LangChain's standard tests of tools, structured output, images, sounds and documents do not apply: ranklet
refused tools and structured output by name at that commit, as further checks show. lm-eval's measure is the largest
difference of a log-likelihood to its `hf` model, which is transformers + PEFT, over answers of a few tokens and two
whole texts, for the base and two adapters."""
ATTENTION_NOTE = """\
Keys were cut into splits of at least 256 keys; 512 are kept. With 512, 32 x 512 behind 0 took 171 us for Qwen3-0.6B in
the same call. Times of the other shapes measured with both differ by up to 4 %. The larger bound on partial sums and
the explicit `fma` came later and were not measured."""
SHARED_ATTENTION_NOTE = """\
A program reads a page for up to 16 query heads: for 8 sequences of Qwen3-0.6B and 4 of Llama-3.1-8B. Without a common
beginning, groups cost 2 to 5 us of a layer."""
STREAM_FAULTS_NOTE = """\
At commit 7c1f901. Two replicas and two gateways on one machine, 64 streams at once of the base model and three
adapters, greedy and sampled, with penalties, logprobs and two choices, float32. A stream is right if its tokens, text,
finish reason and usage are those of the same request without faults. A pause is the time between two events of a
stream. A drained replica is stopped 2 s after it gets no new requests. Gateways that a deploy replaces take their
counts along."""
FAIR_TEXTS_NOTE = (
    "The scheduler and the queue of an engine on a simulated device, with the shapes of 0.6B and 256 texts at once: a "
    "step takes the time that the engine's estimate of its cost says, scaled to a measured step of an H200. Steady "
    "requests are prompts of 512 tokens, texts have 64 to 192 tokens, those of the flood 512 to 1,536. A flood of long "
    "answers once took all rows, and texts of others waited for seconds. The 17 are adapters, "
    "or API keys of one adapter."
)

CONVERSATIONS_NOTE = (
    "System prompts of 1,500 tokens, questions of 150 and answers of 200 tokens, four turns on average, adapters by "
    "Zipf's law with exponent 1.1. Replicas with the speed of Qwen3-0.6B's shapes on one H200. The load is 70 % if all "
    "but the questions is cached, as one infinite cache of all replicas would have nearly all of it. Texts count for "
    "the goodput whose first token comes within 200 ms, and whose tokens follow each other in 20 ms on average. Rules "
    "other than ranklet's and \"adapter only\", which is ranklet's without prefixes, see every queue without delay; "
    "ranklet's eight gateways see what real ones see."
)
GRAMMAR_SCHEMAS_NOTE = """\
Measured at commit ffc7aaa. SmolLM2-135M-Instruct and four trained adapters at temperature 1, up to 48 texts at once, of
up to 112 tokens, in float32. Schemas have nested objects, arrays, tuples, enums, constants, bounds, patterns, formats,
references, trees, anyOf, oneOf, allOf and keys in several scripts. `jsonschema` checks each finished text, formats
included. No text of this run was preempted; `tests/replicas/engine/test_grammar_texts.py` preempts some."""

TEXT_CLUSTER_NOTE = """The first rates are of the middle half of each run. All texts are equally long, so that they end
in waves, and the last wave does not fill both GPUs: whole runs have a lower ratio. Rates of equal runs differ by up to
10 %. The machine has 32 cores for two engines, eight gateways, the load client and Ray. While one GPU ran texts beside
embeddings, other guests of the host took two cores, so that this rate is low and its ratio of 2.14 does not count."""
TEXT_CLUSTER_LENGTHS_NOTE = """Texts of different lengths do not end in waves, on one GPU as on two. At commit cccc6b1,
`RowDecoder` also computed vectors in short steps of few adapters, which it does not since."""
TEXT_CLUSTER_LOWEST_NOTE = """Both engines waited more than in other runs. Taken time of cores was not recorded yet."""
TEXT_CLUSTER_BEFORE_NOTE = """While one adapter floods, the engine runs fewer of its texts at once, so that the gaps of
the others stay short. In this run it did so with common beginnings too, since prompts in the prefix cache counted
towards a flood; they do not count since (`hot-texts-simulated.json`)."""
TEXT_CLUSTER_SETTLED_NOTE = """The last wave of 2,048 texts fills the 256 places of one GPU. Those of two GPUs are not
divided so evenly. Two engines without a server ran as fast as one."""
THRASH_NOTE = """Relative to the row before. An engine's own process exempts what is there at its start from garbage
collection, and so does the benchmark. Before it did, the device idled for up to 7 % of a measurement, and two of five
pairs had 0.93 and 0.94."""

GRAMMAR_NOTE = """\
Rates and gaps are of the time when all texts run. A step waits only for masks that are usually ready in time."""
RERANK_NOTE = """\
The reference is transformers + PEFT in float32. The last column is the difference of transformers + PEFT in bfloat16 to
it, which comes from rounding. In float32 on the CPU, tests compare scores within 1e-5."""
DORA_NOTE = """\
LoRA of rank 16 on all seven projections, medians of three runs in turn; another benchmark ran on the second GPU of the
machine. With 128 tokens, plain LoRA was slower than DoRA, of which the cause was not looked for."""
TOKEN_ROWS_NOTE = """\
LoRA of rank 16, 100 trained or added tokens each. Medians of times, and of ratios to the plain adapter that was loaded
in the same turn. Loads from disk read and verify the adapter; those from the host copy one that is in the host cache.
No copy waits for the device; what rows of tokens add is mostly time of Python, which launches further copies."""
SYSTEM_PROMPTS_NOTE = """\
320 texts in flight, 256 of which may run, of 64 adapters by Zipf's law with exponent 1. A prompt has 2,000 tokens of
its adapter and 32 of its own; 64 are generated. With `group_limit` replaced by 1, so that each text's pages are read
alone, the same benchmark had 14,828, 15,707, 15,317 and 15,777 tokens/s on another machine the same day; with groups it
had 18,324 to 20,745 there, when the splits of a group were combined two by two."""
SYSTEM_PROMPTS_BEFORE_NOTE = """\
Prompts in the prefix cache counted towards a flood in this run, and attention read each text's pages alone."""
HOT_TEXTS_NOTE = """\
At an earlier commit, prompts in the prefix cache counted towards a flood, and so did tokens that nobody else wanted.
The rate with system prompts was 8,056 tokens/s then, of 54 texts at once; the gap had a p50 of 7 ms, the first token a
p99 of 6.9 s. Texts start together only while some wait for rows, as with 320 requests in flight. On H200s that makes
1.5 % more tokens a second, not 17 %, and gaps with a p50 of 5.0 ms instead of 5.5
(`system-prompts-h200-lengths.log`): while texts wait, fewer steps have prompts than on this device."""
TOKEN_ROWS_CPU_NOTE = """\
LoRA of rank 16, 100 trained or added tokens each, on a busy machine. Medians of times, and of ratios to the plain
adapter that was loaded in the same turn. Tokenizer files have 10.5 MB; those with added tokens differ from adapter to
adapter, and each engine compares them with the base's."""

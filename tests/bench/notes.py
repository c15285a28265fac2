"""Paragraphs above the tables of tests/bench/results/README.md: what the result files do not say."""

GENERATE_NOTE = """\
One engine without a server, at commit 5391fa9: greedy, all requests submitted at once, random tokens, no prefix cache.
Each number is the better of two runs, as for vLLM on an H200. A step is the time between two tokens of a text. A script
around the benchmark noted each step's size. 9 of 10 targets are reached, and the last is missed by 0.3 %."""
GENERATE_8B_NOTE = """\
As above, one run each, weights in the shapes of Llama-3.1-8B. The targets of one text at a time are reached, the others
are missed by 2 to 14 %. With 16 texts, a step takes 4.86 ms, of which reading weights, keys and values takes 4.1. With
256 texts, the layers' products take 6.5 ms of a step, and would take 6.1 with cuBLAS (`kernels/NOTES.md`); reading keys
and values takes 2.3 ms at 288 tokens and 5.1 at 640. Steps with prompts reach 710 TFLOP/s."""
GAPS_NOTE = """\
64 texts of 512 prompt tokens and 1,024 generated ones, at commit b80c4ac with `decode_slowdown: 1.9`. The target for
p99 is 2.5 times the median without other work. It is missed beside embeddings, so the setting is 1.8 since then. With
1.85, the same benchmark within a script that noted each step gave 2.17, 2.32 and 2.32."""
TEXT_HTTP_NOTE = """\
32 adapters of rank 16, one run each, with two gateways. Not run by the benchmark itself, whose run had too little
memory for keys and values, see below. The target is 0.92 of the engine."""
TEXT_CPU_NOTE = """\
At commit 011c9f5. The engine alone had kept most of the device's memory, so fewer texts than 256 ran at the same time,
and rates were lower: 0.65 to 0.72 of the engine's. The next table's load of 80 % was more than this replica could
answer. Later commits measure the engine in a process of its own."""
ENGINE_NOTE = """\
At commit b80c4ac. All prompts are submitted at once by a thread of the same process, whose work slows down the first
launches. In the same call the commit e1bea1a, before text, had 338,504, 322,202 and 325,065 tokens/s with prompts of
6144 tokens, 529,060, 495,389 and 494,076 with 512, and 534,687, 443,090 and 501,738 with 128. The time of a batch on
the device differed by up to 1 %. Since then requests wait for the launch, which was not measured."""
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
refuses tools and structured output by name, as further checks show. lm-eval's measure is the largest difference of a
log-likelihood to its `hf` model, which is transformers + PEFT, over answers of a few tokens and two whole texts, for
the base and two adapters."""
ATTENTION_NOTE = """\
Keys were cut into splits of at least 256 keys; 512 are kept. With 512, 32 x 512 behind 0 took 171 us for Qwen3-0.6B in
the same call. Times of the other shapes measured with both differ by up to 4 %. The larger bound on partial sums and
the explicit `fma` came later and were not measured."""

"""Limits on the files of an adapter's folder, which may come from anyone. Those of tokenizers are in `tokenizer_files`.

Each is several times what the largest known adapters need. Within all of them, no file holds the interpreter for long.
"""

MAX_ADAPTER_BYTES = 4 << 30  # all files that make the revision, unless `sources.max_adapter_bytes` says otherwise
MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERN_CHARS = 8192
MAX_RANK = (1 << 31) - 1  # of the config; `engine.max_rank` limits ranks of modules
MAX_ENTRIES = {  # of the config's fields that contain names or patterns of modules
    "target_modules": 4096, "exclude_modules": 4096, "rank_pattern": 4096, "alpha_pattern": 4096, "layers_pattern": 64,
}  # fmt: skip
MAX_TOKEN_INDICES = 1 << 18  # more than any vocabulary has
MAX_HEADER_BYTES = 4 << 20  # of the weights
MAX_TENSORS = 16_384  # five times a model of 200 layers with all modules targeted
MAX_SHOWN_CHARS = 100  # of one value, in a finding
MAX_FINDING_CHARS = 2000
MAX_FINDINGS = 100
MAX_FINDINGS_CHARS = 12_000  # of all findings together

"""On a machine without a GPU, kernels compile for an H200: a part of the other tests, run once more with `sm90.py`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = (
    "test_csgmv.py::test_column_terms[False]",
    "test_row_gemm.py::test_column_terms[mixed-thin]", "test_row_gemm.py::test_column_terms[mixed-split]",
    "test_paged_attention.py::test_arrivals_are_left_zero",
    "test_prefill_attention.py::test_a_token_does_not_depend_on_the_cut[30-prefill_triton]",
    "test_token_rows.py::test_embeddings_and_logits_of_tokens_with_own_rows[ranklet.kernels.csgmv-True-20-dtype2]",
)  # fmt: skip
KERNELS = {
    "shrink_kernel", "expand_kernel", "thin_kernel", "split_kernel", "prefill_kernel", "replace_embeddings_kernel",
    "replace_logits_kernel",
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU")
def test_kernels_compile_for_an_h200(tmp_path: Path) -> None:
    folder = Path(__file__).parent
    command = [
        sys.executable, "-O", "-m", "pytest", "-p", "tests.kernels.sm90", "-p", "no:xdist",
        "-p", "no:cacheprovider", "--assert=plain", "-W", "ignore::pytest.PytestConfigWarning",
        *(str(folder / each) for each in TESTS),
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=folder.parents[1], env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    (compiled,) = re.findall("^compiled: (.*)$", done.stdout, re.MULTILINE)
    assert set(compiled.split(", ")) >= KERNELS

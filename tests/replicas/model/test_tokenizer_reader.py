"""A tokenizer that another process has read is the same, and this process imports neither torch nor transformers."""

import subprocess
import sys
from pathlib import Path

import pytest

from ranklet.replicas.bounded_process import child_environment
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.tokenizer import load_backend
from ranklet.replicas.model.tokenizer_reader import read_backend
from tests.assets.tokenizer import save_tokenizer


@pytest.mark.parametrize("bos", [False, True])
def test_the_tokenizer_is_that_of_the_folder(tmp_path: Path, *, bos: bool) -> None:
    save_tokenizer(tmp_path, vocab_size=400, max_length=16, append_eos=not bos, bos=bos)
    found, expected = read_backend(tmp_path), load_backend(tmp_path)
    assert found.to_str() == expected.to_str()
    text = "the court ruled that the notice was late </s> 法"
    assert found.encode(text).ids == expected.encode(text).ids


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refused:
        load_backend(tmp_path)
    with pytest.raises(ModelError) as found:
        read_backend(tmp_path)
    assert str(found.value) == str(refused.value)
    assert str(tmp_path) in str(found.value)


def test_the_process_that_asks_does_not_import_torch(model_dir: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from ranklet.replicas.model.tokenizer_reader import read_backend; "
        f"read_backend(Path({str(model_dir)!r})); assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], env=child_environment(), check=True)

"""Kernels are listed instead of compiled, and then compiled by threads. No GPU: Triton's part is played."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import run
from sys import executable
from threading import Thread, get_ident
from types import SimpleNamespace

import pytest
import torch
from triton import knobs

from ranklet.kernels.compile_ahead import Kernel, compile_kernels, listed_kernels


@dataclass(eq=False)
class Function:
    """A function that Triton compiles."""

    cache_key: str = "key"
    compiled: list[str] = field(default_factory=list)
    loaded_by: list[int] = field(default_factory=list)

    def preload(self, specialization: str) -> "Compiled":
        if specialization == "fails":
            raise RuntimeError("the kernel does not fit the device")
        self.compiled.append(specialization)
        return Compiled(self.loaded_by)

    def launch(self, specialization: str) -> bool:
        """Return whether the kernel was compiled and launched."""
        hook = knobs.runtime.jit_cache_hook
        if hook is None:
            return True
        return not hook(
            key="", repr="", fn=SimpleNamespace(jit_function=self), compile={"specialization_data": specialization},
            is_manual_warmup=False, already_compiled=False,
        )  # fmt: skip


@dataclass
class Compiled:
    """A compiled kernel, which notes the threads that load it."""

    loaded_by: list[int]

    @property
    def run(self) -> None:
        self.loaded_by.append(get_ident())


def test_kernels_of_this_thread_are_listed_once_and_not_launched() -> None:
    one, two, elsewhere = Function(), Function(), list[bool]()
    with listed_kernels() as kernels:
        assert not any([one.launch("a"), two.launch("a"), one.launch("b"), one.launch("a")])
        thread = Thread(target=lambda: elsewhere.append(two.launch("c")))
        thread.start()
        thread.join()
    assert elsewhere == [True]
    assert list(kernels) == [Kernel(one, "a"), Kernel(two, "a"), Kernel(one, "b")]
    assert one.launch("a")


def test_the_hook_is_restored_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), listed_kernels():
        raise ZeroDivisionError
    assert knobs.runtime.jit_cache_hook is None


def test_kernels_are_compiled_and_failures_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    one, two = Function(), Function()
    kernels = [Kernel(one, "a"), Kernel(two, "fails"), Kernel(two, "b"), Kernel(one, "c")]
    assert compile_kernels(kernels, torch.device("cpu"), threads=1) == 1
    assert (one.compiled, two.compiled) == (["a", "c"], ["b"])
    assert one.loaded_by + two.loaded_by == 3 * [get_ident()]
    assert compile_kernels([], torch.device("cpu")) == 0


SOURCE = """
import torch
import triton
import triton.language as tl
from ranklet.kernels.compile_ahead import compile_kernels, listed_kernels

"""
KERNEL = """
@triton.jit
def kernel_{i}(out, {names}):
    tl.store(out, {added})

"""


@pytest.mark.gpu
def test_kernels_of_any_arguments_are_launched_by_their_own_functions(tmp_path: Path) -> None:
    """The first process fills the cache; the others load from it, in which threads would mix functions up."""
    count, source, calls = 24, SOURCE, ""
    for i in range(1, count + 1):
        names = [f"x{j}" for j in range(i)]
        source += KERNEL.format(i=i, names=", ".join(names), added=" + ".join(names))
        calls += f"    kernel_{i}[(1,)](out[{i}:], {', '.join(['3'] * i)})\n"
    source += f"""out = torch.zeros({count + 1}, dtype=torch.int32, device="cuda")
def launch():
{calls}
with listed_kernels() as kernels:
    launch()
assert len(kernels) >= {count}
assert compile_kernels(list(kernels), out.device, threads=16) == 0
launch()
assert out.tolist() == [3 * i for i in range({count + 1})]
"""
    script = tmp_path / "script.py"
    script.write_text(source)
    for _ in range(6):
        run([executable, str(script)], check=True, timeout=100)

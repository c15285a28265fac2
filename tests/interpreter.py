"""Makes Triton's interpreter faster. Tests launch kernels with it where there is no GPU. The bits stay the same."""

from dataclasses import replace
from typing import Any

from triton.runtime.interpreter import InterpretedFunction, InterpreterError, interpreter_builder

_called: set[Any] = set()
_first_call = InterpretedFunction.__call__


def speed_up() -> None:
    """Leave out work whose result the interpreter does not use.

    The interpreter computes sums and products of integers in int64 too, a third of its time, and compares both only in
    its debug mode, which no test uses.

    It replaces the names of `triton.language` by its own, which takes 2 ms: at each launch, and at each call of a
    function by a kernel. After a function's first call, its names stay replaced, so that later calls need not do it.
    """
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
    InterpretedFunction.__call__ = _call


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    if function.fn not in _called:
        _called.add(function.fn)
        return _first_call(function, *args, **kwargs)
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise InterpreterError(repr(error)) from error

"""Functions of Triton and Gluon as plain Python: the same code, with other globals."""

from __future__ import annotations

import builtins
import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

Edits = Mapping[str, tuple[str, str]]


class Translation:
    """Makes functions that call what is given here where they would call Triton.

    Args:
        modules: in place of Triton's modules, by the last part of their names.
        functions: in place of Gluon's functions, by name.
        edits: function -> (text, what it reads instead).
    """

    def __init__(
        self,
        *,
        modules: Mapping[str, Any],
        functions: Mapping[str, Callable[..., Any]],
        edits: Edits,
    ) -> None:
        self._modules, self._functions, self._edits = modules, functions, edits
        self._made: dict[FunctionType, FunctionType] = {}

    def function(self, jitted: Any) -> FunctionType:
        """A jit function, translated with all that it calls.

        Raises:
            ValueError: a text to edit is not there, or more than once.
        """
        original: FunctionType = jitted.fn
        if original not in self._made:
            code = self._code(original)
            scope: dict[str, Any] = {"__builtins__": builtins}
            self._made[original] = FunctionType(code, scope, original.__name__)
            for name in code.co_names:
                if name in original.__globals__:
                    scope[name] = self._value(original.__globals__[name])
        return self._made[original]

    def _value(self, value: Any) -> Any:
        if isinstance(value, ModuleType):
            return self._modules[value.__name__.rpartition(".")[2]]
        if hasattr(value, "fn"):
            return self.function(value)
        if type(value).__name__ == "constexpr":
            return value.value
        return self._functions[value.__name__]

    def _code(self, function: FunctionType) -> CodeType:
        if function.__name__ not in self._edits:
            return function.__code__
        old, new = self._edits[function.__name__]
        source = textwrap.dedent(inspect.getsource(function))
        source = source[source.index("def ") :]
        if source.count(old) != 1:
            raise ValueError(f"{function.__name__} does not read {old!r} once")
        scope: dict[str, Any] = {}
        exec("from __future__ import annotations\n" + source.replace(old, new), scope)
        edited: FunctionType = scope[function.__name__]
        return edited.__code__

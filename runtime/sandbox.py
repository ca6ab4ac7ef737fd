"""jinja2's immutable sandbox, with a bound on how much memory a few characters of a template can ask for."""

import json
import re
from collections.abc import Iterable
from typing import Any

import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.sandbox
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

MAX_VALUE = 16 * 1024 * 1024  # characters or entries of any one value that a template makes
_MAX_BITS = 1 << 16  # of a whole number

# What published chat templates use. jinja2's other filters make text of any width out of nothing, or are for HTML.
_FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float groupby int items last length list lower map "
    "max min reject rejectattr reverse round safe select selectattr sort string sum title trim unique upper"
)
_STR_METHODS = {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"}
_WIDE = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:\d{4}|\*|\d*\.(?:\d{4}|\*))")


def _bound(size: int) -> None:
    if size > MAX_VALUE:
        raise SecurityError(f"makes a value of more than {MAX_VALUE} characters")


def _size(value: Any) -> int:
    """Length of `str(value)`, roughly; entries that are there twice count twice. Raises for more than allowed."""
    total, stack = 0, [value]
    while stack:
        entry = stack.pop()
        if isinstance(entry, Namespace):
            entry = entry._Namespace__attrs
        total += len(entry) if isinstance(entry, str | bytes) else 64  # so that few steps suffice to refuse
        _bound(total)
        if isinstance(entry, dict):
            stack += entry.keys()
            stack += entry.values()
        elif isinstance(entry, list | tuple | set | frozenset):
            stack += entry
    return total


def bounded(value: Any) -> Any:
    _size(value)
    return value


def _concat(pieces: Iterable[Any]) -> str:
    pieces = [str(bounded(piece)) for piece in pieces]
    _bound(sum(map(len, pieces)))
    return "".join(pieces)


def _separated(separator: str, pieces: list[str]) -> str:
    _bound(sum(map(len, pieces)) + len(separator) * len(pieces))
    return separator.join(pieces)


@jinja2.pass_environment
def _join(environment: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    return _separated(str(d), [str(bounded(entry)) for entry in value])


def _replace(text: Any, old: str, new: str, count: int | None = -1) -> str:
    text = str(bounded(text))
    _bound(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _bound(len(text) + (text.count("\n") + 1) * (width if isinstance(width, int) else len(width)))
    return jinja2.filters.do_indent(text, width, first, blank)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter escapes HTML, which models were not trained on.
    size = _size(value)
    if isinstance(indent, int):
        _bound(size * 50 * max(indent, 0) if indent > 16 else 0)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """`a ~ b` through the environment's own concatenation."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:  # noqa: N802
        self.write("environment.concat((")
        for entry in node.nodes:
            self.visit(entry, frame)
            self.write(", ")
        self.write("))")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses, before the memory is taken, values far larger than any prompt."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _CodeGenerator
    concat = staticmethod(_concat)

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=bounded, **options)
        self.filters = {name: self.filters[name] for name in _FILTERS.split()} | {
            "join": _join, "replace": _replace, "indent": _indent, "tojson": _tojson,
            "string": lambda value: str(bounded(value)),
        }  # fmt: skip
        del self.globals["lipsum"]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if hasattr(left, "__len__") and hasattr(right, "__len__"):
                _bound(len(left) + len(right))
        elif operator == "%":
            if isinstance(left, str):
                arguments = right if isinstance(right, tuple) else (right,)
                if _WIDE.search(left):
                    raise SecurityError("formats with a width of 1000 or more")
                _bound(len(left) + left.count("%") * (1000 + sum(_size(entry) for entry in arguments)))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise SecurityError("makes a number of more digits than a prompt can use")
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(sequence, "__len__"):
                    _bound(len(sequence) * times)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        return None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes) and attr in _STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, function: Any, *args: Any, **options: Any) -> Any:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and args:
            if name == "join":
                return _separated(owner, list(args[0]))
            if name == "replace":
                return _replace(owner, *args, **options)
        return super().call(context, function, *args, **options)

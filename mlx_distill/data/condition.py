"""A condition on metadata, such as ``model == "x" and score >= 0.8``, without Python's ``eval``."""

import ast
import json
import operator
from collections.abc import Callable
from typing import Any

from mlx_distill.errors import InputError, one_line


class Undecided(Exception):
    """Some metadata do not decide a condition; the text says why."""


def compile_where(where: str) -> Callable[[dict[str, Any]], bool]:
    """Return a condition on metadata as a function of them; nothing of Python's runs but this.

    It knows names (dotted ones look into nested objects), constants and lists of them, ``and``,
    ``or``, ``not``, comparisons, ``in`` and ``not in``. OpenAI and Bedrock store every value as a
    text: one that is compared with a number or a truth value is read as one, if it can be. The
    function raises Undecided where a name is missing or two values cannot be compared.

    Raises:
        InputError: If the condition holds anything else.
    """
    try:
        tree = ast.parse(where.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"where is no condition: {one_line(error)}: {where}") from None
    value = _compile(tree)
    return lambda metadata: _truth(value(metadata))


_Value = Callable[[dict[str, Any]], Any]
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    **{kind: lambda a, b, f=f: f(_like(a, b), _like(b, a)) for kind, f in _ORDER.items()},
    ast.In: lambda member, group: member in group,
    ast.NotIn: lambda member, group: member not in group,
}


def _compile(node: ast.expr) -> _Value:
    """Return an expression as a function of the metadata."""
    match node:
        case ast.BoolOp(op=op, values=values):
            parts = [_compile(value) for value in values]
            decide = all if isinstance(op, ast.And) else any
            return lambda metadata: decide(_truth(part(metadata)) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            denied = _compile(operand)
            return lambda metadata: not _truth(denied(metadata))
        case ast.Compare():
            return _comparison(node)
        case ast.Name() | ast.Attribute():
            names = _names(node)
            return lambda metadata: _look_up(metadata, names)
        case ast.Constant() | ast.List() | ast.Tuple() | ast.UnaryOp():
            try:
                constant = ast.literal_eval(node)
            except (ValueError, TypeError):
                raise _unknown(node) from None
            return lambda metadata: constant
    raise _unknown(node)


def _comparison(node: ast.Compare) -> _Value:
    for op in node.ops:
        if type(op) not in _COMPARE:
            raise _unknown(op, node)
    compares = [_COMPARE[type(op)] for op in node.ops]
    operands = [_compile(operand) for operand in (node.left, *node.comparators)]
    source = ast.unparse(node)

    def compare(metadata: dict[str, Any]) -> bool:
        values = [operand(metadata) for operand in operands]
        try:
            return all(f(a, b) for f, a, b in zip(compares, values, values[1:], strict=False))
        except TypeError:
            raise Undecided(f"not comparable: {source}") from None

    return compare


def _names(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [*_names(node.value), node.attr]
    raise _unknown(node)


def _look_up(metadata: dict[str, Any], names: list[str]) -> Any:
    value: Any = metadata
    for name in names:
        if not isinstance(value, dict) or name not in value:
            raise Undecided(f"no such metadata: {'.'.join(names)}")
        value = value[name]
    return value


def _like(value: Any, other: Any) -> Any:
    """Return a text as the number or truth value that it spells, if the other one is such."""
    if isinstance(value, str) and isinstance(other, bool | int | float):
        try:
            spelt = json.loads(value.lower())
        except ValueError:
            return value
        return spelt if isinstance(spelt, bool | int | float) else value
    return value


def _truth(value: Any) -> bool:
    return bool(_like(value, True))


def _unknown(node: ast.AST, inside: ast.AST | None = None) -> InputError:
    return InputError(
        f"where cannot use {type(node).__name__} in {ast.unparse(inside or node)}; it takes names, "
        "constants, comparisons, in, and, or, not"
    )

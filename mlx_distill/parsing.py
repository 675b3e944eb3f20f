"""JSON and YAML that others wrote, as values: whatever it is, there is a value or one sentence.

The parsers themselves end with all kinds of errors: texts that are nested some thousand deep,
numbers of more than 4,300 digits, aliases that multiply into more than the memory holds.
"""

import json
from typing import Any

import yaml

from mlx_distill.errors import InputError, one_line

YAML_NODES = 100_000  # that a file may expand to


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        InputError: If it is none; the text says why, and not where it comes from.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if error.lineno > 1 else ""
        raise InputError(f"{error.msg} at column {error.colno}{line}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(one_line(error)) from None


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        InputError: If it is none, or its aliases expand to more than 100,000 values.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        _check_size(node)
        loader = yaml.SafeLoader("")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{error.problem}{line}") from None
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(one_line(error)) from None


def _check_size(root: yaml.Node) -> None:
    """Raise InputError if a document stands for too many values, every alias written out."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, inside: frozenset[int]) -> int:
        key = id(node)
        if key in inside:
            raise InputError(f"a value holds itself, line {node.start_mark.line + 1}")
        if key not in sizes:
            inside |= {key}
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            children = [child for part in parts for child in _nodes(part)]
            sizes[key] = 1 + sum(size(child, inside) for child in children)
        return sizes[key]

    if size(root, frozenset()) > YAML_NODES:
        raise InputError(f"its aliases stand for more than {YAML_NODES:,} values")


def _nodes(part: Any) -> tuple[yaml.Node, ...]:
    """Return an entry of a list, or the name and the value of one of a mapping."""
    return part if isinstance(part, tuple) else (part,)

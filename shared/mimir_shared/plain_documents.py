"""JSON and YAML from files that we did not write: plain values alone, and nothing that grows or nests without bound.

YAML makes no objects (`!!python/…` is refused), and an alias may stand for something, but not for a million things.
"""

import json
from typing import Any, Final

import yaml

MAX_YAML_BYTES: Final = 1_000_000
MAX_YAML_NODES: Final = 10_000
"""With every alias written out."""
MAX_YAML_DEPTH: Final = 50

PlainValue = Any
"""None, bool, int, float, str, list, dict; in YAML also dates. The libraries give it no type."""


def parse_json(text: str | bytes | bytearray) -> PlainValue:
    """As json.loads. Raises: json.JSONDecodeError also for what that meets with other errors (depth, long numbers)."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from error


def parse_yaml(text: str | bytes) -> PlainValue:
    """The one document of a YAML file. Raises: yaml.YAMLError for all that is wrong with it."""
    if len(text) > MAX_YAML_BYTES:
        raise yaml.YAMLError(f"{len(text)} bytes long; the limit is {MAX_YAML_BYTES}")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_nodes(node, {}, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, TypeError) as error:  # a date or number that is none; keys that cannot be keys
        raise yaml.YAMLError(" ".join(str(error).split())) from error


def _count_nodes(node: yaml.Node, counted: dict[int, int], depth: int) -> int:
    """How many nodes there would be without aliases. Raises: yaml.YAMLError for too many, too deep, or a circle.

    Args:
        counted: number by id of the node; 0 while it is being counted.
    """
    if depth > MAX_YAML_DEPTH:
        raise yaml.YAMLError(f"nested more than {MAX_YAML_DEPTH} deep")
    if id(node) in counted:
        if counted[id(node)] == 0:
            raise yaml.YAMLError("an alias that contains itself")
        return counted[id(node)]
    counted[id(node)] = 0
    number = 1
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                number += _count_nodes(part, counted, depth + 1)
                if number > MAX_YAML_NODES:
                    raise yaml.YAMLError(f"more than {MAX_YAML_NODES} values, aliases written out")
    counted[id(node)] = number
    return number

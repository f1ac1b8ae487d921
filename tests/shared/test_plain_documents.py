"""JSON and YAML of others: plain values, or an error; never an object, a full memory or an exhausted stack."""

import json

import pytest
import yaml

from mimir_shared.plain_documents import MAX_YAML_NODES, parse_json, parse_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("1" * 5000, "4300 digits"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
)
def test_json_that_cannot_be_read_is_one_kind_of_error(text: str, why: str) -> None:
    for given in (text, text.encode()):
        with pytest.raises(json.JSONDecodeError, match=why):
            parse_json(given)


def test_bytes_that_are_no_text_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        parse_json(b'"\xff"')


def test_plain_values_are_read() -> None:
    assert parse_json('{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}
    assert parse_yaml("a: [1, 2.5, null, x]\nb: &one {c: 1}\nd: *one\n") == {
        "a": [1, 2.5, None, "x"],
        "b": {"c": 1},
        "d": {"c": 1},
    }
    assert parse_yaml("base: &base {a: 1}\nmore: {<<: *base, b: 2}")["more"] == {"a": 1, "b": 2}
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("!!python/object/apply:os.system ['true']", "python/object/apply"),
        ("!!python/object/new:os.system ['true']", "python/object/new"),
        ("!!python/name:os.system", "python/name"),
        ("!!python/module:os", "python/module"),
        ("!!python/tuple [1]", "python/tuple"),
        ("!unknown x", "unknown"),
        (LAUGHS, f"more than {MAX_YAML_NODES} values"),
        ("- &a [*a]", "contains itself"),
        ("&a {b: *a}", "contains itself"),
        ("[" * 200 + "]" * 200, "nested more than"),
        ("[" * 100_000, "nested too deeply"),
        ("2001-99-99", "month must be"),
        ("!!int x", "invalid literal"),
        ("1" * 5000, "4300"),
        ("? [a]\n: b", "unhashable"),
        ("a: 1\n---\nb: 2", "single document"),
        ("x" * 1_000_001, "limit is 1000000"),
        ("[" + "x," * 20_000 + "]", f"more than {MAX_YAML_NODES} values"),
    ],
    ids=range(18),
)
def test_yaml_that_is_no_plain_document_is_one_kind_of_error(text: str, why: str) -> None:
    with pytest.raises(yaml.YAMLError, match=why):
        parse_yaml(text)


def test_the_control_an_alias_bomb_is_small_until_it_is_written_out() -> None:
    assert len(LAUGHS) < 1000
    value = yaml.safe_load(LAUGHS.split("a5")[0])
    assert len(repr(value)) > 30_000

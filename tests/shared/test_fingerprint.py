"""Fingerprints tell identities apart exactly where they differ, and differences name the field."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimir_shared.fingerprint import ABSENT, canonical_json, differences, fingerprint

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=12
)
IDENTITIES = st.dictionaries(st.text(), VALUES, max_size=4)


def test_fingerprint_is_sha256_of_sorted_json_without_spaces() -> None:
    expected = hashlib.sha256(b'{"a":[1,2.5,null,true],"b":"\\u00e9"}').hexdigest()
    assert fingerprint({"b": "é", "a": [1, 2.5, None, True]}) == expected


def test_fingerprint_ignores_the_order_of_keys_at_every_depth() -> None:
    assert fingerprint({"a": {"x": 1, "y": 2}, "b": 3}) == fingerprint({"b": 3, "a": {"y": 2, "x": 1}})


def test_fingerprint_heeds_the_order_of_a_list() -> None:
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})


def test_one_as_int_float_bool_and_text_are_four_fingerprints() -> None:
    assert len({fingerprint({"a": value}) for value in (1, 1.0, True, "1")}) == 4


def test_floats_keep_every_bit() -> None:
    assert fingerprint({"a": 0.1 + 0.2}) != fingerprint({"a": 0.3})
    assert fingerprint({"a": -0.0}) != fingerprint({"a": 0.0})


def test_a_tuple_counts_as_a_list() -> None:
    assert fingerprint({"a": (1, (2,))}) == fingerprint({"a": [1, [2]]})


def test_text_is_compared_by_code_points() -> None:
    composed, decomposed = "é", "e\u0301"
    assert fingerprint({"a": composed}) != fingerprint({"a": decomposed})
    assert fingerprint({"a": "😀\u202e\x00"}) == fingerprint({"a": "😀\u202e\x00"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint({"a": [value]})


@pytest.mark.parametrize("value", [np.float64(1.0), np.int64(1), b"1", {1, 2}, {1: "a"}, {True: "a"}])
def test_values_that_json_would_disguise_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="an identity"):
        fingerprint({"a": value})


@given(IDENTITIES)
def test_fingerprint_survives_being_written_and_read(identity: dict[str, object]) -> None:
    assert fingerprint(json.loads(json.dumps(identity))) == fingerprint(identity)
    assert json.loads(canonical_json(identity)) == identity


@given(IDENTITIES, IDENTITIES)
def test_differences_are_empty_for_equal_fingerprints_alone(old: dict[str, object], new: dict[str, object]) -> None:
    assert (differences(old, new) == []) == (fingerprint(old) == fingerprint(new))


def test_differences_name_nested_fields_with_old_and_new_value() -> None:
    old = {
        "dtype": "float32",
        "model": {"commit": None, "sha256": {"config.json": "aa"}},
        "instructions": [{"text": "x"}],
    }
    new = {
        "dtype": "bfloat16",
        "model": {"commit": None, "sha256": {"config.json": "bb"}},
        "instructions": [{"text": "y"}],
    }
    assert differences(old, new) == [
        ("dtype", "float32", "bfloat16"),
        ("instructions[0].text", "x", "y"),
        ('model.sha256["config.json"]', "aa", "bb"),
    ]


def test_differences_show_what_one_side_lacks() -> None:
    assert differences({"a": 1, "b": [1]}, {"b": [1, 2], "c": None}) == [
        ("a", 1, ABSENT),
        ("b[1]", ABSENT, 2),
        ("c", ABSENT, None),
    ]


def test_differences_tell_int_from_float() -> None:
    assert differences({"fps": 8}, {"fps": 8.0}) == [("fps", 8, 8.0)]

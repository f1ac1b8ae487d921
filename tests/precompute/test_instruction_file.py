"""Instructions come from a YAML file, and whatever is wrong with it is told by entry."""

from pathlib import Path

import pytest

from mimir_precompute.config import Instruction
from mimir_precompute.instruction_file import read_instructions
from mimir_shared.errors import InputError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "instructions.yaml"
    path.write_bytes(text.encode())
    return str(path)


def test_instructions_keep_their_order_and_text(tmp_path: Path) -> None:
    text = "- name: mood\n  text: >-\n    Say what mood\n    it has.\n- {name: a-2, text: 'Wörter: 你好'}\n"
    assert read_instructions(write(tmp_path, text)) == (
        Instruction(name="mood", text="Say what mood it has."),
        Instruction(name="a-2", text="Wörter: 你好"),
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file"),
        ("[]", "no instruction"),
        ("name: mood\ntext: x", "the file"),
        ("- name: mood", "entry 1: expected `name` and `text`, got no `text`"),
        ("- mood", "entry 1: expected `name` and `text`, got 'mood'"),
        ("- {name: a, text: b}\n- {name: c, text: ''}", "entry 2: expected a `text`"),
        ("- {name: a, text: b, weight: 2}", "entry 1: expected `name` and `text` alone, got `weight`"),
        ("- {name: 'a b', text: c}", "entry 1: expected a `name` of letters"),
        ("- {name: a, text: 3}", "entry 1: expected a `text` with something in it, got 3"),
        ("- {name: a, text: [b}", "no YAML"),
        ("- !!python/object/apply:os.system ['touch canary']", "no YAML"),
        ("- &a {name: x, text: *a}", "no YAML: an alias that contains itself"),
        ("- &a [*a]", "an alias that contains itself"),
    ],
)
def test_a_bad_file_is_refused_by_entry(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError, match=r"instructions\.yaml") as refusal:
        read_instructions(write(tmp_path, text))
    assert told in str(refusal.value)
    assert "expected" in str(refusal.value) or "no YAML" in str(refusal.value)


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_instructions(str(tmp_path / "none.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"- {name: a, text: '\xff\xfe'}")
    with pytest.raises(InputError, match="no YAML"):
        read_instructions(str(tmp_path / "bytes.yaml"))

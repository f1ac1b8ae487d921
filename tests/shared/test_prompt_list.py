"""Prompts from files, and the names of the videos that are made of them."""

import json
from pathlib import Path

import pytest

from mimir_shared.errors import InputError
from mimir_shared.prompt_list import prompts_from_texts, read_prompts
from mimir_train.sampling.video_name import video_name


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_has_one_prompt_a_line_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    found = read_prompts(written(tmp_path / "p.txt", "\ufeffa cat\r\n\n  a dog  \n"))
    assert found.prompts == ("a cat", "a dog")
    assert found.samples_per_prompt == 1


def test_json_lines_have_prompt_or_text(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "a cat"}), "", json.dumps({"text": "a\u2028dog", "file_name": "x.mp4"})]
    assert read_prompts(written(tmp_path / "p.jsonl", "\n".join(lines))).prompts == ("a cat", "a\u2028dog")


def test_vbench_file_gives_five_samples_of_each_prompt_and_each_prompt_once(tmp_path: Path) -> None:
    entries = [{"prompt_en": text, "dimension": ["color"]} for text in ("a cat", "a dog", "a cat")]
    found = read_prompts(written(tmp_path / "vbench.json", json.dumps(entries)))
    assert found.prompts == ("a cat", "a dog")
    assert found.samples_per_prompt == 5
    assert found.duplicates == 1


def test_every_prompt_of_the_real_vbench_file_is_its_own_file_name() -> None:
    path = Path(__file__).resolve().parents[3] / "shared" / "prompts" / "vbench_full_info.json"
    if not path.is_file():
        pytest.skip("no ../shared/prompts/vbench_full_info.json beside this checkout")
    found = read_prompts(path)
    assert (len(found.prompts), found.duplicates) == (944, 2)
    assert all(video_name(prompt, 4) == f"{prompt}-4.mp4" for prompt in found.prompts)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "\n \n", "no prompt in it"),
        ("p.jsonl", "", "no prompt in it"),
        ("p.json", "", "no prompt in it"),
        ("p.json", "[]", "no prompt in it"),
        ("p.csv", "a cat", r"expected a \.txt, \.jsonl or \.json file, got '\.csv'"),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt"', "line 2: not JSON"),
        ("p.jsonl", '{"caption": "a cat"}', 'line 1: expected "prompt" or "text" with a text, got None'),
        ("p.jsonl", '{"prompt": "  "}', "line 1: expected .* got '  '"),
        ("p.jsonl", '{"prompt": "a \\ud800"}', "character 2 is half of a surrogate pair"),
        ("p.json", '{"prompt_en": "a cat"}', "expected VBench's list .* got dict"),
        ("p.json", '["a cat"]', "entry 0: expected an object .* got str"),
    ],
)
def test_files_without_usable_prompts_are_refused_by_what_is_wrong(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_prompts(written(tmp_path / name, text))
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_file_another_encoding_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "latin.txt").write_bytes("façade".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_prompts(tmp_path / "latin.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "folder.txt")


def test_an_empty_prompt_on_the_command_line_is_refused() -> None:
    with pytest.raises(InputError, match="an empty text"):
        prompts_from_texts(["a cat", " "])


def test_a_video_is_named_by_its_prompt_as_vbench_does() -> None:
    assert video_name("A cat, 8K – détail!", 3) == "A cat, 8K – détail!-3.mp4"


@pytest.mark.parametrize("prompt", ["x" * 300, "é" * 200, "a/b", "..", "line\nbreak", "猫" * 90 + "/"])
def test_a_prompt_that_no_file_name_holds_is_cut_and_gets_its_digest(prompt: str, tmp_path: Path) -> None:
    name = video_name(prompt, 0)
    (tmp_path / f".{name}.tmp").write_bytes(b"")  # the longest form in which it is ever written
    (tmp_path / name).write_bytes(b"")
    assert [path.name for path in tmp_path.glob("*-0.mp4") if path.name == name]
    assert name != video_name(prompt + "!", 0)
    assert name.count("/") == 0

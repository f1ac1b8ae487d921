"""Files that would run a program if they were read carelessly: no canary appears, and each ends in clear words.

Models and checkpoints, which need torch, are in test_payloads_in_models.py.
"""

import contextlib
import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimir_precompute.clips.clip_list import read_clip_list
from mimir_precompute.config import DecodeLimits
from mimir_precompute.decoding.sandbox import DecodeSandbox
from mimir_precompute.inspection.verify import verify_cache
from mimir_precompute.instruction_file import read_instructions
from mimir_precompute.pipeline import EncodeJob, EncodeOutcome, encode_cache
from mimir_precompute.planning.plan import PlanRequest, update_plan
from mimir_precompute.provenance import RunLog
from mimir_precompute.workers.progress import Progress
from mimir_shared.errors import CacheError, InputError, MimirError
from mimir_shared.feature_folder import find_features
from mimir_shared.plan_file import read_plan
from mimir_shared.safetensors_bytes import read_tensors
from mimir_shared.sealed import _JSON_MARK, _ZEROS, _seal, read_sealed_json
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders
from tests.faults.odd_media import scenes
from tests.precompute.media import video_bytes
from tests.programs import run

CLIP = video_bytes(scenes(9))


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self._canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A path at which nothing may have appeared when the test ends."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the input was run"


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def object_array(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def object_archive(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([Payload(canary)], dtype=object))
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
            else:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def member(kind: bytes, *, target: str = "", size: int = 0) -> tarfile.TarInfo:
    entry = tarfile.TarInfo()
    entry.type, entry.linkname, entry.size = kind, target, size
    return entry


def encode(clips: Path, cache: Path) -> EncodeOutcome:
    storage = LocalStorage(cache)
    update_plan(storage, None, read_clip_list(str(clips)), PlanRequest(preset="tiny"))
    with DecodeSandbox(DecodeLimits(memory_gb=1)) as decoder:
        job = EncodeJob(
            storage=storage,
            plan=read_plan(storage),
            encoders=FakeEncoders(),
            shards=(0,),
            max_quarantined=1,
            decoder=decoder,
        )
        return encode_cache(job, Progress(quiet=True), RunLog(storage, "cpu"))


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_control_the_payloads_do_run_for_whoever_unpickles_them(tmp_path: Path) -> None:
    pickle.loads(pickled(tmp_path / "one"))  # noqa: S301  # of our own making
    np.load(io.BytesIO(object_array(tmp_path / "two")), allow_pickle=True)
    np.load(io.BytesIO(object_archive(tmp_path / "three")), allow_pickle=True)["a"]
    assert names_below(tmp_path) == ["one", "three", "two"]


class TestTars:
    @pytest.mark.parametrize(
        ("ending", "make"),
        [(ending, pickled) for ending in ("pkl", "pickle", "pth", "pt", "pyd", "bin", "ckpt", "dill", "joblib")]
        + [("npy", object_array), ("npz", object_archive)],
    )
    def test_a_member_that_decoders_by_ending_would_run_is_left_alone(
        self, ending: str, make: Callable[[Path], bytes], tmp_path: Path, canary: Path
    ) -> None:
        clips = tmp_path / "clips.tar"
        write_tar(clips, {"a.mp4": CLIP, f"a.{ending}": make(canary), "a.txt": b"A clip ."})
        outcome = encode(clips, tmp_path / "cache")
        assert outcome.quarantined == {}
        assert outcome.snapshot is not None
        assert outcome.snapshot.clips == 1

    def test_a_pickle_in_the_place_of_video_or_caption_is_no_clip(self, tmp_path: Path, canary: Path) -> None:
        write_tar(
            tmp_path / "one.tar", {"a.mp4": pickled(canary), "a.txt": b"A clip .", "b.mp4": CLIP, "b.txt": b"B ."}
        )
        assert encode(tmp_path / "one.tar", tmp_path / "cache").quarantined == {"a": "decode: unsupported_format"}
        write_tar(tmp_path / "two.tar", {"a.mp4": CLIP, "a.json": pickled(canary)})
        with pytest.raises(InputError, match="not a JSON object"):
            read_clip_list(str(tmp_path / "two.tar"))

    @pytest.mark.parametrize("name", ["../../outside", "/outside", "a/../../outside", "..\\outside", "./../outside"])
    def test_names_that_lead_out_of_the_folder_write_nothing(self, name: str, tmp_path: Path) -> None:
        inner = tmp_path / "in" / "ner"
        inner.mkdir(parents=True)
        write_tar(inner / "clips.tar", {f"{name}.mp4": CLIP, f"{name}.txt": b"A clip ."})
        with contextlib.suppress(InputError):  # not every such name makes a sample
            encode(inner / "clips.tar", tmp_path / "cache")
        found = [path for path in names_below(tmp_path) if not path.startswith("cache")]
        assert found == ["in", "in/ner", "in/ner/clips.tar"]

    @pytest.mark.parametrize(
        "entry",
        [
            member(tarfile.SYMTYPE, target="/etc/passwd"),
            member(tarfile.LNKTYPE, target="../../secret.mp4"),
            member(tarfile.CHRTYPE),
            member(tarfile.BLKTYPE),
            member(tarfile.FIFOTYPE),
            member(tarfile.DIRTYPE),
            member(tarfile.GNUTYPE_SPARSE),
        ],
        ids=["symlink", "hardlink", "character device", "block device", "FIFO", "folder", "sparse"],
    )
    def test_what_is_no_plain_member_is_passed_over(self, entry: tarfile.TarInfo, tmp_path: Path) -> None:
        write_tar(tmp_path / "clips.tar", {"a.mp4": entry, "a.txt": b"A clip ."})
        with pytest.raises(InputError, match=r"0 videos or images, expected one|not a readable"):
            read_clip_list(str(tmp_path / "clips.tar"))

    def test_a_caption_of_gigabytes_is_refused_by_its_header(self, tmp_path: Path) -> None:
        header = member(tarfile.REGTYPE, size=2**40)
        header.name = "a.txt"
        write_tar(tmp_path / "clips.tar", {"a.mp4": CLIP})
        tar = (tmp_path / "clips.tar").read_bytes().rstrip(b"\0")
        tar += bytes(-len(tar) % 512) + header.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "clips.tar").write_bytes(tar + bytes(10240))
        with pytest.raises(InputError, match=r"bytes; the limit is|not a readable"):
            read_clip_list(str(tmp_path / "clips.tar"))

    def test_a_negative_size_does_not_send_the_reader_round_in_circles(self, tmp_path: Path) -> None:
        header = bytearray(tarfile.TarInfo("a.mp4").tobuf(tarfile.GNU_FORMAT))
        header[124:136] = (-1024).to_bytes(12, "big", signed=True)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "clips.tar").write_bytes(bytes(header) + bytes(10240))
        with pytest.raises(InputError, match=r"not a readable|no clip found"):
            read_clip_list(str(tmp_path / "clips.tar"))


class TestLists:
    @pytest.mark.parametrize("source", ["http://127.0.0.1:9/a.mp4", "https://x/a.mp4", "file:///etc/passwd"])
    def test_an_address_is_refused_when_planning(self, source: str, tmp_path: Path) -> None:
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": source, "text": "A clip ."}))
        with pytest.raises(InputError, match="addresses are not read, only files"):
            read_clip_list(str(tmp_path))

    def test_a_command_as_a_source_is_a_file_that_is_missing(self, tmp_path: Path, canary: Path) -> None:
        clips = tmp_path / "clips"
        clips.mkdir()
        (clips / "good.mp4").write_bytes(CLIP)
        sources = [f"pipe:mkdir {canary}", f"file:{clips}/good.mp4", f"| mkdir {canary}", f"$(mkdir {canary})", "-"]
        lines = [json.dumps({"file_name": source, "text": "A clip ."}) for source in ["good.mp4", *sources]]
        (clips / "metadata.jsonl").write_text("\n".join(lines))
        assert encode(clips, tmp_path / "cache").quarantined == dict.fromkeys(sources, "fetch: missing")

    @pytest.mark.parametrize("argument", ["pipe:mkdir {}", "pipe:mkdir {}; x.tar", "| mkdir {}", "`mkdir {}`.jsonl"])
    def test_a_command_as_the_list_is_no_such_file(self, argument: str, tmp_path: Path, canary: Path) -> None:
        done = run(
            "mimir-precompute", "plan", argument.format(canary), "--cache", tmp_path / "cache", "--preset", "tiny"
        )
        assert done.code == 2
        assert "no such file" in done.err
        assert "Traceback" not in done.err

    def test_columns_that_look_like_code_are_kept_as_text(self, tmp_path: Path, canary: Path) -> None:
        row = {
            "file_name": "a.mp4",
            "text": "A clip .",
            "__reduce__": ["os.mkdir", [str(canary)]],
            "__class__": "os.system",
            "py/object": "os.mkdir",
            "py/reduce": [{"py/type": "os.mkdir"}, {"py/tuple": [str(canary)]}],
            "eval": f"__import__('os').mkdir('{canary}')",
            "seal": "0",
            "mimir": "{}",
            "ARROW:schema": "x",
        }
        (tmp_path / "a.mp4").write_bytes(CLIP)
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
        assert encode(tmp_path, tmp_path / "cache").quarantined == {}

    @pytest.mark.parametrize(
        ("value", "why"),
        [
            ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
            ("[" * 300 + "]" * 300, "nested more than 50 deep"),
            ("1" * 5000, "4300 digits"),
        ],
        ids=["very deep", "deep", "long number"],
    )
    def test_a_json_bomb_is_one_bad_line(self, value: str, why: str, tmp_path: Path) -> None:
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "A clip .", "n": ' + value + "}")
        with pytest.raises(InputError, match=f"line 1: .*{why}"):
            read_clip_list(str(tmp_path))

    @pytest.mark.parametrize(
        "value", ["1" * 30, '"\\ud800"', "{}", '[{"a": {}}]', '[1, "a", null]', "1e999"], ids=range(6)
    )
    def test_values_that_parquet_cannot_hold_are_kept_as_text(self, value: str, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").write_bytes(CLIP)
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "A clip .", "n": ' + value + "}")
        assert encode(tmp_path, tmp_path / "cache").quarantined == {}

    def test_a_caption_cannot_break_out_of_what_shows_it(self, tmp_path: Path, canary: Path) -> None:
        caption = f"{{{{ cycler.__init__.__globals__.os.mkdir('{canary}') }}}} %(x)s [bold]x[/] \x1b]0;title\x07"
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": caption}))
        (tmp_path / "a.mp4").write_bytes(CLIP)
        encode(tmp_path, tmp_path / "cache")
        shown = run("mimir-precompute", "inspect", tmp_path / "cache", "a.mp4")
        assert shown.code == 0
        assert "\x1b" not in shown.out


YAML_PAYLOADS = [
    "!!python/object/apply:os.mkdir ['{}']",
    "!!python/object/new:os.mkdir ['{}']",
    "!!python/object/apply:subprocess.check_output [['mkdir', '{}']]",
    "!!python/name:os.mkdir",
    "!!python/module:os",
    "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)),
    "- &a [*a]",
    "[" * 100_000,
    "2001-99-99",
]


class TestYaml:
    @pytest.mark.parametrize("payload", YAML_PAYLOADS, ids=range(len(YAML_PAYLOADS)))
    def test_instructions_make_no_objects(self, payload: str, tmp_path: Path, canary: Path) -> None:
        path = tmp_path / "instructions.yaml"
        path.write_text(payload.replace("{}", str(canary)))
        with pytest.raises(InputError, match="is no YAML") as caught:
            read_instructions(str(path))
        assert len(str(caught.value)) < 1000

    @pytest.mark.parametrize("payload", YAML_PAYLOADS, ids=range(len(YAML_PAYLOADS)))
    def test_settings_of_training_make_no_objects(self, payload: str, tmp_path: Path, canary: Path) -> None:
        from mimir_train.config_document import parse_assignment, read_document

        path = tmp_path / "config.yaml"
        path.write_text(payload.replace("{}", str(canary)))
        with pytest.raises(InputError, match="not YAML"):
            read_document(path)
        with pytest.raises(InputError, match="not YAML"):
            parse_assignment(f"run.seed={payload.replace('{}', str(canary))}")


def safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: Any, end: Any, shape: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE_TENSORS = {
    "huge header": safetensors({}, length=2**63),
    "header beyond the end": safetensors({}, length=1000),
    "overlapping tensors": safetensors({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)),
    "the same bytes twice": safetensors({"a": tensor(0, 8, [2]), "b": tensor(0, 8, [2])}, bytes(8)),
    "negative begin": safetensors({"a": tensor(-8, 0, [2])}, bytes(8)),
    "end before begin": safetensors({"a": tensor(8, 0, [2])}, bytes(8)),
    "negative dims": safetensors({"a": tensor(0, 16, [-2, -2])}, bytes(16)),
    "dims that overflow": safetensors({"a": tensor(0, 0, [2**32, 2**32])}),
    "end beyond the file": safetensors({"a": tensor(0, 2**40, [2**38])}, bytes(8)),
    "more bytes than dims": safetensors({"a": tensor(0, 8, [1])}, bytes(8)),
    "dims as text": safetensors({"a": tensor(0, 8, ["2"])}, bytes(8)),
    "dims as truth": safetensors({"a": tensor(0, 4, [True])}, bytes(4)),
    "fractions": safetensors({"a": tensor(0.0, 8.0, [2])}, bytes(8)),
    "unknown type": safetensors({"a": tensor(0, 8, [1], "OBJECT")}, bytes(8)),
    "nested header": safetensors(b"[" * 100_000),
    "header that is a list": safetensors([1]),
    "header that is a pickle": safetensors(pickle.dumps({"a": 1})),
}


class TestTensors:
    @pytest.mark.parametrize("name", HOSTILE_TENSORS)
    def test_a_hostile_header_is_damage(self, name: str) -> None:
        with pytest.raises(CacheError, match="damaged"):
            read_tensors(HOSTILE_TENSORS[name], "x.safetensors")

    def test_a_pickle_is_no_safetensors(self, canary: Path) -> None:
        with pytest.raises(CacheError, match="damaged"):
            read_tensors(pickled(canary), "x.safetensors")


class TestCaches:
    """A cache from elsewhere. A seal stops accidents, not someone who can write one: even so, nothing is run."""

    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        (tmp_path / "clips").mkdir()
        (tmp_path / "clips" / "a.mp4").write_bytes(CLIP)
        (tmp_path / "clips" / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "A clip ."}')
        encode(tmp_path / "clips", tmp_path / "cache")
        return tmp_path / "cache"

    @pytest.mark.parametrize("pattern", ["*/*/data/*", "*/*/spec.json", "plan/*", "*/*/manifests/*", "snapshots/*/*"])
    def test_a_pickle_in_the_place_of_any_file_is_damage(self, pattern: str, cache: Path, canary: Path) -> None:
        paths = sorted(cache.glob(pattern))
        assert paths
        for path in paths:
            good = path.read_bytes()
            path.write_bytes(pickled(canary))
            try:
                problems = verify_cache(LocalStorage(cache)).problems
            except MimirError as error:
                problems = [error]  # type: ignore[list-item]
            assert problems, path
            path.write_bytes(good)

    def test_a_document_that_nests_without_end_is_damage_even_with_a_right_seal(self, cache: Path) -> None:
        bomb = b'{"seal":"' + _ZEROS + b'","a":' + b"[" * 100_000
        with pytest.raises(CacheError, match="nested too deeply"):
            read_sealed_json(_seal(bomb, _JSON_MARK), "x.json")
        (path,) = cache.glob("t5/*/spec.json")
        path.write_bytes(b"[" * 100_000)
        with pytest.raises(CacheError, match="nested too deeply"):
            [folder.read_spec() for folder in find_features(LocalStorage(cache))]

    def test_a_sealed_list_is_no_document(self) -> None:
        with pytest.raises(CacheError, match="expected an object"):
            read_sealed_json(_seal(b'[{"seal":"' + _ZEROS + b'"}]', _JSON_MARK), "x.json")

    def test_extra_files_in_a_cache_are_never_read(self, cache: Path, canary: Path) -> None:
        for folder in [path for path in cache.rglob("*") if path.is_dir()]:
            for name in (".metadata", "data.pkl", "model.pt", "conftest.py", "sitecustomize.py"):
                (folder / name).write_bytes(pickled(canary))
        verify_cache(LocalStorage(cache))
        assert run("mimir-precompute", "status", cache).code in (0, 4)

"""Find a model's files, check that they are all there, and digest those that change the features. No torch here.

Weights are read from safetensors only and no code of a model repository is ever run.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mimir_precompute.config import ModelSource
from mimir_shared.errors import InputError, MachineError
from mimir_shared.plain_documents import parse_json

JsonValue = Any
"""What `json` reads and writes; the library gives it no type."""

ModelPart = Literal["weights", "tokenizer", "chat_template"]

WEIGHT_STEMS = ("model", "diffusion_pytorch_model")
"""The file names of transformers and diffusers; both load exactly these, whole or in shards listed by an index."""

CONFIG_FILES = ("config.json", "generation_config.json")

TOKENIZER_MODEL_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
"""A tokenizer folder holds at least one of these."""

TOKENIZER_FILES = (
    *TOKENIZER_MODEL_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")

HASH_CHUNK_BYTES = 1 << 22

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model on this machine, and what of it goes into the identity of a feature."""

    folder: Path
    """Where the files lie; never part of an identity."""
    name: str
    """Hub id, or "local" for a folder."""
    subfolder: str
    """Within the hub repository; empty for a folder."""
    commit: str | None
    """The hub commit that was resolved; None for a folder."""
    digests: Mapping[str, str]
    """sha256 of each file that changes the features, by its name in the folder."""
    config: Mapping[str, JsonValue]
    """config.json of the weights; empty for a tokenizer."""
    chat_template_sha256: str | None
    """Of the template's text, wherever the tokenizer keeps it; None without one."""


def resolve_model(source: ModelSource, parts: tuple[ModelPart, ...]) -> ResolvedModel:
    """Find a model in a folder or on the hub, check that the parts asked for are there, and digest them.

    Args:
        source: a folder, or a hub id (`id` or `id@revision`), with an optional subfolder of either.
        parts: what the encoder will load from it.
    Raises: InputError naming the place and what is missing there.
    """
    folder, name, commit = _locate(source)
    where = f"model folder {folder}" if name == "local" else f"model {source.name!r} ({folder})"
    files: list[Path] = []
    config: dict[str, JsonValue] = {}
    if "weights" in parts:
        config = _read_object(folder / "config.json", where, "weights cannot be loaded without it")
        files += _weight_files(folder, where)
        files += [folder / file for file in CONFIG_FILES]
    template = None
    if "tokenizer" in parts:
        if not any((folder / file).is_file() for file in TOKENIZER_MODEL_FILES):
            raise InputError(
                f"{where}: no tokenizer there (none of {', '.join(TOKENIZER_MODEL_FILES)}); "
                "save it beside the model with tokenizer.save_pretrained"
            )
        files += [folder / file for file in TOKENIZER_FILES]
        template = _chat_template(folder, where)
    if "chat_template" in parts and template is None:
        raise InputError(
            f"{where}: its tokenizer has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); answers need an instruction-tuned model"
        )
    return ResolvedModel(
        folder=folder,
        name=name,
        subfolder="" if name == "local" else source.subfolder,
        commit=commit,
        digests=_digests(folder, sorted({file for file in files if file.is_file()})),
        config=config,
        chat_template_sha256=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    )


def describe_model(model: Mapping[str, JsonValue]) -> str:
    """A model as an identity has it, for whoever is to find it: hub id, or how its weights' digest begins."""
    if model["name"] != "local":
        return f"{model['name']}{'@' + model['commit'] if model['commit'] else ''}"
    digests = model["sha256"]
    file = next((name for name in sorted(digests) if name.endswith(".safetensors")), min(digests))
    return f"the folder in which the sha256 of {file} begins with {digests[file][:12]}"


@contextmanager
def loading_from(model: ResolvedModel) -> Iterator[None]:
    """Turn what a library raises over damaged or unknown model files into one clear line."""
    from safetensors import SafetensorError

    try:
        yield
    except MemoryError as error:
        raise MachineError(f"model folder {model.folder}: not enough memory to load it ({error})") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise MachineError(f"model folder {model.folder}: not enough device memory to load it ({error})") from error
        if type(error).__name__ == "AcceleratorError":
            raise MachineError(f"model folder {model.folder}: the device failed as it was loaded ({error})") from error
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"model folder {model.folder}: cannot be loaded ({type(error).__name__}: {reason}); "
            "is it the right kind of model, and are its files whole?"
        ) from error


def refuse_incomplete(model: ResolvedModel, missing: list[str], mismatched: list[str]) -> None:
    """Raise InputError where weights are absent or of another shape: libraries fill them with random numbers.

    Args:
        missing: parameters that the model has and its files do not.
        mismatched: parameters whose shape in the files differs from config.json.
    """
    if missing or mismatched:
        kind, names = ("are missing", missing) if missing else ("have another shape than config.json says", mismatched)
        shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
        raise InputError(
            f"model folder {model.folder}: {len(names)} of its weights {kind} ({shown}); "
            "the files do not belong to this config.json: fetch or save the model again"
        )


def is_hub_id(name: str) -> bool:
    """Whether a name may be one of the hub: `owner/name`, with an optional `@revision`."""
    repo_id = name.partition("@")[0]
    return "/" in repo_id and _HUB_ID.fullmatch(repo_id) is not None


def refuse_missing_folder(source: ModelSource) -> None:
    """Raise InputError for a model that is neither in a folder here nor a hub id; the hub is not asked yet."""
    if Path(source.name).expanduser().exists() or not _HUB_ID.fullmatch(source.name.partition("@")[0]):
        _locate(source)


def read_config(folder: Path) -> dict[str, JsonValue]:
    """The config.json of a model's folder. Raises InputError."""
    return _read_object(folder / "config.json", f"model folder {folder}", "how large the model is stands there")


def _locate(source: ModelSource) -> tuple[Path, str, str | None]:
    """Returns the folder, the name for the identity, and the hub commit."""
    local = Path(source.name).expanduser()
    if local.is_dir():
        folder = local / source.subfolder if source.subfolder else local
        if not folder.is_dir():
            raise InputError(f"model folder {local}: it has no subfolder {source.subfolder!r}")
        return folder.resolve(), "local", None
    if local.exists():
        raise InputError(f"model {source.name!r}: is a file; give the folder that holds config.json and the weights")
    repo_id, _, revision = source.name.partition("@")
    if not _HUB_ID.fullmatch(repo_id):
        raise InputError(f"model folder {source.name!r}: does not exist")
    root = _download(repo_id, revision or None, source)
    folder = root / source.subfolder if source.subfolder else root
    if not folder.is_dir():
        raise InputError(f"model {source.name!r}: the repository has no subfolder {source.subfolder!r}")
    return folder, repo_id, root.name if _COMMIT.fullmatch(root.name) else None


def _download(repo_id: str, revision: str | None, source: ModelSource) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    prefix = f"{source.subfolder}/" if source.subfolder else ""
    weights = [
        name
        for stem in WEIGHT_STEMS
        for name in (f"{stem}.safetensors", f"{stem}-*-of-*.safetensors", f"{stem}.safetensors.index.json")
    ]
    patterns = [prefix + name for name in (*CONFIG_FILES, *TOKENIZER_FILES, *weights)]
    where = f"model {source.name!r}: neither a folder here nor to be had from the hub"
    # the hub's own HTTP error type, whichever client it is built on; it is not among its declared exports
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise InputError(f"{where}: access is restricted; accept its licence on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{where}: it has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{where}: no such repository; check the id, and set HF_TOKEN if it is private") from error
    except (http_error, errors.EntryNotFoundError, errors.RevisionResolutionError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = "HF_HUB_OFFLINE is set: unset it, or" if errors_say_offline(error) else "Check the network, or"
        raise InputError(f"{where} ({type(error).__name__}: {reason}). {hint} give a folder") from error


def errors_say_offline(error: BaseException) -> bool:
    """Whether the hub was not asked at all, because HF_HUB_OFFLINE forbids it."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or type(error).__name__ == "OfflineModeIsEnabled"


def _weight_files(folder: Path, where: str) -> list[Path]:
    """The safetensors files that the libraries will read, and the index that names them."""
    found: list[Path] = []
    for stem in WEIGHT_STEMS:
        whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if whole.is_file():
            found.append(whole)
        if index.is_file():
            weight_map = _read_object(index, where, "").get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError(f"{where}: {index.name} has no weight_map; fetch or save the model again")
            shards = sorted({folder / str(file) for file in weight_map.values()})
            absent = [shard.name for shard in shards if not shard.is_file()]
            if absent and not whole.is_file():
                raise InputError(f"{where}: {len(absent)} of {len(shards)} weight files missing, first {absent[0]}")
            found += [index, *(shard for shard in shards if shard.is_file())]
    if found:
        return found
    unsafe = sorted(file.name for file in folder.iterdir() if file.suffix in UNSAFE_SUFFIXES)
    if unsafe:
        raise InputError(
            f"{where}: weights only as {unsafe[0]}, which can run code when loaded; "
            "save them as safetensors (model.save_pretrained does)"
        )
    raise InputError(f"{where}: no weights there (expected {' or '.join(f'{s}.safetensors' for s in WEIGHT_STEMS)})")


def _chat_template(folder: Path, where: str) -> str | None:
    """The template's text, in the order in which transformers looks for it."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = _read_object(folder / name, where, "").get("chat_template")
            if template is not None:
                # several named templates are kept as a list: all of them then, as written
                return template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return None


def _read_object(file: Path, where: str, why: str) -> dict[str, JsonValue]:
    if not file.is_file():
        raise InputError(f"{where}: no {file.name} there" + (f"; {why}" if why else ""))
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{where}: {file.name} is not JSON ({error}); fetch or save the model again") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: {file.name} holds no JSON object; fetch or save the model again")
    return value


def _digests(folder: Path, files: list[Path]) -> dict[str, str]:
    # hashing lets go of the interpreter lock, and large models lie in several files
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = pool.map(sha256_of_file, files)
        return {file.relative_to(folder).as_posix(): digest for file, digest in zip(files, digests, strict=True)}


def sha256_of_file(file: Path) -> str:
    """Digest a file of any size in constant memory; 64 hex digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

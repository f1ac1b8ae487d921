"""Read and write a CogVideoX transformer in the folder layout of diffusers: config.json and safetensors.

No diffusers here: the file names, the index and the config's keys are all there is to the format.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mimir_shared.errors import CacheError, InputError
from mimir_shared.plain_documents import parse_json
from mimir_train.model.config import DiTConfig
from mimir_train.model.dit import DiT

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
CLASS_NAME = "CogVideoXTransformer3DModel"
DIFFUSERS_VERSION = "0.42.0"
"""The release whose reading of these keys the tests compare with."""

MAX_SHARD_BYTES = 10 * 10**9

FIXED_KEYS: Mapping[str, object] = {
    "activation_fn": "gelu-approximate",
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_elementwise_affine": True,
    "ofs_embed_dim": None,
    "patch_bias": True,
    "patch_size_t": None,
    "timestep_activation_fn": "silu",
    "use_learned_positional_embeddings": False,
}
"""Keys of config.json for which this model has one value: that of every CogVideoX 1.0 text-to-video release."""

Json = Any
"""What `json` reads; the library gives it no type."""


def find_transformer_folder(folder: Path) -> Path:
    """Accept a transformer's folder, or a whole pipeline's that has `transformer/` inside.

    Raises: InputError where neither holds a config.json.
    """
    for candidate in (folder, folder / "transformer"):
        if (candidate / CONFIG_NAME).is_file():
            return candidate
    raise InputError(
        f"{folder}: no {CONFIG_NAME} here or in transformer/; expected a diffusers folder of a CogVideoX transformer"
    )


def read_transformer_config(folder: Path) -> DiTConfig:
    """Read the sizes of a transformer from its folder's config.json.

    Raises: InputError for a folder that is no CogVideoX 1.0 transformer, naming each key that does not fit.
    """
    path = find_transformer_folder(folder) / CONFIG_NAME
    try:
        document: Json = parse_json(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(document).__name__}")
    if document.get("_class_name", CLASS_NAME) != CLASS_NAME:
        raise InputError(f"{path}: expected the class {CLASS_NAME}, got {document['_class_name']}")
    settings = {key: value for key, value in document.items() if not key.startswith("_")}
    if settings.get("patch_size_t") is not None:
        raise InputError(
            f"{path}: patch_size_t is {settings['patch_size_t']}, a CogVideoX 1.5 transformer; "
            f"only 1.0 (2B and 5B, patches of one latent frame) can be trained"
        )
    misfits = [
        f"{key} is {settings[key]!r}, expected {wanted!r}"
        for key, wanted in FIXED_KEYS.items()
        if key in settings and settings[key] != wanted
    ]
    types = {field.name: field.type for field in fields(DiTConfig)}
    misfits += [f"{key} is not known" for key in sorted(settings.keys() - types.keys() - FIXED_KEYS.keys())]
    misfits += [
        f"{key} is {value!r}, expected {getattr(types[key], '__name__', types[key])}"
        for key, value in settings.items()
        if key in types and not _is_of_type(value, types[key])
    ]
    if misfits:
        raise InputError(f"{path}: not a transformer that can be trained: {'; '.join(misfits)}")
    try:
        return DiTConfig(**{key: value for key, value in settings.items() if key in types})
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def load_transformer(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> DiT:
    """Build the transformer of a folder and fill it with the folder's weights.

    Args:
        dtype: of all parameters; None keeps them as they are stored.
    Raises:
        InputError: as `read_transformer_config`, or no safetensors in the folder.
        CacheError: the weights are damaged, or are not those of its config.
    """
    folder = find_transformer_folder(folder)
    config = read_transformer_config(folder)
    with torch.device("meta"):  # no memory and no time for an initialisation that is thrown away
        model = DiT(config)
    check_weights(folder, model)
    state_dict: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with _open_weights(path) as file:
            # tensor by tensor: a second copy of everything would not fit beside the first
            state_dict |= {name: file.get_tensor(name).to(device=device, dtype=dtype) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(state_dict, strict=True, assign=True)
    return model


def check_weights(folder: Path, model: nn.Module) -> None:
    """Compare names and shapes of a folder's weights with a model's; nothing but headers is read.

    Raises: InputError where there are none; CacheError for damaged files, and weights of another model.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with _open_weights(path) as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of this model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        shown = "; ".join(problems[:4])
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CacheError(f"{folder}: the weights are not those of its {CONFIG_NAME}: {shown}{more}")


def read_rows(folder: Path, rows: Callable[[str], tuple[int, int] | None]) -> Iterator[tuple[str, Tensor]]:
    """Read some rows of each weight: a rank's part, in the dtype that is stored.

    Args:
        folder: whose weights `check_weights` has found to be the model's.
        rows: of the weight of a name: (start, stop) along its first dim, or None for a weight that is not wanted.
    """
    for path in weight_files(folder):
        with _open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118 — not a mapping
                wanted = rows(name)
                if wanted is not None:
                    yield name, file.get_slice(name)[wanted[0] : wanted[1]]


def save_transformer(
    config: DiTConfig, state_dict: Mapping[str, Tensor], folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a transformer as a folder that diffusers' `from_pretrained` loads.

    Args:
        state_dict: of a `DiT`, whole tensors, in the dtype to store.
        folder: made where absent; transformer weights that it holds already are replaced.
        max_shard_bytes: above it the weights go to several files and an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("diffusion_pytorch_model*.safetensors"), folder / INDEX_NAME):
        stale.unlink(missing_ok=True)
    document = {"_class_name": CLASS_NAME, "_diffusers_version": DIFFUSERS_VERSION, **FIXED_KEYS, **asdict(config)}
    _write_json(folder / CONFIG_NAME, document)

    shards = _split_into_shards(state_dict, max_shard_bytes)
    if len(shards) == 1:
        _write_weights(folder / WEIGHTS_NAME, shards[0])
        return
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        name = f"diffusion_pytorch_model-{index:05d}-of-{len(shards):05d}.safetensors"
        _write_weights(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total_bytes = sum(tensor.nbytes for tensor in state_dict.values())
    _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _is_of_type(value: Json, wanted: object) -> bool:
    """JSON writes 1.0 as 1 at will, and Python takes True for 1: here a float may be an int, a bool is no number."""
    return type(value) is wanted or (wanted is float and type(value) is int)


def weight_files(folder: Path) -> list[Path]:
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        try:
            weight_map: Mapping[str, str] = parse_json(index_path.read_text(encoding="utf-8"))["weight_map"]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise CacheError(f"{index_path}: not an index of safetensors files ({error!r}); copy it again") from error
        return [folder / name for name in sorted(set(weight_map.values()))]
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    raise InputError(f"{folder}: neither {WEIGHTS_NAME} nor {INDEX_NAME}; weights must be safetensors")


@contextmanager
def _open_weights(path: Path) -> Iterator[Any]:  # Any: the library types its handle so
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path}: missing or damaged ({error}); copy it again") from error


def _split_into_shards(state_dict: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    """Cut in the order of the model, each shard as full as the limit allows."""
    shards: list[dict[str, Tensor]] = [{}]
    shard_bytes = 0
    for name, tensor in state_dict.items():
        if shards[-1] and shard_bytes + tensor.nbytes > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += tensor.nbytes
    return shards


def _write_weights(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    # loaders look for the metadata before they believe that the tensors are torch's
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}, path, {"format": "pt"})


def _write_json(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")

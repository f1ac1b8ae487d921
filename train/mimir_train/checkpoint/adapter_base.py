"""The transformer that adapters stand on: outside of checkpoints, and known by the digests of its weights."""

from pathlib import Path

from mimir_shared.errors import CacheError
from mimir_shared.storage.folder import machine_faults
from mimir_train.checkpoint.folder import BaseRecord, FileDigest, LoraRecord, digest_file
from mimir_train.config import LoraConfig
from mimir_train.weights.initial_transformer import locate_transformer
from mimir_train.weights.transformer_folder import weight_files


def record_adapters(lora: LoraConfig, init_from: str, folder: Path) -> LoraRecord:
    """What a checkpoint says of adapters; every byte of their base is read for it.

    Args:
        init_from: hub id or folder of the base; a folder is recorded by its whole path, to be found from anywhere.
        folder: where its transformer lies now.
    """
    name = str(Path(init_from).absolute()) if Path(init_from).is_dir() else init_from
    base = BaseRecord(name=name, files=_digests(folder))
    return LoraRecord(rank=lora.rank, alpha=lora.settled_alpha, targets=lora.targets, base=base)


def find_base(record: BaseRecord, name: str, option: str, *, verify: bool) -> Path:
    """The folder of the base's transformer.

    Args:
        name: of a folder or a hub repository, as `option` gave it.
        verify: compare every byte with what the adapters were trained on.
    Raises: InputError where there is none such; CacheError where it is another.
    """
    folder = locate_transformer(name, option)
    found = _digests(folder) if verify else record.files
    for file in sorted(found.keys() | record.files.keys()):
        if found.get(file) != record.files.get(file):
            problem = "is missing" if file not in found else "has other bytes" if file in record.files else "is new"
            raise CacheError(
                f"{folder}: not the transformer that the adapters were trained on ({record.name}): {file} {problem}; "
                f"give that one by {option}"
            )
    return folder


def lora_config(record: LoraRecord) -> LoraConfig:
    return LoraConfig(rank=record.rank, alpha=record.alpha, targets=record.targets)


def _digests(folder: Path) -> dict[str, FileDigest]:
    with machine_faults(f"{folder}: reading the transformer that adapters stand on"):
        return {path.name: digest_file(path) for path in weight_files(folder)}

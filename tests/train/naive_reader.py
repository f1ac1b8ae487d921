"""The plainest way to read a batch, by what the formats themselves promise: no index, no threads, no memory of ours.

It finds a clip's bytes with the libraries of the formats and stacks them with numpy: what the reader gives must be
equal bit for bit.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
import zarr
from safetensors.torch import load
from torch import Tensor

Samples = dict[str, dict[str, Tensor]]
"""key → name → tensor"""


def read_cache(root: Path) -> Samples:
    """Every sample that lies in the tars or zarr groups of a cache."""
    found: Samples = {}
    for path in sorted(root.glob("*/*/data/*.zarr")):
        group = zarr.open_group(path, mode="r")
        for part in (group, *(child for _, child in group.groups())):
            _read_zarr_group(part, found)
    for path in sorted(root.glob("*/*/data/*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
        for name, data in members.items():
            if name.endswith(".json"):
                key = json.loads(io.BytesIO(data).read())["key"]
                tensors = members.get(name.removesuffix(".json") + ".safetensors")
                found.setdefault(key, {}).update(load(tensors) if tensors else {})
    return found


def _read_zarr_group(group: zarr.Group, found: Samples) -> None:
    """The arrays of one group; its attribute `keys` names the clips, in order."""
    names = [name for name, _ in group.arrays()]
    for name in names:
        if name in ("rows", "documents") or name.endswith("_lengths"):
            continue
        array = group[name]
        values = np.asarray(array[:])
        lengths = np.asarray(group[f"{name}_lengths"][:]) if f"{name}_lengths" in names else None
        for row, key in enumerate(group.attrs["keys"]):
            own = values[row] if lengths is None else values[row, : lengths[row]]
            tensor = torch.from_numpy(own.copy())
            is_bf16 = array.attrs.get("dtype") in ("bf16", "bfloat16")
            found.setdefault(key, {})[name] = tensor.view(torch.bfloat16) if is_bf16 else tensor


def stack(tensors: list[Tensor], num_rows: int | None = None) -> Tensor:
    """(B, rows, …), rows that are not there zero; as many as asked for, or as the longest has, at least 1."""
    rows = num_rows or max(1, *(len(tensor) for tensor in tensors))
    padded = np.zeros((len(tensors), rows, *tensors[0].shape[1:]), np.float32)
    for clip, tensor in enumerate(tensors):
        padded[clip, : len(tensor)] = tensor.float().numpy()
    return torch.from_numpy(padded).to(tensors[0].dtype)


def bits(tensor: Tensor) -> Tensor:
    """For comparing: NaN of equal bits are equal, zeros of different sign are not."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])

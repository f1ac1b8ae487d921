"""The configs that say how large a model is, found without a network: in a folder, on this machine, or known here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from mimir_precompute.config import ModelOptions, ModelSource
from mimir_precompute.model_files import is_hub_id, read_config
from mimir_precompute.model_options import model_source
from mimir_precompute.planning.vae_roofline import DEFAULT_CONFIG
from mimir_precompute.presets import PRESETS, Preset
from mimir_shared.errors import InputError


class UnknownSizeError(InputError):
    """How large a model is, or what it costs, is not known here: no estimate, but no obstacle to the work either."""


SizedPart = Literal["vae", "text_encoder", "llm", "transformer"]

_T5_XXL: Final = {
    "d_model": 4096,
    "d_kv": 64,
    "num_heads": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}
_PHI_3_5_MINI: Final = {
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 32064,
}
_TRANSFORMER_2B: Final = {"num_attention_heads": 30, "attention_head_dim": 64, "num_layers": 30}
_TRANSFORMER_5B: Final = {**_TRANSFORMER_2B, "num_attention_heads": 48, "num_layers": 42}

_KNOWN: Final[Mapping[tuple[str, str], Mapping[str, Any]]] = MappingProxyType(
    {
        **{
            (f"{owner}/CogVideoX-{size}", part): config
            for owner in ("THUDM", "zai-org")
            for size, transformer in (("2b", _TRANSFORMER_2B), ("5b", _TRANSFORMER_5B))
            for part, config in (("vae", DEFAULT_CONFIG), ("text_encoder", _T5_XXL), ("transformer", transformer))
        },
        ("microsoft/Phi-3.5-mini-instruct", ""): _PHI_3_5_MINI,
    }
)
"""(hub id, subfolder) → what of config.json says how large it is."""

TOY_CONFIGS: Final[Mapping[SizedPart, Mapping[str, Any]]] = MappingProxyType(
    {
        "vae": {
            "block_out_channels": (16, 32, 32),
            "latent_channels": 8,
            "layers_per_block": 1,
            "temporal_compression_ratio": 4,
        },
        "text_encoder": {
            "d_model": 64,
            "d_kv": 16,
            "num_heads": 4,
            "d_ff": 128,
            "num_layers": 2,
            "feed_forward_proj": "gated-gelu",
        },
        "llm": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "vocab_size": 1176,
        },
        "transformer": {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "num_layers": 4,
            "time_embed_dim": 64,
            "text_embed_dim": 64,
            "in_channels": 8,
            "out_channels": 8,
        },
    }
)
"""Of the models that `toy` writes: those of the preset tiny, where no folder is given."""


@dataclass(frozen=True, kw_only=True)
class SizedModel:
    """A model by its size."""

    name: str
    """For people: hub id or folder, with the part that is meant."""
    config: Mapping[str, Any]


def sized_model(options: ModelOptions, preset: Preset | None, part: SizedPart) -> SizedModel:
    """How large the model is that `encode` would load for a part; without a preset those of cogvideox-5b.

    Raises: UnknownSizeError where it is neither in a folder nor known; nothing is downloaded.
    """
    default = preset or PRESETS["cogvideox-5b"]
    source = _source(options, default, part)
    if not source.name:
        return SizedModel(name=f"toy {part}", config=TOY_CONFIGS[part])
    name = f"{source.name}/{source.subfolder}" if source.subfolder else source.name
    folder = Path(source.name).expanduser()
    if folder.is_dir():
        return SizedModel(name=name, config=read_config(folder / source.subfolder))
    known = _KNOWN.get((source.name.partition("@")[0], source.subfolder))
    if known is None:
        known = _downloaded_config(source)
    return SizedModel(name=name, config=known)


def _source(options: ModelOptions, preset: Preset, part: SizedPart) -> ModelSource:
    if part != "transformer":
        return model_source(options, preset, part, needed=False)
    # no option of stage one names it: it lies beside the others, or is the preset's
    beside = options.models is not None and (Path(options.models).expanduser() / part).is_dir()
    return ModelSource(name=(options.models if beside else preset.models) or "", subfolder=part)


def _downloaded_config(source: ModelSource) -> Mapping[str, Any]:
    """Of a model of the hub that this machine has, whoever downloaded it."""
    repo_id, _, revision = source.name.partition("@")
    if is_hub_id(source.name):
        from huggingface_hub import try_to_load_from_cache

        name = f"{source.subfolder}/config.json" if source.subfolder else "config.json"
        found = try_to_load_from_cache(repo_id, name, revision=revision or None)
        if isinstance(found, str):
            return read_config(Path(found).parent)
    raise UnknownSizeError(
        f"the size of {source.name} is not known here, and nothing is downloaded to find out; give a folder that has it"
    )

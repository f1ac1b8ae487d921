"""The frozen models around the trained one: prompts become text features, latents become pixels.

The only module of stage two that reaches into stage one: sampling must encode a prompt exactly as the
captions were encoded that the model was trained on, by the same code, and so it does. The training loop never does.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from torch import Tensor

from mimir_precompute.config import (
    AnswersSettings,
    Bucket,
    EncodeSettings,
    Geometry,
    Instruction,
    LlmSettings,
    ModelSource,
    T5Settings,
    VaeSettings,
)
from mimir_precompute.device import choose_device
from mimir_precompute.encoders.base import Encoded, EncoderInput
from mimir_precompute.encoders.build import build_encoder
from mimir_precompute.identity import LLM_LAYER_NAMES, feature_identity, resolve_models, tensor_specs
from mimir_precompute.inspection.find_clip import write_video
from mimir_shared.errors import CacheError, InputError
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.fingerprint import differences
from mimir_shared.wording import noun_for
from mimir_train.batch import collate_text
from mimir_train.config import TextAlign
from mimir_train.objective import TextFeatures

JsonValue = Any
"""What `json` reads; the library gives it no type."""

Identities = Mapping[FeatureName, Mapping[str, JsonValue]]
"""What made each feature that the model was trained on, as the cache's spec.json has it."""

NOT_COMPARED: Mapping[FeatureName, tuple[str, ...]] = {
    "latents": ("engine", "engine_version", "geometry", "tensors"),
    "answers": ("engine", "engine_settings", "attention", "batch_size"),
    "llm": ("engine", "engine_settings", "attention", "batch_size"),
}
"""Fields of an identity that may differ: latents are only decoded here, and at other sizes than those of training;
answers and hidden states are transformers' own, one prompt at a time, whichever engine made those of the cache."""

MODEL_NAMES = ("name", "subfolder", "commit")
"""What a model is called; its files' digests decide, so that a copy in a folder is the model of the hub."""

_DIGEST: Final = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
"""Told by its first 12 digits, alone or within a list."""

__all__ = ["FrozenModels", "Identities", "ModelLocations", "Progress", "choose_device", "write_video"]


class Progress(Protocol):
    """Told what is going on."""

    def say(self, text: str) -> None: ...

    def start(self, what: str, total: int) -> None: ...

    def advance(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ModelLocations:
    """Where the frozen models lie: folders or hub ids, as typed."""

    models: str | None
    """With vae, text_encoder, tokenizer (and llm) inside; what follows goes before it."""
    t5: str | None = None
    vae: str | None = None
    llm: str | None = None

    def source(self, part: str) -> ModelSource:
        """Raises InputError, naming the options, where nothing says where the part lies."""
        option = "t5" if part in ("text_encoder", "tokenizer") else part
        own = {"t5": self.t5, "vae": self.vae, "llm": self.llm}[option]
        name = own or self.models
        if name is None:
            raise InputError(
                f"no {part.replace('_', ' ')}: give --models (a folder or hub id with vae, text_encoder, tokenizer "
                f"and llm) or --{option}"
            )
        # the folder or repository of one model alone is taken as it is, a pipeline's by its part
        alone = own is not None and (part == "llm" or (Path(own).is_dir() and not (Path(own) / part).is_dir()))
        return ModelSource(name=name, subfolder="" if alone else part)


class FrozenModels:
    """The models that a cache was made with, found again; each is loaded when it is asked for, and let go after."""

    def __init__(
        self, recorded: Identities, features: Sequence[FeatureName], locations: ModelLocations, device: str
    ) -> None:
        """Find the models and compare them with those that the trained model knows.

        Args:
            recorded: of the checkpoint.
            features: to be made here besides `latents`, which is always decoded: t5; answers and llm.
            device: a torch device name.
        Raises: InputError where a model is not found, CacheError where one is not the recorded one.
        """
        self._recorded = recorded
        self._features = tuple(feature for feature in FEATURES if feature in ("latents", *features))
        self._settings = _settings_of(recorded, self._features, locations, device)
        self._geometry = _geometry_of(recorded)
        self._models = resolve_models(self._settings, self._features)
        self._refuse_other_models()

    def latent_shape(self, bucket: str) -> tuple[int, int, int, int]:
        """(C, T, h, w) of videos of a size FxHxW. Raises InputError for a size that the VAE cannot make."""
        size = Bucket.parse(bucket)
        settings = replace(self._settings, latents=replace(self._settings.latents, stored=("mean",), tiling=False))
        (spec,) = tensor_specs("latents", settings, self._models["latents"].model.config, size)
        channels, frames, height, width = (int(length or 0) for length in spec.sizes)
        return channels, frames, height, width

    def encode_texts(
        self,
        texts: Sequence[str],
        t5_rows: int,
        text_align: TextAlign,
        progress: Progress,
    ) -> dict[str, TextFeatures]:
        """Encode each text as captions were encoded; "" gives the features of the empty prompt.

        One text at a time, so that a text's features never depend on its company; one model at a time.

        Args:
            t5_rows: L; ragged rows are padded with zeros up to it.
            text_align: how the LLM's tokens meet T5's, as in training.
        Returns: by text, features with B = 1 on the CPU; `llm` is None where no `llm` feature is made here.
        """
        encoded: dict[FeatureName, dict[str, Encoded]] = {}
        for feature in self._features:
            if feature != "latents":
                answers = encoded.get("answers", {})
                encoded[feature] = self._encode(feature, texts, answers, progress)
        return {
            text: collate_text(
                [encoded["t5"][text].tensors],
                [encoded["llm"][text].tensors] if "llm" in encoded else None,
                t5_rows=t5_rows,
                text_align=text_align,
            )
            for text in texts
        }

    @contextmanager
    def decoder(self, scaling_factor: float) -> Iterator[Callable[[Tensor], np.ndarray]]:
        """Load the VAE; gives a function from scaled latents (C, T, h, w) to pixels (F, H, W, 3) uint8."""
        with self._loaded("latents", self._settings) as vae:

            def decode(latents: Tensor) -> np.ndarray:
                pixels: np.ndarray = vae.decode_latents((latents.float() / scaling_factor).cpu().numpy())
                return pixels

            yield decode

    def _encode(
        self,
        feature: FeatureName,
        texts: Sequence[str],
        answers: Mapping[str, Encoded],
        progress: Progress,
    ) -> dict[str, Encoded]:
        # of several answers the first is read, the greedy one; the others need not be made
        settings = replace(self._settings, answers=replace(self._settings.answers, variants=1))
        encoded: dict[str, Encoded] = {}
        progress.start(f"{noun_for(len(texts), 'text')} through {feature}", len(texts))
        with self._loaded(feature, settings) as encoder:
            for text in texts:
                document = answers[text].document if text in answers else None
                encoded[text] = encoder.encode([EncoderInput(key=text, caption=text, answers=document)])[0]
                if encoded[text].document.get("t5_truncated"):
                    limit = settings.t5.max_length
                    progress.say(f"note: T5 reads {limit} tokens, the rest of this text is cut: {_short(text)!r}")
                progress.advance()
        return encoded

    @contextmanager
    def _loaded(self, feature: FeatureName, settings: EncodeSettings) -> Iterator[Any]:
        # Any: decode_latents is the VAE's alone, and no part of the interface that all encoders share
        encoder = build_encoder(feature, settings, self._models[feature], settings.device)
        try:
            yield encoder
        finally:
            encoder.close()

    def _refuse_other_models(self) -> None:
        problems: list[str] = []
        differing: set[str] = set()
        for feature in self._features:
            current = feature_identity(
                feature,
                self._settings,
                self._geometry,
                self._models[feature],
                # the recorded one: what differs in it is told as a difference of `answers` itself
                answers=self._recorded.get("answers"),
            )
            left_out = NOT_COMPARED.get(feature, ())
            old, new = _without_names(self._recorded[feature], left_out), _without_names(current, left_out)
            found = [f"{feature} {field}: {_short(a)} → {_short(b)}" for field, a, b in differences(old, new)]
            if found:
                problems += found
                differing.add(str(self._models[feature].model.folder))
        if problems:
            shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
            raise CacheError(
                f"{', '.join(sorted(differing))}: not the models that the checkpoint was trained with: {shown} "
                f"(recorded → found); give those that made its cache"
            )


def _settings_of(
    recorded: Identities, features: Sequence[FeatureName], locations: ModelLocations, device: str
) -> EncodeSettings:
    """The settings that the identities were written from. Raises CacheError where one lacks a field."""
    nowhere = ModelSource(name="")
    missing = [feature for feature in features if feature not in recorded]
    if missing:
        raise CacheError(f"the checkpoint records no identity of {', '.join(missing)}; it is damaged, or not complete")
    for_llm = locations.source("llm") if "answers" in features else nowhere
    try:
        return EncodeSettings(
            latents=_latents_settings(recorded["latents"], locations.source("vae")),
            t5=_t5_settings(recorded["t5"], locations)
            if "t5" in features
            else T5Settings(text_encoder=nowhere, tokenizer=nowhere),
            answers=_answers_settings(recorded["answers"], for_llm)
            if "answers" in features
            else AnswersSettings(source=nowhere),
            llm=_llm_settings(recorded["llm"], for_llm) if "llm" in features else LlmSettings(source=nowhere),
            device=device,
        )
    except (KeyError, TypeError) as fault:
        raise CacheError(
            f"the identities that the checkpoint records cannot be read ({fault!r}); it was written by another release"
        ) from fault


def _latents_settings(identity: Mapping[str, JsonValue], source: ModelSource) -> VaeSettings:
    return VaeSettings(
        source=source,
        dtype=identity["dtype"],
        engine="diffusers",  # which decodes; the other engine is an encoder
        stored=tuple(identity["stored"]),
        tiling=identity["tiling"],
        batch_size=identity["batch_size"],
        seed=identity["sample_seed"] or 0,
    )


def _t5_settings(identity: Mapping[str, JsonValue], locations: ModelLocations) -> T5Settings:
    return T5Settings(
        text_encoder=locations.source("text_encoder"),
        tokenizer=locations.source("tokenizer"),
        dtype=identity["dtype"],
        max_length=identity["max_length"],
        rows=identity["rows"],
        batch_size=identity["batch_size"],
    )


def _answers_settings(identity: Mapping[str, JsonValue], source: ModelSource) -> AnswersSettings:
    sampling = identity["sampling"] or {"temperature": 1.0, "seed": 0}
    return AnswersSettings(
        source=source,
        dtype=identity["dtype"],
        instructions=tuple(Instruction(name=i["name"], text=i["text"]) for i in identity["instructions"]),
        max_caption_tokens=identity["max_caption_tokens"],
        max_answer_tokens=identity["max_answer_tokens"],
        max_instruction_tokens=identity["max_instruction_tokens"],
        variants=identity["variants"],
        temperature=sampling["temperature"],
        seed=sampling["seed"],
    )


def _llm_settings(identity: Mapping[str, JsonValue], source: ModelSource) -> LlmSettings:
    return LlmSettings(
        source=source,
        dtype=identity["dtype"],
        max_caption_tokens=identity["max_caption_tokens"],
        layer=next((layer for layer, name in LLM_LAYER_NAMES.items() if name == identity["layer"]), identity["layer"]),
        instruction_pooling=identity["instruction_pooling"],
        batch_size=identity.get("batch_size", LlmSettings.batch_size),
    )


def _geometry_of(recorded: Identities) -> Geometry:
    try:
        geometry = recorded["latents"]["geometry"]
        return Geometry(buckets=tuple(Bucket.parse(text) for text in geometry["buckets"]), fps=geometry["fps"])
    except (KeyError, TypeError) as fault:
        raise CacheError(f"the identity of latents that the checkpoint records has no geometry ({fault!r})") from fault


def _without_names(identity: Mapping[str, JsonValue], left_out: Sequence[str]) -> dict[str, JsonValue]:
    kept = {field: value for field, value in identity.items() if field not in left_out}
    for field in ("model", "tokenizer"):
        if isinstance(kept.get(field), Mapping):
            kept[field] = {name: value for name, value in kept[field].items() if name not in MODEL_NAMES}
    return kept


def _short(value: JsonValue) -> str:
    text = _DIGEST.sub(r"\1", value if isinstance(value, str) else repr(value))
    return text if len(text) <= 60 else text[:57] + "..."

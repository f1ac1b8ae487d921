"""The real encoders, behind the interface of the pipeline. Models and their libraries load in `build`."""

from collections.abc import Mapping
from typing import Final

from mimir_precompute.config import EncodeSettings, Geometry
from mimir_precompute.encoders.base import Encoder, JsonValue
from mimir_precompute.encoders.build import build_encoder
from mimir_precompute.identity import FeatureModels, feature_identity, resolve_models
from mimir_shared.features import FeatureName

_WHOLE_SHARD: Final = 1 << 20
_CLIPS_OF_ROWS: Final = 64
"""What is kept of a clip's rows takes up to 2 MB for each answer of a 3,072-wide LLM in bfloat16."""


class ModelEncoders:
    """Finds, digests and loads the models that the settings name."""

    def __init__(self, settings: EncodeSettings, geometry: Geometry) -> None:
        self._settings = settings
        self._geometry = geometry
        self._models: dict[FeatureName, FeatureModels] = {}

    def resolve(self, features: tuple[FeatureName, ...]) -> None:
        """Find the models of these features at once, so that one that two of them share is read once."""
        self._models.update(resolve_models(self._settings, features))

    def identity(
        self, feature: FeatureName, dependencies: Mapping[FeatureName, Mapping[str, JsonValue]]
    ) -> dict[str, JsonValue]:
        return feature_identity(
            feature, self._settings, self._geometry, self._models[feature], answers=dependencies.get("answers")
        )

    def batch_size(self, feature: FeatureName) -> int:
        # vLLM forms its own batches, and the larger the set it chooses from the better: a shard of answers at once;
        # of hidden rows as many as fit into memory
        answers, llm = self._settings.answers, self._settings.llm
        sizes: dict[FeatureName, int] = {
            "latents": self._settings.latents.batch_size,
            "t5": self._settings.t5.batch_size,
            "answers": answers.batch_size if answers.engine == "transformers" else _WHOLE_SHARD,
            "llm": llm.batch_size if llm.engine == "transformers" else _CLIPS_OF_ROWS,
        }
        return sizes[feature]

    def build(self, feature: FeatureName) -> Encoder:
        return build_encoder(feature, self._settings, self._models[feature], self._settings.device)

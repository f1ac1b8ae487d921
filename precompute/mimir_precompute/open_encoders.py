"""From the options about models to encoders whose models are found and digested, and not loaded yet."""

from collections.abc import Sequence

from mimir_precompute.config import ModelOptions
from mimir_precompute.device import choose_device
from mimir_precompute.model_encoders import ModelEncoders
from mimir_precompute.model_options import encode_settings
from mimir_precompute.planning.plan import geometry_of
from mimir_precompute.presets import find_preset
from mimir_shared.features import FEATURES, FeatureName
from mimir_shared.plan_file import Plan


def open_encoders(
    plan: Plan, options: ModelOptions, features: Sequence[FeatureName], *, device: str | None = None
) -> ModelEncoders:
    """Find and digest the models of some features; none is loaded yet.

    Args:
        device: where they will run, if that is not to be asked of this machine.
    Raises: InputError for what is missing.
    """
    preset = find_preset(plan.settings.preset) if plan.settings.preset else None
    settings = encode_settings(options, preset, features, device or choose_device(options.device))
    encoders = ModelEncoders(settings, geometry_of(plan.settings))
    encoders.resolve(with_dependencies(features))
    return encoders


def with_dependencies(features: Sequence[FeatureName]) -> tuple[FeatureName, ...]:
    """Some features and those that they are made from, in the order in which they are made."""
    return tuple(f for f in FEATURES if f in features or (f == "answers" and "llm" in features))

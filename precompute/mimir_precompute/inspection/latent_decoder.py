"""The VAE that decodes what a cache holds: the one that encoded it, or none."""

from collections.abc import Mapping
from typing import Any

from mimir_precompute.config import ModelSource, VaeSettings
from mimir_precompute.encoders.vae import VaeEncoder
from mimir_precompute.identity import PARTS
from mimir_precompute.model_files import describe_model, resolve_model
from mimir_shared.errors import CacheError
from mimir_shared.fingerprint import fingerprint


def load_decoder(source: ModelSource, identity: Mapping[str, Any], device: str) -> VaeEncoder:
    """Load a VAE for decoding.

    Args:
        identity: of the cache's `latents`.
    Raises: CacheError where the VAE's files are not those that made the latents.
    """
    model = resolve_model(source, PARTS["latents"])
    encoded_with = identity["model"]["sha256"]
    if dict(model.digests) != encoded_with:
        changed = sorted(
            name for name in {*model.digests, *encoded_with} if model.digests.get(name) != encoded_with.get(name)
        )
        raise CacheError(
            f"{model.folder}: not the VAE that made these latents ({', '.join(changed)} differ) of fingerprint "
            f"{fingerprint(identity)[:12]}; give {describe_model(identity['model'])}, or choose other latents "
            f"by --feature"
        )
    return VaeEncoder(model, VaeSettings(source=source, dtype=identity["dtype"]), device)

"""Which worker makes which features, in which order, and with how many decoders."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from mimir_precompute.option_values import choose_numbers
from mimir_shared.errors import InputError
from mimir_shared.features import DEPENDENCIES, FEATURES, FeatureName

Placement = Mapping[FeatureName, tuple[int, ...]]
"""Feature → numbers of the workers that make it."""

DECODERS_EACH: Final = 2


def parse_placement(texts: Sequence[str], num_workers: int, features: Sequence[FeatureName]) -> Placement:
    """Read "latents=all" or "t5=0" or "latents=0-6,llm=7" options.

    What is not named is made by all workers; answers not named are made where llm is, for both have one model.

    Raises: InputError for what is none of these, and where a worker would have nothing to make.
    """
    everyone = tuple(range(num_workers))
    named: dict[FeatureName, tuple[int, ...]] = {}
    for text in texts:
        for part in re.split(r",(?=[a-z0-9]+=)", text):
            name, equals, workers = part.partition("=")
            feature = next((feature for feature in FEATURES if feature == name), None)
            if feature is None or not equals:
                raise InputError(
                    f"--place {part!r}: expected FEATURE=WORKERS, for instance latents=all or t5=0 or llm=1-3, with "
                    f"FEATURE one of {', '.join(FEATURES)}"
                )
            named[feature] = choose_numbers(f"--place {name}=", workers, num_workers, "worker", "there are")
    if "answers" not in named and "llm" in named:
        named["answers"] = named["llm"]
    placement = {feature: named.get(feature, everyone) for feature in features}
    idle = [worker for worker in everyone if not features_of(worker, placement)]
    if idle:
        raise InputError(
            f"--place {' '.join(texts)}: worker {idle[0]} of {num_workers} has nothing to make; give it a feature, or "
            f"fewer --workers"
        )
    return placement


def features_of(worker: int, placement: Placement) -> tuple[FeatureName, ...]:
    """What a worker makes, in its order: first what few workers make, then where it helps the others.

    What a feature of its own is made from comes before it, so that a worker which waits has nothing left that
    somebody may wait for.
    """
    own = [feature for feature in FEATURES if worker in placement.get(feature, ())]
    order: list[FeatureName] = []
    for feature in sorted(own, key=lambda feature: (len(placement[feature]), FEATURES.index(feature))):
        order += [needed for needed in DEPENDENCIES[feature] if needed in own and needed not in order]
        order += [feature] if feature not in order else []
    return tuple(order)


def share_decoders(total: int | None, worker: int, placement: Placement, cores: int) -> int:
    """Processes that decode for one worker, at least one.

    Args:
        total: of all workers together; None: two for each, as far as there are cores.
        cores: of this machine.
    """
    decoding = placement.get("latents", ())
    if worker not in decoding:
        return 1
    if total is None:
        return max(1, min(DECODERS_EACH, cores // len(decoding)))
    share, more = divmod(total, len(decoding))
    return max(1, share + (decoding.index(worker) < more))

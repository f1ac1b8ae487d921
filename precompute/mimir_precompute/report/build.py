"""The whole page, from a cache and a few choices. Reads; writes nothing into the cache."""

from collections.abc import Mapping
from pathlib import Path

from mimir_precompute.inspection.status import read_status
from mimir_precompute.report.channels import channel_figures, drift_figure, shards_unlike_others, value_rows
from mimir_precompute.report.facts import collect_facts
from mimir_precompute.report.gallery import LatentDecoder, gallery_cards
from mimir_precompute.report.lengths import bucket_rows, length_figures
from mimir_precompute.report.quarantine import quarantine_reasons, read_quarantine
from mimir_precompute.report.samples import SampleReader
from mimir_precompute.report.scan import choose_features, scan_cache
from mimir_precompute.report.sources import FrameDecoder, SourceFrames
from mimir_shared.page.render import render_page
from mimir_shared.plan_file import read_plan
from mimir_shared.snapshot import list_snapshots
from mimir_shared.storage.protocol import Storage

_TEMPLATE = Path(__file__).parent / "report.html.j2"


def build_report(
    storage: Storage,
    *,
    name: str,
    gallery: int,
    wanted: Mapping[str, str],
    decoder: FrameDecoder,
    decode_latents: LatentDecoder | None,
) -> str:
    """The page as HTML; equal caches of one name give equal pages.

    Args:
        name: of the cache, as the page calls it.
        gallery: clips to show.
        wanted: feature → beginning of the fingerprint, where the cache has a feature more than once.
        decoder: of source clips; a bad one must not end this process.
        decode_latents: the VAE that encoded; without one the latents are shown in false colours.
    Raises: InputError where there is no plan, CacheError where the plan or a record is damaged.
    """
    plan, status = read_plan(storage), read_status(storage)
    scan = scan_cache(plan, choose_features(storage, wanted))
    reader = SampleReader(scan.features)
    sources = SourceFrames(plan.settings, decoder)
    quarantined = read_quarantine(plan, scan.features.values())
    answers = scan.features.get("answers")
    values = {
        "facts": collect_facts(storage, name, status, scan, quarantined),
        "plan": plan.settings,
        "num_shards": plan.num_shards,
        "plan_seals": [file.seal for file in plan.files],
        "snapshots": list_snapshots(storage),
        "buckets": bucket_rows(scan, plan.settings.fps),
        "reasons": quarantine_reasons(plan, quarantined, sources),
        "lengths": length_figures(scan, reader),
        "channels": channel_figures(scan),
        "values": value_rows(scan),
        "drift": drift_figure(scan),
        "unlike": shards_unlike_others(storage, scan),
        "instructions": answers.read_spec().identity.get("instructions", []) if answers else [],
        "cards": gallery_cards(scan, reader, sources, plan.settings.fps, gallery, decode_latents),
        "is_decoded": decode_latents is not None,
        "damage": reader.damage,
    }
    return render_page(_TEMPLATE, values)

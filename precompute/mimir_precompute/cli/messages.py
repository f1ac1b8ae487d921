"""What the commands of stage one print for people; what they print for programs is JSON, made where the facts are."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimir_precompute.conversion.convert import ConvertOutcome
from mimir_precompute.conversion.merge import MergeOutcome
from mimir_precompute.gc import GcReport
from mimir_precompute.inspection.diff import CacheDifference
from mimir_precompute.inspection.stats import CacheStatistics
from mimir_precompute.inspection.status import CacheStatus
from mimir_precompute.inspection.verify import Problem, VerifyReport
from mimir_precompute.pipeline import EncodeOutcome
from mimir_precompute.planning.plan import PlanReport
from mimir_precompute.quarantine import QuarantinedClip
from mimir_precompute.repair import RepairOutcome
from mimir_precompute.retry import RetryOutcome
from mimir_precompute.workers.seen import SeenWorker
from mimir_shared.features import FEATURES
from mimir_shared.snapshot import Snapshot
from mimir_shared.wording import counted, describe_duration, format_size

_LEDGER_LINES = 50


def describe_plan(report: PlanReport, *, dry_run: bool = False) -> str:
    """One line on what planning found."""
    changes = [
        f"{count} {name}"
        for count, name in ((report.new, "new"), (report.changed, "changed"), (report.removed, "removed"))
        if count
    ]
    count = report.missing_files
    missing = f"; {counted(count, 'file')} {'is' if count == 1 else 'are'} missing" if count else ""
    done = "would be planned" if dry_run else ("planned" if report.written else "nothing to plan")
    return (
        f"plan: {counted(report.clips, 'clip')} ({', '.join(changes) or 'all as planned before'}){missing}; "
        f"{f'{report.new_shards} new of ' if report.new_shards else ''}{counted(report.shards, 'shard')}: {done}"
    )


def describe_outcome(cache: str, outcome: EncodeOutcome) -> str:
    """What a call of `encode` did, in a few lines."""
    lines = []
    if outcome.nothing_to_do:
        features = ", ".join(feature.feature for feature in outcome.features)
        lines.append(f"nothing to do: every chosen shard of {features} is committed")
    for feature in outcome.features:
        if feature.shards_made:
            copied = f", {feature.copied} copied (same input as before)" if feature.copied else ""
            before = (
                f"; {counted(feature.shards_done_before, 'shard')} there before" if feature.shards_done_before else ""
            )
            lines.append(
                f"{feature.feature}: {counted(feature.shards_made, 'shard')}, {counted(feature.encoded, 'clip')} "
                f"encoded{copied}, {feature.quarantined} quarantined, {format_size(feature.nbytes)}{before}"
            )
    if outcome.quarantined:
        shown = "; ".join(f"{key} ({why})" for key, why in sorted(outcome.quarantined.items())[:5])
        more = f" and {len(outcome.quarantined) - 5} more" if len(outcome.quarantined) > 5 else ""
        lines.append(f"quarantined: {shown}{more}")
    if outcome.snapshot is not None:
        lines.append(f"{cache}: complete, snapshot {outcome.snapshot.digest[:12]} with {outcome.snapshot.clips} clips")
    elif outcome.others_conclude:
        lines.append(f"{cache}: complete; another worker writes the snapshot")
    else:
        lines.append(f"{cache}: not complete yet; other shards or features are missing")
    return "\n".join(lines)


def describe_status(cache: str, status: CacheStatus) -> str:
    """The table of `status`."""
    older = f" ({counted(status.superseded, 'row')} more, which later plans replaced or removed)"
    lines = [
        f"{cache}: {counted(status.clips, 'clip')} in {counted(status.shards, 'shard')}"
        f"{older if status.superseded else ''}, {'complete' if status.complete else 'unfinished'}"
    ]
    lines.append(_status_row("feature", "fingerprint", "shards", "ok", "quarantined", "MB", "clips/s", "left"))
    rows = [(name, one) for name in FEATURES for one in status.features.get(name, [])]
    for name, one in rows:
        shards = f"{one.shards_done}/{status.shards}"
        pace = _pace(one.clips_per_s, one.eta_s)
        lines.append(
            _status_row(name, one.fingerprint, shards, one.ok, one.quarantined, f"{one.bytes / 1e6:.1f}", *pace)
        )
    done = f"{sum(one.shards_done for _, one in rows)}/{status.shards * len(rows)}"
    ok, quarantined = sum(one.ok for _, one in rows), sum(one.quarantined for _, one in rows)
    total_mb = f"{sum(one.bytes for _, one in rows) / 1e6:.1f}"
    lines.append(_status_row("total", "", done, ok, quarantined, total_mb, *_pace(status.clips_per_s, status.eta_s)))
    lines += [_describe_worker(worker) for worker in status.workers]
    for name in FEATURES:
        for one in status.features.get(name, []):
            which = f" {one.fingerprint}" if len(status.features[name]) > 1 else ""
            for why, count in sorted(one.reasons.items()):
                lines.append(f"quarantined in {name}{which}: {count} at {why}")
    if status.snapshots:
        lines.append(f"snapshots: {', '.join(digest[:12] for digest in status.snapshots)} (newest last)")
    elif status.complete:
        lines.append(f"no snapshot to train on yet: `mimir-precompute finalize {cache}` writes one, or says why not")
    return "\n".join(lines)


def _status_row(*cells: object) -> str:
    feature, fingerprint, *numbers = cells
    widths = (12, 9, 13, 11, 9, 13)
    right = "".join(f"{number!s:>{width}}" for number, width in zip(numbers, widths, strict=True))
    return f"{feature:<9}{fingerprint:<14}{right}".rstrip()


def _pace(clips_per_s: float | None, eta_s: float | None) -> tuple[str, str]:
    return (
        "" if clips_per_s is None else f"{clips_per_s:.1f}",
        "" if not eta_s else describe_duration(eta_s),
    )


def _describe_worker(worker: SeenWorker) -> str:
    report = worker.report
    if report.shard is None:
        place = f"{report.feature}, between two shards" if report.clips else f"{report.feature}, no clip written yet"
    else:
        place = f"{report.feature} shard {report.shard} since {report.since}, {report.clips_in_shard} clips of it"
    who = f"{report.host} pid {report.pid}"
    if worker.state == "working":
        rate = "" if report.clips_per_s is None else f", {report.clips_per_s:.1f} clips/s"
        return f"worker {who}: {place}{rate}"
    silent = describe_duration(worker.silent_s)
    if worker.state == "dead":
        return f"worker {who}: DEAD, last heard of {silent} ago at {place}; its shard is free for others"
    return f"worker {who}: STALE, not heard of for {silent}, was at {place}; others take its shard over"


def describe_ledger(cache: str, lines: Sequence[QuarantinedClip], out: Path | None) -> str:
    """The table of `quarantine`, and where the file of it went."""
    shown = [f"{cache}: {counted(len(lines), 'quarantined clip')}{f', written to {out}' if out else ''}"]
    for (feature, stage, reason), count in sorted(Counter((x.feature, x.stage, x.reason) for x in lines).items()):
        shown.append(f"  {feature}: {count} at {stage}: {reason}")
    shown += [_describe_loss(line) for line in lines[:_LEDGER_LINES]]
    if len(lines) > _LEDGER_LINES:
        shown.append(f"… and {len(lines) - _LEDGER_LINES} more (--out FILE.parquet or --json has all)")
    return "\n".join(shown)


def describe_statistics(cache: str, found: CacheStatistics) -> str:
    """The tables of `stats`: a line for each channel of each tensor, then the shards that are unlike the others."""
    lines = []
    for feature, many in found.features.items():
        for one in many:
            lines.append(f"{feature} {one.fingerprint}: {counted(one.clips, 'clip')} in {counted(one.shards, 'shard')}")
            for name, tensor in one.tensors.items():
                lines.append(f"  {name:<24}{'mean':>12}{'std':>12}{'min':>12}{'max':>12}")
                columns = (tensor.mean, [variance**0.5 for variance in tensor.variance], tensor.min, tensor.max)
                for channel, values in enumerate(zip(*columns, strict=True)):
                    label = "all" if len(tensor.mean) == 1 else f"channel {channel}"
                    lines.append(f"    {label:<22}" + "".join(f"{value:>12.4g}" for value in values))
    for drift in found.drifts:
        where = "" if drift.channel is None else f" in channel {drift.channel}"
        lines.append(
            f"shard {drift.shard} of {drift.feature} is unlike the others: the {drift.measure} of {drift.tensor!r}"
            f"{where} is {drift.value:.4g}, elsewhere {drift.others:.4g} ({drift.score:.0f} robust standard "
            f"deviations, {drift.limit:.0f} are allowed); logs/ says what made it"
        )
    if not found.drifts:
        lines.append(f"{cache}: no shard is unlike the others")
    return "\n".join(lines)


def describe_snapshot(snapshot: Snapshot) -> str:
    """What `finalize` wrote, and what it left out."""
    lines = [f"snapshot {snapshot.digest[:12]}: {snapshot.clips} clips, features {', '.join(snapshot.features)}"]
    lines += [f"  left out: {count} at {reason}" for reason, count in snapshot.left_out.items()]
    return "\n".join(lines)


def describe_retry(cache: str, outcome: RetryOutcome) -> str:
    """What became of the clips that were tried again."""
    if not outcome.tried:
        lines = [f"{cache}: no quarantined clip to try again; nothing was made"]
    else:
        failed = len(outcome.failed_again)
        lines = [f"{cache}: {outcome.tried} tried again: {outcome.tried - failed} are good now, {failed} failed again"]
        lines += [_describe_loss(line) for line in outcome.failed_again[:_LEDGER_LINES]]
    if outcome.snapshot is not None:
        lines.append(f"snapshot {outcome.snapshot.digest[:12]} with {outcome.snapshot.clips} clips")
    return "\n".join(lines)


def _describe_loss(line: QuarantinedClip) -> str:
    tries = "" if line.attempt is None else f" (tried {line.attempt} {'time' if line.attempt == 1 else 'times'})"
    return f"{line.key}: {line.feature} {line.stage}: {line.reason}: {line.detail}{tries}"


def describe_verification(cache: str, report: VerifyReport, *, repairing: bool = False) -> str:
    """What `verify` found, and what to do about it unless that is being done."""
    lines = [
        f"{cache}: {counted(report.shards, 'shard')}, {counted(report.samples, 'sample')}, "
        f"{format_size(report.bytes)} read; {'all is well' if report.ok else counted(len(report.problems), 'problem')}"
    ]
    lines += _describe_problems(report.problems)
    for name, count in report.unfinished.items():
        lines.append(f"  not finished: {counted(count, 'shard')} of {name} not encoded yet")
    if not report.ok and not repairing:
        lines.append(f"mend it: `mimir-precompute verify {cache} --repair`, with the models that made the cache")
    return "\n".join(lines)


def describe_conversion(out: str, data_format: str, outcome: ConvertOutcome) -> str:
    """What `convert` did."""
    before = f", {outcome.shards_done_before} were converted before" if outcome.shards_done_before else ""
    lines = [
        f"{out}: {counted(outcome.shards, 'shard')} written as {data_format}, {format_size(outcome.nbytes)}{before}"
    ]
    for name, count in outcome.unfinished.items():
        lines.append(f"  {count} shards of {name} are not encoded yet: convert again when they are")
    if outcome.snapshot is not None:
        lines.append(f"{out}: complete, snapshot {outcome.snapshot.digest[:12]} with {outcome.snapshot.clips} clips")
    elif not outcome.unfinished:
        lines.append(f"{out}: has a feature more than once: write a snapshot with `mimir-precompute finalize {out}`")
    return "\n".join(lines)


def describe_merge(out: str, outcome: MergeOutcome) -> str:
    """What `convert --merge` did."""
    before = f", {outcome.tars_done_before} were written before" if outcome.tars_done_before else ""
    return (
        f"{out}: {counted(outcome.tars, 'tar')} written, {format_size(outcome.nbytes)}{before}; {outcome.clips} clips "
        f"with all features in one sample each. It is an export: `verify` and `encode` work on the cache itself"
    )


def _describe_problems(problems: Sequence[Problem]) -> list[str]:
    # a file that was cut loses all samples behind the cut: one cause, one line
    cut = {(problem.feature, problem.fingerprint, problem.shard) for problem in problems if problem.kind == "length"}
    follows = [
        problem.kind == "sample" and (problem.feature, problem.fingerprint, problem.shard) in cut
        for problem in problems
    ]
    lost = Counter((one.feature, one.shard) for one, follow in zip(problems, follows, strict=True) if follow)
    lines = [
        f"  sample {feature}/{shard}: {counted(count, 'sample')} cannot be read, for a file of it has another length"
        for (feature, shard), count in lost.items()
    ]
    problems = [problem for problem, follow in zip(problems, follows, strict=True) if not follow]
    for problem in problems[:50]:
        place = "/".join(str(part) for part in (problem.feature, problem.shard, problem.row) if part not in (None, ""))
        lines.append(f"  {problem.kind} {place}: {problem.detail}")
    if len(problems) > 50:
        lines.append(f"  … and {len(problems) - 50} more (--json has all)")
    return lines


def describe_repair(cache: str, outcome: RepairOutcome) -> str:
    """What `verify --repair` did, and what it could not do."""
    lines = [
        f"{cache}: {len(outcome.found.problems)} problems, {len(outcome.remaining)} are left; {outcome.shards_made} "
        f"shards made again as their next generation, {outcome.encoded} clips encoded, {outcome.copied} copied"
    ]
    lines += _describe_problems(outcome.remaining)
    lines += [f"  {name} could not be read and was taken away" for name in outcome.lost_snapshots]
    if outcome.snapshot is not None:
        lines.append(
            f"snapshot {outcome.snapshot.digest[:12]} with {outcome.snapshot.clips} clips; older snapshots still name "
            f"the damaged generation: let training take the new one"
        )
    return "\n".join(lines)


def describe_garbage(cache: str, report: GcReport) -> str:
    """What `gc` removed, or would remove."""
    kinds = {
        "data": "data files that no commit record names",
        "record": "superseded commit records",
        "lease": "stale leases",
        "temporary": "abandoned temporary files",
        "snapshot": "unfinished snapshots",
    }
    verb = "would remove" if report.dry_run else "removed"
    lines = [f"{cache}: {verb} {len(report.removed)} files, {report.bytes} bytes"]
    for kind, words in kinds.items():
        sizes = [garbage.bytes for garbage in report.removed if garbage.kind == kind]
        if sizes:
            lines.append(f"  {len(sizes)} {words}, {sum(sizes)} bytes")
    return "\n".join(lines)


def describe_inspection(described: dict[str, Any]) -> str:
    """All that is known of one clip, a line for each fact."""
    removed = " (a later plan removed it; this is its last row)" if described["state"] == "removed" else ""
    lines = [f"{described['key']}{removed}", f"  caption: {described['caption']}"]
    source_now = described["source_now"].get("fault") or f"xxh3 {described['source_now'].get('xxh3')} now"
    size = "unknown" if described["source_bytes"] is None else f"{described['source_bytes']} bytes"
    lines.append(f"  source: {described['source_root']}/{described['source']}, {size} when planned, {source_now}")
    lines.append(f"  plan {described['plan']}: shard {described['shard']}, row {described['row']}")
    own = {name: described[name] for name in ("source_offset", "bucket", "start_s", "end_s")}
    lines += [f"  {name}: {value}" for name, value in (own | described["columns"]).items() if value is not None]
    for row in described["history"]:
        where = f" as shard {row['shard']}, row {row['row']}: {row['caption']!r}" if "shard" in row else ""
        lines.append(f"  history: {row['change']} by plan {row['plan']}{where}")
    for feature, facts in described["features"].items():
        lines.append(f"{feature}: {facts['status']}{_describe_match(facts, described['source_now'], feature)}")
        lines += [f"  {line}" for line in _describe_facts(facts)]
    return "\n".join(lines)


def _describe_match(facts: dict[str, Any], source_now: dict[str, Any], feature: str) -> str:
    """Whether what is stored is what was written, and of what the source is now."""
    if "matches" not in facts:
        return ""
    match = ", its bytes match their hashes" if facts["matches"] else ", DAMAGED"
    if feature.startswith("latents/") and "xxh3" in source_now and source_now["xxh3"] != facts["source_xxh3"]:
        match += ", but the source has changed since"
    return match


def _describe_facts(facts: dict[str, Any]) -> list[str]:
    told_apart = ("status", "matches", "text", "tensors", "document")
    lines = [f"{name}: {value}" for name, value in facts.items() if name not in told_apart and value is not None]
    if "text" in facts:
        lines.append(f"text: {_byte_range(facts['text'])}, xxh3 {facts['text']['xxh3']}")
    for tensor in facts.get("tensors", ()):
        elsewhere = "" if tensor["file"] == facts["file"] else f" of {tensor['file']}"
        lines.append(f"{_describe_tensor(tensor)}{elsewhere}")
    return lines + _describe_document(facts.get("document", {}))


def _describe_tensor(tensor: dict[str, Any]) -> str:
    shape = "x".join(str(size) for size in tensor["shape"])
    valid = f" ({tensor['valid_rows']} rows valid)" if tensor["valid_rows"] is not None else ""
    values = "".join(f" {name} {tensor[name]:.4g}" for name in ("mean", "std", "min", "max") if name in tensor)
    return f"{tensor['name']}: {tensor['dtype']} {shape}{valid}{values}, {_byte_range(tensor)}"


def _byte_range(place: dict[str, Any]) -> str:
    return f"bytes {place['offset']} to {place['offset'] + place['nbytes'] - 1} ({place['nbytes']})"


def _describe_document(document: dict[str, Any]) -> list[str]:
    lines = []
    for variant, answers in enumerate(document.get("variants", ())):
        lines.append(f"answer {variant}: {answers['answer']['text']!r}")
        lines += [f"answer {variant}, {one['name']}: {one['text']!r}" for one in answers["instructions"]]
    return lines + [f"{name}: {value}" for name, value in document.items() if name not in ("variants", "bucket")]


def describe_difference(found: CacheDifference) -> str:
    """What `diff` found; A is the first cache."""
    lines = ["both hold the same features of the same clips, bit for bit" if found.is_equal else "the caches differ"]
    for name, keys in (("A", found.only_a), ("B", found.only_b)):
        if keys:
            lines.append(f"planned in {name} alone: {_some(keys)}")
    if found.other_captions:
        lines.append(f"planned with other captions: {found.other_captions} clips")
    for feature, one in found.features.items():
        if one.only is not None:
            lines.append(f"{feature}: only in {one.only}")
            continue
        text = f", {one.other_text} with other text" if one.other_text else ""
        lines.append(f"{feature}: {one.clips} clips in both{text}")
        lines += [f"    {name}: {before!r} → {after!r}" for name, before, after in one.fields]
        for name, keys in (("A", one.only_a), ("B", one.only_b)):
            if keys:
                lines.append(f"    ok in {name} alone: {_some(keys)}")
        for name, tensor in one.tensors.items():
            shape = f", {tensor.other_shape} of another shape" if tensor.other_shape else ""
            lines.append(
                f"    {name}: {tensor.equal} of {tensor.clips} equal in every bit{shape}; "
                f"relative error rms {tensor.rms_error:.2e}, largest {tensor.max_error:.2e}"
            )
    return "\n".join(lines)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{', '.join(keys[:5])}{more}"

"""The page about a cache: what it tells, whatever the cache lacks, and that it neither runs nor loads anything."""

import http.server
import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mimir_precompute.clips.clip_list import read_clip_list
from mimir_precompute.decoding.clip_pixels import DecodeInProcess
from mimir_precompute.inspection.stats import ShardDrift, ShardStatistics
from mimir_precompute.planning.plan import PlanRequest, update_plan
from mimir_precompute.report.build import build_report
from mimir_precompute.report.command import run_report
from mimir_precompute.report.gallery import LatentDecoder
from mimir_shared.errors import CacheError, InputError
from mimir_shared.plan_file import read_plan
from mimir_shared.storage.folder import LocalStorage
from tests.fake_encoders import FakeEncoders, tree
from tests.pages import Outline, visit_page
from tests.precompute import media
from tests.precompute.test_pipeline import captions_of, encode, write_captions

HOSTILE = '<script>alert("caption")</script></style></title>\' onerror=alert(1) <img src=x> & "quotes" \u202eabc'
SECTIONS = ("progress", "identity", "quarantine", "lengths", "values", "gallery")


@pytest.fixture(scope="module")
def clips(toy_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good clips, one of them with a hostile caption; one cut, one empty, one missing."""
    folder = Path(shutil.copytree(toy_clips, tmp_path_factory.mktemp("report") / "clips"))
    whole = media.video_bytes(media.grey_frames(35), media.VideoStyle(faststart=True))
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    (folder / "empty<b>.mp4").write_bytes(b"")
    captions = {**captions_of(folder), "cut.mp4": "A cut clip.", "empty<b>.mp4": "None.", "gone.mp4": "Gone."}
    captions[next(iter(captions))] = HOSTILE
    write_captions(folder, captions)
    return folder


@pytest.fixture(scope="module")
def cache(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "landscapes"
    encode(clips, folder, max_quarantined=0.5)
    return folder


def page_of(cache: Path, *, gallery: int = 12, decode: LatentDecoder | None = None, **wanted: str) -> str:
    return build_report(
        LocalStorage(cache),
        name=cache.name,
        gallery=gallery,
        wanted=wanted,
        decoder=DecodeInProcess(),
        decode_latents=decode,
    )


def text_of(page: str) -> str:
    return " ".join(Outline(page).text.split())


@pytest.fixture(scope="module")
def page(cache: Path) -> str:
    return page_of(cache)


def test_the_page_has_every_section_and_a_way_to_each(page: str) -> None:
    outline = Outline(page)
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = outline.attributes("a", "href")
    assert set(links) == {f"#{name}" for name in SECTIONS}
    assert set(SECTIONS) <= set(ids)
    assert [tag for tag, _ in outline.elements].count("h1") == 1
    assert {"header", "main", "nav", "footer"} <= {tag for tag, _ in outline.elements}


def test_the_head_says_how_far_the_cache_is_and_what_it_takes(page: str, cache: Path) -> None:
    text = text_of(page)
    assert "landscapes complete" in text
    assert "15 captioned clips in 3 shards, preset tiny : 9×64×96, 1×64×96" in text
    assert "Ready for training 12 of 15" in text
    assert "Quarantined 3 or 20 %" in text
    assert "latents" in text
    assert "3 of 3" in text
    assert "mimir-precompute verify landscapes" in text
    data = sum(path.stat().st_size for path in cache.glob("*/*/data/*"))
    assert f"On disk {data / 1e3:.0f} kB" in text


def test_the_quarantine_is_told_by_reason_with_a_picture_where_a_frame_is_left(page: str) -> None:
    outline = Outline(page)
    text = " ".join(outline.text.split())
    for reason, key in (("truncated", "cut.mp4"), ("missing", "gone.mp4"), ("empty file", "empty<b>.mp4")):
        assert f"{reason} in latents at" in text
        assert key in text
    alts = [alt for alt in outline.attributes("img", "alt") if alt.startswith("First frame that can be decoded")]
    assert alts == ["First frame that can be decoded of cut.mp4"]
    assert "no frame: empty file" in text
    assert "no frame: missing" in text


def test_the_gallery_shows_source_and_latent_and_the_answers_beside_the_caption(page: str) -> None:
    outline = Outline(page)
    alts = outline.attributes("img", "alt")
    assert len(alts) == len(outline.attributes("img", "src")), "a picture without a description"
    assert sum(alt.startswith("Source frame at 1.00 s of") for alt in alts) == 12
    assert sum(alt.endswith("in false colours") for alt in alts) == 12
    assert HOSTILE + "!" in outline.text, "the fake LLM answers with the caption and a mark"
    assert outline.text.count("I3") == 12


def test_a_decoder_makes_pictures_of_the_same_moment_and_the_page_says_how_near_they_are(cache: Path) -> None:
    seen = []

    def decode(latents: np.ndarray) -> np.ndarray:
        seen.append(latents.shape)
        pixels = latents[0].repeat(4, axis=1).repeat(4, axis=2).repeat(4, axis=0)[3:]  # (F, H, W), frame 0 and 4 more
        return np.repeat(((pixels + 1) * 127.5).clip(0, 255).astype(np.uint8)[..., None], 3, axis=3)

    outline = Outline(page_of(cache, gallery=2, decode=decode))
    assert seen == [(4, 3, 16, 24)] * 2
    assert sum(alt.startswith("Decoded from the latents at 1.00 s of") for alt in outline.attributes("img", "alt")) == 2
    assert outline.text.count(" dB") == 2
    assert "false colours" not in outline.text


def test_texts_from_clips_are_shown_and_never_run(page: str) -> None:
    outline = Outline(page)
    assert HOSTILE in outline.text
    tags = {tag for tag, _ in outline.elements}
    assert "script" not in tags
    assert not any(name.startswith("on") for _, attributes in outline.elements for name in attributes)
    assert all(source.startswith("data:image/webp;base64,") for source in outline.attributes("img", "src"))
    for word in ("http://", "https://", "url(", "@import"):
        assert word not in page


def test_equal_caches_give_equal_pages_wherever_they_lie(clips: Path, cache: Path, tmp_path: Path, page: str) -> None:
    encode(clips, tmp_path / "landscapes", max_quarantined=0.5)
    assert page_of(tmp_path / "landscapes") == page
    assert str(cache.parent) not in page


def test_making_the_page_changes_nothing_in_the_cache(cache: Path) -> None:
    before = tree(cache, leave_out=())
    page_of(cache)
    assert tree(cache, leave_out=()) == before


def test_the_page_of_a_plan_alone_says_what_to_run(clips: Path, tmp_path: Path) -> None:
    update_plan(LocalStorage(tmp_path / "new"), None, read_clip_list(str(clips)), PlanRequest(preset="tiny"))
    text = text_of(page_of(tmp_path / "new"))
    assert "new unfinished" in text
    assert "mimir-precompute encode --cache new --shards all" in text
    assert "Nothing is encoded yet" in text
    assert "no latents of this clip in the cache" in text
    assert "Caption, in words" in text


def test_an_unfinished_cache_shows_what_is_there(clips: Path, tmp_path: Path) -> None:
    encode(clips, tmp_path, features=("t5",), shards=(1,), max_quarantined=0.5)
    encode(None, tmp_path, features=("latents",), shards=(0, 2), max_quarantined=0.5)
    text = text_of(page_of(tmp_path))
    assert "2 of 3" in text
    assert "1 of 3" in text
    assert "Not begun: answers, llm." in text
    assert "Ready for training 0 of 15" in text
    assert "goes on where it stopped" in text
    assert "latent, false colours" in text
    assert "No answers of the language model in the cache." in text


def test_a_cache_of_some_features_says_which_are_missing(clips: Path, tmp_path: Path) -> None:
    encode(clips, tmp_path, features=("t5", "answers"), max_quarantined=0.5)
    text = text_of(page_of(tmp_path, gallery=1))
    assert "training from it needs latents, llm as well" in text
    assert "--features latents,llm" in text
    assert "Answer to the caption, in tokens" in text
    assert "Drift of the latents" not in text


def test_sources_that_are_gone_or_changed_leave_a_note(clips: Path, cache: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(clips, tmp_path / "clips"))
    encode(own, tmp_path / "cache", max_quarantined=0.5)
    keys = [clip.key for clip in read_plan(LocalStorage(cache)).shard_clips(0) if clip.key.startswith("0")]
    (own / keys[0]).unlink()
    (own / keys[1]).write_bytes((own / keys[2]).read_bytes())
    text = text_of(page_of(tmp_path / "cache"))
    assert "no source frame: fetch: missing: no such file" in text
    assert "the source file was changed after it was encoded" in text
    assert text.count("latent, false colours") == 12


def test_a_damaged_sample_is_told_and_costs_no_page(cache: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(cache, tmp_path / "cache"))
    for path in sorted(own.glob("answers/*/data/000000-*")):
        data = bytearray(path.read_bytes())
        data[data.index(b'"answer"')] ^= 1
        path.write_bytes(bytes(data))
    outline = Outline(page_of(own))
    assert "1 of the clips read for this page is damaged." in " ".join(outline.text.split())
    assert "alert" in outline.attributes("div", "role")


def test_a_damaged_record_ends_with_an_error_that_names_it(cache: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(cache, tmp_path / "cache"))
    record = next(own.glob("latents/*/manifests/000001.0.parquet"))
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(CacheError, match=r"000001\.0\.parquet"):
        page_of(own)


def test_of_a_feature_made_twice_the_one_asked_for_is_shown(clips: Path, tmp_path: Path) -> None:
    encode(clips, tmp_path, features=("answers",), max_quarantined=0.5)
    other = FakeEncoders(salt={"answers": "other "})
    encode(None, tmp_path, other, features=("answers",), shards=(0,), on_mismatch="new", max_quarantined=0.5)
    plain, salted = page_of(tmp_path), None
    for folder in (tmp_path / "answers").iterdir():
        if len(list((folder / "manifests").iterdir())) == 1:
            salted = page_of(tmp_path, answers=folder.name[:6])
    assert salted is not None
    assert "other " + HOSTILE not in text_of(plain)
    assert "The cache holds a feature more than once." in text_of(plain)
    assert text_of(salted) != text_of(plain)


def test_shards_that_stats_blames_are_told(cache: Path, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "by more than chance allows" not in page
    (latents,) = (path.name for path in (cache / "latents").iterdir())

    def blame(feature: str, fingerprint: str, shards: Sequence[ShardStatistics]) -> list[ShardDrift]:
        return [
            ShardDrift(feature=feature, fingerprint=fingerprint, shard=2, tensor="vae_moments", channel=3,
                       measure="std", value=9.0, others=1.0, score=50.0, limit=7.0)
        ] if feature == "latents" else []  # fmt: skip

    monkeypatch.setattr("mimir_precompute.inspection.stats.find_drifts", blame)
    text = text_of(page_of(cache, latents=latents))
    assert "1 finding of shards that differ from the others by more than chance allows." in text
    assert "latents, shard 2: std of vae_moments , channel 3, is 9.000, elsewhere 1.000" in text


def test_lengths_of_many_clips_are_those_of_a_sample_and_say_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimir_precompute.report.lengths.NUM_SAMPLED", 5)
    assert "5 clips, spread over all shards: median" in text_of(page_of(cache, gallery=0)).replace("5 Clips", "5 clips")


class TestCommand:
    def run(self, cache: Path, out: Path | None = None) -> Path:
        path, nbytes = run_report(str(cache), out=out, gallery=1, wanted=(), models=None, vae=None, device="cpu")
        assert path.stat().st_size == nbytes
        return path

    def test_the_page_lies_in_the_current_folder_under_the_caches_name(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert self.run(cache) == Path("landscapes-report.html")
        assert [path.name for path in tmp_path.iterdir()] == ["landscapes-report.html"]

    def test_from_inside_the_cache_the_page_lies_beside_it(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = Path(shutil.copytree(cache, tmp_path / "own"))
        monkeypatch.chdir(own / "plan")
        assert self.run(Path("..")) == tmp_path / "own-report.html"

    def test_a_file_that_cannot_be_written_is_told(self, cache: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="Is a directory; give a file: --out"):
            self.run(cache, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_no_plan_no_page(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no plan in this cache"):
            self.run(tmp_path, tmp_path / "page.html")


class TestInABrowser:
    def test_the_page_opens_without_a_complaint_and_asks_the_network_for_nothing(
        self, page: str, tmp_path: Path
    ) -> None:
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        visit = visit_page(tmp_path / "page.html", tmp_path)
        assert visit.console == []
        assert visit.requests == []

    def test_a_page_that_loads_a_picture_from_elsewhere_is_caught_and_its_policy_forbids_it(
        self, page: str, tmp_path: Path
    ) -> None:
        """The control of the test above."""
        asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_error(404)

            def log_message(self, format: str, *args: object) -> None:
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            leaking = page.replace("<main>", f'<main><img alt="" src="http://127.0.0.1:{server.server_port}/leak">')
            (tmp_path / "forbidden.html").write_text(leaking, encoding="utf-8")
            forbidden = visit_page(tmp_path / "forbidden.html", tmp_path)
            assert (asked, forbidden.requests) == ([], [])
            assert any("Content Security Policy" in line for line in forbidden.console)
            (tmp_path / "open.html").write_text(leaking.replace("Content-Security-Policy", "x-none"), encoding="utf-8")
            leaked = visit_page(tmp_path / "open.html", tmp_path)
            server.shutdown()
        assert asked == ["/leak"]
        assert len(leaked.requests) == 1


def test_a_page_of_twelve_large_clips_stays_small(tmp_path: Path) -> None:
    """The worst that a picture can hold is noise."""
    from mimir_shared.page.pictures import still_picture

    noise = np.random.default_rng(0).integers(0, 256, (480, 720, 3), np.uint8)
    still = still_picture(noise, longest_side=480)
    assert (still.width, still.height) == (480, 320)
    assert 24 * len(still.uri) < 5_000_000


def test_a_cache_of_zarr_shards_has_the_same_gallery(clips: Path, page: str, tmp_path: Path) -> None:
    encode(clips, tmp_path / "landscapes", max_quarantined=0.5, data_format="zarr")
    zarr, tars = (Outline(one) for one in (page_of(tmp_path / "landscapes"), page))
    assert zarr.attributes("img", "src") == tars.attributes("img", "src")
    assert "zarr" in zarr.text.split()
    assert "webdataset" not in zarr.text.split()


def test_sources_in_tars_are_shown_as_well(toy_clips: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        for name, caption in list(captions_of(toy_clips).items())[:3]:
            tar.add(toy_clips / name, name)
            text = tmp_path / "caption.txt"
            text.write_text(caption)
            tar.add(text, Path(name).with_suffix(".txt").name)
    encode(tmp_path / "clips.tar", tmp_path / "cache")
    alts = Outline(page_of(tmp_path / "cache")).attributes("img", "alt")
    assert sum(alt.startswith("Source frame") for alt in alts) == 3


def test_identities_are_shown_whole(page: str, cache: Path) -> None:
    outline = Outline(page)
    for spec in cache.glob("*/*/spec.json"):
        identity = json.loads(spec.read_text())["identity"]
        assert json.dumps(identity, indent=1, ensure_ascii=False) in outline.text

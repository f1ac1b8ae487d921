"""On a CUDA device: batches read into pinned memory and copied on a side stream are those that were stored."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from mimir_train.batch import BatchLoader, find_layout  # noqa: E402
from mimir_train.cache_reader import open_cache  # noqa: E402
from mimir_train.order.clip_order import TrainingOrder  # noqa: E402
from mimir_train.reading.batch_memory import BatchMemory  # noqa: E402
from mimir_train.reading.step_reader import ReadOptions  # noqa: E402
from tests.train.caches import VIDEO, build_cache  # noqa: E402

DEVICE = torch.device("cuda", 0)


def test_slots_are_pinned_and_views_of_them_too() -> None:
    slot = BatchMemory(1 << 20, pinned=True).lend()
    assert torch.from_numpy(slot[4096:8192]).is_pinned()


@pytest.mark.parametrize("prefetch", [1, 4])
@pytest.mark.parametrize("busy", [False, True])
def test_batches_on_the_device_equal_those_on_the_host(tmp_path: Path, prefetch: int, busy: bool) -> None:
    cache = open_cache(str(build_cache(tmp_path / "cache", {VIDEO: 64})))
    order = TrainingOrder(cache.buckets(), seed=3, global_batch_size=4)
    layout = find_layout(cache, llm=True)
    on_host = BatchLoader(cache, order, layout)
    on_device = BatchLoader(cache, order, layout, options=ReadOptions(prefetch=prefetch, borrow=True), device=DEVICE)
    work = torch.randn(4096, 4096, device=DEVICE)
    seen = []
    for batch in on_device.batches(0, 80):
        if busy:
            for _ in range(4):  # the host runs far ahead of the device, whose memory is used again meanwhile
                work = (work @ work).clamp(-1, 1)
        assert all(tensor.device == DEVICE for tensor in batch.tensors())
        seen.append([(tensor.double().nan_to_num() * 3).sum() for tensor in batch.tensors()])
        seen[-1] += [tensor.clone() for tensor in batch.tensors()]
    torch.cuda.synchronize()
    for found, batch in zip(seen, on_host.batches(0, 80), strict=True):
        expected = batch.tensors()
        for tensor, stored in zip(found[len(expected) :], expected, strict=True):
            assert torch.equal(tensor.cpu(), stored)
        for total, stored in zip(found[: len(expected)], expected, strict=True):
            assert total.item() == pytest.approx((stored.double() * 3).sum().item(), rel=1e-9, abs=1e-6)


def test_memory_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    cache = open_cache(str(build_cache(tmp_path / "cache", {VIDEO: 64})))
    order = TrainingOrder(cache.buckets(), seed=3, global_batch_size=4)
    loader = BatchLoader(cache, order, find_layout(cache, llm=True), device=DEVICE)
    allocated = {}
    for batch in loader.batches(0, 1500):
        if batch.step in (200, 1499):
            allocated[batch.step] = torch.cuda.max_memory_reserved(DEVICE)
    assert allocated[1499] == allocated[200]

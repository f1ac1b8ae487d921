"""Operations and bytes of the VAE's encoder, against the paper's arithmetic and against what torch counts."""

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch.utils.flop_counter import FlopCounterMode

from mimir_precompute.config import Bucket
from mimir_precompute.encoders.fast_vae import frame_chunks
from mimir_precompute.planning.vae_roofline import DEVICES, Device, block_tflops, chunk_frames, floor_s, layer_costs
from mimir_precompute.toy.models import VAE_CONFIG

FULL_SIZE = Bucket(frames=49, height=480, width=720)


def test_a_full_clip_takes_149_tflop() -> None:
    layers = layer_costs({}, FULL_SIZE, 2)
    assert sum(layer.flops for layer in layers) / 1e12 == pytest.approx(149.0, abs=0.05)
    blocks = block_tflops(layers)
    want = {f"down_blocks.{i}": tflops for i, tflops in enumerate((90.5, 42.5, 6.1, 5.5))} | {"mid_block": 4.0}
    assert {name: blocks[name] for name in want} == pytest.approx(want, abs=0.06)
    assert blocks["conv_in"] == pytest.approx(0.35, abs=0.005)


@pytest.mark.parametrize("bucket", [Bucket(frames=17, height=32, width=48), Bucket(frames=1, height=16, width=16)])
def test_operations_are_those_that_torch_counts(bucket: Bucket) -> None:
    vae = AutoencoderKLCogVideoX(**VAE_CONFIG).eval()
    clip = torch.zeros(1, 3, bucket.frames, bucket.height, bucket.width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(clip)
    assert sum(layer.flops for layer in layer_costs(VAE_CONFIG, bucket, 4)) == counter.get_total_flops()


@pytest.mark.parametrize("frames", [1, 8, 9, 17, 49])
def test_chunks_are_those_of_the_encoder(frames: int) -> None:
    assert list(chunk_frames(frames)) == [chunk.stop - chunk.start for chunk in frame_chunks(frames, 8)]


def test_layer_names_are_those_of_the_weights() -> None:
    vae = AutoencoderKLCogVideoX(**VAE_CONFIG)
    modules = {name for name, _ in vae.encoder.named_modules()}
    assert {layer.name for layer in layer_costs(VAE_CONFIG, FULL_SIZE, 2)} <= modules


def test_a_floor_is_the_longer_of_arithmetic_and_traffic() -> None:
    layers = layer_costs({}, FULL_SIZE, 2)
    flops, nbytes = (sum(getattr(layer, field) for layer in layers) for field in ("flops", "nbytes"))
    no_memory = Device(name="arithmetic alone", flops_per_s=1e12, bytes_per_s=1e30)
    no_arithmetic = Device(name="memory alone", flops_per_s=1e30, bytes_per_s=1e12)
    assert floor_s(layers, no_memory) == pytest.approx(flops / 1e12)
    assert floor_s(layers, no_arithmetic) == pytest.approx(nbytes / 1e12)
    assert 0.19 < floor_s(layers, DEVICES["h200"]) < 0.25
    # float32 moves twice the bytes, and does the same arithmetic
    assert sum(layer.nbytes for layer in layer_costs({}, FULL_SIZE, 4)) == 2 * nbytes

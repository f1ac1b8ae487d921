"""Sampling while training: the step against diffusers' scheduler, and what a run leaves for `decode`."""

import math

import pytest
import torch

from mimir_train.objective import NoiseSchedule
from mimir_train.sampling.schedulers import build_scheduler
from mimir_train.validation.samples import DdimStepper


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [5, 20, 50])
def test_our_ddim_follows_the_path_of_diffusers(shift: float, num_steps: int) -> None:
    scheduler = build_scheduler("ddim", shift)
    scheduler.set_timesteps(num_steps)
    stepper = DdimStepper(NoiseSchedule.cogvideox(shift), num_steps)
    assert list(stepper.timesteps) == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 4, 3, 4, 6, generator=generator)
    for timestep in scheduler.timesteps:
        v_prediction = torch.randn(ours.shape, generator=generator) / math.sqrt(2)
        ours = stepper.step(v_prediction, ours, generator)
        theirs = scheduler.step(v_prediction, timestep, theirs, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

"""What stage one computes of a trained fuser for its pictures is what the trainer's fuser computes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mimir_precompute.volatility.fusing import load_weights
from mimir_shared.errors import InputError
from mimir_train.model.config import FUSERS, FuserConfig
from mimir_train.model.fuser import LlmFeatures, TokenFuser
from mimir_train.weights.fuser_folder import save_fuser

WITH_DECODER = [name for name, switches in FUSERS.items() if switches.decoder]


def random_fuser(name: str) -> TokenFuser:
    torch.manual_seed(1)
    switches = FUSERS[name]  # type: ignore[index]
    fuser = TokenFuser(FuserConfig(switches=switches, t5_rms=0.3, text_width=10, llm_width=6, decoder_gain=0.7))
    for parameter in fuser.parameters():
        torch.nn.init.normal_(parameter)
    return fuser


@pytest.mark.parametrize("name", WITH_DECODER)
def test_branches_equal_those_of_the_trainers_fuser(name: str, tmp_path: Path) -> None:
    fuser = random_fuser(name)
    save_fuser(fuser.config, fuser.state_dict(), tmp_path)
    t5, llm = torch.randn(1, 8, 10), torch.randn(1, 8, 6)
    nothing = torch.zeros(1, 0, 6)
    all_there = torch.ones(1, 8, dtype=torch.bool)
    features = LlmFeatures(llm, all_there, nothing, all_there[:, :0], torch.zeros(1, 4, 6))
    weights = load_weights(tmp_path)
    with torch.no_grad():
        want = fuser(t5, features, append_stabilizer=False)[0].numpy()
    got = weights.encoder_tokens(t5[0].numpy()) + weights.decoder_tokens(llm[0].numpy())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_fuser_without_decoder_is_refused(tmp_path: Path) -> None:
    fuser = random_fuser("baseline")
    save_fuser(fuser.config, fuser.state_dict(), tmp_path)
    with pytest.raises(InputError, match="decoder branch"):
        load_weights(tmp_path)

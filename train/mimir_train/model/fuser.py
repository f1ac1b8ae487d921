"""The token fuser: T5's tokens and the LLM's become the text that conditions the video transformer.

Mimir (arXiv 2412.03085) section 3.2 and figure 3:
    encoder_tokens    = T5 + Z_theta(T5)
    decoder_tokens    = Z_beta(scale * norm(LLM tokens))
    fused_tokens      = encoder_tokens + alpha * decoder_tokens
    stabilizer_tokens = project(instructions) + learnable offsets
    condition_tokens  = fused_tokens, then stabilizer_tokens
Z_theta and Z_beta start at zero, so training starts from the model that knows T5 alone.
Letters in shapes: B batch, L T5 tokens, D their width, M and A the LLM's query and answer tokens, H their width,
K instructions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_train.model.config import FuserConfig

SEEDED_PROJECTION_SEED = 20241204
"""Of the map that stands in for a ZeroConv: the same in every run, so that ablations start alike."""

RMS_EPS = 1e-6


class LlmFeatures(NamedTuple):
    """What the LLM said of a batch of captions. Rows where a mask is False are never read."""

    query_hidden: Tensor
    """(B, M, H): the caption's own tokens."""
    query_mask: Tensor
    """(B, M) bool."""
    answer_hidden: Tensor
    """(B, A, H): the tokens of the answer to the caption."""
    answer_mask: Tensor
    """(B, A) bool."""
    instruction_hidden: Tensor
    """(B, K, H): one pooled row for each instruction's answer."""


def join_llm_tokens(llm: LlmFeatures, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Put each sample's answer right behind its query, cut to `num_tokens` or padded with zeros.

    Returns: tokens (B, L, H) and their mask (B, L) bool, with L = num_tokens.
    """
    rows = torch.cat([llm.query_hidden, llm.answer_hidden], dim=1)  # (B, M+A, H)
    is_token = torch.cat([llm.query_mask, llm.answer_mask], dim=1).bool()  # (B, M+A)
    # stable: real rows come to the front in the order they had
    order = torch.argsort((~is_token).to(torch.uint8), dim=1, stable=True)[:, :num_tokens]
    mask = is_token.gather(1, order)
    tokens = rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2]))
    tokens = tokens.masked_fill(~mask[:, :, None], 0)  # pad rows may hold anything
    missing = num_tokens - tokens.shape[1]
    return F.pad(tokens, (0, 0, 0, missing)), F.pad(mask, (0, missing))  # (B, L, H), (B, L)


class TokenFuser(nn.Module):
    """The paper's token fuser, each part present or not by the config's switches.

    No map has a bias: pad rows of the LLM add nothing, and the zero unconditional (T5 and LLM all zeros) gives
    tokens of zero. The stabilizer's offsets stay there, for they tell nothing of the prompt: its unconditional
    tokens are the offsets alone.
    """

    def __init__(self, config: FuserConfig) -> None:
        super().__init__()
        self.config = config
        switches, text_width, llm_width = config.switches, config.text_width, config.llm_width

        self.encoder_zero_proj: nn.Linear | None = None
        self.decoder_zero_proj: nn.Linear | None = None
        self.decoder_seeded_proj: nn.Linear | None = None
        self.decoder_scale: nn.Parameter | None = None
        self.instruction_proj: nn.Linear | None = None
        self.stabilizer_offsets: nn.Parameter | None = None
        if switches.zero_conv:
            self.encoder_zero_proj = nn.Linear(text_width, text_width, bias=False)
        if switches.decoder and switches.zero_conv:
            self.decoder_zero_proj = nn.Linear(llm_width, text_width, bias=False)
        if switches.decoder and not switches.zero_conv:
            self.decoder_seeded_proj = nn.Linear(llm_width, text_width, bias=False)
        if switches.norm:
            self.decoder_scale = nn.Parameter(torch.empty(llm_width))
        if switches.stabilizer:
            self.instruction_proj = nn.Linear(llm_width, text_width, bias=False)
            self.stabilizer_offsets = nn.Parameter(torch.empty(config.num_instructions, text_width))
        self.init_weights()

    def forward(self, t5_embeds: Tensor, llm: LlmFeatures | None = None, *, append_stabilizer: bool = True) -> Tensor:
        """Fuse the tokens of a batch of captions.

        Args:
            t5_embeds: (B, L, D), any float dtype; all rows, pads included, for the pretrained transformer reads them.
            llm: may be None for a fuser that does not need it (`FuserSwitches.needs_llm`).
            append_stabilizer: False before `FuserConfig.stabilizer_start_step` (`FuserConfig.appends_stabilizer`
                tells); of no effect on a fuser without stabilizer.
        Returns: condition_tokens (B, L, D), or (B, L+K, D) with the stabilizer, in the dtype of the weights
            (of t5_embeds for the baseline, which has none).
        Raises: ValueError for a width, number of instructions or missing input that does not fit the config.
        """
        self._check(t5_embeds, llm)
        fused_tokens = self.encode(t5_embeds)  # (B, L, D)
        if llm is not None and self.config.switches.decoder:
            fused_tokens = fused_tokens + self.config.decoder_gain * self.decode(llm, t5_embeds.shape[1])
        if llm is None or not (self.config.switches.stabilizer and append_stabilizer):
            return fused_tokens
        return torch.cat([fused_tokens, self.stabilize(llm.instruction_hidden)], dim=1)  # (B, L+K, D)

    def encode(self, t5_embeds: Tensor) -> Tensor:
        """e_theta: T5 and its zero-initialised residual; (B, L, D) to (B, L, D)."""
        t5_embeds = t5_embeds.to(self._dtype(t5_embeds))
        if self.encoder_zero_proj is None:
            return t5_embeds
        residual: Tensor = self.encoder_zero_proj(t5_embeds)
        return t5_embeds + residual

    def decode(self, llm: LlmFeatures, num_tokens: int) -> Tensor:
        """e_beta: the LLM's tokens in T5's range and width; (B, L, D), pad rows zero."""
        llm_tokens, _ = join_llm_tokens(llm, num_tokens)  # (B, L, H)
        project = self.decoder_seeded_proj if self.decoder_zero_proj is None else self.decoder_zero_proj
        assert project is not None, f"decode without a decoder: {self.config.switches}"
        decoder_tokens: Tensor = project(self._bring_to_t5_range(llm_tokens))
        return decoder_tokens

    def stabilize(self, instruction_hidden: Tensor) -> Tensor:
        """e_s = e_i + e_l: what the LLM said to each instruction, and a learnable offset; (B, K, H) to (B, K, D)."""
        assert self.instruction_proj is not None, f"stabilize without a stabilizer: {self.config.switches}"
        assert self.stabilizer_offsets is not None
        instruction_tokens: Tensor = self.instruction_proj(self._bring_to_t5_range(instruction_hidden))
        return instruction_tokens + self.stabilizer_offsets

    def init_weights(self) -> None:
        """Set every parameter as training starts."""
        for zero_proj in (self.encoder_zero_proj, self.decoder_zero_proj):
            if zero_proj is not None:
                nn.init.zeros_(zero_proj.weight)  # nothing is added to T5 before it has been learned
        if self.decoder_seeded_proj is not None:
            # keeps the size of what goes in, so that `direct` meets the LLM's values as they are
            generator = torch.Generator(device="cpu").manual_seed(SEEDED_PROJECTION_SEED)
            values = torch.empty(self.decoder_seeded_proj.weight.shape, dtype=torch.float32, device="cpu")
            values.normal_(std=self.config.llm_width**-0.5, generator=generator)
            with torch.no_grad():
                self.decoder_seeded_proj.weight.copy_(values)
        if self.decoder_scale is not None:
            nn.init.constant_(self.decoder_scale, self.config.t5_rms)  # LLM tokens get T5's size
        if self.instruction_proj is not None and self.stabilizer_offsets is not None:
            nn.init.normal_(self.instruction_proj.weight, std=self.config.llm_width**-0.5)  # keeps the size
            nn.init.normal_(self.stabilizer_offsets, std=0.02)  # small, and different: tells instructions apart

    @torch.no_grad()
    def figures(self, t5_embeds: Tensor, llm: LlmFeatures | None = None) -> dict[str, float]:
        """What to watch in training: whether each branch grows, and how much of the text is its doing.

        Args: as `forward`.
        Returns: for each part that is there: norms of Z_theta, Z_beta and the offsets, mean of the scale; and
            `…_share`: the RMS of a branch over the sum of the RMS of all branches of the fused tokens.
        """
        self._check(t5_embeds, llm)
        parameters = {
            "encoder_zero_proj_norm": None if self.encoder_zero_proj is None else self.encoder_zero_proj.weight.norm(),
            "decoder_zero_proj_norm": None if self.decoder_zero_proj is None else self.decoder_zero_proj.weight.norm(),
            "decoder_scale_mean": None if self.decoder_scale is None else self.decoder_scale.mean(),
            "stabilizer_offsets_norm": None if self.stabilizer_offsets is None else self.stabilizer_offsets.norm(),
        }
        figures = {name: float(value) for name, value in parameters.items() if value is not None}

        encoder_tokens = self.encode(t5_embeds)
        branches = {"t5": t5_embeds, "encoder_residual": encoder_tokens - t5_embeds.to(encoder_tokens.dtype)}
        if llm is not None and self.config.switches.decoder:
            branches["decoder"] = self.config.decoder_gain * self.decode(llm, t5_embeds.shape[1])
        rms = {name: float(tokens.float().square().mean().sqrt()) for name, tokens in branches.items()}
        total = sum(rms.values())
        return figures | {f"{name}_share": value / total if total > 0 else 0.0 for name, value in rms.items()}

    def _bring_to_t5_range(self, llm_tokens: Tensor) -> Tensor:
        """scale * norm, where that switch is on; the last dim is H. Zeros stay zeros."""
        dtype = self._dtype(llm_tokens)
        if self.decoder_scale is None:
            return llm_tokens.to(dtype)
        # float32: a sum of squares over thousands of channels, some of them very large
        normed = F.rms_norm(llm_tokens.float(), (self.config.llm_width,), eps=RMS_EPS)
        return (normed * self.decoder_scale.float()).to(dtype)

    def _dtype(self, tokens: Tensor) -> torch.dtype:
        """The dtype of the weights; that of `tokens` where there are none."""
        weight = next(self.parameters(), None)
        return tokens.dtype if weight is None else weight.dtype

    def _check(self, t5_embeds: Tensor, llm: LlmFeatures | None) -> None:
        config = self.config
        if t5_embeds.shape[2] != config.text_width:
            raise ValueError(f"t5_embeds are {t5_embeds.shape[2]} wide, the fuser takes {config.text_width}")
        if not config.switches.needs_llm:
            return
        if llm is None:
            raise ValueError("this fuser needs the LLM's features, and got none")
        if llm.query_hidden.shape[2] != config.llm_width:
            raise ValueError(f"query_hidden is {llm.query_hidden.shape[2]} wide, the fuser takes {config.llm_width}")
        if config.switches.stabilizer and llm.instruction_hidden.shape[1] != config.num_instructions:
            raise ValueError(
                f"instruction_hidden has {llm.instruction_hidden.shape[1]} rows, one for each instruction; "
                f"the fuser takes {config.num_instructions}"
            )

"""One place that knows which encoder makes which feature; each library is imported when its encoder is built."""

from mimir_precompute.config import EncodeSettings
from mimir_precompute.encoders.base import Encoder
from mimir_precompute.identity import FeatureModels
from mimir_shared.features import FeatureName


def build_encoder(feature: FeatureName, settings: EncodeSettings, models: FeatureModels, device: str) -> Encoder:
    """Load the model of one feature onto a device ("cpu", "cuda:0").

    Raises: InputError if its files cannot be loaded, MachineError if memory does not suffice.
    """
    if feature == "latents":
        from mimir_precompute.encoders.vae import VaeEncoder

        return VaeEncoder(models.model, settings.latents, device)
    if feature == "t5":
        from mimir_precompute.encoders.t5 import T5Encoder

        assert models.tokenizer is not None, "t5 has a tokenizer"
        return T5Encoder(models.model, models.tokenizer, settings.t5, device)
    if feature == "answers":
        from mimir_precompute.encoders.answers import AnswersEncoder

        return AnswersEncoder(models.model, settings.answers, device)
    from mimir_precompute.encoders.llm import LlmEncoder

    answers = settings.answers
    longest_answer = max(answers.max_answer_tokens, answers.max_instruction_tokens)
    return LlmEncoder(models.model, settings.llm, answers.instructions, device, longest_answer=longest_answer)

"""Tokenizers of the toy models: trained in place on toy captions and some plain English, able to write any text."""

import functools
import json
import string

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from mimir_precompute.config import DEFAULT_INSTRUCTIONS
from mimir_precompute.toy.clips import toy_scene

T5_MAX_TOKENS = 64
LLM_MAX_TOKENS = 2048
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
PHI_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# Phi-3.5-mini-instruct's own, so that what is tried on the toy model holds for the real one.
PHI_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Words that captions of real video are made of, so that those too come out as tens of tokens and not hundreds.
PLAIN_ENGLISH = """
A man in a dark jacket walks along the beach at sunset while waves break on the sand behind him.
The camera slowly pans across a busy city street at night, with cars, bright signs and people crossing the road.
A young woman with long brown hair sits at a wooden table and drinks a cup of coffee near the window.
Two dogs run through tall green grass in a field, chasing a ball as the sun shines through the trees.
An aerial view of snowy mountains and a frozen lake under a clear blue sky, with clouds moving in the distance.
A close-up shot of a cat looking at the camera, its eyes wide open, then turning its head to the side.
Children are playing in the park; one of them jumps and another holds a red balloon.
A chef is cutting fresh vegetables in a kitchen, then puts them into a large pan over the fire.
The video shows a person riding a bicycle down a narrow path between old stone houses.
A white boat floats on calm water while birds fly above it and the light changes from gold to pink.
An old train passes over a bridge, smoke rising into the cold morning air.
A group of people stand in front of a building, talking and smiling, and one woman waves her hand.
Several colorful fish swim around coral under the sea as small bubbles rise to the surface.
A girl wearing a yellow dress dances in the rain, spinning around with her arms outstretched.
Close up of hands typing on a keyboard, with a cup and a phone on the desk in soft warm light.
A rocket lifts off from the ground in slow motion, leaving a trail of white smoke behind.
Fireworks explode over the river, their reflection glittering on the water, while the crowd watches.
A little boy throws a stone into the pond and watches the rings spread.
The scene is cinematic and realistic, with a shallow depth of field and high detail.
In the background there are tall trees, a wooden fence and a small house with a green door.
A black car drives fast along a winding road through the desert, dust rising from its wheels.
Three horses gallop across an open plain beneath a dramatic cloudy sky.
She opens a book, reads a few lines and closes it again before she leaves the room.
He is playing the guitar and singing on a stage with blue and purple lights.
A robot made of metal stands in a futuristic city filled with neon lights and flying vehicles.
Animation of a cartoon bear who eats honey, laughs and falls asleep under a tree in a magical forest.
Time lapse of flowers blooming in spring, petals opening one after another.
An elderly couple hold hands as they walk slowly through autumn leaves.
There is nothing else in the picture. It shows one object, which has a smooth surface and no visible pattern.
First it moves to the right, then it stops, and after that it goes back to where it was before.
The object on the left is bigger than the other, and both of them are in the middle of the frame.
This image contains two objects of the same color and shape, next to each other, made of glass, wood or paper.
what who when where why how which that this these those from into onto over under between through during about
because could would should might must will can may not only also very more most some any each every other another
"""


@functools.cache
def training_text() -> tuple[str, ...]:
    """Lines that both tokenizers are trained on, and from which the toy LLM takes which token follows which."""
    captions = [toy_scene(0, index).caption for index in range(150)]
    instructions = [instruction.text for instruction in DEFAULT_INSTRUCTIONS]
    return (*captions, *(instructions * 8), *(PLAIN_ENGLISH.strip().splitlines() * 4))


def build_t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's conventions (words begin with "▁", "</s>" ends a text, pad is 0), falling back to bytes, never to <unk>."""
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    draft = Tokenizer(BPE())
    draft.pre_tokenizer = words
    trainer = BpeTrainer(vocab_size=1500, show_progress=False, initial_alphabet=list(string.printable.strip()))
    draft.train_from_iterator(training_text(), trainer)
    learned = json.loads(draft.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = {piece: number for number, piece in enumerate(("<pad>", "</s>", "<unk>", *BYTE_TOKENS, *pieces))}
    merges = [(first, second) for first, second in learned["merges"]]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always", split=True)]
    )
    end = ("</s>", vocabulary["</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[end]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=T5_MAX_TOKENS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_llm_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens and the chat template of Phi-3."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=1400,
        show_progress=False,
        special_tokens=list(PHI_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=list(PHI_SPECIAL_TOKENS[4:]),
        chat_template=PHI_CHAT_TEMPLATE,
        model_max_length=LLM_MAX_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )

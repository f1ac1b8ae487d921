"""Captions of toy scenes: objects, counts, colours, relations and motion, in varied words that stay true."""

import random
from dataclasses import dataclass
from typing import Literal

Shape = Literal["square", "circle", "triangle", "ring", "star"]
Motion = Literal["still", "left", "right", "up", "down"]
Relation = Literal["left", "right", "above", "below"]

NUMBERS = {1: "one", 2: "two", 3: "three"}

# (one thing does, several do, doing)
_MOTION_WORDS: dict[Motion, tuple[tuple[str, str, str], ...]] = {
    "still": (
        ("stays still", "stay still", "staying still"),
        ("does not move", "do not move", "not moving"),
        ("rests in place", "rest in place", "resting in place"),
    ),
    "left": (
        ("moves to the left", "move to the left", "moving to the left"),
        ("slides left", "slide left", "sliding left"),
        ("drifts leftwards", "drift leftwards", "drifting leftwards"),
    ),
    "right": (
        ("moves to the right", "move to the right", "moving to the right"),
        ("slides right", "slide right", "sliding right"),
        ("drifts rightwards", "drift rightwards", "drifting rightwards"),
    ),
    "up": (
        ("moves up", "move up", "moving up"),
        ("rises", "rise", "rising"),
        ("floats upwards", "float upwards", "floating upwards"),
    ),
    "down": (
        ("moves down", "move down", "moving down"),
        ("sinks", "sink", "sinking"),
        ("glides downwards", "glide downwards", "gliding downwards"),
    ),
}
_RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "left": ("to the left of", "on the left of"),
    "right": ("to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_INVERSE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}
_PLACE_WORDS: dict[Relation, str] = {
    "left": "on the left",
    "right": "on the right",
    "above": "at the top",
    "below": "at the bottom",
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing, or several alike, that a caption speaks of; all of it moves alike."""

    count: int
    colour: str
    shape: Shape
    motion: Motion

    @property
    def noun(self) -> str:
        return f"{self.colour} {self.shape}" + ("s" if self.count > 1 else "")

    @property
    def indefinite(self) -> str:
        if self.count > 1:
            return f"{NUMBERS[self.count]} {self.noun}"
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.noun}"

    @property
    def definite(self) -> str:
        return f"the {self.noun}" if self.count == 1 else f"the {NUMBERS[self.count]} {self.noun}"

    @property
    def is_or_are(self) -> str:
        return "is" if self.count == 1 else "are"


def describe(subjects: tuple[Subject, ...], relation: Relation | None, background: str, rng: random.Random) -> str:
    """Caption a scene of one to three subjects; `relation` is the first's to the second (with three, always "left")."""
    if len(subjects) == 1:
        return _describe_one(subjects[0], background, rng)
    assert relation is not None, f"{len(subjects)} subjects need a relation"
    if len(subjects) == 2:
        sentences = [_relate_two(subjects[0], subjects[1], relation, rng)]
    else:
        sentences = [_line_up(subjects, rng)]
    sentences.append(_move_all(subjects, rng))
    if rng.random() < 0.5:
        sentences.append(f"the background is {background}")
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _describe_one(subject: Subject, background: str, rng: random.Random) -> str:
    one, several, doing = rng.choice(_MOTION_WORDS[subject.motion])
    does = one if subject.count == 1 else several
    behind = f"a {background} background"
    sentence = rng.choice(
        (
            f"{subject.indefinite} {does} on {behind}",
            f"{subject.indefinite} {does}",
            f"on {behind}, {subject.indefinite} {does}",
            f"there {subject.is_or_are} {subject.indefinite} {doing}",
            f"we see {subject.indefinite} {doing} in front of {behind}",
        )
    )
    return sentence[0].upper() + sentence[1:] + "."


def _relate_two(first: Subject, second: Subject, relation: Relation, rng: random.Random) -> str:
    if rng.random() < 0.5:
        first, second, relation = second, first, _INVERSE[relation]
    words = rng.choice(_RELATION_WORDS[relation])
    return rng.choice(
        (
            f"{first.indefinite} {first.is_or_are} {words} {second.indefinite}",
            f"{words} {second.indefinite} there {first.is_or_are} {first.indefinite}",
            f"{second.indefinite} and {first.indefinite}, {first.definite} {_PLACE_WORDS[relation]}",
            f"we see {first.indefinite} {words} {second.indefinite}",
        )
    )


def _line_up(subjects: tuple[Subject, ...], rng: random.Random) -> str:
    first, second, third = subjects
    if rng.random() < 0.3:
        return f"from right to left there are {third.indefinite}, {second.indefinite} and {first.indefinite}"
    return rng.choice(
        (
            f"from left to right there are {first.indefinite}, {second.indefinite} and {third.indefinite}",
            f"{first.indefinite}, {second.indefinite} and {third.indefinite} side by side from left to right",
        )
    )


def _move_all(subjects: tuple[Subject, ...], rng: random.Random) -> str:
    if len({subject.motion for subject in subjects}) == 1:
        # Without the wordings that deny: "all of them do not move" says little.
        wordings = [several for _, several, _ in _MOTION_WORDS[subjects[0].motion] if "not" not in several]
        several = rng.choice(wordings)
        everything = "both" if sum(subject.count for subject in subjects) == 2 else "all of them"
        return f"{everything} {several}"
    clauses = []
    for subject in subjects:
        one, several, _ = rng.choice(_MOTION_WORDS[subject.motion])
        clauses.append(f"{subject.definite} {one if subject.count == 1 else several}")
    if len(clauses) == 2:
        return f"{clauses[0]}{rng.choice((' and ', ', while '))}{clauses[1]}"
    return f"{clauses[0]}, {clauses[1]} and {clauses[2]}"

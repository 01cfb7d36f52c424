"""The words of the testbed: what a scene may hold, how questions are phrased, the answers."""

from __future__ import annotations

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
PLURALS = ("circles", "squares", "triangles", "diamonds", "stars", "crosses", "rings", "hearts")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
RGB = (
    (214, 32, 32),
    (245, 130, 16),
    (244, 220, 36),
    (30, 150, 52),
    (40, 208, 222),
    (36, 64, 214),
    (122, 36, 158),
    (246, 120, 184),
)

# chance level of each kind: the best that can be done knowing the question but not the picture
KINDS: dict[str, float] = {
    "existence": 1 / 2,
    "color": 1 / 8,
    "shape": 1 / 8,
    "count": 1 / 4,
    "where": 1 / 2,
    "relation": 1 / 2,
    "number": 1 / 90,
    "digit": 1 / 10,
}
KIND_NAMES = tuple(KINDS)
# free-form, scored apart and never mixed with the one-word kinds
CAPTION = "caption"
# about two pictures, and about the frames of a clip: for families that were trained on them
PAIR_KINDS: dict[str, float] = {"difference": 1 / 8}
CLIP_KINDS: dict[str, float] = {"change": 1 / 8, "motion": 1 / 4}

# {c} {s}: color and shape of the object asked about, {ss}: plural, {d} {t}: the second object
TEMPLATES: dict[str, tuple[str, ...]] = {
    "existence": (
        "is there any {c} {s} in the picture?",
        "does the picture show any {c} {s}?",
        "is there any {s} in the picture?",
        "does the picture show any {s}?",
    ),
    "color": ("what color is the {s}?", "which color does the {s} have?"),
    "shape": ("what shape is the {c} object?", "which shape does the {c} object have?"),
    "count": (
        "how many {ss} are there?",
        "what is the number of {ss}?",
        "how many {c} objects are there?",
        "what is the number of {c} objects?",
    ),
    "where": (
        "is the {c} {s} on the left or on the right?",
        "is the {c} {s} at the top or at the bottom?",
    ),
    "relation": (
        "is the {c} {s} left of the {d} {t}?",
        "is the {c} {s} right of the {d} {t}?",
        "is the {c} {s} above the {d} {t}?",
        "is the {c} {s} below the {d} {t}?",
    ),
    "number": ("what number is printed on the card?", "which number can you read?"),
    "digit": ("which digit is written by hand?", "what is the handwritten digit?"),
    "caption": ("list the objects from left to right.",),
    "difference": (
        "what color is the object that only the first picture shows?",
        "what color is the object that only the second picture shows?",
        "what shape is the object that only the first picture shows?",
        "what shape is the object that only the second picture shows?",
    ),
    "change": (
        "what is the new color of the object that changes?",
        "what was the old color of the object that changes?",
    ),
    "motion": (
        "to which side does the {c} {s} move?",
        "towards which side is the {c} {s} moving?",
    ),
}

# answers by index; a printed number has two indices, tens and ones
DIGITS = tuple("0123456789")
ANSWERS = (*DIGITS, "yes", "no", *COLORS, *SHAPES, "left", "right", "top", "bottom")
YES, NO = ANSWERS.index("yes"), ANSWERS.index("no")
FIRST_COLOR, FIRST_SHAPE = ANSWERS.index(COLORS[0]), ANSWERS.index(SHAPES[0])
LEFT, TOP = ANSWERS.index("left"), ANSWERS.index("top")


def phrase(kind: str, template: int, fillers: tuple[int, int, int, int]) -> str:
    """The text of a question; `fillers` are color, shape, second color, second shape."""
    color, shape, color2, shape2 = fillers
    return TEMPLATES[kind][template].format(
        c=COLORS[color], s=SHAPES[shape], ss=PLURALS[shape], d=COLORS[color2], t=SHAPES[shape2]
    )


def answer_text(indices: tuple[int, ...]) -> str:
    """The text of an answer of one or two indices (two digits join: "47")."""
    return "".join(ANSWERS[i] for i in indices if i >= 0)

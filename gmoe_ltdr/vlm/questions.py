"""Synthetic visual questions: coloured shapes in a picture of 32 x 32, one word as the answer.

Enough to train a vision-language model from scratch on a CPU in minutes and to see whether it looks
at its picture. A scene has one to four objects in a grid of two by two, no two of the same colour
or shape. There are four kinds of questions:

    what color is the top left thing ?      red
    what shape is the bottom left thing ?   circle
    how many things ?                       three
    is there a red thing ?                  no

To learn from there are descriptions, too, as LLaVAs are first trained on captions: the answer goes
from cell to cell with colour and shape, or "no thing". From one-word answers alone, so small a
model learns far more slowly.

Shapes: N questions, S tokens of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIDE, CELL = 32, 16
NUM_IMAGE_TOKENS = 16  # patches of 8 x 8
COLORS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 50),
    "white": (245, 245, 245),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("one", "two", "three", "four")
PLACES = (("top", "left"), ("top", "right"), ("bottom", "left"), ("bottom", "right"))
KINDS = ("color", "shape", "number", "yes or no")
DESCRIPTION = len(KINDS)  # in place of an index into them
WORDS = (
    "<pad>", "<bos>", "<eos>", "<image>", "what", "color", "shape", "is", "the", "thing", "things",
    "how", "many", "there", "a", "top", "bottom", "left", "right", "?", "yes", "no",
    *COLORS, *SHAPES, *NUMBERS,
)  # fmt: skip
IDS = {word: number for number, word in enumerate(WORDS)}
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
_LENGTH = 1 + NUM_IMAGE_TOKENS + 4 + 9  # <bos>, image, the longest question with its answer, <eos>


@dataclass(frozen=True)
class Questions:
    """A batch, or a whole data set.

    Attributes:
        input_ids: (N, S), padded on the right: picture, question, answer, end.
        attention_mask: (N, S).
        labels: (N, S), the answer and the end; -100 elsewhere.
        pixel_values: (N, 3, 32, 32), between -1 and 1.
        answer_place: (N,), where the answer begins in `input_ids`.
        kind: (N,), index into `KINDS`, or `DESCRIPTION`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor
    answer_place: Tensor
    kind: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, chosen: Tensor | slice) -> Questions:
        return Questions(**{name: value[chosen] for name, value in vars(self).items()})

    def inputs(self) -> dict[str, Tensor]:
        """What a LLaVA takes, labels included."""
        names = ("input_ids", "attention_mask", "labels", "pixel_values")
        return {name: getattr(self, name) for name in names}


def make_questions(number: int, seed: int, *, descriptions: float = 0.0) -> Questions:
    """Questions drawn at random; another seed gives others.

    Args:
        number: Rows.
        seed: Of everything.
        descriptions: Share of rows that ask for a description.
    """
    draw = np.random.default_rng(seed)
    ids = np.full((number, _LENGTH), PAD)
    labels = np.full((number, _LENGTH), -100)
    pixels = np.empty((number, 3, SIDE, SIDE), dtype=np.float32)
    places, kinds = np.empty(number, dtype=np.int64), np.empty(number, dtype=np.int64)
    for row in range(number):
        num_objects = int(draw.integers(1, 5))
        colors = [list(COLORS)[i] for i in draw.permutation(len(COLORS))[:num_objects]]
        shapes = [SHAPES[i] for i in draw.permutation(len(SHAPES))[:num_objects]]
        cells = draw.permutation(len(PLACES))[:num_objects]
        pixels[row] = _picture(colors, shapes, cells, draw)
        if draw.random() < descriptions:
            kinds[row] = DESCRIPTION
            words, answer = ["what", "is", "there", "?"], _describe(colors, shapes, cells)
        else:
            kinds[row] = draw.integers(len(KINDS))
            words, word = _ask(KINDS[kinds[row]], colors, shapes, cells, draw)
            answer = [word]
        sentence = [BOS, *[IMAGE] * NUM_IMAGE_TOKENS, *(IDS[word] for word in words)]
        places[row] = len(sentence)
        sentence += [*(IDS[word] for word in answer), EOS]
        ids[row, : len(sentence)] = sentence
        labels[row, places[row] : len(sentence)] = sentence[places[row] :]
    input_ids = torch.from_numpy(ids)
    return Questions(
        input_ids=input_ids,
        attention_mask=(input_ids != PAD).long(),
        labels=torch.from_numpy(labels),
        pixel_values=torch.from_numpy(pixels),
        answer_place=torch.from_numpy(places),
        kind=torch.from_numpy(kinds),
    )


def _ask(
    kind: str, colors: list[str], shapes: list[str], cells: np.ndarray, draw: np.random.Generator
) -> tuple[list[str], str]:
    if kind == "number":
        return ["how", "many", "things", "?"], NUMBERS[len(colors) - 1]
    if kind == "yes or no":
        there = bool(draw.integers(2))
        candidates = colors if there else [color for color in COLORS if color not in colors]
        color = candidates[int(draw.integers(len(candidates)))]
        return ["is", "there", "a", color, "thing", "?"], "yes" if there else "no"
    chosen = int(draw.integers(len(colors)))
    answer = colors[chosen] if kind == "color" else shapes[chosen]
    return ["what", kind, "is", "the", *PLACES[int(cells[chosen])], "thing", "?"], answer


def _describe(colors: list[str], shapes: list[str], cells: np.ndarray) -> list[str]:
    told = [["no", "thing"] for _ in PLACES]
    for color, shape, cell in zip(colors, shapes, cells, strict=True):
        told[int(cell)] = [color, shape]
    return [word for pair in told for word in pair]


def _picture(
    colors: list[str], shapes: list[str], cells: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """(3, 32, 32), between -1 and 1: objects of 8 to 10 pixels on a dark, noisy ground."""
    picture = draw.normal(40, 12, (SIDE, SIDE, 3))
    for color, shape, cell in zip(colors, shapes, cells, strict=True):
        size = int(draw.integers(8, 11))
        top, left = (
            corner * CELL + int(draw.integers(1, CELL - size)) for corner in divmod(int(cell), 2)
        )
        inside = _stamp(shape, size)
        picture[top : top + size, left : left + size][inside] = COLORS[color]
    return (picture.clip(0, 255) / 127.5 - 1).transpose(2, 0, 1).astype(np.float32)


def _stamp(shape: str, size: int) -> np.ndarray:
    """Bool (size, size)."""
    y, x = np.mgrid[0:size, 0:size] - (size - 1) / 2
    half = size / 2
    if shape == "circle":
        return x**2 + y**2 <= half**2
    if shape == "square":
        return np.ones((size, size), dtype=bool)
    if shape == "triangle":
        return np.abs(x) <= (y + half) / 2
    return (np.abs(x) < size / 6) | (np.abs(y) < size / 6)

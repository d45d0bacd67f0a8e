"""Synthetic visual questions: coloured shapes in a picture of 32 x 32, one word as the answer.

Enough to train a vision-language model from scratch on a CPU in minutes and to see whether it looks
at its picture. A scene has one to four objects in a grid of two by two, no two of the same colour
or shape. There are four kinds of questions:

    what color is the circle ?         red
    what shape is the red thing ?      circle
    how many things ?                  three
    is there a red circle ?            no

(where the answer is no, a red thing is there, and a circle if there is more than one thing.)

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
KINDS = ("color", "shape", "number", "yes or no")
WORDS = (
    "<pad>", "<bos>", "<eos>", "<image>", "what", "color", "shape", "is", "the", "thing", "things",
    "how", "many", "there", "a", "?", "yes", "no", *COLORS, *SHAPES, *NUMBERS,
)  # fmt: skip
IDS = {word: number for number, word in enumerate(WORDS)}
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
_LENGTH = 1 + NUM_IMAGE_TOKENS + 7 + 2  # <bos>, image, the longest question, answer, <eos>


@dataclass(frozen=True)
class Questions:
    """A batch, or a whole data set.

    Attributes:
        input_ids: (N, S), padded on the right: picture, question, answer, end.
        attention_mask: (N, S).
        labels: (N, S), the answer and the end; -100 elsewhere.
        pixel_values: (N, 3, 32, 32), between -1 and 1.
        answer_place: (N,), where the answer stands in `input_ids`.
        kind: (N,), index into `KINDS`.
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


def make_questions(number: int, seed: int) -> Questions:
    """Questions drawn at random; another seed gives others."""
    draw = np.random.default_rng(seed)
    ids = np.full((number, _LENGTH), PAD)
    labels = np.full((number, _LENGTH), -100)
    pixels = np.empty((number, 3, SIDE, SIDE), dtype=np.float32)
    places, kinds = np.empty(number, dtype=np.int64), np.empty(number, dtype=np.int64)
    for row in range(number):
        num_objects = int(draw.integers(1, 5))
        colors = [list(COLORS)[i] for i in draw.permutation(len(COLORS))[:num_objects]]
        shapes = [SHAPES[i] for i in draw.permutation(len(SHAPES))[:num_objects]]
        pixels[row] = _picture(colors, shapes, draw)
        kinds[row] = draw.integers(len(KINDS))
        words, answer = _ask(KINDS[kinds[row]], colors, shapes, draw)
        sentence = [BOS, *[IMAGE] * NUM_IMAGE_TOKENS, *(IDS[word] for word in words)]
        places[row] = len(sentence)
        sentence += [IDS[answer], EOS]
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
    kind: str, colors: list[str], shapes: list[str], draw: np.random.Generator
) -> tuple[list[str], str]:
    chosen = int(draw.integers(len(colors)))
    color, shape = colors[chosen], shapes[chosen]
    if kind == "color":
        return ["what", "color", "is", "the", shape, "?"], color
    if kind == "shape":
        return ["what", "shape", "is", "the", color, "thing", "?"], shape
    if kind == "number":
        return ["how", "many", "things", "?"], NUMBERS[len(colors) - 1]
    there = bool(draw.integers(2))
    if not there:
        # the colour with another object's shape, so that both have to be seen together
        others = [s for s in (shapes if len(shapes) > 1 else SHAPES) if s != shape]
        shape = others[int(draw.integers(len(others)))]
    return ["is", "there", "a", color, shape, "?"], "yes" if there else "no"


def _picture(colors: list[str], shapes: list[str], draw: np.random.Generator) -> np.ndarray:
    """(3, 32, 32), between -1 and 1: objects of 8 to 10 pixels on a dark, noisy ground."""
    picture = draw.normal(40, 12, (SIDE, SIDE, 3))
    cells = draw.permutation(4)[: len(colors)]
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

"""Transforms: ranges, determinism, one image's numbers being its own, what each change does."""

from __future__ import annotations

import pickle

import pytest
import torch
from PIL import Image

from domainbed_ext.datasets import transforms
from domainbed_ext.datasets.transforms import AUGMENTATIONS, Jitter, Plain, Style, get_transforms
from domainbed_ext.errors import UsageError

SHAPE = (3, 64, 64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawings(n: int = 6) -> torch.Tensor:
    """White images with a coloured square and a black line."""
    x = torch.full((n, *SHAPE), 255, dtype=torch.uint8)
    for i in range(n):
        x[i, i % 3, 16:48, 12 + i : 50] = 40
        x[i, :, 30:33, 8:56] = 0
    return x


def black_frame(ink: torch.Tensor, thickness: int) -> torch.Tensor:
    ink[..., 20 : 20 + thickness, 20:44] = 1
    return ink


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_in_memory_ranges_shape_and_untouched_input(augmentation):
    train, evaluate = get_transforms(augmentation, SHAPE, in_memory=True)
    images = drawings()
    before = images.clone()
    for x in (train(images, generator()), evaluate(images, generator())):
        assert x.shape == images.shape
        assert x.dtype == torch.float32
        assert x.min() >= -1 - 1e-6
        assert x.max() <= 1 + 1e-6
    assert torch.equal(images, before)


def test_evaluation_scales_only():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    _, evaluate = get_transforms("style", (3, 4, 4), in_memory=True)
    drawing = generator(3)
    state = drawing.get_state()
    values = evaluate(x, drawing)[0, :, 0, 0]
    torch.testing.assert_close(values, torch.tensor([-1.0, -0.6, 1.0]))
    assert torch.equal(drawing.get_state(), state)


def test_evaluation_resizes_to_the_input_shape():
    x = Plain((48, 48))(drawings(2), None)
    assert x.shape == (2, 3, 48, 48)
    torch.testing.assert_close(x[:, :, 0, 0], torch.ones(2, 3))


@pytest.mark.parametrize("augmentation", ["domainbed", "style"])
def test_random_numbers_come_from_the_generator_alone(augmentation):
    train, _ = get_transforms(augmentation, SHAPE, in_memory=True)
    images = drawings()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = train(images, generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(train(images, generator(1)), first)
    assert not torch.equal(train(images, generator(2)), first)


@pytest.mark.parametrize("augmentation", ["domainbed", "style"])
def test_copies_of_one_image_come_out_differently(augmentation):
    train, _ = get_transforms(augmentation, SHAPE, in_memory=True)
    x = train(drawings(1).expand(8, -1, -1, -1), generator())
    assert len({tuple(image.flatten().tolist()) for image in x}) == 8


@pytest.mark.parametrize("make", [Jitter, Style])
def test_an_image_does_not_depend_on_its_batch_mates(make):
    images = drawings()
    others = images.clone()
    others[1:] = 255 - others[1:]
    transform = make((64, 64))
    assert torch.equal(transform(images, generator(4))[0], transform(others, generator(4))[0])


def test_style_turned_off_is_the_identity():
    still = Style((64, 64), geometry=0, edges=0, grey=0, threshold=0, stroke=0, blur=0, erase=0)
    images = drawings(32)
    expected = Plain((64, 64))(images)
    changed = still(images, generator())
    mirrored = changed.flip(-1)
    for before, after, mirror in zip(expected, changed, mirrored, strict=True):
        assert min((before - after).abs().max(), (before - mirror).abs().max()) < 1e-4


def test_style_keeps_the_background_white():
    blank = torch.full((64, *SHAPE), 255, dtype=torch.uint8)
    # a threshold may leave a trace of ink: sigmoid(-0.2 * 6) at most
    assert Style((64, 64), threshold=0)(blank, generator()).min() == 1


def test_geometry_bends_grey_stays():
    images = drawings(16)
    x = Style((64, 64), edges=0, grey=1, threshold=0, stroke=0, blur=0, erase=0)(
        images, generator()
    )
    torch.testing.assert_close(x[:, 0], x[:, 1])
    torch.testing.assert_close(x[:, 0], x[:, 2])


def test_the_output_size_is_sampled_directly():
    assert Style((48, 48))(drawings(), generator()).shape == (6, 3, 48, 48)
    assert Jitter((48, 48))(drawings(), generator()).shape == (6, 3, 48, 48)


def test_domainbed_in_memory_never_turns_or_mirrors():
    """The left side of a half-black image stays dark, its top edge stays as its bottom edge."""
    images = torch.zeros(64, 1, 16, 16, dtype=torch.uint8)
    images[..., 8:] = 255
    x = Jitter((16, 16))(images, generator())
    assert (x[..., :5].mean((1, 2, 3)) < x[..., 11:].mean((1, 2, 3))).all()
    torch.testing.assert_close(x, x[:, :, :1].expand_as(x), atol=1e-5, rtol=0)


def test_edges_of_a_filled_square_are_its_outline():
    ink = torch.zeros(1, 3, 32, 32)
    ink[..., 8:24, 8:24] = 1
    outline = transforms._edges(ink, torch.tensor([0.1]), torch.tensor([4.0]))[0, 0]
    assert outline[16, 16] == 0
    assert outline[2, 2] == 0
    assert outline[8, 16] == 1
    assert outline[16, 8] == 1


@pytest.mark.parametrize(("thicker", "rows"), [(True, 5), (False, 1)])
def test_strokes_grow_and_shrink_by_a_pixel_a_side(thicker, rows):
    ink = black_frame(torch.zeros(1, 3, 64, 64), 3)
    changed = transforms._change_stroke(ink, torch.tensor([thicker]), torch.tensor([1.0]))
    assert int(changed[0, 0, :, 32].sum()) == rows


def test_threshold_makes_black_and_white():
    ink = torch.tensor([0.0, 0.4, 0.6, 1.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    changed = transforms._threshold(ink, torch.tensor([0.5]), torch.tensor([100.0]))
    assert changed.shape == (1, 1, 1, 4)
    torch.testing.assert_close(
        changed.flatten(), torch.tensor([0.0, 0.0, 1.0, 1.0]), atol=1e-3, rtol=0
    )


def test_erasing_removes_one_box():
    ink = torch.ones(1, 3, 11, 11)
    half = torch.tensor([0.5])
    changed = transforms._erase(ink, half, half, torch.tensor([0.15]), torch.tensor([0.25]))
    # of 0, 0.1, .. 1: three rows lie within 0.15 of the middle, five columns within 0.25
    assert int((changed[0, 0] == 0).sum()) == 15
    assert changed[0, 0, 5, 5] == 0


def test_chosen_images_alone_are_changed():
    ink = torch.rand(3, 3, 8, 8, generator=generator())
    chosen = torch.tensor([False, True, False])
    changed = transforms._apply(chosen, ink.clone(), transforms._grey)
    assert torch.equal(changed[0], ink[0])
    assert torch.equal(changed[2], ink[2])
    torch.testing.assert_close(changed[1, 0], ink[1].mean(0))


def test_file_images_follow_domainbeds_recipe():
    train, evaluate = get_transforms("domainbed", (3, 32, 32), in_memory=False)
    image = Image.new("RGB", (50, 40), (255, 0, 0))
    x = evaluate(image)
    assert x.shape == (3, 32, 32)
    # red, ImageNet's statistics: (1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225
    expected = torch.tensor([2.2489, -2.0357, -1.8044]).view(3, 1, 1).expand(3, 32, 32)
    torch.testing.assert_close(x, expected, atol=1e-3, rtol=0)
    torch.manual_seed(0)
    first = train(image)
    assert first.shape == (3, 32, 32)
    torch.manual_seed(0)
    assert torch.equal(train(image), first)


def test_no_augmentation_of_files_is_evaluation():
    train, evaluate = get_transforms("none", (3, 32, 32), in_memory=False)
    assert train is evaluate


@pytest.mark.parametrize("in_memory", [True, False])
def test_transforms_travel_to_workers(in_memory):
    pair = get_transforms("domainbed", SHAPE, in_memory=in_memory)
    copies = pickle.loads(pickle.dumps(pair))
    image = drawings(2) if in_memory else Image.new("RGB", (70, 70), (9, 200, 30))
    arguments = (image, generator()) if in_memory else (image,)
    assert torch.equal(copies[1](*arguments), pair[1](*arguments))


def test_unknown_and_unfit_augmentations_are_refused():
    with pytest.raises(UsageError, match="'styel' is unknown; choose among domainbed, style, none"):
        get_transforms("styel", SHAPE, in_memory=True)
    with pytest.raises(UsageError, match="image files choose 'domainbed' or 'none'"):
        get_transforms("style", SHAPE, in_memory=False)

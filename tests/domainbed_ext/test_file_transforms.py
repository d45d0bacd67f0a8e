"""The transforms of image files against torchvision's, which DomainBed chains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from domainbed_ext.datasets import file_transforms
from domainbed_ext.datasets.file_transforms import FileTransform

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def picture(height, width, seed=0):
    """Smooth colours with grain, like a photograph's."""
    random = np.random.RandomState(seed)
    coarse = Image.fromarray(random.randint(0, 256, (5, 6, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    noisy = smooth + random.normal(0, 6, smooth.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def difference(left, right):
    return (left.float() - right.float()).abs()


@pytest.mark.parametrize("seed", range(24))
def test_training_images_are_those_of_torchvisions_chain(seed):
    image = picture(97, 140, seed)
    chain = T.Compose(
        [
            T.RandomResizedCrop((64, 64), scale=(0.7, 1.0)),
            T.RandomHorizontalFlip(),
            T.ColorJitter(0.3, 0.3, 0.3, 0.3),
            T.RandomGrayscale(0.1),
        ]
    )
    torch.manual_seed(seed)
    exact = chain(TF.to_tensor(image)) * 255  # float32 all the way
    after = torch.rand(1)
    torch.manual_seed(seed)
    found = FileTransform((64, 64), augmented=True).pixels(image)
    assert torch.equal(torch.rand(1), after)  # as many random numbers
    # We round twice, Pillow to 8 bits after each change, and it keeps hue in 256 steps.
    torch.manual_seed(seed)
    pillows = TF.pil_to_tensor(chain(image))
    error, pillows_error = difference(found, exact), difference(pillows, exact)
    assert error.mean() < 0.6
    assert error.quantile(0.99) < 2
    assert error.mean() < pillows_error.mean() < 3


def test_the_chain_of_the_test_above_meets_every_case():
    mirrored = grey = 0
    for seed in range(24):
        torch.manual_seed(seed)
        T.RandomResizedCrop.get_params(torch.empty(3, 97, 140), [0.7, 1.0], [3 / 4, 4 / 3])
        mirrored += int(torch.rand(1) < 0.5)
        T.ColorJitter.get_params([0.7, 1.3], [0.7, 1.3], [0.7, 1.3], [-0.3, 0.3])
        grey += int(torch.rand(1) < 0.1)
    assert 0 < mirrored < 24
    assert grey > 0


@pytest.mark.parametrize("size", [(64, 64), (30, 150), (97, 140)])
def test_evaluation_resizes_as_pillow_does(size):
    image = picture(97, 140)
    found = FileTransform(size, augmented=False).pixels(image)
    expected = TF.pil_to_tensor(TF.resize(image, size))
    assert found.dtype == torch.uint8
    assert difference(found, expected).max() <= 1
    assert difference(found, expected).mean() < 0.25


def test_an_evaluated_image_of_the_right_size_equals_torchvisions_to_the_bit():
    image = picture(32, 32)
    chain = T.Compose([T.Resize((32, 32)), T.ToTensor(), T.Normalize(MEAN, STD)])
    found = FileTransform((32, 32), augmented=False)(image)
    assert torch.equal(found, chain(image))


@pytest.mark.parametrize("turns", [-0.3, -0.05, 0.0, 0.1, 0.3])
def test_hues_are_those_of_hsv(turns):
    x = TF.pil_to_tensor(picture(40, 50)).float()
    x[:, :4] = x[:1, :4]  # grey rows
    x[:, 4] = torch.tensor([255.0, 0, 0])[:, None]
    expected = TF.adjust_hue(x / 255, turns) * 255
    torch.testing.assert_close(file_transforms._turn_hue(x, turns), expected, atol=2e-3, rtol=0)


def test_arrays_and_images_are_alike_and_left_alone():
    image = picture(50, 40)
    pixels = np.array(image)
    for augmented in (False, True):
        transform = FileTransform((40, 40), augmented)
        torch.manual_seed(1)
        of_image = transform(image)
        torch.manual_seed(1)
        assert torch.equal(transform(pixels), of_image)
        assert np.array_equal(pixels, np.asarray(image))


def test_normalize_of_a_batch_is_that_of_its_images():
    transform = FileTransform((16, 16), augmented=False)
    images = [picture(20, 20, seed) for seed in range(3)]
    batch = transform.normalize(torch.stack([transform.pixels(image) for image in images]))
    assert torch.equal(batch, torch.stack([transform(image) for image in images]))

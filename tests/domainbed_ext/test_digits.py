"""RotatedDigits and ColoredDigits."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from domainbed_ext.datasets.digits import ColoredDigits, RotatedDigits, _load_digits

HPARAMS = {"data_augmentation": True}


@pytest.fixture(scope="module")
def rotated():
    return RotatedDigits(None, [0], HPARAMS)


@pytest.fixture(scope="module")
def colored():
    return ColoredDigits(None, [2], HPARAMS)


def all_images(environment):
    return environment.images(np.arange(len(environment))).numpy()


def test_the_scans_are_scikit_learns():
    scans, digits = _load_digits()
    bunch = load_digits()
    assert np.array_equal(scans, bunch.images)
    assert np.array_equal(digits, bunch.target)


def test_rotated_environments_share_1797_digits(rotated):
    assert [environment.name for environment in rotated.datasets] == [
        *("0", "15", "30", "45", "60", "75")
    ]
    # 1797 = 6 * 299 + 3: dealt out in turn.
    assert [len(environment) for environment in rotated.datasets] == [300, 300, 300, 299, 299, 299]
    assert rotated.input_shape == (1, 16, 16)
    assert rotated.num_classes == 10
    labels = np.concatenate([environment.labels for environment in rotated.datasets])
    assert np.array_equal(np.bincount(labels), np.bincount(load_digits().target))


def test_unrotated_digits_are_the_enlarged_scans(rotated):
    expected = {
        np.asarray(
            Image.fromarray(np.round(scan * 255 / 16).astype(np.uint8)).resize((16, 16), 3)
        ).tobytes()
        for scan in load_digits().images
    }
    images = all_images(rotated[0])
    assert all(image.tobytes() in expected for image in images)


def test_rotation_lays_the_ones_down(rotated):
    images = all_images(rotated[5]).astype(float)[:, 0]
    ones = images[rotated[5].labels == 1].mean(axis=0)
    upright = all_images(rotated[0]).astype(float)[:, 0][rotated[0].labels == 1].mean(axis=0)
    # The mean "one" is tall at 0 degrees and wide at 75.
    rows, columns = np.mgrid[:16, :16] - 7.5

    def elongation(image):
        return (image * rows**2).sum() / (image * columns**2).sum()

    assert elongation(upright) > 1.5
    assert elongation(ones) < 0.7


def test_colors_follow_the_label_as_often_as_announced(colored):
    assert colored.input_shape == (2, 16, 16)
    assert [len(environment) for environment in colored.datasets] == [599, 599, 599]
    for environment, flips in zip(colored.datasets, (0.1, 0.2, 0.9), strict=True):
        images = all_images(environment)
        ink = images.reshape(len(images), 2, -1).sum(axis=2)
        assert ((ink > 0).sum(axis=1) == 1).all()  # one channel each
        colors = ink.argmax(axis=1)
        assert (colors != environment.labels).sum() == round(flips * 599)


def test_a_quarter_of_the_colored_labels_is_wrong(colored, rotated):
    from domainbed_ext.datasets.digits import shuffled_digits

    _, digits = shuffled_digits()
    for env, environment in enumerate(colored.datasets):
        wrong = environment.labels != (digits[env::3] < 5)
        assert wrong.sum() == round(0.25 * 599)


def test_digits_are_the_same_every_time(colored):
    again = ColoredDigits(None, [0], {"data_augmentation": False})
    for a, b in zip(colored.datasets, again.datasets, strict=True):
        assert np.array_equal(all_images(a), all_images(b))
        assert np.array_equal(a.labels, b.labels)
    assert colored.fingerprint() == again.fingerprint()

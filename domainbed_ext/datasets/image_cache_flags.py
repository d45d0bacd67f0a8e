"""The flags of `train` and `sweep` that choose an image cache; imports nothing heavy."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from domainbed_ext.errors import UsageError

if TYPE_CHECKING:
    from domainbed_ext.train_args import TrainArgs

FOLDER = "image_cache"
EXACT, OFF = "exact", "off"
DEFAULT_LIMIT_GB = 16.0


@dataclass(frozen=True)
class ImageCacheOptions:
    """Where decoded images are kept, and how.

    Attributes:
        mode: "off", "exact", or the shorter side in pixels that images are reduced to.
        folder: Holds the caches of all data sets.
        limit_gb: What they may take together; a data set that does not fit is decoded as ever.
    """

    mode: str
    folder: Path
    limit_gb: float = DEFAULT_LIMIT_GB

    def __post_init__(self) -> None:
        if self.mode not in (EXACT, OFF) and not _is_side(self.mode):
            raise UsageError(
                f"--image_cache {self.mode} is unknown; choose {OFF}, {EXACT} or the shorter side "
                "in pixels that images are reduced to, such as 320"
            )
        if not self.limit_gb > 0:
            raise UsageError(
                f"--image_cache_gb {self.limit_gb} leaves no room; pass a number above 0, or "
                f"--image_cache {OFF}"
            )

    @property
    def side(self) -> int | None:
        """The shorter side of reduced images."""
        return int(self.mode) if _is_side(self.mode) else None


def _is_side(mode: str) -> bool:
    return mode.isascii() and mode.isdigit() and 16 <= int(mode) <= 10_000


def image_cache_options(args: TrainArgs) -> ImageCacheOptions:
    """What the flags ask for; refuses what cannot be."""
    folder = args.image_cache_dir or Path(args.data_dir) / FOLDER
    return ImageCacheOptions(args.image_cache, Path(folder), args.image_cache_gb)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to a command line."""
    parser.add_argument(
        "--image_cache",
        default=EXACT,
        metavar="MODE",
        help="keep decoded image files on the disk for all jobs: off, exact (same pixels), or a "
        "number of pixels that the shorter side is reduced to (other pixels) (default: exact)",
    )
    parser.add_argument(
        "--image_cache_dir",
        metavar="DIR",
        help=f"where, a fast local disk if there is one (default: {FOLDER} in --data_dir)",
    )
    parser.add_argument(
        "--image_cache_gb",
        type=float,
        default=DEFAULT_LIMIT_GB,
        metavar="GB",
        help="what all of it may take; what does not fit is decoded as needed (default: 16)",
    )

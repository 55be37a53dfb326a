"""Aspect-ratio buckets: images of other shapes than squares, in batches of one shape each."""

from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator
from diffusers.training_utils import generate_aspect_ratio_buckets

from difftrain_utils.config.config import Config
from difftrain_utils.data.rows import MappedRows
from difftrain_utils.data.sizes import image_sizes
from difftrain_utils.processes import main_process_first


class Buckets:
    """The size (height, width) that each image is resized and cropped to: that of the nearest aspect ratio, so that
    cropping cuts off least.

    A bucket with fewer images than a batch is left out, the smallest first, and its images go to the nearest of the
    others. `sizes` (n, 2) are the images' (height, width); one of 0, which cannot be read, counts as square.
    """

    def __init__(self, sizes: np.ndarray, buckets: Sequence[tuple[int, int]], batch_size: int):
        heights, widths = np.where(sizes > 0, sizes, 1).T
        ratios, inverse = np.unique(widths / heights, return_inverse=True)
        self.sizes = sorted(map(tuple, buckets), key=lambda size: size[1] / size[0])
        while True:
            of_buckets = np.log([width / height for height, width in self.sizes])
            self.of_row = np.abs(np.log(ratios)[:, None] - of_buckets).argmin(1)[inverse].astype(np.int16)
            self.counts = np.bincount(self.of_row, minlength=len(self.sizes))
            if len(self.sizes) == 1 or self.counts.min() >= batch_size:
                break
            self.sizes.pop(self.counts.argmin())
        targets = np.array(self.sizes)[self.of_row]
        self.cropped = cropped_share(np.stack([heights, widths], 1), targets)
        self.remainder = int((self.counts % batch_size).sum())

    def size_of(self, row: int) -> tuple[int, int]:
        """(height, width) of a row's bucket."""
        return self.sizes[self.of_row[row]]

    def describe(self) -> str:
        """In words: how many images each has, what cropping cuts off, what an epoch leaves out."""
        counts = ", ".join(f"{h}x{w}: {n}" for (h, w), n in zip(self.sizes, self.counts, strict=True))
        return (
            f"Buckets (height x width: images): {counts}; cropping cuts {self.cropped.mean():.1%} of an image "
            f"(at most {self.cropped.max():.1%}); an epoch leaves out {self.remainder} images, others each time"
        )


def cropped_share(sizes: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The share of each image's area that is cut off when it is scaled to cover its target: 1 - min(r/R, R/r) for the
    aspect ratios r and R. Both have the shape (n, 2), as (height, width)."""
    quotient = (sizes[:, 1] * targets[:, 0]) / (sizes[:, 0] * targets[:, 1])
    return 1 - np.minimum(quotient, 1 / quotient)


def load_buckets(accelerator: Accelerator, family, rows: MappedRows, config: Config) -> Buckets:
    """The buckets that `data.buckets` asks for. Prints what they make of the images.

    Raises:
        InputError: a size is none that the model can take.
        RowError: an image's header cannot be read, and `data.on_bad_row` is stop.
    """
    sizes = config.data.buckets
    if sizes == "auto":
        sizes = generate_aspect_ratio_buckets(config.data.resolution, divisibility=family.size_multiple)
    for height, width in sizes:
        family.check_size(height, width, "data.buckets")
    with main_process_first(accelerator):
        buckets = Buckets(image_sizes(rows, config.data), sizes, config.train.batch_size)
    accelerator.print(buckets.describe())
    return buckets

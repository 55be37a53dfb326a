"""Aspect-ratio buckets: images of other shapes than squares, in batches of one shape each."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from accelerate import Accelerator
from diffusers.training_utils import generate_aspect_ratio_buckets

from difftrain_utils.config.config import Config
from difftrain_utils.data.rows import MappedRows, Rows
from difftrain_utils.data.sizes import image_sizes
from difftrain_utils.errors import InputError
from difftrain_utils.processes import main_process_first


class Buckets:
    """The size (height, width) that each image is resized and cropped to: that of the nearest aspect ratio, so that
    cropping cuts off least.

    A bucket with fewer images than a batch is left out, the smallest first, and its images go to the nearest of the
    others. `sizes` (n, 2) are the images' (height, width); one of 0, which cannot be read, counts as square.

    With `no_upscale` an image only has buckets that are not larger than it, in height and in width; -1 stands for none.
    `scaled_down` are such buckets, as {size: the aspect ratio that it stands for}; of one ratio the largest is taken.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        buckets: Sequence[tuple[int, int]],
        batch_size: int,
        no_upscale: bool = False,
        scaled_down: Mapping[tuple[int, int], float] = MappingProxyType({}),
    ):
        sizes = np.where(sizes > 0, sizes, 1).astype(np.int64)
        _, first, inverse = np.unique(sizes @ (1 << 32, 1), return_index=True, return_inverse=True)
        kinds = sizes[first]  # of images: (height, width)
        ratio_of = dict(scaled_down) | {tuple(size): size[1] / size[0] for size in buckets}
        self.sizes = sorted(ratio_of, key=lambda size: (ratio_of[size], -size[0]))
        ratios = np.array([ratio_of[size] for size in self.sizes])
        distances = np.abs(np.log(kinds[:, 1] / kinds[:, 0])[:, None] - np.log(ratios))
        if no_upscale:
            distances[(kinds[:, None] < np.array(self.sizes)).any(2)] = np.inf
        while True:
            nearest = np.where(np.isinf(distances).all(1), -1, distances.argmin(1))
            self.of_row = nearest[inverse].astype(np.int16)
            self.counts = np.bincount(self.of_row[self.of_row >= 0], minlength=len(self.sizes))
            if len(self.sizes) == 1 or self.counts.min() >= batch_size:
                break
            fewest = self.counts.argmin()
            self.sizes.pop(fewest)
            distances = np.delete(distances, fewest, axis=1)
        is_in = self.of_row >= 0
        self.cropped = cropped_share(sizes[is_in], np.array(self.sizes)[self.of_row[is_in]])
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


def scale_down(buckets: Sequence[tuple[int, int]], multiple: int) -> dict[tuple[int, int], float]:
    """Smaller sizes of the same shapes, for `data.no_upscale`: seven eighths, six eighths, … and an eighth of each,
    rounded down to multiples; each with the aspect ratio that it stands for."""
    found = {}
    for height, width in buckets:
        for eighths in range(7, 0, -1):
            size = tuple(side * eighths // (8 * multiple) * multiple for side in (height, width))
            if min(size) > 0:
                found.setdefault(size, width / height)
    return found


def fit_sizes(accelerator: Accelerator, family, rows: Rows, config: Config) -> tuple[Rows, Buckets | None]:
    """The rows that can be trained on at the sizes that `data` asks for, and their buckets where there are any. Prints
    what is made of the images.

    Raises:
        InputError: a size is none that the model can take, or `data.no_upscale` leaves a source no image.
        RowError: an image's header cannot be read, and `data.on_bad_row` is stop.
    """
    data, buckets = config.data, None
    if not data.buckets and not data.no_upscale:
        return rows, None
    with main_process_first(accelerator):
        sizes = image_sizes(rows, data)
    if data.buckets:
        buckets = load_buckets(family, sizes, config)
        is_kept = buckets.of_row >= 0
    else:
        is_kept = (sizes >= data.resolution).all(1)
    if not is_kept.all():
        rows = take_large(rows, sizes, is_kept)
        why = "too small" if buckets is None else "too small, or too few of their size for a batch"
        accelerator.print(f"data.no_upscale: {len(sizes) - len(rows)} of {len(sizes)} images are left out, {why}")
    if buckets is not None:
        buckets.of_row = buckets.of_row[is_kept]
        accelerator.print(buckets.describe())
    return rows, buckets


def load_buckets(family, sizes: np.ndarray, config: Config) -> Buckets:
    """The buckets that `data.buckets` asks for, of images of the `sizes` (n, 2). Raises InputError if a size is none
    that the model can take."""
    data, buckets, scaled_down = config.data, config.data.buckets, {}
    if buckets == "auto":
        buckets = generate_aspect_ratio_buckets(data.resolution, divisibility=family.size_multiple)
        scaled_down = scale_down(buckets, family.size_multiple) if data.no_upscale else {}
    for height, width in [*buckets, *scaled_down]:
        family.check_size(height, width, "data.buckets")
    return Buckets(sizes, buckets, config.train.batch_size, data.no_upscale, scaled_down)


def take_large(rows: MappedRows, sizes: np.ndarray, is_kept: np.ndarray) -> MappedRows:
    """The rows that are kept. Raises InputError if there are none of a source."""
    ends = np.cumsum(rows.lengths)
    for part, end in zip(rows.parts, ends.tolist(), strict=True):
        of_part = slice(end - len(part), end)
        if not is_kept[of_part].any():
            height, width = max(sizes[of_part].tolist(), key=min)
            raise InputError(
                f"data.no_upscale: each of the {len(part)} images of {part.source.dataset} would be enlarged, or its "
                f"bucket has no batch; the largest has {width} × {height} pixels"
            )
    return rows.take(np.flatnonzero(is_kept))

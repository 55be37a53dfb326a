"""Images as large and as hard to decode as photographs, with captions, for benchmarks that cannot download any.

    python benchmarks/photos.py FOLDER [--num-images 512] [--image-size 512]

writes JPEGs of 5:4 with a shorter side of `--image-size` and their metadata.jsonl.
"""

import argparse
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

NUM_DISTINCT = 512  # images of a larger folder are links to these: it is the bytes of one image that matter
WORDS = (
    "a",
    "the",
    "of",
    "on",
    "with",
    "old",
    "red",
    "small",
    "bright",
    "stone",
    "river",
    "window",
    "evening",
    "light",
)


def draw_photo(index: int, image_size: int) -> Image.Image:
    """Noise whose power falls with its frequency, as that of photographs does: RGB, 5:4."""
    generator, width = np.random.default_rng(index), image_size * 5 // 4
    image, octave = np.full((image_size, width, 3), 128.0, np.float32), 2
    while octave <= image_size:
        noise = generator.integers(0, 256, (octave, octave * 5 // 4, 3), dtype=np.uint8)
        noise = Image.fromarray(noise).resize((width, image_size), Image.Resampling.BICUBIC)
        image += (np.asarray(noise, dtype=np.float32) - 128) / octave**0.5
        octave *= 2
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def write_photos(folder: Path, num_images: int, image_size: int) -> None:
    """Write an image folder of JPEGs of quality 90 with captions of 8 to 24 words."""
    folder.mkdir(parents=True)

    def save(index: int) -> None:
        draw_photo(index, image_size).save(folder / f"{index:06d}.jpg", quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(save, range(min(num_images, NUM_DISTINCT))))
    generator = random.Random(0)
    with (folder / "metadata.jsonl").open("w") as file:
        for index in range(num_images):
            if index >= NUM_DISTINCT:
                os.link(folder / f"{index % NUM_DISTINCT:06d}.jpg", folder / f"{index:06d}.jpg")
            caption = " ".join(generator.choices(WORDS, k=generator.randint(8, 24)))
            file.write(json.dumps({"file_name": f"{index:06d}.jpg", "text": caption}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=512)
    args = parser.parse_args()
    write_photos(args.folder, args.num_images, args.image_size)


if __name__ == "__main__":
    main()

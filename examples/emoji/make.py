"""Make a captioned image folder of emoji, of the npm package that has them as pictures of 64 x 64 pixels:

    npm pack emoji-datasource-google
    python examples/emoji/make.py emoji-datasource-google-*.tgz data/emoji

A picture is laid on white; its caption is the emoji's name in lower case, and the column `category` says of which kind
it is. By the package's README the pictures are Google's Noto Emoji, under the Apache License 2.0.
"""

import argparse
import io
import json
import re
import sys
import tarfile
import zlib
from pathlib import Path

from PIL import Image, UnidentifiedImageError

LIST, PICTURES = "package/emoji.json", "package/img/google/64/"


def read_package(path: Path) -> dict[str, bytes]:
    """The list of emoji and their pictures, by their names in the package, which is not unpacked."""
    with tarfile.open(path, "r:gz") as package:  # in its order, because going back would begin at the start again
        return {
            member.name: package.extractfile(member).read()
            for member in package
            if member.isfile() and (member.name == LIST or member.name.startswith(PICTURES))
        }


def lay_on_white(png: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture).convert("RGB")


def make(package: Path, folder: Path) -> int:
    """Write the images and metadata.jsonl into the new folder; returns how many. Raises ValueError if the package is
    another one or damaged, OSError if it cannot be read or the folder not be made."""
    try:
        files = read_package(package)
        emoji = [entry for entry in json.loads(files[LIST]) if entry["has_img_google"]]
        pictures = {entry["image"]: lay_on_white(files[PICTURES + entry["image"]]) for entry in emoji}
        rows = [{"file_name": e["image"], "text": e["name"].lower(), "category": e["category"]} for e in emoji]
    except (tarfile.TarError, zlib.error, EOFError, KeyError, TypeError, ValueError, UnidentifiedImageError) as error:
        raise ValueError(f"{package}: not the npm package emoji-datasource-google, or damaged: {error}") from error
    if odd := [name for name in pictures if not re.fullmatch(r"[0-9a-f-]+\.png", name)]:
        raise ValueError(f"{package}: no name of a picture: {odd[0]!r}")
    folder.mkdir(parents=True)
    for name, picture in pictures.items():
        picture.save(folder / name)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="emoji-datasource-google-VERSION.tgz")
    parser.add_argument("folder", type=Path, help="a new folder for the images")
    arguments = parser.parse_args()
    try:
        print(f"{make(arguments.package, arguments.folder)} emoji in {arguments.folder}")
    except (ValueError, OSError) as error:
        print(f"make.py: {error}", file=sys.stderr)
        sys.exit(2)

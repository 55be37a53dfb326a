"""A folder of photos, of videos and stills, or of sounds: with captions and masks in files beside them, as kohya's
scripts, ai-toolkit, OneTrainer and diffusion-pipe know it.

Beside `cat.jpg`, `cat.mp4` or `cat.wav`, `cat.txt` (or `cat.caption`) has its caption, and `cat-masklabel.png` is an
image's mask. Folders within are read, too; what is hidden, and all other files, are not looked at.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets

from difftrain_utils.data.sounds import StoredAudio
from difftrain_utils.errors import InputError

# Also what Pillow needs a plugin for, or libsndfile does not know: such a file is refused, and not left out without a
# word.
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl")
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv")
VIDEO_ENDINGS += (".mts", ".m2ts", ".3gp", ".vob")
SOUND_ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64")
SOUND_ENDINGS += (".m4a", ".aac", ".wma", ".mp2", ".ac3", ".ape", ".wv", ".mka")
# By the kind of the folder, as `datasets` calls it
ENDINGS = {"image": IMAGE_ENDINGS, "video": VIDEO_ENDINGS + IMAGE_ENDINGS, "audio": SOUND_ENDINGS}
NOUNS = {"image": "images", "video": "videos", "audio": "sounds"}
STORED = {"image": datasets.Image, "video": datasets.Video, "audio": StoredAudio}
CAPTION_ENDINGS = (".txt", ".caption")
MASK_ENDING = "-masklabel.png"
REPEATS = re.compile(r"(\d+)_(.+)")


class Photo(NamedTuple):
    """An image, a video or a sound, and the files of its caption and of its mask where it has them."""

    path: Path
    caption: Path | None
    mask: Path | None


def list_files(folder: Path) -> list[Path]:
    """The files in a folder and those within that are not hidden, sorted by their paths; links are followed, but for
    those that lead back to a folder that they lie in.

    Raises:
        InputError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}")

    found, above = [], {str(folder): {os.path.realpath(folder)}}
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        within = {name: os.path.join(place, name) for name in folders if not name.startswith(".")}
        real = {name: os.path.realpath(path) for name, path in within.items()}
        folders[:] = [name for name in folders if name in real and real[name] not in above[place]]
        above |= {within[name]: above[place] | {real[name]} for name in folders}
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def is_mask(path: Path) -> bool:
    return path.name.lower().endswith(MASK_ENDING)


def is_photo(path: Path, kind: str = "image") -> bool:
    """Whether a file is a photo, in a folder of the kind "video" that or a video, or in one of "audio" a sound, by its
    name."""
    return path.suffix.lower() in ENDINGS[kind] and not is_mask(path)


def list_photos(folder: Path, kind: str = "image") -> list[Photo]:
    """The photos (or videos, sounds) of a folder, sorted by their paths. Raises InputError if one has two files of
    captions."""
    files, captions, masks = list_files(folder), {}, {}
    for path in files:
        if path.suffix.lower() in CAPTION_ENDINGS:
            if (stem := path.with_suffix("")) in captions:
                raise InputError(f"{path}: a second file of captions beside {captions[stem].name}")
            captions[stem] = path
        elif is_mask(path):
            masks[path.with_name(path.name[: -len(MASK_ENDING)])] = path
    stems = [(path, path.with_suffix("")) for path in files if is_photo(path, kind)]
    return [Photo(path, captions.get(stem), masks.get(stem)) for path, stem in stems]


def read_caption(path: Path) -> str:
    """The first line of a file of captions that is not blank, which alone kohya's scripts read, too; an empty file's
    caption is empty. Raises InputError if it cannot be read."""
    try:
        return path.read_text("utf-8-sig").strip().split("\n")[0].strip()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def words_of(image: Path) -> str:
    """The caption in a file's name: underscores are spaces, and a number at the end that stands by itself, as in
    "red_car_02.jpg" or "red car (2).jpg", is left off."""
    words = image.stem.replace("_", " ").strip()
    return re.sub(r"(\s*\(\d+\)|[\s-]+\d+)$", "", words)


def read_photos(folder: Path, kind: str = "image") -> datasets.Dataset:
    """The photos of a folder in the columns `image`, `text` (null without a file of captions), `file_name` (`words_of`)
    and, where there are any, `mask`; of a folder of videos, also its stills, in `video`, and of one of sounds these in
    `audio`, and there are no masks.

    Raises:
        InputError: a file of captions cannot be read, or an image has two.
    """
    photos = list_photos(folder, kind)
    columns = {
        kind: [stored(photo.path) for photo in photos],
        "text": [photo.caption and read_caption(photo.caption) for photo in photos],
        "file_name": [words_of(photo.path) for photo in photos],
    }
    features = {kind: STORED[kind](), "text": datasets.Value("string"), "file_name": datasets.Value("string")}
    if kind == "image" and any(photo.mask for photo in photos):
        columns["mask"] = [photo.mask and stored(photo.mask) for photo in photos]
        features["mask"] = datasets.Image()
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def stored(path: Path) -> dict[str, str | None]:
    """A file as an undecoded `datasets.Image`, `Video` or `Audio`."""
    return {"bytes": None, "path": str(path.absolute())}


def repeats_of(folder: Path, kind: str = "image") -> dict[Path, tuple[int, str, int]]:
    """Of kohya's folders `<n>_words` with images (videos, sounds) in a folder: n, the words, and how many images.

    Raises:
        InputError: there are images beside them, or an n is 0.
    """
    images = [path.relative_to(folder).parts for path in list_files(folder) if is_photo(path, kind)]
    counts = Counter(place for place, *within in images if within)
    matches = {name: match for name in sorted(counts) if (match := REPEATS.fullmatch(name))}
    found = {folder / name: (int(match[1]), match[2], counts[name]) for name, match in matches.items()}
    for path, (n, *_) in found.items():
        if n == 0:
            raise InputError(f"{path}: its {NOUNS[kind]} would be repeated 0 times; the number must be at least 1")
    beside = [parts for parts in images if len(parts) == 1 or parts[0] not in matches]
    if found and beside:
        raise InputError(
            f"{folder.joinpath(*beside[0])}: outside of the folders <repeats>_<words>, such as "
            f"{next(iter(matches))}; move it into one"
        )
    return found


def find_problems(folder: Path, kind: str = "image") -> Iterator[tuple[str, str]]:
    """("error" or "warning", message) for what is wrong with the files beside a folder's images (videos, sounds)."""
    try:
        photos = list_photos(folder, kind)
    except InputError as error:
        yield "error", str(error)
        return
    used = {path for photo in photos for path in (photo.caption, photo.mask)}
    for path in list_files(folder):
        if path not in used and (path.suffix.lower() in CAPTION_ENDINGS or is_mask(path)):
            yield "warning", f"{path}: no {NOUNS[kind][:-1]} of that name beside it"
        elif kind != "image" and is_mask(path):
            yield "warning", f"{path}: not used, {NOUNS[kind]} have no masks"
    for path in (photo.caption for photo in photos if photo.caption):
        try:
            read_caption(path)
        except InputError as error:
            yield "error", str(error)
            continue
        if "\n" in path.read_text("utf-8-sig").strip():
            yield "warning", f"{path}: more than one line, of which the first is the caption"

"""Write captions for the photos of a folder that have none, by a model of transformers that says what is in an image.

    difftrain caption path/to/photos --model Salesforce/blip-image-captioning-large
    difftrain caption path/to/photos --model llava-hf/llava-1.5-7b-hf --prompt "Describe the photo in one sentence."

Beside `cat.jpg` it writes `cat.txt`, whole or not at all, so that what was stopped goes on where it was. The likeliest
next token is taken each time: the same model says the same of an image again, on the same machine with --batch-size 1.
Exit code 2 if there is an image that cannot be read, or of which nothing was said.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from difftrain_utils.commands.parser import Parser
from difftrain_utils.config.hub import use_cache_without_network
from difftrain_utils.errors import InputError, RowError, blame, some
from difftrain_utils.files import local_path, write_file
from difftrain_utils.terminal import printable, progress

if TYPE_CHECKING:
    from PIL import Image

QUESTION = "Describe this image in one sentence."


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="difftrain caption", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=local_path, help="of photos, also in folders within it")
    parser.add_argument("--model", required=True, metavar="NAME", help="a folder, or a name on the hub")
    how = f"what a chat model is asked (default: {QUESTION}), or how the captions of others begin"
    parser.add_argument("--prompt", metavar="TEXT", help=how)
    parser.add_argument("--max-new-tokens", type=int, default=75, metavar="N", help="the longest caption (default: 75)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="also of images that have a caption")
    parser.add_argument("--prefix", default="", metavar="TEXT", help="what each caption begins with, literally")
    args = parser.parse_args(argv)
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(args, name)}")
    files = files_to_write(args.folder, args.overwrite)
    if not files:
        return
    use_cache_without_network([args.model])
    print(f"Loading {args.model}", flush=True)
    describe, problems = load_model(args.model, args.prompt, args.max_new_tokens), 0
    starts = range(0, len(files), args.batch_size)
    for start in progress(starts, len(starts), "Captions, batches"):
        batch = files[start : start + args.batch_size]
        images, errors = read_images([image for image, _ in batch])
        captions = dict(zip(images, describe(list(images.values())) if images else (), strict=True))
        errors += [f"{image}: the model says nothing" for image, caption in captions.items() if not caption]
        for image, file in batch:
            if captions.get(image):
                write_file(file, f"{args.prefix}{captions[image]}\n")
        for error in errors:
            tqdm.write(f"error: {printable(error)}")
        problems += len(errors)
    print(f"{len(files) - problems} captions written" + (f", {problems} images have none" if problems else ""))
    if problems:
        sys.exit(2)


def files_to_write(folder: Path, overwrite: bool) -> list[tuple[Path, Path]]:
    """The images that are to get a caption, each with the file for it. Prints how many there are.

    Raises:
        InputError: the folder has no images, or captions elsewhere, or two images would share a file.
    """
    from difftrain_utils.data.photos import list_photos

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if metadata := next(folder.rglob("metadata.jsonl"), None):
        raise InputError(f"{metadata}: has the captions of this folder, and .txt files beside images would not be read")
    photos = list_photos(folder)
    if not photos:
        raise InputError(f"{folder}: no images")
    files = [(photo.path, photo.caption or photo.path.with_suffix(".txt")) for photo in photos]
    files = [pair for pair in files if overwrite or not (pair[1].is_file() and pair[1].read_bytes().strip())]
    image_of: dict[Path, Path] = {}
    for image, file in files:
        if (other := image_of.setdefault(file, image)) != image:
            raise InputError(f"{image}: its caption would be that of {other.name}, too; give it another name")
    kept = len(photos) - len(files)
    print(f"{folder}: {len(photos)} images, of which {kept} keep their captions and {len(files)} get one", flush=True)
    if files:
        print(f"To be written: {some([str(file.relative_to(folder)) for _, file in files])}", flush=True)
    return files


def read_images(paths: list[Path]) -> tuple[dict[Path, "Image.Image"], list[str]]:
    """Those that can be read, and what is wrong with the others."""
    from difftrain_utils.data.photos import stored
    from difftrain_utils.media.image import open_image, read_bytes

    images, errors = {}, []
    for path in paths:
        try:
            images[path] = open_image(read_bytes(stored(path), str(path)), str(path))
        except RowError as error:
            errors.append(str(error))
    return images, errors


def load_model(name: str, prompt: str | None, max_new_tokens: int) -> Callable[[list["Image.Image"]], list[str]]:
    """A function from images to their captions, one line each.

    Raises:
        InputError: transformers cannot load the model, or not all of its weights are there.
    """
    import torch
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dtype = torch.float32 if device.type == "cpu" else "auto"  # "auto": as its files have it
    transformers.logging.disable_progress_bar()
    here = {"trust_remote_code": False}  # nothing of a repository is run
    with blame(f"--model {name}", Exception):  # whatever transformers raises on somebody's files
        processor = AutoProcessor.from_pretrained(name, **here)
        model, found = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, output_loading_info=True, **here)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"weights missing: {some(missing)}")
    model = model.to(device).eval()
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    is_chat = getattr(processor, "chat_template", None) is not None

    def inputs_of(images: list["Image.Image"]):
        if not is_chat:
            text = {} if prompt is None else {"text": [prompt] * len(images)}
            return processor(images=images, return_tensors="pt", **text)
        asked = {"type": "text", "text": QUESTION if prompt is None else prompt}
        chats = [[{"role": "user", "content": [{"type": "image", "image": image}, asked]}] for image in images]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True})

    @torch.no_grad()
    def describe(images: list["Image.Image"]) -> list[str]:
        inputs = inputs_of(images).to(device, model.dtype)
        with blame(f"--model {name}", ValueError, TypeError, IndexError):  # it cannot do with these inputs
            tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        asked = inputs.get("input_ids")
        if asked is not None and torch.equal(tokens[:, : asked.shape[1]], asked):  # a chat comes back with the answer
            tokens = tokens[:, asked.shape[1] :]
        return [" ".join(text.split()) for text in processor.batch_decode(tokens, skip_special_tokens=True)]

    return describe

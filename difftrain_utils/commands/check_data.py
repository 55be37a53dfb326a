"""Find all that is wrong with the rows of a config, before training does.

    difftrain check-data --config configs/sd15_finetune.yaml --data.dataset path/to/images

Takes the options of the training script. Decodes every image, sound or text, or the clip in the middle of every video,
of data.dataset (or of all data.sources) and of data.validation_dataset, and prints a line for each problem, with file
and line:

    error:    training stops at it, or with data.on_bad_row skip takes another row in its place; also an image that
              metadata.jsonl names twice, which training would see twice as often, and a text that holds the mask token
    warning:  training takes it: an empty caption or text, one that is cut off or has tokens that the tokenizer does not
              know, an image or a video that is enlarged, a sound that is silent, clipped or cut off

Of videos it says how long, how large and of how many frames a second they are, of sounds how long and how loud, of
which rates and channels, how much is padding, and which are the same.

Of the checkpoint it loads a tokenizer alone, of several that which takes the longest captions. Exit code 2 if there is
an error, else 0.
"""

import sys

from tqdm import tqdm

from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.scripts import SCRIPTS, script_for


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    config = parse_config(SCRIPTS[script_for(argv)], argv, prog="difftrain check-data", about=__doc__)

    # after the config, so that a typo is reported at once
    from difftrain_utils.data.problems import check_rows, list_rows
    from difftrain_utils.data.sources import sources_of, validation_source
    from difftrain_utils.data.tokenizer import make_tokenizer
    from difftrain_utils.errors import check_installed, counted
    from difftrain_utils.families.load import load_tokenizer
    from difftrain_utils.media import audio, text, video
    from difftrain_utils.media.media import media_of

    check_installed({name: of for name, of in config.needed_packages().items() if name == "data"})
    media, num_rows, kinds = media_of(config.data), 0, []
    own = make_tokenizer(config.data) if media is text else None
    tokenizer = own or load_tokenizer(config)
    sources = sources_of(config.data) + ([validation_source(config.data)] if config.data.validation_dataset else [])
    for field, source in sources:
        length, row_at, problems = list_rows(field, source, config.data)
        num_rows += length
        title, found = source.dataset, []
        for kind, message in (*problems, *check_rows(length, row_at, title, config.data, tokenizer, found)):
            kinds.append(kind)
            tqdm.write(f"{kind}: {message}")
        if media in (audio, video):
            described = media.describe_found(found) if found else f"no {media.NOUN[:-1]} that can be read"
            print(f"{title}: {described}")
    counts = [counted(n, f"{kind}s") for kind in ("error", "warning") if (n := kinds.count(kind))]
    captions = " and its caption" if num_rows == 1 else " and their captions"
    what = f"{counted(num_rows, media.NOUN)}{captions if media.HAS_CAPTIONS else ''}"
    print(f"{what}: {' and '.join(counts) or 'all fine'}")
    if "error" in kinds:
        sys.exit(2)

"""All that is trained on: the rows, the sizes they are trained at, and which of them each sample has."""

from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator

from difftrain_utils.config.config import Config
from difftrain_utils.config.rows import RowsConfig
from difftrain_utils.data.buckets import Buckets, fit_sizes
from difftrain_utils.data.clips import ClipBuckets, fit_clips, fit_held_out, spread_clips, tell_skipped
from difftrain_utils.data.lanes import Lanes
from difftrain_utils.data.order import Order
from difftrain_utils.data.rows import Rows, map_rows, split_rows
from difftrain_utils.data.sources import sources_of
from difftrain_utils.data.streaming import open_stream
from difftrain_utils.data.tokens import load_tokens
from difftrain_utils.data.windows import spread_windows
from difftrain_utils.media import audio, image, pairs, text, video
from difftrain_utils.media.media import media_of
from difftrain_utils.processes import main_process_first, on_main_process
from difftrain_utils.terminal import announce


@dataclass
class Data:
    """`rows` to train on and those that are held out, the buckets where there are any, and the row of each sample."""

    rows: Rows
    order: Order | Lanes
    validation_rows: Rows | None = None
    buckets: Buckets | ClipBuckets | None = None

    @property
    def samples_per_epoch(self) -> int:
        """How many samples a pass over the data has."""
        return self.order.epoch_length


def load_data(accelerator: Accelerator, family, config: Config) -> Data:
    """The data that the section `data` names. No image is decoded yet; texts are, where they are packed.

    Raises:
        InputError: a data set, its split or a column is not there, a line of metadata.jsonl is wrong, a split is empty,
            all pairs of a data set that is no stream have the same image twice, a stream has fewer rows than a batch,
            the model cannot take images, videos or sounds of this size, no bucket has a batch of images, all are too
            small, all videos are skipped, or no held-out video has a bucket; or see `load_tokens`.
    """
    seed, media, buckets = config.train.seed_of("data"), media_of(config.data), None
    names = [source.dataset for _, source in sources_of(config.data)]
    announce(f"Opening the data, {', '.join(names)}")
    check_sizes(family, config.data)
    streamed = on_main_process(accelerator, partial(open_stream, config.data)) if config.data.streaming else None
    with main_process_first(accelerator):
        rows = map_rows(config.data) if streamed is None else streamed
        if media is pairs and streamed is None:
            for part in rows.parts:
                pairs.refuse_equal(part, part.source.dataset)
        rows, validation_rows = split_rows(rows, config.data)
        knows_lengths = media is video and streamed is None and not config.data.buckets  # with buckets they are told of
        if knows_lengths:
            tell_skipped(accelerator, rows, "videos", config.data)
            if validation_rows is not None and config.train.eval_every:
                tell_skipped(accelerator, validation_rows, "held-out videos", config.data)
        if media is video and config.data.window == "all":
            rows = spread_clips(accelerator, rows, config.data)
        elif media is audio and config.data.window == "all":
            rows = spread_windows(accelerator, rows, config.data)
    if media is text:
        rows, validation_rows = load_tokens(accelerator, family, rows, validation_rows, config)
    elif media in (image, pairs):
        rows, buckets = fit_sizes(accelerator, family, rows, config)
    elif media is video and config.data.buckets:
        rows, buckets = fit_clips(accelerator, family, rows, config)
        if validation_rows is not None:
            validation_rows = fit_held_out(accelerator, validation_rows, buckets, config.data)
    order = rows.order(seed, config.train.batch_size, buckets)
    return Data(rows, order, validation_rows, buckets)


def check_sizes(family, config: RowsConfig) -> None:
    """Raise InputError unless the model can take what is read where there are no buckets."""
    media = media_of(config)
    if media in (image, pairs):
        family.check_size(config.resolution, config.resolution, "data.resolution")
    elif media is video:
        family.check_frames(config.num_frames, "data.num_frames")
        family.check_size(config.height, config.width, "data.height")
    elif media is audio:
        family.check_waveforms(config)

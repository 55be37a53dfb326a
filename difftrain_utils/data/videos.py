"""The built-in data set of videos."""

import datasets

from difftrain_utils.builtins.moving_shapes import encode_clip
from difftrain_utils.config.video_data import VideoDataConfig
from difftrain_utils.errors import InputError
from difftrain_utils.terminal import progress

MOVING_SHAPES, NUM_MOVING_SHAPES = "builtin:moving-shapes", 1440


def builtin_videos(name: str, field: str, config: VideoDataConfig) -> datasets.Dataset:
    """A built-in data set as files in memory, with the columns `video` and `text`, at the run's size and frames a
    second. Raises InputError if there is none of that name, or the run's clips are not square."""
    if name != MOVING_SHAPES:
        raise InputError(f"{field}: no such builtin: {name!r}; there is {MOVING_SHAPES}")
    if config.height != config.width:
        raise InputError(f"data.height: {name} is square, got {config.height} x {config.width}")
    clips = (encode_clip(index, config.height, config.num_frames, config.fps) for index in range(NUM_MOVING_SHAPES))
    videos, captions = zip(*progress(clips, NUM_MOVING_SHAPES, "Drawing the videos"), strict=True)
    columns = {"video": [{"bytes": each, "path": f"{i:06d}.avi"} for i, each in enumerate(videos)], "text": captions}
    features = datasets.Features({"video": datasets.Video(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=features)

import json
from types import SimpleNamespace

import pytest
from helpers import options, short_options, train
from PIL import Image

from difftrain_utils.builtins.shapes import PROMPTS, draw_shape
from difftrain_utils.commands import best_guidance, drawing, generate
from difftrain_utils.commands.generate import settings_of
from difftrain_utils.errors import InputError
from difftrain_utils.media.grids import MARGIN
from difftrain_utils.run.source import Source

SHAPES = {"data.dataset": "builtin:shapes", "data.resolution": 32, "evaluation.shapes_judge": True}
SHAPES |= {"evaluation.prompts": PROMPTS}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """What was drawn (guidance, prompt, seed), in place of drawing: all right at a guidance of 3, half of them at 2 and
    none at others."""
    found = []
    source = Source("pipeline", "pipeline", tmp_path, 4, "ema")
    config = SimpleNamespace(evaluation=SimpleNamespace(prompts=PROMPTS[:4], shapes_judge=True), judge="shapes")

    def draw_all(loaded, samples, settings, config):
        for i, sample in enumerate(samples):
            found.append((settings.guidance, sample.prompt, sample.seed))
            shift = {3: 0, 2: i % 2}.get(settings.guidance, 1)
            yield sample, draw_shape(PROMPTS.index(sample.prompt) + shift, 32)[0]

    monkeypatch.setattr(best_guidance, "find_sources", lambda run: [source])
    monkeypatch.setattr(Source, "makes", "pictures")
    monkeypatch.setattr(Source, "tells_gap", False)
    monkeypatch.setattr(best_guidance, "run_config", lambda source: config)
    monkeypatch.setattr(best_guidance, "settings_of", lambda args, _: {"height": 32, "guidance": args.guidance})
    for name in ("load", "check"):
        monkeypatch.setattr(drawing, name, lambda *_: None)
    monkeypatch.setattr(drawing, "own_precision", lambda *_: "fp32")
    monkeypatch.setattr(drawing, "guide", lambda loaded, settings, *_: settings)
    monkeypatch.setattr(drawing, "draw_all", draw_all)
    return found


def test_the_best_is_chosen_by_other_pictures_than_are_reported(drawn, tmp_path, capsys):
    best_guidance.main(
        ["a/run", "--scales", "4", "1", "3", "2", "--num-images", "2", "--output", str(tmp_path / "grids")]
    )
    printed = capsys.readouterr().out
    assert "Best by shapes_right: guidance 3. There, with other noise:" in printed
    rows = {row.split()[0]: row.split()[1] for row in printed.splitlines() if len(row.split()) > 1}
    assert {scale: rows[scale] for scale in "1234"} == {"1": "0", "2": "0.5", "3": "1", "4": "0"}
    chosen_by = [(prompt, seed) for scale, prompt, seed in drawn[: 8 * 4] if scale == 3]
    reported = [(prompt, seed) for _, prompt, seed in drawn[8 * 4 :]]
    assert len(chosen_by) == len(reported) == 8 and {scale for scale, *_ in drawn[8 * 4 :]} == {3}
    assert len({seed for _, seed in chosen_by + reported}) == 16  # no two with the same noise
    for scale in (1, 2, 4):  # but at each scale the same noise
        assert [(prompt, seed) for s, prompt, seed in drawn if s == scale] == chosen_by
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == [f"guidance-{i}.png" for i in (1, 2, 3, 4)]
    best_guidance.main(["a/run", "--scales", "1", "2"])
    assert "guidance 2, the last that was tried" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--scales 0.5 2", "--scales: must be at least 1, got 0.5"),
        ("--scales 2 2", "--scales: 2.0 is there twice"),
        ("--metric fid", "--metric: must be one of shapes_right, got 'fid'"),
        ("--features some/network", "--features: needs --reference"),
    ],
)
def test_what_is_refused(drawn, argv, message):
    with pytest.raises(InputError, match=f"^{message}"):
        best_guidance.main(["a/run", *argv.split()])
    assert drawn == []


def test_a_model_that_is_told_its_steps_by_its_guidance_is_refused(drawn, monkeypatch):
    monkeypatch.setattr(Source, "tells_gap", True)
    with pytest.raises(
        InputError, match=r"^a/run: is told by its guidance how far a step goes, so it has none to choose$"
    ):
        best_guidance.main(["a/run"])
    assert drawn == []


def test_the_run_guides_as_it_says_but_at_1(drawn, monkeypatch, tmp_path):
    """By its own settings, each scale's before it draws with it."""
    own = {"num_inference_steps": 2, "guidance_interval": [0.1, 0.9], "autoguidance": "weaker"}
    (tmp_path / "config.resolved.yaml").write_text(json.dumps({"evaluation": own, "data": {"resolution": 32}}))
    monkeypatch.setattr(best_guidance, "settings_of", settings_of)
    told = []

    def guide(loaded, settings, *_):
        told.append((len(drawn), settings.guidance, settings.guidance_interval, settings.autoguidance))
        return settings

    monkeypatch.setattr(drawing, "guide", guide)
    best_guidance.main(["a/run", "--scales", "1", "2", "3"])
    guided = ([0.1, 0.9], "weaker")
    assert told == [(0, 3, *guided), (0, 1, None, None), (4, 2, *guided), (8, 3, *guided), (12, 3, *guided)]


def test_prompts_that_the_judge_does_not_know_are_refused_before_anything_is_drawn(drawn, monkeypatch):
    evaluation = SimpleNamespace(prompts=["a purple elephant"], shapes_judge=False)
    monkeypatch.setattr(best_guidance, "run_config", lambda source: SimpleNamespace(evaluation=evaluation))
    with pytest.raises(InputError, match=r"^--judge shapes: 'a purple elephant' is no caption of builtin:shapes"):
        best_guidance.main(["a/run", "--judge", "shapes"])
    assert drawn == []


@pytest.mark.slow
def test_a_run(checkpoint_folder, image_folder, tmp_path, capsys):
    """One that guides in an interval and by a weaker model: the pictures are those of `difftrain generate`."""
    argv = [*short_options(checkpoint_folder, image_folder, tmp_path / "run"), *options(SHAPES)]
    guided = {"evaluation.guidance_interval": [0.2, 1.0], "evaluation.autoguidance": checkpoint_folder}
    argv += options(guided | {"optimizer.init_args.lr": 0.01, "evaluation.num_inference_steps": 2})
    run = train([*argv, "--train.max_steps", "2"])
    best_guidance.main([str(run), "--scales", "1", "2", "--output", str(tmp_path / "grids")])
    assert "Best by shapes_right: guidance 1" in capsys.readouterr().out  # all wrong
    first = (MARGIN, MARGIN, MARGIN + 128, MARGIN + 128)  # of a grid, enlarged
    for scale in (1, 2):
        generate.main([str(run), PROMPTS[0], "--guidance", str(scale), "--output", str(tmp_path / f"{scale}.png")])
        picture = Image.open(tmp_path / f"{scale}.png").resize((128, 128), Image.Resampling.NEAREST)
        assert Image.open(tmp_path / f"grids/guidance-{scale}.png").crop(first).tobytes() == picture.tobytes()
    assert (tmp_path / "1.png").read_bytes() != (tmp_path / "2.png").read_bytes()

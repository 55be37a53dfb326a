import dataclasses
import pickle
import shutil
import signal
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from helpers import (
    ROOT,
    as_rows,
    assert_one_line,
    launch_environment,
    make_data,
    metrics_without_times,
    options,
    parse_config,
    pipeline_bytes,
    train,
    without_dropout,
)
from PIL import Image
from transformers import CLIPTextModel

from difftrain_utils.data import encoded as cache_module
from difftrain_utils.data.encoded import EncodedCache, build_cache, load_caches
from difftrain_utils.data.fingerprint import inspect_splits
from difftrain_utils.data.rows import map_rows
from difftrain_utils.data.samples import Samples
from difftrain_utils.errors import InputError, RunError
from difftrain_utils.families.load import load_family
from difftrain_utils.files import file_digest

BOTH = {"data.cache_latents": True, "data.cache_text": True, "data.center_crop": True}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "ENTRIES_PER_SHARD", 4)
    monkeypatch.setattr(cache_module, "ENTRIES_PER_BATCH", 3)


@pytest.fixture
def cached_run(short_run, tmp_path) -> list[str]:
    return [*short_run, *options(BOTH | {"data.cache_dir": tmp_path / "cache"})]


@pytest.fixture(scope="module")
def varied_folder(tmp_path_factory):
    """21 rows of three shapes with one caption to three, of which some are the same, empty or longer than the model's
    limit; and with two images that cannot be decoded and a caption that is none."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 40 + 20 * (i % 3 == 0), 3), np.uint8)) for i in range(21)]
    captions = [["a", "", f"image {i}"][: i % 3 + 1] for i in range(20)] + [["many " * 100]]
    folder = tmp_path_factory.mktemp("varied")
    (folder / "good").mkdir()
    data = make_data(images, captions)
    data.to_parquet(folder / "good/train.parquet")
    (folder / "bad").mkdir()

    def spoil(row: dict, index: int) -> dict:
        content = row["image"]["bytes"][: 200 if index in (2, 9) else None]
        return {"image": row["image"] | {"bytes": content}, "text": None if index == 13 else row["text"]}

    undecoded = data.cast_column("image", as_rows(data).parts[0].data.features["image"])
    undecoded.map(spoil, with_indices=True).to_parquet(folder / "bad/train.parquet")
    return folder


class TestTensorCache:
    groups = np.array([0, 1, 0, 0, 1, 0, 0, 2])

    def build(self, folder, encode=None, inputs=None) -> EncodedCache:
        cache = EncodedCache(folder, self.groups)
        inputs = inputs or [torch.full((2, 2 + int(group)), float(i)) for i, group in enumerate(self.groups)]
        build_cache(Accelerator(cpu=True), cache, inputs, encode or torch.stack, "Testing", num_workers=0)
        return cache

    def test_it_gives_what_was_put_in(self, tmp_path):
        cache = self.build(tmp_path)
        for _ in range(2):
            for i in np.random.default_rng(0).permutation(8).tolist():
                assert torch.equal(cache[i], torch.full((2, 2 + int(self.groups[i])), float(i)))
            cache = pickle.loads(pickle.dumps(cache))  # with open shards
        # five of group 0 in two shards, and one each of the others; with digests that sha256sum would take
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            f"shard-0000{i}.{kind}" for i in range(4) for kind in ("safetensors", "sha256")
        ]
        for path in tmp_path.glob("*.safetensors"):
            assert path.with_suffix(".sha256").read_text() == f"{file_digest(path)}  {path.name}\n"

    def encoded(self, folder, **kwargs) -> list[float]:
        """What had to be encoded, but for the one entry that is encoded to know the room that is needed."""
        entries = []

        def encode(batch):
            entries.append([tensor[0, 0].item() for tensor in batch])
            return torch.stack(batch)

        self.build(folder, encode, **kwargs)
        return [entry for batch in entries[1:] for entry in batch]

    def test_a_finished_cache_is_not_made_again(self, tmp_path):
        assert sorted(self.encoded(tmp_path)) == list(range(8))
        assert self.encoded(tmp_path) == []

    def test_a_build_that_failed_goes_on(self, tmp_path):
        seen = []

        def fail_late(batch):
            seen.extend(batch)
            if len(seen) > 7:  # one for the room, four of the first shard, one of the second, and then two
                raise KeyboardInterrupt
            return torch.stack(batch)

        with pytest.raises(KeyboardInterrupt):
            self.build(tmp_path, fail_late)
        assert len(list(tmp_path.glob("*.safetensors"))) == 2
        assert self.encoded(tmp_path) == [1, 4, 7]

    @pytest.mark.parametrize("damage", ["a bit", "truncated", "no digest", "digest of another"])
    def test_a_damaged_shard_is_made_again_with_a_warning(self, tmp_path, capsys, damage):
        self.build(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        path = tmp_path / "shard-00001.safetensors"
        content = bytearray(path.read_bytes())
        if damage == "a bit":
            content[-1] ^= 4
            path.write_bytes(content)
        elif damage == "truncated":
            path.write_bytes(content[:-7])
        elif damage == "no digest":
            path.with_suffix(".sha256").unlink()
        else:
            shutil.copy(tmp_path / "shard-00000.sha256", path.with_suffix(".sha256"))
        capsys.readouterr()
        assert self.encoded(tmp_path) == [6]
        warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert warnings == [f"warning: {path} is damaged: making it again"]
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_too_little_room_is_told_before_anything_is_encoded(self, tmp_path, monkeypatch):
        usage = shutil._ntuple_diskusage(100, 100, 8 * 16 - 1)  # of group 0 an entry has 16 bytes
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        encoded = []
        with pytest.raises(InputError, match=rf"^data.cache_dir: {tmp_path} needs 0.0 GB more, 0.0 GB are free$"):
            self.build(tmp_path, lambda batch: encoded.append(len(batch)) or torch.stack(batch))
        assert encoded == [1] and list(tmp_path.iterdir()) == []
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=8 * 16))
        self.build(tmp_path)

    def test_a_disk_that_is_full_after_all(self, tmp_path, monkeypatch):
        monkeypatch.setattr("pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(RunError, match=r"^cannot write .*shard-00000.sha256: .*No space left"):
            self.build(tmp_path)
        assert list(tmp_path.iterdir()) == []


def caches_of(argv: list[str]):
    config = parse_config(argv)
    family = load_family(config)
    data = map_rows(config.data)
    fingerprints = inspect_splits(data, None, config.data)
    return load_caches(Accelerator(cpu=True), family, data, config, fingerprints, None), family, data, config


def test_entries_are_what_the_encoders_give(cached_run, varied_folder):
    argv = [*cached_run, "--data.dataset", str(varied_folder / "good")]
    (latents, prompts), family, data, config = caches_of(argv)
    assert not {"vae", "text_encoder"} & vars(family).keys()
    plain = dataclasses.replace(config.data, cache_latents=False, cache_text=False, random_flip=False)
    samples = Samples(data, plain, 0, 100)
    for row in range(21):
        k = next(k for k in range(21) if samples.index_of(k) == row)
        pixel_values = samples[k]["pixel_values"][None]
        assert latents[row].shape == (2, 2, 4, 8, 8)
        for flip, pixels in enumerate((pixel_values, pixel_values.flip(-1))):
            torch.testing.assert_close(latents[row][flip], family.encode_images(pixels)[0], rtol=1e-5, atol=1e-5)
        captions = data[row].captions
        assert len(prompts.of_row(row)) == len(captions)
        for number, caption in zip(prompts.of_row(row), captions, strict=True):
            expected = family.encode_prompts([caption])[0]
            torch.testing.assert_close(prompts[number], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prompts[0], family.encode_prompts([""])[0], rtol=1e-5, atol=1e-5)
    numbers = {number for row in range(21) for number in prompts.of_row(row)}
    assert numbers == set(range(len(prompts.cache.places)))  # each caption once, and no more


def test_a_vae_that_overflows_is_told_and_not_taken_for_bad_rows(cached_run, monkeypatch):
    def overflow(_, pixel_values):
        return torch.full((len(pixel_values), 2, 4, 8, 8), torch.inf)

    monkeypatch.setattr("difftrain_utils.families.stable_diffusion.StableDiffusion.encode_images", overflow)
    with pytest.raises(RunError, match=r"^data.cache_latents: the VAE's output is not finite in torch.float32"):
        caches_of(cached_run)


def test_damaged_captions_are_numbered_again(cached_run, capsys):
    (_, prompts), *_ = caches_of(cached_run)
    expected = [prompts.of_row(row) for row in range(10)]
    path = prompts.cache.folder / "captions.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"[0, 1", b"[0, 2"))
    (_, prompts), *_ = caches_of(cached_run)
    assert [prompts.of_row(row) for row in range(10)] == expected and path.read_bytes() == content
    assert f"warning: {path} is damaged: making it again" in capsys.readouterr().err


class TestKey:
    def folders(self, argv, **fields) -> dict[str, str]:
        (latents, prompts), *_ = caches_of([*argv, *options(fields)])
        return {"latents": latents.folder.name, "text": prompts.cache.folder.name}

    @pytest.mark.parametrize(
        "fields",
        [
            {"data.num_workers": 1},
            {"train.batch_size": 2, "train.seed": 5, "data.caption_dropout": 0.0},
            {"train.max_steps": 3, "train.gradient_checkpointing": True},
        ],
        ids=str,
    )
    def test_it_does_not_change_with(self, cached_run, fields):
        assert self.folders(cached_run, **fields) == self.folders(cached_run)

    @pytest.mark.parametrize(
        ("name", "value", "changed"),
        [
            ("data.resolution", 16, {"latents"}),
            ("data.random_flip", False, {"latents"}),
            ("data.image_interpolation", "box", {"latents"}),
            ("train.channels_last", True, {"latents"}),
            ("model.vae_slicing", True, {"latents"}),
        ],
    )
    def test_it_changes_with_transforms(self, cached_run, name, value, changed):
        folders = [self.folders(cached_run), self.folders(cached_run, **{name: value})]
        assert {what for what in folders[0] if folders[0][what] != folders[1][what]} == changed

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("torch.__version__", "2.99.0"),
            ("diffusers.__version__", "0.99.0"),
            ("transformers.__version__", "5.99.0"),
            ("torch.get_num_threads", lambda: 3),
            ("torch.backends.cpu.get_cpu_capability", lambda: "VSX"),
        ],
    )
    def test_it_changes_with_what_rounding_depends_on(self, cached_run, monkeypatch, name, value):
        before = self.folders(cached_run)
        monkeypatch.setattr(name, value)
        after = self.folders(cached_run)
        assert all(before[what] != after[what] for what in ("latents", "text"))

    def test_it_changes_with_an_image_and_with_a_caption(self, cached_run, image_folder, tmp_path):
        folder = shutil.copytree(image_folder, tmp_path / "data")
        seen = [self.folders(cached_run), self.folders(cached_run, **{"data.dataset": folder})]
        assert seen[0] == seen[1]  # a folder that moved
        shutil.copy(folder / "000002.png", folder / "000003.png")
        seen.append(self.folders(cached_run, **{"data.dataset": folder}))
        lines = (folder / "metadata.jsonl").read_text()
        (folder / "metadata.jsonl").write_text(lines.replace('"text": "', '"text": "not ', 1))
        seen.append(self.folders(cached_run, **{"data.dataset": folder}))
        for what in ("latents", "text"):
            assert len({folders[what] for folders in seen}) == 3

    def test_it_changes_with_the_encoders(self, cached_run, checkpoint_folder, tmp_path):
        def change(folder, name: str, old: str, new: str) -> None:
            text = (folder / name).read_text()
            assert old in text
            (folder / name).write_text(text.replace(old, new, 1))

        def flip_bit(folder, name: str) -> None:
            content = bytearray((folder / name).read_bytes())
            content[-4] ^= 1
            (folder / name).write_bytes(content)

        before = self.folders(cached_run)
        for i, (spoil, changed) in enumerate(
            (
                (lambda f: flip_bit(f, "vae/diffusion_pytorch_model.safetensors"), {"latents"}),
                (lambda f: change(f, "vae/config.json", '"silu"', '"gelu"'), {"latents"}),
                (lambda f: flip_bit(f, "text_encoder/model.safetensors"), {"text"}),
                (lambda f: change(f, "text_encoder/config.json", '_norm_eps": ', '_norm_eps": 1'), {"text"}),
                (lambda f: change(f, "tokenizer/tokenizer_config.json", '_max_length": ', '_max_length": 1'), {"text"}),
                (lambda f: flip_bit(f, "unet/diffusion_pytorch_model.safetensors"), set()),
            )
        ):  # fmt: skip
            folder = shutil.copytree(checkpoint_folder, tmp_path / f"model-{i}")
            spoil(folder)
            family = load_family(parse_config([*cached_run, "--model.pretrained_model_name_or_path", str(folder)]))
            old = load_family(parse_config(cached_run))
            keys = {
                what: [f.cache_key(*parts) for f in (old, family)]
                for what, parts in (("latents", ["vae"]), ("text", ["text_encoder", "tokenizer"]))
            }
            assert {what for what, (a, b) in keys.items() if a != b} == changed, i
        assert self.folders(cached_run) == before

    def test_it_changes_with_the_type(self, cached_run):
        config = parse_config(cached_run)
        data, names = map_rows(config.data), []
        for dtype in (torch.float32, torch.bfloat16):
            family = load_family(config)
            family.move_frozen_parts("cpu", dtype)
            fingerprints = inspect_splits(data, None, config.data)
            latents, prompts = load_caches(Accelerator(cpu=True), family, data, config, fingerprints, None)
            assert latents[0].dtype == prompts[0].dtype == dtype
            names.append((latents.folder.name, prompts.cache.folder.name))
        assert set(names[0]).isdisjoint(names[1])


COMBINATIONS = {
    "both": {},
    "latents": {"data.cache_text": False},
    "text": {"data.cache_latents": False},
    "workers-accumulation": {"data.num_workers": 1, "train.gradient_accumulation_steps": 2},
    "buckets": {"data.buckets": [[32, 32], [24, 40]]},
    "bad-rows": {"data.on_bad_row": "skip"},
    "bad-rows-buckets": {"data.on_bad_row": "skip", "data.buckets": [[32, 32], [24, 40]], "data.num_workers": 1},
    "bad-rows-text": {"data.on_bad_row": "skip", "data.cache_latents": False},
    "bad-rows-latents": {"data.on_bad_row": "skip", "data.cache_text": False},
    "no-flip": {"data.random_flip": False, "data.caption_dropout": 0.0},
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_training_from_caches_is_training(cached_run, varied_folder, tmp_path, name):
    dataset = {"data.dataset": varied_folder / ("bad" if "bad" in name else "good")}
    model = {"model.pretrained_model_name_or_path": without_dropout(cached_run, tmp_path)}
    argv = [*cached_run, *options(dataset | model | {"train.keep_checkpoints": 0} | COMBINATIONS[name])]
    without = options({"data.cache_latents": False, "data.cache_text": False})
    plain = train([*argv, *without, "--output-dir", str(tmp_path / "plain")])
    cached = train([*argv, "--output-dir", str(tmp_path / "cached")])
    metrics = [metrics_without_times(run) for run in (plain, cached)]
    assert [m["loss"] for m in metrics[1]] == pytest.approx([m["loss"] for m in metrics[0]], rel=1e-5)
    assert [m.get("skipped_rows") for m in metrics[1]] == [m.get("skipped_rows") for m in metrics[0]]
    if "bad" in name:
        assert sum(m["skipped_rows"] for m in metrics[0]) > 0
    resumed = [*argv, "--output-dir", str(tmp_path / "resumed"), "--resume-from", str(cached / "checkpoint-4")]
    assert pipeline_bytes(train(resumed)) == pipeline_bytes(cached)
    assert metrics_without_times(tmp_path / "resumed") == metrics[1][4:]


def test_two_sources_of_which_one_has_many_captions(cached_run, varied_folder, image_folder, tmp_path):
    sources = [{"dataset": str(varied_folder / "good"), "weight": 1}, {"dataset": str(image_folder), "weight": 1}]
    argv = [*cached_run, *options({"data.dataset": None, "data.sources": sources})]
    without = options({"data.cache_latents": False, "data.cache_text": False})
    losses = [
        [m["loss"] for m in metrics_without_times(train([*argv, *more, "--output-dir", str(tmp_path / out)]))]
        for more, out in ((without, "plain"), ([], "cached"))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class TestEncodersInMemory:
    @pytest.fixture
    def loads(self, monkeypatch) -> list:
        """(class, a weak reference) of the encoders that are loaded."""
        loaded = []
        for cls in (AutoencoderKL, CLIPTextModel):

            def load(*args, cls=cls, original=cls.from_pretrained, **kwargs):
                module = original(*args, **kwargs)
                loaded.append((cls.__name__, weakref.ref(module)))
                return module

            monkeypatch.setattr(cls, "from_pretrained", load)
        return loaded

    def test_they_are_not_loaded_where_the_caches_are_complete(self, cached_run, tmp_path, loads):
        for name, times in (("first", 2), ("second", 1)):  # to save the pipeline they are loaded once in each run
            loads.clear()
            train([*cached_run, "--output-dir", str(tmp_path / name)])
            assert sorted(cls for cls, _ in loads) == ["AutoencoderKL"] * times + ["CLIPTextModel"] * times
        assert pipeline_bytes(tmp_path / "first") == pipeline_bytes(tmp_path / "second")

    def test_after_an_evaluation_they_are_dropped_again(self, cached_run, loads, monkeypatch):
        import train_text_to_image as script

        alive = []

        class StepTimer(script.StepTimer):
            def batches(self, dataloader):
                for batch in super().batches(dataloader):
                    alive.append(sum(reference() is not None for _, reference in loads))
                    yield batch

        monkeypatch.setattr(script, "StepTimer", StepTimer)
        fields = {"train.eval_every": 2, "evaluation.prompts": ["a red circle"], "evaluation.num_inference_steps": 1}
        fields |= {"data.validation_split": 0.3, "evaluation.num_validation_samples": 8, "train.batch_size": 2}
        train([*cached_run, *options(fields)])
        assert alive == [0] * 6
        assert len(loads) == 2 * (1 + 3 + 1)  # the build, three evaluations, the pipeline

    def test_without_caches_they_stay(self, short_run, loads):
        fields = {"train.eval_every": 2, "evaluation.prompts": ["a red circle"], "evaluation.num_inference_steps": 1}
        train([*short_run, *options(fields)])
        assert len(loads) == 2 * 2  # at the beginning, and for the pipeline


def test_workers_hold_no_python_object_per_row(cached_run, varied_folder):
    """Captions and numbers are with the caches as arrays: pickled, a sample's source is small."""
    (latents, prompts), *_ = caches_of([*cached_run, "--data.dataset", str(varied_folder / "good")])
    for part in (latents, prompts.cache):
        assert not any(isinstance(value, dict | list) and len(value) > 20 for value in vars(part).values())
    assert isinstance(prompts.starts, np.ndarray) and isinstance(prompts.numbers, np.ndarray)
    assert not hasattr(prompts, "captions")


def test_two_processes_build_the_same_bytes(cached_run, varied_folder, tmp_path):
    """And say what is damaged, whoever has to make it again; and train as one does."""
    model = {"model.pretrained_model_name_or_path": without_dropout(cached_run, tmp_path)}
    fields = model | {"data.dataset": varied_folder / "bad", "data.on_bad_row": "skip"}
    argv = [*cached_run, *options(fields)]
    script = """if True:
        import runpy, sys
        import difftrain_utils.data.encoded as cache
        cache.ENTRIES_PER_SHARD, cache.ENTRIES_PER_BATCH = 4, 3
        sys.argv = ["train_text_to_image.py", *sys.argv[1:]]
        runpy.run_path("train_text_to_image.py", run_name="__main__")
    """
    (tmp_path / "small_shards.py").write_text("\n".join(line[8:] for line in script.splitlines()[1:]))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [str(ROOT / "accelerate_configs/cpu_ddp.yaml"), str(tmp_path / "small_shards.py")]

    def run(name: str) -> subprocess.CompletedProcess:
        fields = {"train.output_dir": tmp_path / name, "data.cache_dir": tmp_path / "cache-two"}
        environment = launch_environment() | {"ACCELERATE_USE_CPU": "true"}
        result = subprocess.run(
            [*command, *argv, *options(fields)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result

    def files(name: str) -> dict[str, bytes]:
        folder = tmp_path / name
        found = [path for path in folder.rglob("*") if path.parent != folder and path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    one = train([*argv, "--output-dir", str(tmp_path / "one")])
    run("two")
    assert files("cache-two") == files("cache")
    losses = [[m["loss"] for m in metrics_without_times(path)] for path in (one, tmp_path / "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    shards = sorted((tmp_path / "cache-two").glob("latents-*/shard-*.safetensors"))
    assert len(shards) == 6
    shards[1].write_bytes(shards[1].read_bytes()[:-1])  # the second process's
    result = run("again")
    assert [line for line in result.stderr.splitlines() if line.startswith("warning: ")] == [
        f"warning: {shards[1]} is damaged: making it again"
    ]
    assert files("cache-two") == files("cache")


def test_a_build_that_is_killed_goes_on(cached_run, tmp_path):
    script = """if True:
        import os, runpy, signal, sys
        import difftrain_utils.data.encoded as cache
        from difftrain_utils.families.stable_diffusion import StableDiffusion
        cache.ENTRIES_PER_SHARD, cache.ENTRIES_PER_BATCH = 4, 3
        encode, calls = StableDiffusion.encode_images, []

        def encode_images(self, pixel_values):
            calls.append(len(pixel_values))
            if sum(calls) > 2 * 1 + 2 * 4 + 2 * 3:  # for the room, the first shard, and a batch of the second; mirrored
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(self, pixel_values)

        StableDiffusion.encode_images = encode_images
        runpy.run_path("train_text_to_image.py", run_name="__main__")
    """
    command = [sys.executable, "-c", script, *cached_run]
    killed = subprocess.run(command, cwd=ROOT, env=launch_environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    shards = list((tmp_path / "cache").glob("latents-*/*.safetensors"))
    assert [path.name for path in shards] == ["shard-00000.safetensors"]
    before = shards[0].stat()
    train([*cached_run, "--train.max_steps", "2"])
    assert shards[0].stat().st_mtime_ns == before.st_mtime_ns and shards[0].stat().st_ino == before.st_ino
    assert len(list(shards[0].parent.glob("*.safetensors"))) == 3
    assert list((tmp_path / "cache").rglob("*.partial")) == []


class TestMistakes:
    def test_a_truncated_image_stops_the_build(self, cached_run, varied_folder, tmp_path, capsys):
        folder = tmp_path / "data"
        folder.mkdir()
        data = make_data([Image.effect_noise((36, 36), 50)] * 6, ["a"] * 6)

        def cut(row: dict, index: int) -> dict:
            return {"image": row["image"] | {"bytes": row["image"]["bytes"][: 200 if index == 4 else None]}}

        undecoded = data.cast_column("image", as_rows(data).parts[0].data.features["image"])
        undecoded.map(cut, with_indices=True).to_parquet(folder / "train.parquet")
        for workers in ("0", "1"):
            argv = [*cached_run, "--data.dataset", str(folder), "--data.num_workers", workers]
            assert_one_line(argv, r"4.png: cannot decode the image", capsys)
            assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("part", ["vae", "text_encoder"])
    def test_an_encoder_without_weights(self, cached_run, checkpoint_folder, tmp_path, capsys, part):
        folder = shutil.copytree(checkpoint_folder, tmp_path / "model")
        (weights,) = (folder / part).glob("*.safetensors")
        argv = [*cached_run, "--model.pretrained_model_name_or_path", str(folder)]
        weights.write_bytes(weights.read_bytes()[:1000])
        message = f"model.pretrained_model_name_or_path: {folder}: {part}: "
        assert_one_line(argv, message, capsys)
        weights.unlink()
        assert_one_line(argv, message, capsys)
        assert not (tmp_path / "run").exists()

    def test_a_cache_folder_that_cannot_be_written(self, cached_run, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        argv = [*cached_run, "--data.cache_dir", str(tmp_path / "file")]
        assert_one_line(argv, r"cannot write .*/file/latents-\w+: ", capsys)
        assert not (tmp_path / "run").exists()

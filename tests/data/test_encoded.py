import copy
import dataclasses
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from helpers import (
    as_rows,
    assert_one_line,
    data_of,
    launch,
    launch_two,
    make_data,
    metrics_without_times,
    options,
    parse_config,
    pipeline_bytes,
    train,
    without_dropout,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.data import caches as caches_module
from difftrain_utils.data import encoded as cache_module
from difftrain_utils.data.caches import load_caches
from difftrain_utils.data.encoded import (
    EncodedCache,
    Entry,
    build_cache,
    pack,
)
from difftrain_utils.data.fingerprint import inspect_splits
from difftrain_utils.data.rows import map_rows
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.errors import InputError, RunError
from difftrain_utils.families.load import load_family
from difftrain_utils.files import file_digest
from difftrain_utils.processes import this_process
from difftrain_utils.run.meter import StepTimer

BOTH = {"data.cache_latents": True, "data.cache_text": True, "data.center_crop": True}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Of latents of 32 x 32 pixels, upright and mirrored, a shard has two batches."""
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(cache_module, "ENTRIES_PER_BATCH", 2)


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


def damage_file(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[-1] ^= 4
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-7])
    elif damage == "no digest":
        path.with_suffix(".sha256").unlink()
    elif damage == "gone":
        path.unlink()
    else:
        shutil.copy(path.parent / "shard-00000.sha256", path.with_suffix(".sha256"))


def stacked(batch: list[torch.Tensor]) -> Entry:
    return {"values": torch.stack(batch)}


class TestEncodedCache:
    """Entries of 16, 24 and 32 bytes: of group 0 a shard has two batches of two, of the others one."""

    groups = np.array([0, 1, 0, 0, 1, 0, 0, 2])

    @pytest.fixture(autouse=True)
    def smaller_shards(self, monkeypatch):
        monkeypatch.setattr(cache_module, "SHARD_BYTES", 64)

    def build(self, folder, encode=stacked) -> EncodedCache:
        inputs = [torch.full((2, 2 + int(group)), float(i)) for i, group in enumerate(self.groups)]
        return build_cache(Accelerator(cpu=True), folder, self.groups, inputs, encode, "Testing", num_workers=0)

    def test_it_gives_what_was_put_in(self, tmp_path):
        cache = self.build(tmp_path)
        for _ in range(2):
            for i in np.random.default_rng(0).permutation(8).tolist():
                assert cache[i].keys() == {"values"}
                assert torch.equal(cache[i]["values"], torch.full((2, 2 + int(self.groups[i])), float(i)))
            cache = pickle.loads(pickle.dumps(cache))  # with open shards
        # five of group 0 in two shards, and one each of the others; with digests that sha256sum would take
        files = [tmp_path / "layout.json", *(tmp_path / f"shard-0000{i}.safetensors" for i in range(4))]
        assert sorted(tmp_path.iterdir()) == sorted(p.with_suffix(s) for p in files for s in (p.suffix, ".sha256"))
        for path in files:
            assert path.with_suffix(".sha256").read_text() == f"{file_digest(path)}  {path.name}\n"

    def test_several_runs_make_each_shard_once(self, tmp_path, monkeypatch):
        """Two at the same time, each in a thread, which stands for another machine."""
        monkeypatch.setattr(cache_module, "LOOK_AGAIN", 0.02)
        self.build(tmp_path / "alone")
        shutil.copytree(tmp_path / "alone", tmp_path / "both", ignore=shutil.ignore_patterns("shard-*"))
        encoded: list[float] = []

        def encode(batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            time.sleep(0.05)
            encoded.extend(float(values[0, 0]) for values in batch)
            return stacked(batch)

        with ThreadPoolExecutor(2) as pool:
            caches = list(pool.map(lambda _: self.build(tmp_path / "both", encode), range(2)))
        assert sorted(encoded) == list(range(8)) and len(caches) == 2
        files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("alone", "both")]
        assert files[0] == files[1]

    @pytest.mark.parametrize("left", ["gone", "silent", "alive"])
    def test_a_claim_lasts_as_long_as_who_made_it(self, tmp_path, left, monkeypatch):
        path, host = tmp_path / "shard.safetensors", {} if left == "gone" else {"host": "another machine"}
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        cache_module.claim_of(path).write_text(json.dumps(this_process() | {"pid": process.pid} | host))
        if left == "silent":
            monkeypatch.setattr(cache_module, "ABANDONED", -1)
        assert cache_module.claim(path) == (left != "alive")
        assert [each.name for each in tmp_path.iterdir()] == ["shard.claim"]

    def encoded(self, folder) -> list[float]:
        """What had to be encoded, in order."""
        entries = []

        def encode(batch):
            entries.extend(tensor[0, 0].item() for tensor in batch)
            return stacked(batch)

        self.build(folder, encode)
        return entries

    def test_a_finished_cache_is_not_made_again(self, tmp_path):
        # some of each group, to measure it, and then group after group
        assert self.encoded(tmp_path) == [0, 6, 1, 4, 7, 0, 2, 3, 5, 6, 1, 4, 7]
        assert self.encoded(tmp_path) == []

    def test_a_build_that_failed_goes_on(self, tmp_path):
        seen = []

        def fail_late(batch):
            seen.extend(batch)
            if len(seen) > 10:  # five that are measured, four of the first shard, one of the second, and then two
                raise KeyboardInterrupt
            return stacked(batch)

        with pytest.raises(KeyboardInterrupt):
            self.build(tmp_path, fail_late)
        assert len(list(tmp_path.glob("*.safetensors"))) == 2
        assert self.encoded(tmp_path) == [1, 4, 7]

    @pytest.mark.parametrize("damage", ["a bit", "truncated", "no digest", "digest of another"])
    def test_a_damaged_shard_is_made_again_with_a_warning(self, tmp_path, capsys, damage):
        self.build(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        path = tmp_path / "shard-00001.safetensors"
        damage_file(path, damage)
        capsys.readouterr()
        assert self.encoded(tmp_path) == [6]
        warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert warnings == [f"warning: {path} is damaged: making it again"]
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("damage", ["a bit", "truncated", "no digest", "digest of another", "gone"])
    def test_a_damaged_layout_is_measured_again_and_no_shard_made(self, tmp_path, damage):
        self.build(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert json.loads(before["layout.json"]) == {
            "0": {"entry_bytes": 16, "entries_per_shard": 4},
            "1": {"entry_bytes": 24, "entries_per_shard": 2},
            "2": {"entry_bytes": 32, "entries_per_shard": 2},
        }
        damage_file(tmp_path / "layout.json", damage)
        assert self.encoded(tmp_path) == [0, 6, 1, 4, 7]
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize(("size", "entries"), [(1, 2), (63, 2), (64, 4), (95, 4), (96, 6), (10**6, 8)])
    def test_a_shard_has_as_many_whole_batches_as_its_bytes_hold(self, tmp_path, monkeypatch, size, entries):
        monkeypatch.setattr(cache_module, "SHARD_BYTES", size)
        monkeypatch.setattr(self, "groups", np.zeros(8, int))
        sizes = []
        cache = self.build(tmp_path, lambda batch: sizes.append(len(batch)) or stacked(batch))
        assert sizes == [2] * 5  # one to measure; of any shard, so that no entry is rounded otherwise
        assert [len(shard) for shard in cache.shards] == [entries] * (8 // entries) + [8 % entries] * (8 % entries > 0)
        for path, shard in zip(map(cache.path, range(9)), cache.shards, strict=False):
            assert load_file(path)["values"].nbytes == 16 * len(shard) <= max(size, 32)

    def test_too_little_room_is_reported_before_anything_is_encoded(self, tmp_path, monkeypatch):
        needed = 5 * 16 + 2 * 24 + 32  # by group, as measured
        usage = shutil._ntuple_diskusage(1000, 1000, needed - 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        encoded = []
        with pytest.raises(InputError, match=rf"^data.cache_dir: {tmp_path} needs 0.0 GB more, 0.0 GB are free$"):
            self.build(tmp_path, lambda batch: encoded.append(len(batch)) or stacked(batch))
        assert encoded == [2, 2, 1]
        assert {path.name for path in tmp_path.iterdir()} == {"layout.json", "layout.sha256"}
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed))
        self.build(tmp_path)
        (tmp_path / "shard-00001.safetensors").unlink()  # one entry of group 0
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=15))
        with pytest.raises(InputError, match=r"^data.cache_dir: .* needs 0.0 GB more"):
            self.build(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=16))
        assert self.encoded(tmp_path) == [6]

    @pytest.mark.parametrize(
        "full_at", ["layout.sha256", "layout.json", "shard-00000.sha256", "shard-00000.safetensors"]
    )
    def test_a_disk_that_is_full_after_all(self, tmp_path, monkeypatch, full_at):
        write_bytes = Path.write_bytes

        def write(path, content):
            if path.name.startswith(full_at):
                raise OSError(28, "No space left")
            write_bytes(path, content)

        monkeypatch.setattr(Path, "write_bytes", write)
        with pytest.raises(RunError, match=rf"^cannot write .*{full_at}: .*No space left"):
            self.build(tmp_path)
        in_order = ["layout.sha256", "layout.json", "shard-00000.sha256", "shard-00000.safetensors"]
        assert {path.name for path in tmp_path.iterdir()} == set(in_order[: in_order.index(full_at)])
        monkeypatch.undo()
        self.build(tmp_path)


class TestEntries:
    """Of what a text encoder puts out for captions of some tokens out of 8."""

    lengths = (3, 1, 0, 2, 5, 2, 1, 3, 1, 1)
    groups = np.array([0, 0, 0, 1, 1, 0, 1, 0, 0, 0])

    @pytest.fixture(autouse=True)
    def small_shards(self, monkeypatch):
        monkeypatch.setattr(cache_module, "SHARD_BYTES", 1)
        monkeypatch.setattr(cache_module, "ENTRIES_PER_BATCH", 2)

    def entry(self, i: int) -> Entry:
        """What the mask leaves out is not zero."""
        generator, length, group = torch.Generator().manual_seed(i), self.lengths[i], int(self.groups[i])
        mask = torch.arange(8) < length
        mask[: max(0, length - 2)] = False  # what comes before the last that counts is kept
        return {
            "prompt_embeds": torch.randn(8, 3, generator=generator).to(torch.bfloat16),
            "prompt_embeds_mask": mask,
            "ids": torch.randint(9, (8, 2), generator=generator, dtype=torch.int32),
            "ids_mask": mask.long(),
            "latents": torch.randn(2, 3, 4 + group, 6 - group, generator=generator),
            "flags": torch.arange(4) == i % 4,
            "label": torch.tensor(100 + i),
            "score": torch.tensor(i / 8, dtype=torch.float16),
            "is_even": torch.tensor(i % 2 == 0),
        }

    def build(self, folder: Path) -> EncodedCache:
        def encode(batch: list[int]) -> Entry:
            entries = [self.entry(i) for i in batch]
            return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

        inputs = range(len(self.lengths))
        return build_cache(Accelerator(cpu=True), folder, self.groups, inputs, encode, "Testing", num_workers=0)

    def test_they_come_back_with_zeros_instead_of_what_the_mask_leaves_out(self, tmp_path):
        made = self.build(tmp_path)
        caches = [made, pickle.loads(pickle.dumps(made)), self.build(tmp_path)]
        for i in np.random.default_rng(0).permutation(10).tolist():
            for found, expected in ((one[i], self.entry(i)) for one in caches):
                for name in ("prompt_embeds", "prompt_embeds_mask", "ids", "ids_mask"):
                    expected[name][self.lengths[i] :] = 0
                    expected[name] = expected[name][:5]  # the longest of all, whichever are in its shard or group
                assert found.keys() == expected.keys()
                for name, values in expected.items():
                    assert found[name].dtype == values.dtype and torch.equal(found[name], values), name

    def test_what_the_mask_leaves_out_is_not_on_the_disk(self, tmp_path):
        cache = self.build(tmp_path)
        assert [shard.tolist() for shard in cache.shards] == [[0, 1], [2, 5], [7, 8], [9], [3, 4], [6]]
        for shard, entries in enumerate(cache.shards):
            stored, tokens = load_file(cache.path(shard)), sum(self.lengths[i] for i in entries)
            sizes = {name: values.nbytes for name, values in stored.items() if not name.endswith(".ends")}
            assert sizes == {
                "prompt_embeds": tokens * 3 * 2,
                "prompt_embeds_mask": tokens,
                "ids": tokens * 2 * 4,
                "ids_mask": tokens * 8,
                "latents": len(entries) * 2 * 3 * (24 if self.groups[entries[0]] == 0 else 25) * 4,
                "flags": len(entries) * 4,
                "label": len(entries) * 8,
                "score": len(entries) * 2,
                "is_even": len(entries),
            }
            ends = np.cumsum([self.lengths[i] for i in entries]).tolist()
            assert stored["prompt_embeds.ends"].tolist() == stored["ids_mask.ends"].tolist() == ends
            file = cache.path(shard).read_bytes()  # a header, and the tensors that it lists
            header = 8 + int.from_bytes(file[:8], "little")
            assert len(file) == header + sum(values.nbytes for values in stored.values())

    def test_an_entry_is_measured_as_it_is_stored(self, tmp_path):
        """Of group 0 the first and the last, of 3 and 1 tokens."""
        tokens, rest = 2 * (6 + 1 + 8 + 8), 2 * 3 * 24 * 4 + 4 + 8 + 2 + 1
        assert self.build(tmp_path).layout["0"]["entry_bytes"] == tokens + rest

    def test_what_puts_out_nothing_cannot_be_cached(self, tmp_path):
        groups = np.zeros(3, int)
        with pytest.raises(InputError, match=r"^data.cache_dir: .*: the encoder puts out nothing that could be kept$"):
            build_cache(Accelerator(cpu=True), tmp_path, groups, range(3), lambda batch: {}, "Testing", num_workers=0)

    def test_pack_lays_entries_one_after_another(self):
        entries = [
            {"x": torch.tensor([i] * 4), "x_mask": torch.arange(4) < n, "n": torch.tensor(n)}
            for i, n in enumerate((2, 0, 3))
        ]
        before = copy.deepcopy(entries)
        packed = pack(entries)
        assert {name: values.tolist() for name, values in packed.items()} == {
            "x": [0, 0, 2, 2, 2],
            "x.ends": [2, 2, 5],
            "x_mask": [True] * 5,
            "x_mask.ends": [2, 2, 5],
            "n": [2, 0, 3],
        }
        assert str(entries) == str(before)


def caches_of(argv: list[str]):
    config = parse_config(argv)
    family = load_family(config)
    data = data_of(map_rows(config.data))
    fingerprints = inspect_splits(data.rows, None, config.data)
    return load_caches(Accelerator(cpu=True), family, data, fingerprints, config), family, data, config


def test_entries_are_what_the_encoders_give(cached_run, varied_folder):
    argv = [*cached_run, "--data.dataset", str(varied_folder / "good")]
    caches, family, data, config = caches_of(argv)
    latents, text = caches["latents"], caches["text"]
    assert not {"vae", "text_encoder"} & family._parts.keys()
    plain = dataclasses.replace(config.data, cache_latents=False, cache_text=False, random_flip=False)
    samples = Samples(data, plain, 0, 100)
    for row in range(21):
        k = next(k for k in range(21) if samples.order[k] == row)
        pixel_values = samples[k]["pixel_values"][None]
        entry = latents[row]
        assert entry.keys() == {"moments", "sizes", "is_readable"}
        assert entry["moments"].shape == (2, 2, 4, 8, 8) and entry["is_readable"].item() is True
        for flip, pixels in enumerate((pixel_values, pixel_values.flip(-1))):
            torch.testing.assert_close(entry["moments"][flip], family.encode_images(pixels)[0], rtol=1e-5, atol=1e-5)
        captions = data.rows[row].captions
        assert len(text.of_row(row)) == len(captions)
        for number, caption in zip(text.of_row(row), captions, strict=True):
            assert_same_conditioning(text[number], family.encode_prompts([caption]))
    assert_same_conditioning(text[text.NULL], family.null_conditioning())
    numbers = {number for row in range(21) for number in text.of_row(row)}
    assert numbers == set(range(1, len(text.cache.shard_of)))  # each caption once, and no more


def assert_same_conditioning(entry: Entry, expected: Entry) -> None:
    """Of one sample, and as a batch of one."""
    assert entry.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(entry[name], values[0], rtol=1e-5, atol=1e-5)


def test_a_vae_that_overflows_is_reported_and_not_taken_for_bad_rows(cached_run, monkeypatch):
    def overflow(_, pixel_values):
        return torch.full((len(pixel_values), 2, 4, 8, 8), torch.inf)

    monkeypatch.setattr("difftrain_utils.families.stable_diffusion.StableDiffusion.encode_images", overflow)
    with pytest.raises(RunError, match=r"^data.cache_latents: the VAE's output is not finite in torch.float32"):
        caches_of(cached_run)


def test_damaged_captions_are_numbered_again(cached_run, capsys):
    text = caches_of(cached_run)[0]["text"]
    expected = [text.of_row(row) for row in range(10)]
    path = text.cache.folder / "captions.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"[0, 1", b"[0, 2"))
    assert path.read_bytes() != content
    text = caches_of(cached_run)[0]["text"]
    assert [text.of_row(row) for row in range(10)] == expected and path.read_bytes() == content
    assert f"warning: {path} is damaged: making it again" in capsys.readouterr().err


def test_a_cache_of_captions_that_were_encoded_together_is_not_used(cached_run, capsys, monkeypatch):
    monkeypatch.setattr(caches_module, "FORMATS", {"latents": 2, "text": 2})
    before = folders_of(caches_of(cached_run)[0])
    monkeypatch.undo()
    after = folders_of(caches_of(cached_run)[0])
    assert after["latents"] == before["latents"] and after["text"] != before["text"]
    warning = f"{before['text']} is of an earlier version of difftrain and not used: making it again"
    assert capsys.readouterr().err.count(warning) == 1
    caches_of(cached_run)
    assert warning not in capsys.readouterr().err


def folders_of(caches: dict) -> dict[str, str]:
    return {"latents": caches["latents"].folder.name, "text": caches["text"].cache.folder.name}


class TestKey:
    def folders(self, argv, **fields) -> dict[str, str]:
        return folders_of(caches_of([*argv, *options(fields)])[0])

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
            ("model.vae_tiling", True, {"latents"}),
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
                (lambda f: change(f, "tokenizer/tokenizer_config.json", '_length": 16', '_length": 15'), {"text"}),
                (lambda f: flip_bit(f, "unet/diffusion_pytorch_model.safetensors"), set()),
            )
        ):  # fmt: skip
            folder = shutil.copytree(checkpoint_folder, tmp_path / f"model-{i}")
            spoil(folder)
            family = load_family(parse_config([*cached_run, "--model.pretrained_model_name_or_path", str(folder)]))
            old = load_family(parse_config(cached_run))
            keys = {
                what: [f.describe_parts(*parts) for f in (old, family)]
                for what, parts in (("latents", ["vae"]), ("text", ["text_encoder", "tokenizer"]))
            }
            assert {what for what, (a, b) in keys.items() if a != b} == changed, i
        assert self.folders(cached_run) == before

    def test_it_changes_with_the_type(self, cached_run):
        config = parse_config(cached_run)
        data, seen = data_of(map_rows(config.data)), []
        fingerprints = inspect_splits(data.rows, None, config.data)
        for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
            family = load_family(config)
            family.move_frozen_parts(
                SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision), TrainConfig()
            )
            caches = load_caches(Accelerator(cpu=True), family, data, fingerprints, config)
            assert caches["latents"][0]["moments"].dtype == caches["text"][0]["prompt_embeds"].dtype == dtype
            seen.append(folders_of(caches))
        assert all(seen[0][what] != seen[1][what] for what in ("latents", "text"))


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


QUICK = ("both", "workers-accumulation", "bad-rows-buckets", "no-flip")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in COMBINATIONS]
)
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


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_latents_of_any_rank_and_prompts_of_any_length(fake_family, load_fake_caches, on_bad_row):
    """Videos, say. Of the rows that cannot be read one has a damaged image, and one no caption."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (16 + i, 24, 3), np.uint8)) for i in range(7)]
    captions = ["", "a", "a bb", "a bb ccc", "dddd", "a bb ccc dddd", "a"]
    rows = as_rows(make_data(images, captions))
    if on_bad_row == "skip":

        def spoil(row: dict, index: int) -> dict:
            content = row["image"]["bytes"][: 60 if index == 2 else None]
            return {"image": row["image"] | {"bytes": content}, "text": None if index == 5 else row["text"]}

        rows.parts[0].data = rows.parts[0].data.map(spoil, with_indices=True)
    config = DataConfig("memory", resolution=16, center_crop=True, random_flip=True, on_bad_row=on_bad_row)
    config.caption_dropout, data = 0.2, data_of(rows)
    plain = Samples(data, config, 0, 100)
    config = dataclasses.replace(config, cache_latents=True, cache_text=True)
    caches = load_fake_caches(data, config)
    for row in range(7):
        entry, is_bad = caches["latents"][row], on_bad_row == "skip" and row in (2, 5)
        assert entry["moments"].shape == (2, 2, 3, 2, 2, 2) and entry["is_readable"].item() is not is_bad
        assert entry["sizes"][:, :2].tolist() == [[0, 0] if is_bad else [16 + row, 24]] * 2
    samples, num_skipped = Samples(data, config, 0, 100, caches), 0
    for k in range(0, 56, 8):
        batch, expected = (collate([which[k + i] for i in range(8)]) for which in (samples, plain))
        assert batch["moments"].shape == (8, 2, 3, 2, 2, 2)
        assert torch.equal(batch["moments"], fake_family.encode_images(expected["pixel_values"]))
        conditioning = fake_family.encode_prompts(expected["captions"])
        length = 4 if on_bad_row == "stop" else 3  # of the longest caption that can be read
        assert batch["conditioning"].keys() == conditioning.keys()
        for name, values in batch["conditioning"].items():
            assert torch.equal(values, conditioning[name][:, :length])
        assert torch.equal(batch["sizes"], expected["sizes"])
        for name in ("keys", "skipped", "dropped"):
            assert batch[name] == expected[name]
        num_skipped += sum(batch["skipped"])
    assert num_skipped == (16 if on_bad_row == "skip" else 0)  # two of seven in each of eight epochs


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
                loading = original(*args, **kwargs)  # the module, and what of its weights was found
                loaded.append((cls.__name__, weakref.ref(loading[0])))
                return loading

            monkeypatch.setattr(cls, "from_pretrained", load)
        return loaded

    def test_they_are_not_loaded_where_the_caches_are_complete(self, cached_run, tmp_path, loads):
        for name, times in (("first", 2), ("second", 1)):  # to save the pipeline they are loaded once in each run
            loads.clear()
            train([*cached_run, "--output-dir", str(tmp_path / name)])
            assert sorted(cls for cls, _ in loads) == ["AutoencoderKL"] * times + ["CLIPTextModel"] * times
        assert pipeline_bytes(tmp_path / "first") == pipeline_bytes(tmp_path / "second")

    def test_after_an_evaluation_they_are_dropped_again(self, cached_run, loads, monkeypatch):
        alive, next_batch = [], StepTimer.next_batch

        def count(self, batches):
            batch = next_batch(self, batches)
            alive.append(sum(reference() is not None for _, reference in loads))
            return batch

        monkeypatch.setattr(StepTimer, "next_batch", count)
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
    caches, *_ = caches_of([*cached_run, "--data.dataset", str(varied_folder / "good")])
    text = caches["text"]
    for part in (caches["latents"], text.cache):
        assert not any(isinstance(value, dict | list) and len(value) > 20 for value in vars(part).values())
    assert isinstance(text.starts, np.ndarray) and isinstance(text.numbers, np.ndarray)
    assert not hasattr(text, "captions")


@pytest.mark.slow
def test_two_processes_build_the_same_bytes(cached_run, varied_folder, tmp_path):
    """And say what is damaged, whoever has to make it again; and train as one does."""
    model = {"model.pretrained_model_name_or_path": without_dropout(cached_run, tmp_path)}
    fields = model | {"data.dataset": varied_folder / "bad", "data.on_bad_row": "skip"}
    argv = [*cached_run, *options(fields)]
    small_shards = tmp_path / "small_shards.py"
    small_shards.write_text(
        "import runpy\n"
        "import difftrain_utils.data.encoded as cache\n"
        "cache.SHARD_BYTES, cache.ENTRIES_PER_BATCH = 20_000, 2\n"
        'runpy.run_path("train_text_to_image.py", run_name="__main__")\n'
    )

    def run(name: str) -> subprocess.CompletedProcess:
        fields = {"train.output_dir": tmp_path / name, "data.cache_dir": tmp_path / "cache-two"}
        result = launch_two([*argv, *options(fields)], script=small_shards)
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
    script = tmp_path / "killed.py"
    text = """if True:
        import os, runpy, signal
        import difftrain_utils.data.encoded as cache
        from difftrain_utils.families.stable_diffusion import StableDiffusion
        cache.SHARD_BYTES, cache.ENTRIES_PER_BATCH = 20_000, 2
        encode, calls = StableDiffusion.encode_images, []

        def encode_images(self, pixel_values):
            calls.append(len(pixel_values))
            if sum(calls) > 2 * 1 + 2 * 4 + 2 * 2:  # measured, the first shard, and a batch of the second; mirrored
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(self, pixel_values)

        StableDiffusion.encode_images = encode_images
        runpy.run_path("train_text_to_image.py", run_name="__main__")
    """
    script.write_text(text)
    killed = launch(cached_run, script=script)
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

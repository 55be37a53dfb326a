import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import data_of
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.data.features import Teacher, cache_features
from difftrain_utils.data.rows import map_rows
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.errors import InputError

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 2, "image_size": 8}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def make_dinov2() -> torch.nn.Module:
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3))


def make_clip() -> torch.nn.Module:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=SIZES))


def make_siglip() -> torch.nn.Module:
    return SiglipVisionModel(SiglipVisionConfig(**SIZES))


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


@pytest.mark.parametrize(("make", "before"), [(make_dinov2, 4), (make_clip, 1), (make_siglip, 0)])
def test_a_teacher_is_what_the_model_says_of_each_patch(tmp_path, make, before):
    """`before` are the states that are of no patch. The other size is none that the model is made for."""
    model = make().eval()
    teacher, vision = Teacher(str(saved(model, tmp_path)), stride=4), getattr(model, "vision_model", model)
    small = torch.rand(2, 3, 8, 8)
    images = (small - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = vision(images).last_hidden_state[:, before:]
    pixel_values = 2 * small - 1
    torch.testing.assert_close(Teacher(str(tmp_path), stride=2)(pixel_values), expected)
    assert teacher.width == 16 and teacher(torch.rand(2, 3, 16, 32)).shape == (2, 32, 16)


def test_what_has_no_patches_is_refused(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    folder = saved(ResNetModel(config), tmp_path / "resnet")
    with pytest.raises(InputError, match=r"^teacher: .*resnet: a ResNetModel has no patches$"):
        Teacher(str(folder), stride=8)
    with pytest.raises(InputError, match=r"^teacher: .*nothing: "):
        Teacher(str(tmp_path / "nothing"), stride=8)


class TestCacheFeatures:
    def make(self, fake_family, image_folder, tmp_path, teacher=None, **fields):
        data = DataConfig(str(image_folder), resolution=32, cache_dir=str(tmp_path / "cache"), **fields)
        config, rows = TextToImageConfig(ModelConfig("fake"), data), map_rows(data)
        teacher = teacher or Teacher(str(saved(make_siglip(), tmp_path)), stride=8)
        fingerprints = {"train": {"sha256": "of the test"}}
        cache = cache_features(Accelerator(cpu=True), fake_family, teacher, data_of(rows), fingerprints, config)
        return teacher, cache, Samples(data_of(rows), data, 0, 20, {"teacher": cache})

    def test_they_are_of_the_crop_that_a_sample_has(self, fake_family, image_folder, tmp_path):
        options = {"center_crop": True, "random_flip": True}
        teacher, _, samples = self.make(fake_family, image_folder, tmp_path, **options)
        batch = collate([samples[k] for k in range(20)])
        assert set(batch["flips"]) == {0, 1}
        features = batch["teacher"]["features"][range(20), batch["flips"]]
        torch.testing.assert_close(features, teacher(batch["pixel_values"]), rtol=1e-4, atol=1e-5)
        other = batch["teacher"]["features"][range(20), [1 - flip for flip in batch["flips"]]]
        assert not torch.allclose(other, features, atol=0.01)

    def test_each_teacher_has_its_own(self, fake_family, image_folder, tmp_path):
        def cached(folder: Path, stride: int = 8) -> str:
            teacher = Teacher(str(folder), stride)
            _, cache, _ = self.make(fake_family, image_folder, tmp_path, teacher, center_crop=True)
            return cache.folder.name

        first = saved(model := make_siglip(), tmp_path / "first")
        names = [cached(first), cached(first, stride=4), cached(saved(make_siglip(), tmp_path / "of other weights"))]
        model.config.num_attention_heads = 4
        names.append(cached(saved(model, tmp_path / "of other heads")))
        file = first / "preprocessor_config.json"
        for name in ("image_mean", "image_std"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {name: [0.1, 0.2, 0.3]}))
            names.append(cached(first))
        assert len(set(names)) == len(names) and cached(first) == names[-1]

    def test_random_crops_are_refused(self, fake_family, image_folder, tmp_path):
        with pytest.raises(InputError, match=r"^data.center_crop: features are kept of one crop"):
            self.make(fake_family, image_folder, tmp_path)

"""FAD, KAD and CLAP score by tiny networks, against transformers' own forward passes and formulas in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
import torch
from accelerate import Accelerator
from helpers import options
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    AutoFeatureExtractor,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from difftrain_utils.builtins.tiny.parts import byte_tokenizer
from difftrain_utils.builtins.tones import TONES, make_tone
from difftrain_utils.config import command_line
from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.data.load import load_data
from difftrain_utils.data.samples import read_held_out
from difftrain_utils.errors import InputError
from difftrain_utils.evaluation.image_metrics import as_shown, image_metrics
from difftrain_utils.evaluation.sound_metrics import cut, load_sound_features, load_sound_networks
from difftrain_utils.families.load import load_family
from difftrain_utils.media.audio import Sound

RATE, LENGTH, CPU = 4000, 4096, torch.device("cpu")
FUSED = {"enable_fusion": True, "fusion_type": "aff_2d"}  # as laion/clap-htsat-fused


def make_tokenizer():
    return byte_tokenizer("</s>", "<pad>", "<s>", ("<s>", "</s>"))


@pytest.fixture(scope="module")
def sound_networks(tmp_path_factory):
    """Random networks with their feature extractors: clap and fused, of sounds of 1 s at 8 kHz at most; at 16
    kHz wav2vec2, whisper, of 2 s at most, and ast, of 0.64 s."""
    folder, tokenizer = tmp_path_factory.mktemp("networks"), make_tokenizer()
    torch.manual_seed(0)
    narrow = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = narrow | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text |= {"max_position_embeddings": 40, "projection_dim": 8}
    audio = {"window_size": 4, "num_mel_bins": 8, "spec_size": 32, "hidden_size": 16, "patch_embeds_hidden_size": 8}
    audio |= {"depths": [1, 1], "num_attention_heads": [1, 2], "num_hidden_layers": 2, "projection_dim": 8}
    clap = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=8))
    clap.text_model.embeddings.word_embeddings.weight.data.mul_(50)  # random embeddings are alike
    fused = ClapModel(ClapConfig(text_config=text, audio_config=audio | FUSED, projection_dim=8))
    convs = {"conv_dim": [8, 8], "conv_stride": [10, 8], "conv_kernel": [20, 8], "num_feat_extract_layers": 2}
    convs |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 8}
    each = {"layers": 1, "ffn_dim": 32, "attention_heads": 2}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in each.items()}
    sizes |= {"d_model": 16, "max_source_positions": 100, "vocab_size": 20, "num_mel_bins": 8}
    sizes |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    of_clap = {"hop_length": 80, "max_length_s": 1, "fft_window_size": 256, "frequency_max": 4000}
    networks = {
        "clap": (clap, ClapFeatureExtractor(8, 8000, truncation="rand_trunc", **of_clap)),
        "fused": (fused, ClapFeatureExtractor(8, 8000, truncation="fusion", **of_clap)),
        "wav2vec2": (Wav2Vec2ForCTC(Wav2Vec2Config(**narrow, **convs)), Wav2Vec2FeatureExtractor()),
        "whisper": (WhisperModel(WhisperConfig(**sizes)), WhisperFeatureExtractor(8, chunk_length=2)),
        "ast": (ASTModel(ASTConfig(**narrow, max_length=64, num_mel_bins=16)), ASTFeatureExtractor(1, 16000, 16, 64)),
    }
    for name, parts in networks.items():
        for part in parts:
            part.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "clap")
    return folder


def sound(index: int, channels: int = 1, length: int = LENGTH) -> Sound:
    """A tone, softer in each further channel."""
    samples, _ = make_tone(index, length, RATE)
    return Sound(np.stack([samples / (1 + channel) for channel in range(channels)]).astype(np.float32), RATE)


def given(sounds: list[Sound], folder, piece: int) -> list[dict[str, torch.Tensor]]:
    """What a network is given of each sound's two halves, of so many samples, or of all of it, by its own extractor."""
    extractor, found = AutoFeatureExtractor.from_pretrained(folder), []
    rate = extractor.sampling_rate
    for samples, own_rate in sounds:
        mono = soxr.resample(samples.mean(0), own_rate, rate, quality="VHQ")
        pieces = [mono[i : i + piece] for i in range(0, len(mono), piece)]
        found.append(extractor(pieces, sampling_rate=rate, return_tensors="pt"))
    return found


# ── Networks ─────────────────────────────────────────────────────────────────────────────────────────────────
@torch.no_grad()
def test_the_features_are_what_each_kind_of_network_says_of_a_sound(sound_networks):
    """Of stereo at 4 kHz, resampled to the network's rate: 1.024 s are two pieces of CLAP's and of AST's, and half of
    what Whisper takes."""
    sounds = [sound(0, channels=2), sound(6, channels=2)]
    clap, wav2vec2, whisper, ast = (
        network.from_pretrained(sound_networks / name).eval()
        for name, network in (
            ("clap", ClapModel),
            ("wav2vec2", Wav2Vec2Model),
            ("whisper", WhisperModel),
            ("ast", ASTModel),
        )
    )
    own = {
        "clap": (4096, lambda x: clap(input_ids=torch.tensor([[1]]), **x).audio_embeds),
        "wav2vec2": (16384, lambda x: wav2vec2(**x).last_hidden_state.mean(1)),
        "whisper": (16384, lambda x: whisper.get_encoder()(**x).last_hidden_state[:, :51].mean(1)),
        "ast": (8192, lambda x: ast(**x).pooler_output),
    }
    for name, (piece, forward) in own.items():
        features = load_sound_features(str(sound_networks / name), CPU)(sounds)
        expected = torch.stack([forward(x).mean(0) for x in given(sounds, sound_networks / name, piece)])
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.allclose(features[0], features[1], rtol=1e-3), name


@torch.no_grad()
def test_nothing_is_drawn_of_a_sound_that_is_longer_than_clap_takes_and_of_one_that_is_not(sound_networks):
    features, sounds = load_sound_features(str(sound_networks / "fused"), CPU), [sound(0), sound(6, length=2000)]
    drawn = []
    for seed in range(4):
        np.random.seed(seed)
        drawn.append(features(sounds if seed % 2 else sounds[::-1]).flip([0] * (1 - seed % 2)))
    assert all(torch.equal(one, drawn[0]) for one in drawn) and not torch.allclose(*drawn[0])


def test_pieces_are_of_one_length():
    assert cut(np.arange(10), None).tolist() == [list(range(10))] == cut(np.arange(10), 10).tolist()
    assert cut(np.arange(11), 4).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────────────────
def audio_config(sound_networks, tmp_path, **fields) -> TextToAudioConfig:
    """`fields` have __ for the dots of their names."""
    own = {"model.pretrained_model_name_or_path": "builtin:tiny-stable-audio", "data.dataset": "builtin:tones"}
    own |= {"data.waveform_length": LENGTH, "data.sampling_rate": RATE, "data.audio_channels": 1}
    own |= {"data.validation_split": 0.01, "data.cache_dir": tmp_path, "evaluation.num_metric_images": 5}
    own |= {f"evaluation.{name}": sound_networks / "clap" for name in ("fad_features", "clap_score_model")}
    own |= {"evaluation.batch_size": 2, "evaluation.num_inference_steps": 2}
    own |= {name.replace("__", "."): value for name, value in fields.items()}
    return command_line.parse_config(TextToAudioConfig, options(own))


@torch.no_grad()
def test_the_metrics_of_generated_sounds(sound_networks, tmp_path, capsys):
    """Against the distance of two Gaussians, that of two sets pair by pair, and CLAP's own cosines."""
    config, accelerator = audio_config(sound_networks, tmp_path), Accelerator()
    family = load_family(config)
    rows = load_data(accelerator, family, config).validation_rows
    networks, drawn, captions = load_sound_networks(config, rows, CPU), [], []
    assert "fad is unreliable: 5 sounds for 8 features; it takes 16" in capsys.readouterr().err

    def draw(denoiser, prompts, length, generators, **options) -> list[Sound]:
        made = [sound(len(drawn) + i, length=length) for i in range(len(prompts))]
        captions.extend(prompts)
        drawn.extend(made)
        return made

    found = image_metrics(accelerator, networks, SimpleNamespace(generate=draw), None, rows, config)
    assert found.keys() == {"fad", "kad", "clap_score"} and len(captions) == 5

    real = as_shown(read_held_out(rows, list(range(5)), config.data, 0), config.data)
    x, y = (networks["fad_features"](sounds).double().numpy() for sounds in (real, drawn))
    roots = np.sqrt(np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T)).astype(complex)).real.sum()
    fad = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * roots
    assert found["fad"] == pytest.approx(fad, rel=1e-3) and fad > 1e-6
    median = np.sort([np.linalg.norm(x[i] - x[j]) for i in range(5) for j in range(i)])[4]  # of 10 the lower middle

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([[np.exp(-np.square(p - q).sum() / (2 * median**2 + 1e-8)) for q in b] for p in a])

    kad = sum((kernel(a, a).sum() - 5) / 20 for a in (x, y)) - 2 * kernel(x, y).mean()
    assert found["kad"] == pytest.approx(100 * kad, rel=1e-3)

    clap, tokenizer, cosines = ClapModel.from_pretrained(sound_networks / "clap").eval(), make_tokenizer(), []
    for inputs, caption in zip(given(drawn, sound_networks / "clap", 4096), captions, strict=True):
        output = clap(**inputs, **tokenizer([caption], return_tensors="pt"))
        cosines.append((output.logits_per_audio / clap.logit_scale_a.exp()).mean().item())
    assert found["clap_score"] == pytest.approx(np.mean(cosines), rel=1e-4) and np.std(cosines) > 1e-4


def test_a_sound_is_compared_without_the_silence_after_it_that_is_not_learned():
    waveforms, masks = torch.rand(2, 1, 8), torch.tensor([[[1.0] * 8], [[8 / 3] * 3 + [0.0] * 5]])
    batch, data = {"waveforms": waveforms}, SimpleNamespace(sampling_rate=RATE)
    assert [sound.samples.shape for sound in as_shown(batch | {"masks": masks}, data)] == [(1, 8), (1, 3)]
    assert [sound.samples.shape for sound in as_shown(batch, data)] == [(1, 8), (1, 8)]


def test_a_generated_sound_is_as_long_as_the_one_that_it_is_compared_with(tmp_path):
    for index, length in enumerate((2000, LENGTH, 6000)):
        soundfile.write(tmp_path / f"{index}.wav", make_tone(index, length, RATE)[0], RATE)
        (tmp_path / f"{index}.txt").write_text(TONES[index])
    own = {"dataset": tmp_path, "validation_dataset": tmp_path, "validation_split": 0.0}
    fields = {f"data__{name}": value for name, value in own.items()} | {"evaluation__num_metric_images": 3}
    config, accelerator, lengths = audio_config(tmp_path, tmp_path / "cache", **fields), Accelerator(), []
    rows = load_data(accelerator, load_family(config), config).validation_rows

    def features(sounds: list[Sound]) -> torch.Tensor:
        lengths.append([sound.samples.shape[1] for sound in sounds])
        return torch.randn(len(sounds), 2)

    def draw(denoiser, prompts, *_, **__) -> list[Sound]:
        return [sound(index) for index in range(len(prompts))]

    networks = {"fad_features": features, "clap_score_model": lambda sounds, captions: features(sounds)[:, 0]}
    image_metrics(accelerator, networks, SimpleNamespace(generate=draw), None, rows, config)
    assert lengths[0] == lengths[1] == lengths[2] == [2000, LENGTH], "real, made, and made for the score"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluation__fad_features": "no/such"}, "evaluation.fad_features: cannot use 'no/such': "),
        ({"evaluation__clap_score_model": "{}/ast"}, "evaluation.clap_score_model: cannot use .*/ast': "),
        ({"evaluation__num_metric_images": 99}, "evaluation.num_metric_images: there are 60 held-out sounds, got 99$"),
        ({"data__validation_split": 0}, "evaluation.fad_features: needs held-out data: data.validation_split or"),
        (
            {"train__keep_best": "fid"},
            "train.keep_best: is another script's: here it is one of .*, fad, kad, clap_score, tones_right, got '?fid",
        ),
    ],
)
def test_what_cannot_be_is_said(sound_networks, tmp_path, fields, message):
    fields = {name: str(value).format(sound_networks) for name, value in fields.items()}
    with pytest.raises(InputError, match=f"^{message}"):
        load_sound_networks(audio_config(sound_networks, tmp_path, **fields), range(60), CPU)

"""The networks of FAD, KAD and CLAP score of sounds; image_metrics.py measures by them."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import ASTFeatureExtractor, AutoFeatureExtractor, AutoModel, AutoTokenizer, ClapModel

from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.data.rows import MappedRows
from difftrain_utils.errors import blame, warn
from difftrain_utils.evaluation.distances import unreliable
from difftrain_utils.evaluation.image_metrics import begin_loading, check_vocabulary, load_weights
from difftrain_utils.media.audio import Sound

LEAST = 0.1  # seconds; a shorter sound is padded with silence, for networks have no features of a few samples


def load_sound_networks(
    config: TextToAudioConfig, rows: MappedRows | None, device: torch.device
) -> dict[str, Callable]:
    """What `image_metrics` needs for the metrics asked for: {"fad_features": (sounds) -> (N, d), "clap_score_model":
    (sounds, captions) -> (N,)}, float32, of N sounds (Kilgour et al. 2019, arXiv:1812.08466; Elizalde et al. 2023,
    arXiv:2206.04769). Warns of fewer sounds than a Fréchet distance needs.

    Raises:
        InputError: a network cannot be loaded, or there are fewer `rows` than are to be generated.
    """
    begin_loading(config, rows)
    evaluation, data, networks = config.evaluation, config.data, {}
    silence = np.zeros((data.audio_channels, data.waveform_length), np.float32)
    blank = [Sound(silence, data.sampling_rate)]  # what a network cannot do shows now
    if name := evaluation.fad_features:
        with blame(f"evaluation.fad_features: cannot use {name!r}", Exception):
            networks["fad_features"] = load_sound_features(name, device)
            width = networks["fad_features"](blank).shape[1]
        if note := unreliable("fad is", "sounds", evaluation.num_metric_images, width):
            warn(f"evaluation.num_metric_images: {note}")
    if name := evaluation.clap_score_model:
        with blame(f"evaluation.clap_score_model: cannot use {name!r}", Exception):
            networks["clap_score_model"] = load_clap(name, device)
            networks["clap_score_model"](blank, [""])
    return networks


def load_sound_features(name: str, device: torch.device) -> Callable:
    """(sounds) -> (N, d), of an audio model of transformers: of CLAP the embedding that is compared with a text's; of
    others what they pool, or else the mean over the tokens that are of the sound. Of a sound that is longer than the
    network takes, the mean over its pieces."""
    network, prepare = load_weights(AutoModel, name, device, unused="masked_spec_embed"), load_extractor(name, device)
    if network.config.is_encoder_decoder:  # Whisper
        network = network.get_encoder()

    def of_pieces(inputs: dict[str, torch.Tensor], share: float) -> torch.Tensor:
        if isinstance(network, ClapModel):
            return embed_sounds(network, inputs)
        output = network(**inputs)
        if (pooled := getattr(output, "pooler_output", None)) is not None:
            return pooled
        if (states := getattr(output, "last_hidden_state", None)) is None:
            raise ValueError("it puts out no hidden states")
        return states[:, : max(round(share * states.shape[1]), 1)].mean(1)

    return lambda sounds: torch.stack([of_pieces(*prepare(sound)).mean(0) for sound in sounds])


def load_clap(name: str, device: torch.device) -> Callable:
    """(sounds, captions) -> (N,): the cosine of the embeddings of each sound and its caption, the mean over the pieces
    of one that is longer than the network takes."""
    model, prepare = load_weights(ClapModel, name, device), load_extractor(name, device)
    tokenizer, text_config = AutoTokenizer.from_pretrained(name), model.config.text_config
    check_vocabulary(tokenizer, text_config)
    longest = text_config.max_position_embeddings - text_config.pad_token_id - 1  # RoBERTa counts from there
    limits = {"padding": True, "truncation": True, "max_length": longest}

    def score(sounds: Sequence[Sound], captions: Sequence[str]) -> torch.Tensor:
        text = tokenizer(list(captions), return_tensors="pt", **limits).to(device)
        states = model.text_model(input_ids=text.input_ids, attention_mask=text.attention_mask).pooler_output
        of_captions = torch.nn.functional.normalize(model.text_projection(states), dim=-1)
        of_sounds = [embed_sounds(model, prepare(sound)[0]) for sound in sounds]
        pairs = zip(of_sounds, of_captions, strict=True)
        return torch.stack([(pieces @ of_caption).mean() for pieces, of_caption in pairs])

    return score


def embed_sounds(model: ClapModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """CLAP's embeddings of sounds, of length 1."""
    return torch.nn.functional.normalize(model.audio_projection(model.audio_model(**inputs).pooler_output), dim=-1)


def load_extractor(name: str, device: torch.device) -> Callable:
    """(sound) -> what its network is given of the sound's pieces, batch first, and which share of that is not padding:
    the mean of the channels, resampled and prepared as the network's own feature extractor does it."""
    extractor = AutoFeatureExtractor.from_pretrained(name)
    rate = getattr(extractor, "sampling_rate", None)
    if rate is None:
        raise ValueError("it is no audio model: its preprocessor has no sampling_rate")
    longest = longest_piece(extractor)

    def prepare(sound: Sound) -> tuple[dict[str, torch.Tensor], float]:
        pieces = cut(resampled(sound, rate), longest)
        inputs = extractor(list(pieces), sampling_rate=rate, return_tensors="pt")
        if "is_longer" in inputs:  # CLAP's extractor says it of one at random where there is none
            inputs["is_longer"] = torch.zeros_like(inputs["is_longer"])
        return dict(inputs.to(device)), pieces.shape[1] / (longest or pieces.shape[1])

    return prepare


def longest_piece(extractor) -> int | None:
    """How many samples an extractor pads to, and takes of a sound: the rest it would leave out, or some part, at random
    (CLAP); None: it takes all."""
    if isinstance(extractor, ASTFeatureExtractor):
        return extractor.max_length * extractor.sampling_rate // 100  # a frame each 10 ms
    return getattr(extractor, "nb_max_samples", getattr(extractor, "n_samples", None))  # CLAP's, Whisper's


def cut(samples: np.ndarray, longest: int | None) -> np.ndarray:
    """As few pieces of one length as none is longer than that, (pieces, samples); of the end are left out fewer samples
    than there are pieces."""
    number = 1 if longest is None else -(-len(samples) // longest)
    return samples[: len(samples) // number * number].reshape(number, -1)


def resampled(sound: Sound, rate: int) -> np.ndarray:
    """The mean of a sound's channels at a rate, (samples,) float32."""
    import soxr  # an extra

    samples = soxr.resample(sound.samples.mean(0), sound.sampling_rate, rate, quality="VHQ")
    return np.pad(samples, (0, max(round(LEAST * rate) - len(samples), 0)))

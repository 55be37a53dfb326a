"""What all families of text models in transformers' format have in common."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from accelerate import Accelerator
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from difftrain_utils.config.config import Config
from difftrain_utils.config.model import LoraConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.devices import weight_dtype
from difftrain_utils.errors import LOAD_ERRORS, InputError, RunError, blame
from difftrain_utils.families.diffusers_family import refuse_incomplete
from difftrain_utils.families.family import Weights
from difftrain_utils.families.lora import base_state, has_adapters, save_peft_adapters, with_trained
from difftrain_utils.families.text_samplers import sample_tokens
from difftrain_utils.files import tensors_digest
from difftrain_utils.keyed_random import seed_for
from difftrain_utils.media.text import end_token, tokenizer_digest, vocabulary_size
from difftrain_utils.optimization.trained import is_trained_whole

OTHER_HEADS = ("bert.pooler.", "cls.seq_relationship.")  # of BERT's files, which a masked language model has not


@dataclass
class TransformersFamily:
    """A `TextFamily` of checkpoints in transformers' format, but for how the model is told what it may look
    at (`attention_masks`).

    The denoiser is the whole model; the tokenizer is all that is beside it."""

    denoiser_part: ClassVar[str] = "model"
    takes_gradient_checkpointing: ClassVar[bool] = True
    text_encoders: ClassVar[None] = None
    """There are none."""
    fixed: ClassVar[dict[str, Any]] = {}
    """Fields of the model's config that are as they are here, whatever the checkpoint says."""

    source: str
    """The folder or hub name of the checkpoint, at `revision` and `variant`."""
    revision: str | None
    variant: str | None
    config: PretrainedConfig
    """The model's."""
    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    init_seed: int | None = None
    """The seed of the denoiser's random weights; None: the checkpoint's weights."""
    has_weights: bool = True
    """False: the denoiser is on the meta device, and of the checkpoint only its config and tokenizer are read."""
    lora: LoraConfig | None = None
    """Of the adapters that the denoiser has in training."""
    device: torch.device | str = "cpu"
    weight_dtype: torch.dtype = torch.float32

    @classmethod
    def load(
        cls, source: str, config: Config, weights: Weights, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> "TransformersFamily":
        """See `TextFamily`."""
        at = {"revision": config.model.revision, "trust_remote_code": False}  # nothing of a repository is run
        own = AutoConfig.from_pretrained(source, attn_implementation="sdpa", **cls.fixed, **at)
        if tokenizer is not None:
            if weights == "pretrained":
                raise InputError("data.tokenizer: needs model.train_from_scratch: the weights are for their own tokens")
            tell_tokens(own, tokenizer)
        else:
            with blame(f"model.pretrained_model_name_or_path: {source}: tokenizer", *LOAD_ERRORS):
                tokenizer = AutoTokenizer.from_pretrained(source, **at)
                if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
                    raise ValueError("there is no fast one (tokenizer.json)")
        family = cls(
            source,
            config.model.revision,
            config.model.variant,
            own,
            tokenizer,
            mask_token_of(tokenizer, own, config.model.mask_token),
            init_seed=config.train.seed_of("weights") if weights == "random" else None,
            has_weights=weights != "none",
            lora=config.model.lora,
        )
        if (size := vocabulary_size(tokenizer)) > own.vocab_size:
            raise ValueError(f"the tokenizer has {size} tokens, the model {own.vocab_size}")
        longest, length = own.max_position_embeddings, config.data.sequence_length
        if length > longest:
            raise InputError(f"data.sequence_length: {source} takes {longest} tokens at most, got {length}")
        return family

    # ── The model ────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def class_name(self) -> str:
        return self.config.architectures[0]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.class_name)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def load_denoiser(self) -> torch.nn.Module:
        """See `Family`. Random weights are a function of the seed."""
        if not self.has_weights:
            with torch.device("meta"):
                return self.model_class(self.config)
        if self.init_seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_for(self.init_seed, "weights", 0))
                return self.model_class(self.config)
        culprit = f"model.pretrained_model_name_or_path: {self.source}"
        with blame(culprit, *LOAD_ERRORS):
            model, found = self.model_class.from_pretrained(
                self.source,
                config=self.config,
                dtype=torch.float32,
                use_safetensors=True,  # other files are pickles
                output_loading_info=True,
                revision=self.revision,
                variant=self.variant,
            )
        found["unexpected_keys"] = [key for key in found["unexpected_keys"] if not key.startswith(OTHER_HEADS)]
        refuse_incomplete(model, found, culprit)
        return model

    def check_denoiser(self, denoiser: torch.nn.Module) -> None:
        if not isinstance(denoiser, self.model_class):
            raise RunError(f"a checkpoint of {self.class_name} has one, not a {type(denoiser).__name__}")
        if (size := denoiser.config.vocab_size) != self.vocab_size:
            raise RunError(f"{self.source} has {self.vocab_size} tokens, this denoiser {size}")

    def digests(self, denoiser: torch.nn.Module) -> dict[str, str]:
        return {"model": tensors_digest(base_state(denoiser)), "tokenizer": tokenizer_digest(self.tokenizer)}

    def move_frozen_parts(self, accelerator: Accelerator, config: TrainConfig) -> None:
        """See `Family`: there are none."""
        self.device, self.weight_dtype = accelerator.device, weight_dtype(accelerator.mixed_precision)

    def free_cached(self) -> None:
        """See `Family`: nothing is cached."""

    def frozen_modules(self) -> dict[str, torch.nn.Module]:
        return {}

    def of_shapes(
        self, dtype: torch.dtype, empty: Callable[[torch.nn.Module], torch.nn.Module]
    ) -> "TransformersFamily":
        return dataclasses.replace(self, device="cpu", weight_dtype=dtype)

    # ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────
    def attention_masks(self, attention_mask: torch.Tensor) -> Any:
        """What the model is told of what it may look at, (batch, tokens) bool: transformers' own masks, made also where
        nothing is padded. It would leave those out, and another kernel would round otherwise: what a sample's logits
        are would depend on its neighbours."""
        raise NotImplementedError

    def mask_arguments(self, attention_mask: torch.Tensor) -> dict[str, Any]:
        """What transformers' functions that make masks are given; of the embeddings they ask for shape and dtype."""
        embeddings = attention_mask.new_empty((*attention_mask.shape, 1), dtype=self.weight_dtype)
        always = {"allow_is_bidirectional_skip": False}
        return {"config": self.config, "inputs_embeds": embeddings, "attention_mask": attention_mask} | always

    def predict(
        self, denoiser: torch.nn.Module, noisy_tokens: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        masks = self.attention_masks(attention_mask)
        return denoiser(input_ids=noisy_tokens, attention_mask=masks, return_dict=False)[0].float()

    @torch.no_grad()
    def generate(
        self,
        denoiser: torch.nn.Module,
        prompts: Sequence[str],
        *,
        length: int,
        num_inference_steps: int,
        sampler: str,
        temperature: float,
        block_length: int | None,
        generators: Sequence[torch.Generator],
    ) -> list[str]:
        starts = [self.tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
        rows = [start + [self.mask_token_id] * (length - len(start)) for start in starts]
        tokens = torch.tensor(rows, device=self.device)
        predict = partial(self.predict, denoiser, attention_mask=torch.ones_like(tokens, dtype=torch.bool))
        how = {"num_inference_steps": num_inference_steps, "temperature": temperature, "block_length": block_length}
        found = sample_tokens(predict, tokens, self.mask_token_id, generators, sampler=sampler, **how)
        pairs = zip(starts, found.tolist(), strict=True)
        return [self.text_of(start, row[len(start) :]) for start, row in pairs]

    def text_of(self, start: list[int], tokens: list[int]) -> str:
        """The text of a prompt's tokens and those after it, up to the first that ends a text."""
        end = end_token(self.tokenizer)
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        return self.tokenizer.decode(start + tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # ── What is left of a run ────────────────────────────────────────────────────────────────────────────────
    def save_pipeline(self, folder: Path, denoiser: torch.nn.Module) -> None:
        """See `Family`: what transformers loads. Around adapters, which are merged, and what was trained in part it is
        the checkpoint's own model."""
        self.check_denoiser(denoiser)
        if has_adapters(denoiser) or not is_trained_whole(denoiser):
            denoiser = with_trained(self.load_denoiser(), denoiser)
        denoiser.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def loads_adapters(cls) -> bool:
        """See `Family`: peft does."""
        return True

    def save_lora(self, folder: Path, denoiser: torch.nn.Module) -> None:
        """See `Family`: as `PeftModel.from_pretrained(model, folder)` loads them."""
        self.check_denoiser(denoiser)
        save_peft_adapters(folder, denoiser, self.source)


def tell_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the config, in place, that of a model of these tokens."""
    config.vocab_size = vocabulary_size(tokenizer)
    for name in ("pad", "bos", "eos", "cls", "sep"):
        if hasattr(config, f"{name}_token_id"):
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))


def mask_token_of(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, token: str | None) -> int:
    """The number of the token that stands for one that is masked: of `token`, or the tokenizer's own, or the one of the
    model's config (`mask_token_id`). It is the tokenizer's from then on. Raises InputError if there is none."""
    if token is not None:
        number = tokenizer.get_vocab().get(token)
        if number is None:
            raise InputError(f"model.mask_token: the tokenizer has no token {token!r}")
    else:
        number = tokenizer.mask_token_id if tokenizer.mask_token is not None else getattr(config, "mask_token_id", None)
        if number is None:
            raise InputError("model.mask_token: must be one of the tokenizer's tokens, for it has none for this")
        if not isinstance(number, int) or not 0 <= number < vocabulary_size(tokenizer):
            raise ValueError(f"mask_token_id must be one of {vocabulary_size(tokenizer)} tokens, got {number!r}")
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(number)
    return number

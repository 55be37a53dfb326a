"""How a run of text does: a bound on the likelihood of held-out texts, and samples with what can be said of them."""

import math
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from difftrain_utils.builtins import brackets
from difftrain_utils.config.config import Config
from difftrain_utils.data.rows import Rows
from difftrain_utils.data.samples import read_held_out
from difftrain_utils.errors import go_on_without
from difftrain_utils.evaluation.generate import check_prompts, generate_texts
from difftrain_utils.evaluation.generative_perplexity import generative_perplexity, load_scorer
from difftrain_utils.evaluation.nelbo import by_mask_fraction, validation_nelbos
from difftrain_utils.evaluation.validation import save_validation_losses
from difftrain_utils.keyed_random import torch_generator_for
from difftrain_utils.media.media import media_of
from difftrain_utils.optimization.ema import EMA, evaluation_weights
from difftrain_utils.processes import main_process_first, share_out
from difftrain_utils.run.run_folder import SAMPLES, VALIDATION, step_file
from difftrain_utils.terminal import progress

JUDGES = {"brackets": brackets.is_valid}


class TextEvaluation:
    """What is evaluated every `train.eval_every` steps.

    Raises:
        InputError: a prompt is refused (`check_prompts`), or the model of the perplexity cannot be loaded.
    """

    def __init__(self, accelerator: Accelerator, family, validation_rows: Rows | None, config: Config):
        self.accelerator, self.family, self.rows, self.config = accelerator, family, validation_rows, config
        self.length = config.evaluation.length or config.data.sequence_length
        of_length = "at most (evaluation.length, data.sequence_length)"
        check_prompts(config.evaluation.prompts, self.length, family.tokenizer, "evaluation.prompts", of_length)
        name = config.evaluation.perplexity_model
        with main_process_first(accelerator):
            self.scorer = load_scorer(name, accelerator.device) if name else None

    def evaluate(self, denoiser: torch.nn.Module, ema: EMA | None, step: int) -> dict[str, Any]:
        """The line of metrics. All processes call it and share the work out; the page of samples is written by one.

        The validation loss is the bound in nats per token (see `by_mask_fraction`), of the raw and of the EMA weights;
        samples are of the EMA weights if there are any: `distinct` is the share of them that differ, and `valid` that
        of those which `evaluation.judge` finds right; `perplexity` is theirs to `evaluation.perplexity_model`.
        """
        evaluation, logs, denoiser = self.config.evaluation, {}, self.accelerator.unwrap_model(denoiser)
        if self.rows is not None:
            losses, num_bins = {}, evaluation.num_validation_bins
            weights = {"validation_loss": None} | ({"validation_loss_ema": ema} if ema is not None else {})
            read_batch = partial(read_held_out, self.rows, config=self.config.data, seed=evaluation.seed)
            for name, average in weights.items():
                with evaluation_weights(average, denoiser):
                    losses[name], num_tokens = validation_nelbos(
                        self.accelerator, self.family, denoiser, read_batch, evaluation
                    )
                logs |= by_mask_fraction(name, losses[name], num_tokens, num_bins)
            if self.accelerator.is_main_process:
                with go_on_without():
                    path = step_file(self.config.train.output_dir, VALIDATION, step, ".safetensors")
                    save_validation_losses(losses, len(self.rows), num_bins, path)
        if evaluation.num_samples:
            with evaluation_weights(ema, denoiser), self.accelerator.autocast():
                texts = self.generate(denoiser)
            if self.accelerator.is_main_process:
                with go_on_without():
                    path = step_file(self.config.train.output_dir, SAMPLES, step, ".txt")
                    media_of(self.config.data).save(texts, self.prompts, path)
            logs["distinct"] = len(set(texts)) / len(texts)
            if self.scorer is not None:
                perplexity = generative_perplexity(self.accelerator, self.scorer, texts)
                logs |= {"perplexity": perplexity} if math.isfinite(perplexity) else {}
            if evaluation.judge is not None:
                logs["valid"] = sum(map(JUDGES[evaluation.judge], texts)) / len(texts)
        return logs

    @property
    def prompts(self) -> list[str]:
        """What each of the samples begins with."""
        evaluation = self.config.evaluation
        prompts = evaluation.prompts or [""]
        return [prompts[i % len(prompts)] for i in range(evaluation.num_samples)]

    def generate(self, denoiser: torch.nn.Module) -> list[str]:
        """All samples, of which each process makes its share; sample i's draws depend on (evaluation.seed, i) alone."""
        evaluation, prompts, made = self.config.evaluation, self.prompts, []
        batches = share_out(self.accelerator, len(prompts), evaluation.batch_size)
        for keys, num_kept in progress(batches, len(batches), "Writing, batches"):
            generators = [torch_generator_for(evaluation.seed, "evaluation", i) for i in keys]
            of_keys = [prompts[i] for i in keys]
            texts = generate_texts(self.family, denoiser, evaluation, self.length, of_keys, generators)
            made += list(zip(keys, texts, strict=True))[:num_kept]
        texts = dict(gather_object(made))
        return [texts[i] for i in range(len(prompts))]

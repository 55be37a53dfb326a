"""What a run is for."""

from pathlib import Path

import torch
from accelerate import Accelerator

from difftrain_utils.families.lora import trains_adapters_alone
from difftrain_utils.files import digest_of_each, new_folder
from difftrain_utils.optimization.ema import EMA, evaluation_weights
from difftrain_utils.optimization.sharding import fill_outline, whole
from difftrain_utils.optimization.trained import trained_state
from difftrain_utils.run.run_folder import LORA, PIPELINE


def export_pipeline(
    accelerator: Accelerator,
    family,
    denoiser: torch.nn.Module,
    plain_denoiser: torch.nn.Module,
    ema: EMA | None,
    output_dir: str,
) -> dict[str, str]:
    """Write `output_dir/pipeline`, with the EMA weights if there are any, and return the digests of the "raw" weights
    and of those in the "pipeline", as far as they are trained. Of adapters it is `output_dir/lora`, unless others are
    trained beside them, and `pipeline` only if they are to be merged. All processes call it; one writes.

    The denoiser that is written is `plain_denoiser`, its weights gathered where they are shared out.

    Raises:
        RunError: it cannot be written, or would be none of this family's.
    """
    denoiser, text_encoders = accelerator.unwrap_model(denoiser), family.text_encoders
    weights = {"raw": trained_digest(denoiser, text_encoders)}
    with evaluation_weights(ema, denoiser, text_encoders):
        weights["pipeline"] = trained_digest(denoiser, text_encoders)
        fill_outline(accelerator, plain_denoiser, denoiser)
        if accelerator.is_main_process:
            denoiser = plain_denoiser
            if family.lora is not None and family.loads_adapters() and trains_adapters_alone(denoiser):
                with new_folder(Path(output_dir) / LORA) as folder:
                    family.save_lora(folder, denoiser)
            if family.lora is None or family.lora.merge:
                with new_folder(Path(output_dir) / PIPELINE) as folder:
                    family.save_pipeline(folder, denoiser)
    return weights


def trained_digest(denoiser: torch.nn.Module, text_encoders: torch.nn.Module | None) -> str:
    """SHA-256 of what is trained. All processes call it."""
    of_encoders = {} if text_encoders is None else trained_state(text_encoders)
    state = trained_state(denoiser) | {f"text_encoders.{name}": value for name, value in of_encoders.items()}
    return digest_of_each(state, lambda name: whole(state[name]))

"""Learning what is preferred, of pairs of images."""

import torch
import torch.nn.functional as F

from difftrain_utils.config.preference import PreferenceLossConfig


def preference_margins(
    config: PreferenceLossConfig, errors: torch.Tensor, reference_errors: torch.Tensor
) -> torch.Tensor:
    """By how much each chosen image has a higher implicit reward than the rejected one, (pairs,), of the errors that
    the model and the reference, which it was before training, make of the images, chosen and rejected in turn,
    (2·pairs,): -β/2·[(e - e_ref)(chosen) - (e - e_ref)(rejected)].

    Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908, equation 14). There the errors are sums over the elements and
    times T·ω(λ); here, as in the paper's code, they are means, times the weights of `loss.weighting`, and all other
    factors are in β.
    """
    chosen, rejected = (errors - reference_errors).view(-1, 2).unbind(1)
    return -config.beta / 2 * (chosen - rejected)


def preference_losses(margins: torch.Tensor) -> torch.Tensor:
    """-log σ(margin), (pairs,): ln 2 where the model is the reference."""
    return -F.logsigmoid(margins)


def implicit_accuracies(margins: torch.Tensor) -> torch.Tensor:
    """1 where the chosen image has the higher implicit reward, 0 where the rejected one has, and ½ where both have the
    same, (pairs,)."""
    return (1 + margins.sign()) / 2

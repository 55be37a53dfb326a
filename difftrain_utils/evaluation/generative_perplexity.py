"""How likely another language model finds what was written."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM, AutoTokenizer

from difftrain_utils.errors import blame
from difftrain_utils.processes import share_out
from difftrain_utils.terminal import announce

Scorer = Callable[[str], tuple[float, int]]


def load_scorer(name: str, device: torch.device) -> Scorer:
    """A function of a text: its nats under a causal model of transformers, a folder or a name on the hub, and of how
    many tokens they are.

    Each token is predicted from those before it, the first one where the tokenizer has a token for the beginning. Of a
    text that is too long the beginning counts.

    Raises:
        InputError: there is no such model, or it cannot be loaded.
    """
    announce(f"Loading {name}, for the perplexity of samples")
    with blame(f"evaluation.perplexity_model: cannot use {name!r}", Exception):
        here = {"trust_remote_code": False}  # nothing of a repository is run
        tokenizer = AutoTokenizer.from_pretrained(name, **here)
        model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, dtype=torch.float32, **here)
        model.eval().requires_grad_(False).to(device)
        longest = getattr(model.config, "max_position_embeddings", None)

        @torch.no_grad()
        def score(text: str) -> tuple[float, int]:
            begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            tokens = [*begin, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids][:longest]
            if len(tokens) < 2:
                return 0.0, 0
            tokens = torch.tensor([tokens], device=device)
            with torch.autocast(device.type, enabled=False):
                logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
            nats = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
            return nats.item(), len(logits)

        score("a b")  # what a model cannot do shows now
    return score


def generative_perplexity(accelerator: Accelerator, scorer: Scorer, texts: Sequence[str]) -> float:
    """exp of the nats per token of all texts together, which the processes share out; NaN where there are none.

    It falls, too, when a sampler repeats itself: look at `distinct` and at the samples beside it.
    """
    shares = share_out(accelerator, len(texts), 1)
    scores = [scorer(texts[i]) for keys, num_kept in shares for i in keys[:num_kept]]
    nats, numbers = torch.tensor(gather_object(scores), dtype=torch.float64).view(-1, 2).sum(0)
    return (nats / numbers).exp().item()

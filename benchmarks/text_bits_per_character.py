"""How well masked diffusion predicts real text, beside an autoregressive model of the same size and budget.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/text_bits_per_character.py [--models masked causal] [options]

The text is what `help()` of Python says of the language (`pydoc_data.topics`, 0.4 MB, under the PSF license), another
with each version of Python: each paragraph once, in texts of 2,000 characters, of which every tenth is held out.
`masked` is train_text.py. `causal` is the same Llama with causal attention, in a plain loop that takes the same batches
of bytes, optimizer, schedule and average of the weights; its first token is predicted from the end of a text. Both give
the held-out bytes a probability in the same blocks: the causal model its own, the masked one a bound, which is sampled,
so its bits per character are at most what is printed. Options that are not listed here go to the config.
"""

import argparse
import copy
import math
import platform
import pydoc_data.topics
import tempfile
import time
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import train_text
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.text import TextConfig
from difftrain_utils.data.load import load_data
from difftrain_utils.data.samples import Samples, collate, read_held_out
from difftrain_utils.data.tokenizer import make_tokenizer
from difftrain_utils.families.load import load_family
from difftrain_utils.optimization.averages import build_averages
from difftrain_utils.optimization.ema import evaluation_weights
from difftrain_utils.optimization.optimizers import build_lr_scheduler, build_optimizer

OPTIONS = """
--model.pretrained_model_name_or_path builtin:tiny-llada --data.tokenizer bytes --data.sequence_length 128
--data.packing pack --train.batch_size 32 --train.max_steps 1000 --train.eval_every 1000 --train.save_every 0
--train.log_every 100 --optimizer.init_args.lr 3e-3 --optimizer.init_args.weight_decay 0 --lr_scheduler.name cosine
--lr_scheduler.num_warmup_steps 100 --ema.decay 0.995 --evaluation.num_validation_samples 4096
--evaluation.num_samples 4
"""
TEXT_LENGTH = 2000  # characters, at least


def write_texts(folder: Path) -> dict[str, int]:
    """Write the texts into train/ and held-out/; returns how many characters of each there are, and in held-out/ how
    many bytes with an end of the text each."""
    seen, texts, text = set(), [], ""
    for topic in sorted(pydoc_data.topics.topics):
        for paragraph in pydoc_data.topics.topics[topic].split("\n\n"):
            if paragraph not in seen:
                seen.add(paragraph)
                text += f"{paragraph.strip()}\n\n"
                if len(text) >= TEXT_LENGTH:
                    texts.append(text)
                    text = ""
    for number, text in enumerate(texts):
        place = folder / ("held-out" if number % 10 == 9 else "train") / f"{number:03d}.txt"
        place.parent.mkdir(exist_ok=True)
        place.write_text(text, newline="")
    held_out = texts[9::10]
    sizes = {"train": sum(map(len, texts)) - sum(map(len, held_out)), "held-out": sum(map(len, held_out))}
    return sizes | {"tokens": sum(len(text.encode()) + 1 for text in held_out)}


def masked_nats(config: TextConfig) -> torch.Tensor:
    """Train; returns the bound of the held-out tokens, nats a token: its estimate, its standard error, and the bound by
    the share of tokens that is masked, from few to all."""
    train_text.main(config)
    folder = Path(config.train.output_dir)
    found = load_file(folder / f"validation/step-{config.train.max_steps:06d}.safetensors")
    bins = found["validation_loss_ema"].view(-1, config.evaluation.num_validation_bins).double()
    return torch.cat([bins.mean()[None], (bins.var(0).mean() / bins.numel()).sqrt()[None], bins.mean(0)])


def causal_nats(config: TextConfig) -> torch.Tensor:
    """Train the other model; returns the nats of a held-out token, (1,)."""
    torch.set_num_threads(config.train.cpu_threads)
    train, accelerator = config.train, Accelerator(cpu=True)
    family = load_family(config, tokenizer=make_tokenizer(config.data))
    data, end = load_data(accelerator, family, config), family.tokenizer.eos_token_id
    own = copy.deepcopy(family.config)
    own.is_causal = True
    torch.manual_seed(train.seed)
    model = LlamaForCausalLM(own).train()
    parameters = list(model.parameters())
    optimizer = build_optimizer(config.optimizer, {"denoiser": model})
    lr_scheduler = build_lr_scheduler(config.lr_scheduler, optimizer, train.max_steps)
    ema = build_averages(config.ema, parameters)["ema"]
    samples = Samples(data, config.data, train.seed, train.max_steps * train.batch_size)

    def nats_of(tokens: torch.Tensor) -> torch.Tensor:
        before = F.pad(tokens[:, :-1], (1, 0), value=end)
        logits = model(before, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)

    for step in range(1, train.max_steps + 1):
        keys = range((step - 1) * train.batch_size, step * train.batch_size)
        loss = nats_of(collate([samples[k] for k in keys])["tokens"]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        ema.step(parameters, step)
        if step % train.log_every == 0:
            print(f"causal: step {step}/{train.max_steps}, loss {loss.item():.3f}", flush=True)
    rows = data.validation_rows
    with evaluation_weights(ema, model.eval()), torch.no_grad():
        tokens = read_held_out(rows, range(len(rows)), config.data, seed=0)["tokens"]
        nats = torch.cat([nats_of(part) for part in tokens.split(config.evaluation.batch_size)])
    return nats.mean()[None]


def last_of_each(options: list[str]) -> list[str]:
    """Of options `--name value`, each once: what comes later holds."""
    return [part for option in dict(zip(options[::2], options[1::2], strict=True)).items() for part in option]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=["masked", "causal"], default=["masked", "causal"])
    parser.add_argument("--threads", type=int, default=2)
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = f"{folder}/datasets"
        sizes = write_texts(Path(folder))
        print(f"Python {platform.python_version()}: {sizes['train']} characters, {sizes['held-out']} held out")
        # fmt: off
        places = [
            "--data.dataset", f"{folder}/train", "--data.validation_dataset", f"{folder}/held-out",
            "--data.cache_dir", f"{folder}/cache", "--train.output_dir", f"{folder}/run",
            "--train.cpu_threads", str(args.threads),
        ]
        # fmt: on
        for name in args.models:
            config, start = parse_config(TextConfig, last_of_each([*OPTIONS.split(), *places, *options])), time.time()
            nats = (masked_nats if name == "masked" else causal_nats)(config)
            bits = nats * sizes["tokens"] / sizes["held-out"] / math.log(2)
            if name == "causal":
                print(f"causal: {bits[0]:.3f} bits per character, {time.time() - start:.0f} s")
            else:
                shares = ", ".join(f"{value:.2f}" for value in bits[2:])
                print(f"masked: at most {bits[0]:.3f} bits per character (standard error {bits[1]:.3f}),", end=" ")
                print(f"by the share that is masked {shares}, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()

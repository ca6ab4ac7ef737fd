"""Makes the bundled model: tokenizer, weights and figures, all from the Shakespeare text beside this file.

    python -m tritium.models.mobilellm.shakespeare.train [--output DIR] [--steps N] [--threads N]

The last tenth of the text is held out: no weight and no step is chosen by it (README.md beside this file names the two
decisions about the recipe that did look at it). The last twentieth of the rest, the selection slice, decides which
step's weights the first stage keeps; a short second stage then goes on from them with the whole training part, the
slice included, for a number of steps fixed beforehand.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from ....runtime.backend import Backend
from ....runtime.checkpoint import load_weights, read_spec, save_pretrained
from ....runtime.decoder import Decoder
from ....runtime.kernel_set import KernelSet
from ....runtime.plan import Dense
from ....runtime.registry import get_family
from .kneser_ney import Ids, KneserNey

HERE = Path(__file__).resolve().parent
END = "<|endoftext|>"
# Words with the space before them, punctuation with the line ends after it, so that ":\n" can be one token.
WORDS = r"'(?:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Settings:
    """How the model is trained."""

    steps: int = 4500
    batch: int = 1024  # tokens a step
    block: int = 256  # tokens a sequence; the last third of the steps takes twice as many
    deviation: float = 0.06  # of the matrices at first
    learning_rate: float = 2e-3
    warm_up: float = 0.04  # part of the training
    weight_decay: float = 0.1  # of the matrices other than the embedding
    dropout: float = 0.1  # of what each block adds to the residual stream
    split: float = 0.1  # chance that a token is replaced by the two that it was merged from
    scene: int = 20  # mean number of speeches that are kept together when an epoch is shuffled
    evaluations: int = 15
    finish_steps: int = 750  # of the second stage
    finish_rate: float = 8e-4  # its learning rate
    seed: int = 1


# Data and tokenizer


def split_text(data: bytes) -> tuple[bytes, bytes, bytes]:
    """(fitted part, selection slice, held-out part), in the text's order; the first two are the training part."""
    training = len(data) * 9 // 10
    fitted = training * 19 // 20
    return data[:fitted], data[fitted:training], data[training:]


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: every text has an encoding, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: bytes) -> Ids:
    """Token ids [T] of a text."""
    return np.array(tokenizer.encode(text.decode()).ids, dtype=np.int64)


def merge_parts(tokenizer: Tokenizer) -> Ids:
    """[V, 2]: the two ids that each token was merged from, -1 for tokens that are not merges."""
    vocabulary = tokenizer.get_vocab()
    parts = np.full((len(vocabulary), 2), -1, dtype=np.int64)
    for left, right in reversed(json.loads(tokenizer.to_str())["model"]["merges"]):
        parts[vocabulary[left + right]] = vocabulary[left], vocabulary[right]
    return parts


def split_tokens(ids: Ids, parts: Ids, rate: float, rng: np.random.Generator) -> Ids:
    """Other spellings of the same text: each merged token falls in two with chance `rate`, its halves likewise."""
    open_ = np.ones(len(ids), dtype=bool)
    while True:
        chosen = open_ & (parts[ids, 0] >= 0) & (rng.random(len(ids)) < rate)
        if not chosen.any():
            return ids
        ids, open_ = np.repeat(ids, 1 + chosen), np.repeat(chosen, 1 + chosen)
        first = np.flatnonzero(chosen) + np.arange(chosen.sum())
        ids[first], ids[first + 1] = parts[ids[first]].T


def batches(speeches: list[Ids], parts: Ids, settings: Settings) -> Iterator[Tensor]:
    """Training batches [batch] without end. Each epoch cuts the text anew into scenes, each opened by END (id 0),
    shuffles them, and splits other tokens."""
    rng = np.random.default_rng(settings.seed)
    stream = np.zeros(0, dtype=np.int64)
    while True:
        cuts = np.flatnonzero(rng.random(len(speeches)) < 1 / settings.scene).tolist()
        bounds = list(zip([0, *cuts], [*cuts, len(speeches)], strict=True))
        scenes = [np.concatenate([[0], *speeches[start:end]]) for start, end in bounds if end > start]
        order = rng.permutation(len(scenes))
        epoch = split_tokens(np.concatenate([scenes[index] for index in order]), parts, settings.split, rng)
        stream = np.concatenate([stream, epoch])
        while len(stream) >= settings.batch:
            yield torch.from_numpy(stream[: settings.batch])
            stream = stream[settings.batch :]


# The model


@dataclass(frozen=True)
class Dropping(Backend):
    """The PyTorch path that drops, scaled, elements of what every block adds to the residual stream."""

    rate: float = 0.0

    def kernels(self, like: Tensor, parameters: Iterable[Tensor] = ()) -> KernelSet:
        def linear_residual(x: Tensor, linear: Dense, stream: Tensor) -> Tensor:
            return stream + F.dropout(F.linear(x, linear.weight, linear.bias), self.rate)

        return replace(super().kernels(like, parameters), linear_residual=linear_residual)


@torch.no_grad()
def nats(model: Decoder, ids: Ids, window: int) -> float:
    """Nats that a text costs behind END. Each token is predicted with at least window / 2 tokens of context once there
    are so many: windows overlap by half."""
    tokens = torch.from_numpy(np.concatenate([[0], ids]))
    total, scored = 0.0, 0
    for begin in range(0, len(ids), window // 2):
        end = min(begin + window, len(ids))
        logits = model(tokens[None, begin:end]).logits[0, scored - begin :].float()
        total += F.cross_entropy(logits, tokens[scored + 1 : end + 1], reduction="sum").item()
        scored = end
        if end == len(ids):
            break
    return total


def bits_per_byte(model: Decoder, tokenizer: Tokenizer, text: bytes, window: int) -> float:
    """The model's cross-entropy on a text in its canonical tokenisation."""
    return nats(model, encode(tokenizer, text), window) / math.log(2) / len(text)


def optimizer_of(model: Decoder, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; the embedding and the norms do not decay."""
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith("embedding")]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or name.startswith("embedding")]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def rate_at(done: float, settings: Settings) -> float:
    """Learning rate when the fraction `done` of the training is behind: linear warm-up, then a cosine towards zero."""
    if done < settings.warm_up:
        return settings.learning_rate * done / settings.warm_up
    return settings.learning_rate * (1 + math.cos(math.pi * (done - settings.warm_up) / (1 - settings.warm_up))) / 2


def train(
    start: Decoder, tokenizer: Tokenizer, text: bytes, selection: bytes, settings: Settings, minutes: float
) -> tuple[Decoder, dict[str, Any]]:
    """The averaged weights that were best on the selection slice, as a float32 model, and how they were made.

    `start` has the first weights. Without a selection slice the last weights are kept.

    `minutes` of wall-clock time end the training, and the schedule with it, where the steps would take longer.
    """
    torch.manual_seed(settings.seed)
    model = Decoder(start.config, backend="torch")
    model.backend = Dropping("torch", rate=settings.dropout)
    model.load_state_dict(start.state_dict())
    average = Decoder(start.config, backend="torch").requires_grad_(False)
    optimizer = optimizer_of(model, settings)
    speeches = [encode(tokenizer, speech + b"\n\n") for speech in text.rstrip(b"\n").split(b"\n\n")]
    source = batches(speeches, merge_parts(tokenizer), settings)
    best, kept, weights = math.inf, 0, average.state_dict()
    curve: dict[int, float] = {}
    step, done, started = 0, 0.0, time.perf_counter()
    with tqdm(total=settings.steps * settings.batch, unit=" tokens", unit_scale=True, smoothing=0.05) as bar:
        while done < 1:
            block = settings.block if done < 2 / 3 else 2 * settings.block
            ids = next(source).view(-1, block)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(done, settings)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            # The average forgets over about 200 steps, and faster while there are few.
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), max(0.005, 5 / (4 + step)))
            before, done = done, max(step / settings.steps, (time.perf_counter() - started) / 60 / minutes)
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", selection=f"{best:.3f} bits/byte")
            bar.update(settings.batch)
            if selection and int(before * settings.evaluations) < int(done * settings.evaluations):
                bits = curve[step] = bits_per_byte(average, tokenizer, selection, 2 * settings.block)
                if bits < best:
                    best, kept = bits, step
                    weights = {name: weight.clone() for name, weight in average.state_dict().items()}
    if selection:
        average.load_state_dict(weights)
    else:
        kept = step
    return average, {
        "steps": step,
        "step_kept": kept,
        "tokens_seen": kept * settings.batch,
        "epochs": round(kept * settings.batch / sum(map(len, speeches)), 1),
        "seconds": round(time.perf_counter() - started),
        "selection_bits_per_byte": {count: round(bits, 4) for count, bits in curve.items()},
    }


# What is written


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save(model: Decoder, tokenizer: Tokenizer, directory: Path) -> None:
    """A checkpoint folder in the Hugging Face layout, in bfloat16."""
    save_pretrained(model, directory, dtype=torch.bfloat16)
    end = tokenizer.token_to_id(END)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    write_json(directory / "config.json", {**config, "bos_token_id": end, "eos_token_id": end})
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.context_length,
        },
    )
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95}
    write_json(directory / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, **sampling})


def load_saved(directory: Path) -> Decoder:
    """The saved model, computing in bfloat16."""
    with torch.device("meta"):
        model = Decoder(read_spec(directory), backend="torch").to(torch.bfloat16)
    load_weights(model, directory, progress=False)
    return model


def baselines(tokenizer: Tokenizer, training: bytes, held_out: bytes) -> dict[str, float]:
    """Bits per byte of the 5-gram models, over bytes and over the model's own tokens."""
    raw = [np.frombuffer(part, np.uint8).astype(np.int64) for part in (training, held_out)]
    by_bytes = KneserNey(raw[0], 256).bits(raw[1])
    by_tokens = KneserNey(encode(tokenizer, training), tokenizer.get_vocab_size()).bits(encode(tokenizer, held_out))
    return {
        "kneser_ney_5gram_bytes": by_bytes / len(held_out),
        "kneser_ney_5gram_tokens": by_tokens / len(held_out),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the checkpoint (default: this one)")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the training earlier, after this long")
    parser.add_argument("--finish", action="store_true", help="only the second stage, from the first's --output")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = Settings(steps=arguments.steps)

    fitted, selection, held_out = split_text((HERE / "tinyshakespeare.txt").read_bytes())
    spec = get_family("mobilellm").spec("shakespeare").replace(dtype="float32")
    tokenizer = train_tokenizer((fitted + selection).decode(), spec.vocab_size)
    ngrams = baselines(tokenizer, fitted + selection, held_out)
    print("5-gram models, bits per byte:", ngrams)
    record = arguments.output / "results.json"
    if not arguments.finish:
        start = Decoder(spec, backend="torch").initialise(settings.deviation, settings.seed)
        model, training = train(start, tokenizer, fitted, selection, settings, arguments.minutes)
        save(model, tokenizer, arguments.output)
        write_json(record, {"training": training})
    training = json.loads(record.read_text(encoding="utf-8"))["training"]
    second = replace(settings, steps=settings.finish_steps, learning_rate=settings.finish_rate, seed=settings.seed + 1)
    start = Decoder(spec, backend="torch")
    first = load_saved(arguments.output)
    start.load_state_dict(first.state_dict())
    model, finish = train(start, tokenizer, fitted + selection, b"", second, arguments.minutes)

    save(model, tokenizer, arguments.output)
    window = 2 * settings.block
    saved = load_saved(arguments.output)
    results = {
        "held_out_bits_per_byte": {
            "model_float32": bits_per_byte(model, tokenizer, held_out, window),
            "model_bfloat16": bits_per_byte(saved, tokenizer, held_out, window),
            "first_stage_bfloat16": bits_per_byte(first, tokenizer, held_out, window),
            **ngrams,
        },
        "parameters": model.num_parameters(),
        "bytes": {"fitted": len(fitted), "selection": len(selection), "held_out": len(held_out)},
        "tokens": {"fitted": len(encode(tokenizer, fitted)), "held_out": len(encode(tokenizer, held_out))},
        "evaluation_window_tokens": window,
        "training": training,
        "second_stage": finish,
        "settings": asdict(settings),
        "threads": arguments.threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
    }
    write_json(arguments.output / "results.json", results)
    print(json.dumps(results, indent=2))
    for seed, prompt in enumerate(["ROMEO:", "To be, or not to be", "First Citizen:\nBefore we"]):
        ids = torch.from_numpy(encode(tokenizer, prompt.encode()))[None]
        out = model.generate(ids, 150, temperature=0.8, top_p=0.95, seed=seed, eos_token_id=0)
        print("-" * 60, tokenizer.decode(out[0].tolist()), sep="\n")


if __name__ == "__main__":
    main()

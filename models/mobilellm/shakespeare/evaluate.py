"""The bundled model's figures: what a trained checkpoint costs on the held-out text, beside n-gram models of the rest.

    tritium train models/mobilellm/train/shakespeare.yaml
    python -m tritium.models.mobilellm.shakespeare.evaluate [CHECKPOINT]

Writes results.json into the checkpoint's folder; without one, the bundled model is measured and nothing is written.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....runtime.decoder import Decoder
from ....runtime.loading import load
from ....runtime.tokenizer import Tokenizer
from .kneser_ney import Ids, KneserNey

HERE = Path(__file__).resolve().parent
HELD_OUT = 0.1  # as in the training's configuration
WINDOW = 512


def split_text(data: bytes) -> tuple[bytes, bytes]:
    """(what is trained on, what is held out), in the text's order."""
    end = int(len(data) * (1 - HELD_OUT))
    return data[:end], data[end:]


def encode(tokenizer: Tokenizer, text: bytes) -> Ids:
    """Token ids [T] of a text."""
    return np.array(tokenizer.encode(text.decode(), add_special_tokens=False), dtype=np.int64)


@torch.no_grad()
def predictions(model: Decoder, ids: Ids, window: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(float32 logits [T, V] for tokens, those tokens [T]) of a text behind the end of text, id 0, in its order. Each
    token is predicted with at least window / 2 tokens of context once there are so many: windows overlap by half."""
    tokens = torch.from_numpy(np.concatenate([[0], ids]))
    scored = 0
    for begin in range(0, len(ids), window // 2):
        end = min(begin + window, len(ids))
        yield model(tokens[None, begin:end]).logits[0, scored - begin :].float(), tokens[scored + 1 : end + 1]
        scored = end
        if end == len(ids):
            break


def nats(model: Decoder, ids: Ids, window: int) -> float:
    """Nats that a text costs."""
    costs = (F.cross_entropy(*each, reduction="sum").item() for each in predictions(model, ids, window))
    return sum(costs)


def bits_per_byte(model: Decoder, tokenizer: Tokenizer, text: bytes, window: int = WINDOW) -> float:
    """The model's cross-entropy on a text in its canonical tokenisation."""
    return nats(model, encode(tokenizer, text), window) / math.log(2) / len(text)


def baselines(tokenizer: Tokenizer, training: bytes, held_out: bytes) -> dict[str, float]:
    """Bits per byte of the 5-gram models, over bytes and over the model's own tokens."""
    raw = [np.frombuffer(part, np.uint8).astype(np.int64) for part in (training, held_out)]
    by_bytes = KneserNey(raw[0], 256).bits(raw[1])
    vocabulary = tokenizer.fast.get_vocab_size()
    by_tokens = KneserNey(encode(tokenizer, training), vocabulary).bits(encode(tokenizer, held_out))
    return {
        "kneser_ney_5gram_bytes": by_bytes / len(held_out),
        "kneser_ney_5gram_tokens": by_tokens / len(held_out),
    }


def measure(checkpoint: Path) -> dict[str, Any]:
    """All figures of a checkpoint, its saved weights computing in float32."""
    training, held_out = split_text((HERE / "tinyshakespeare.txt").read_bytes())
    model, tokenizer, _ = load(checkpoint, device="cpu", dtype="float32", backend="torch", progress=False)
    assert tokenizer is not None
    found = {"model": bits_per_byte(model, tokenizer, held_out)}
    return {
        "held_out_bits_per_byte": {**found, **baselines(tokenizer, training, held_out)},
        "parameters": model.num_parameters(),
        "bytes": {"trained": len(training), "held_out": len(held_out)},
        "tokens": {"trained": len(encode(tokenizer, training)), "held_out": len(encode(tokenizer, held_out))},
        "evaluation_window_tokens": WINDOW,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=HERE)
    checkpoint = parser.parse_args().checkpoint
    text = json.dumps(measure(checkpoint), indent=2) + "\n"
    if checkpoint != HERE:
        (checkpoint / "results.json").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()

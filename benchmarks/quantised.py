"""What 8 and 4 bits cost in quality: the bundled model on its held-out text, beside itself with its own weights.

The divergence is KL(p || q), p the next token's distribution by the weights as they are and q by the quantised ones,
meaned over the tokens of the text. Both compute in float32 on the PyTorch path. Bytes are those of a bfloat16 model's
weights, embeddings and scales included.
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tritium.runtime.decoder import Decoder
from tritium.runtime.loading import BUNDLED, load, pick_device
from tritium.runtime.quantisation import SCHEMES

from .harness import environment, table, write

# The bundled model's folder is imported where it is evaluated: the other benchmarks need not have it.
if TYPE_CHECKING:
    from tritium.models.mobilellm.shakespeare.kneser_ney import Ids

BYTES: int | None = None  # of the held-out text, from its beginning: all


def compared(dense: Decoder, model: Decoder, ids: "Ids", window: int | None = None) -> dict[str, float]:
    """Over the tokens of a text: mean KL and its largest value, nats of both models, how often they like the same token
    best. The window is the evaluation's own where it is None.
    """
    from tritium.models.mobilellm.shakespeare import evaluate

    window = evaluate.WINDOW if window is None else window
    sums = dict.fromkeys(("divergence", "dense_nats", "nats", "same_best"), 0.0)
    largest, pairs = 0.0, (evaluate.predictions(each, ids, window) for each in (dense, model))
    for (expected, tokens), (found, _) in zip(*pairs, strict=True):
        p, q = (logits.double().log_softmax(-1) for logits in (expected, found))
        divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        sums["divergence"] += divergence.sum().item()
        sums["dense_nats"] += F.nll_loss(p, tokens, reduction="sum").item()
        sums["nats"] += F.nll_loss(q, tokens, reduction="sum").item()
        sums["same_best"] += (expected.argmax(-1) == found.argmax(-1)).sum().item()
        largest = max(largest, divergence.max().item())
    means = {name: value / len(ids) for name, value in sums.items()}
    return {**means, "largest_divergence": largest}


def measure(scheme: str, text: bytes) -> dict[str, Any]:
    """The figures of one scheme on a text."""
    from tritium.models.mobilellm.shakespeare import evaluate

    options: dict[str, Any] = {"device": "cpu", "progress": False}
    dense, tokenizer, _ = load(BUNDLED, dtype="float32", backend="torch", **options)
    model = load(BUNDLED, dtype="float32", backend="torch", quantise=scheme, **options)[0]
    assert tokenizer is not None
    ids = evaluate.encode(tokenizer, text)
    found = compared(dense, model, ids)
    per_byte = len(ids) / len(text) / torch.tensor(2.0).log().item()
    return {
        "model": BUNDLED,
        "scheme": scheme,
        "tokens": len(ids),
        "divergence": found["divergence"],
        "largest_divergence": found["largest_divergence"],
        "same_best": found["same_best"],
        "dense_bits_per_byte": found["dense_nats"] * per_byte,
        "bits_per_byte": found["nats"] * per_byte,
        "dense_bytes": _nbytes(load(BUNDLED, dtype="bfloat16", **options)[0]),
        "bytes": _nbytes(load(BUNDLED, dtype="bfloat16", quantise=scheme, **options)[0]),
    }


def _nbytes(model: Decoder) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def run(options: argparse.Namespace) -> None:
    """Measures, prints the table, and writes the figures where asked."""
    from tritium.models.mobilellm.shakespeare import evaluate

    if options.threads:
        torch.set_num_threads(options.threads)
    text = evaluate.split_text((evaluate.HERE / "tinyshakespeare.txt").read_bytes())[1][:BYTES]
    results = []
    for scheme in SCHEMES:
        results.append(measure(scheme, text))
        print(f"{scheme}: measured", file=sys.stderr, flush=True)
    device = pick_device("cpu")
    print(summary({"environment": environment(device), "results": results}))
    if options.json:
        write(options.json, device, results)


def summary(record: dict[str, Any]) -> str:
    """The figures of a results file as a table, with what they were measured on."""
    rows = [("weights", "MB", "bits/byte", "KL, nats/token", "largest", "same best token")]
    first = record["results"][0]
    rows.append(("bfloat16", f"{first['dense_bytes'] / 1e6:.2f}", f"{first['dense_bits_per_byte']:.4f}", "-", "-", "-"))
    for row in record["results"]:
        rows.append(
            (
                row["scheme"],
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['bits_per_byte']:.4f}",
                f"{row['divergence']:.2e}",
                f"{row['largest_divergence']:.2e}",
                f"{row['same_best']:.2%}",
            )
        )
    where = record["environment"]
    lines = (
        f"{first['model']} on {first['tokens']} tokens of held-out text, computing in float32;",
        f"{where['device']}, torch {where['versions']['torch']}; {where['date']}",
    )
    return "\n".join((table(rows), "", *lines))

"""The adapter for lm_eval: its real base class, the bundled model, and log-softmax of transformers' logits."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from tritium.runtime.errors import TritiumError
from tritium.runtime.registry import MODELS

ROOT = Path(__file__).resolve().parents[2]
HARNESS = Path(os.environ.get("VENV", ROOT / ".venv")).resolve() / "lm-eval"  # `make test` puts it there
BUNDLED = MODELS / "mobilellm" / "shakespeare"
LONG = "To be, or not to be, that is the question. " * 60


@pytest.fixture(scope="module")
def adapter() -> Iterator[Any]:
    if not HARNESS.is_dir():
        assert "CI" not in os.environ, f"{HARNESS} is not there: `make test` installs it"
        pytest.skip(f"{HARNESS} is not there: `make test` installs it")
    sys.path.insert(0, str(HARNESS))
    yield import_module("tritium.runtime.dropin.lm_eval")
    sys.path.remove(str(HARNESS))


@pytest.fixture(scope="module")
def model(adapter: Any) -> Any:
    return adapter.TritiumLM(str(BUNDLED), device="cpu", backend="torch", batch_size=2)


@pytest.fixture(scope="module")
def oracle() -> Any:
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32, attn_implementation="eager").eval()


def asked(kind: str, *arguments: Any) -> Any:
    return import_module("lm_eval.api.instance").Instance(kind, {}, arguments, 0)


@torch.no_grad()
def by_transformers(oracle: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = torch.tensor([context + continuation])
    logits = oracle(ids[:, :-1]).logits[0, -len(continuation) :]
    wanted = ids[0, -len(continuation) :]
    log_probs = logits.log_softmax(-1).gather(1, wanted.unsqueeze(1))
    return float(log_probs.double().sum()), bool((logits.argmax(-1) == wanted).all())


def test_log_likelihoods(model: Any, oracle: Any) -> None:
    """A space that ends the context belongs to the continuation; an empty context is the token that begins a text."""
    pairs = [("ROMEO:\nWhat is", " love"), ("ROMEO: ", "zebra quark"), ("", "To be"), ("KING HENRY", " V")]
    found = model.loglikelihood([asked("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    encode = model.tok_encode
    for (context, continuation), mine in zip(pairs, found, strict=True):
        whole = encode(context + continuation)
        kept = encode(context.rstrip()) if context else [model.prefix_token_id]
        tail = whole[len(kept) :] if context else encode(continuation, add_special_tokens=False)
        assert mine == (pytest.approx(by_transformers(oracle, kept, tail)[0], rel=1e-5), False)


def test_what_greedy_decoding_gives_is_said(model: Any) -> None:
    (text,) = model.generate_until([asked("generate_until", "ROMEO:", {"until": [], "max_gen_toks": 4})])
    found = model.loglikelihood(
        [asked("loglikelihood", "ROMEO:", text), asked("loglikelihood", "ROMEO:", text + " zq")]
    )
    assert [greedy for _, greedy in found] == [True, False]


def test_a_context_beyond_the_models_loses_its_beginning(model: Any, oracle: Any) -> None:
    context, continuation = model._encode_pair(LONG, " Aye")
    assert len(context) > model.max_length
    (found,) = model.loglikelihood([asked("loglikelihood", LONG, " Aye")])
    kept = (context + continuation)[-(model.max_length + 1) :]
    expected = by_transformers(oracle, kept[: -len(continuation)], continuation)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


def test_rolling_counts_each_token_once(model: Any, oracle: Any) -> None:
    texts = [LONG, "To"]
    found = model.loglikelihood_rolling([asked("loglikelihood_rolling", text) for text in texts])
    for text, mine in zip(texts, found, strict=True):
        tokens, total, size = model.tok_encode(text), 0.0, model.max_length
        for start in range(0, len(tokens), size):
            # The last window has the full context: it begins as early as the model allows.
            end = min(len(tokens), start + size)
            before = ([model.prefix_token_id, *tokens])[max(0, end - size) : start + 1]
            total += by_transformers(oracle, before, tokens[start:end])[0]
        assert mine == pytest.approx(total, rel=1e-5)


def test_generation_stops_where_it_is_told(model: Any) -> None:
    settings = {"max_gen_toks": 24, "do_sample": False}
    (whole,) = model.generate_until([asked("generate_until", "ROMEO:", settings)])
    stop = whole.split()[2]
    cut, sampled, again, third = model.generate_until(
        [
            asked("generate_until", "ROMEO:", {**settings, "until": [stop, "never"]}),
            *[asked("generate_until", "ROMEO:", {"max_gen_toks": 8, "temperature": 0.9, "seed": 3})] * 2,
            asked("generate_until", "JULIET:", {"until": "\n", "max_gen_toks": 24}),
        ]
    )
    assert cut == whole[: whole.index(stop)]
    assert sampled == again != whole[: len(sampled)]
    assert "\n" not in third


def test_the_cache_of_answers_is_told(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(model.cache_hook, "add_partial", lambda *answer: told.append(answer))
    model.loglikelihood([asked("loglikelihood", "A", " b")])
    model.loglikelihood_rolling([asked("loglikelihood_rolling", "To be")])
    model.generate_until([asked("generate_until", "A", {"max_gen_toks": 1})])
    assert [(kind, tuple(key)) for kind, key, _ in told] == [
        ("loglikelihood", ("A", " b")),
        ("loglikelihood_rolling", ("To be",)),
        ("generate_until", ("A", {"max_gen_toks": 1})),
    ]


def test_lm_eval_finds_it_by_name(adapter: Any) -> None:
    adapter.register()
    adapter.register()  # harmless
    assert import_module("lm_eval.api.registry").get_model("tritium") is adapter.TritiumLM


@pytest.mark.parametrize("size", [0, -1, "many", 1.5])
def test_a_wrong_batch_size_is_named(adapter: Any, size: Any) -> None:
    with pytest.raises(TritiumError, match=r"^batch_size: must be a whole number of 1 or more, or auto"):
        adapter._rows(size, None)


def test_no_room_is_named(model: Any) -> None:
    with pytest.raises(TritiumError, match="max_gen_toks: 512 leave no room in 512 tokens"):
        model.generate_until([asked("generate_until", "A", {"max_gen_toks": 512})])


def test_without_lm_eval_one_line_says_so(tmp_path: Path) -> None:
    script = "import tritium.runtime.dropin.lm_eval"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "TritiumError: needs lm_eval with api.model: pip install" in done.stderr

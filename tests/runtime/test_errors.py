"""Every mistake gives one line that says what is wrong and what would be right: from the shell and from Python."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tritium.runtime import cli
from tritium.runtime.decoder import Decoder
from tritium.runtime.generation import SamplingOptions, generate
from tritium.runtime.registry import get_family

import tritium
from tritium import TritiumError

VOCAB, CONTEXT = 96, 128
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "context_length": CONTEXT},
    **{"embedding_dim": 16, "num_layers": 2},
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "hidden_dim": 24,
    "norm_eps": 1e-6,
    "rope_base": 10000.0,
    "rope_scaling": None,
    "tie_embeddings": True,
    "dtype": "float32",
}
NORM = "model.norm.weight"
INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def new_model(family: str = "qwen3") -> Decoder:
    return tritium.load_model(get_family(family).spec_from(SIZES, "tiny"), device="cpu")


def write_tokenizer(directory: Path) -> None:
    """A token a character of printable ASCII, so that any tokens are text."""
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    fast = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family in ("qwen3", "mobilellm"):
        found[family] = tmp_path_factory.mktemp(family)
        tritium.save_pretrained(new_model(family), found[family])
        write_tokenizer(found[family])
    return found


@pytest.fixture
def checkpoint(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A good qwen3 checkpoint of one's own, to be spoilt."""
    return Path(shutil.copytree(originals["qwen3"], tmp_path / "ck"))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return new_model()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for module in ("tritium.kernels.launch", "tritium.runtime.backend"):  # nor the interpreter in a GPU's place
        monkeypatch.setattr(f"{module}.INTERPRETED", False)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command line answers with. Fails for anything else: a traceback, output, another code."""
    try:
        code = cli.main(arguments)
    except SystemExit as ended:
        code = ended.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("tritium")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def refused(capsys: pytest.CaptureFixture[str], checkpoint: Path, *more: str) -> str:
    return refusal(capsys, "generate", "--checkpoint", str(checkpoint), "--prompt", "a", "--max-new-tokens", "2", *more)


def test_the_unspoilt_checkpoints_work(originals: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Without this, every refusal below could have the same wrong reason."""
    for directory in originals.values():
        options = ["--prompt", "abc", "--max-new-tokens", "2", "--device", "cpu"]
        assert cli.main(["generate", "--checkpoint", str(directory), *options]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("abc")
        assert err == ""


ARGUMENTS: list[tuple[list[str], list[str]]] = [
    (["--model", "qwen9"], ["unknown model family 'qwen9'", "did you mean qwen3 or", "known: gpt, llama,"]),
    (
        ["--model", "qwen3", "--size", "0.7B"],
        ["qwen3: unknown size '0.7B'; did you mean", "or 0.6B? known: 0.6B, 1.7B"],
    ),
    (["--checkpoint", "qwen3:0.7B"], ["qwen3: unknown size '0.7B'", "0.6B"]),
    (["--checkpoint", "qwen9:0.6B"], ["unknown model family 'qwen9'", "did you mean qwen3 or"]),
    (["--model", "qwen3", "--variant", "instuct"], ["unknown variant 'instuct'", "did you mean instruct?", "base"]),
    (["--model", "mobilellm", "--size", "70b"], ["mobilellm 70b", "no published weights", "140m, 125m"]),
    (["--checkpoint", "/no/such/folder"], ["/no/such/folder: no such checkpoint folder", "owner/name"]),
    (["--checkpoint", "owner/name"], ["owner/name: no such folder here", "HF_HUB_OFFLINE"]),
    (["--model", "qwen3", "--size", "0.6b"], ["Qwen/Qwen3-0.6B: no such folder here", "HF_HUB_OFFLINE"]),
    (["--checkpoint", "nofolder"], ["nofolder: no such checkpoint folder"]),
    (["--checkpoint", ""], ["--checkpoint"]),
    (["--model", ""], ["unknown model family ''", "known: gpt, llama, mobilellm,"]),
    (["--size", "0.6B"], ["--size needs --model"]),
    (["--checkpoint", "x", "--model", "qwen3"], ["--checkpoint", "--model", "not both"]),
    (["--checkpoint", "x", "--variant", "base"], ["--variant", "--model"]),
    (["--max-new-tokens", "-1"], ["max_new_tokens: must be 0 or more, got -1"]),
    (["--max-new-tokens", "ten"], ["--max-new-tokens", "invalid int value: 'ten'"]),
    (["--temperature", "-0.5"], ["temperature: must be 0 (greedy) or more, got -0.5"]),
    (["--temperature", "nan"], ["temperature: must be", "got nan"]),
    (["--temperature", "hot"], ["--temperature", "invalid float value: 'hot'"]),
    (["--top-p", "0"], ["top_p: must be above 0 and at most 1, got 0.0"]),
    (["--top-p", "1.1"], ["top_p: must be above 0 and at most 1, got 1.1"]),
    (["--top-p", "nan"], ["top_p: must be above 0 and at most 1, got nan"]),
    (["--top-k", "-3"], ["top_k: must be 0 (all tokens) or more, got -3"]),
    (["--seed", "x"], ["--seed", "'x'"]),
    (["--bogus", "1"], ["--bogus"]),
]


@pytest.mark.parametrize(("arguments", "said"), ARGUMENTS, ids=lambda part: " ".join(part)[:40])
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]) -> None:
    """Would break: exit codes, nearest names, or a model loaded before its options are looked at."""
    line = refusal(capsys, "generate", "--prompt", "a", *arguments)
    assert [part for part in said if part not in line] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["COMMAND"]),
        (["generat"], ["generat", "generate", "chat", "verify", "models", "tune"]),
        (["generate"], ["--prompt"]),
        (["models", "extra"], ["extra"]),
    ],
)
def test_wrong_commands(capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]) -> None:
    line = refusal(capsys, *arguments)
    assert [part for part in (*said, "--help") if part not in line] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "triton"], ["'triton' cannot run here", "GPU", "'torch' or 'auto'"]),
        (["--backend", "tritn"], ["backend: unknown 'tritn'", "did you mean triton?", "auto, triton, torch"]),
        (["--device", "gpu"], ["device: unknown 'gpu'", "cuda"]),
        (["--device", "cuda:7"], ["device: cuda:7 is not there", "0 GPUs"]),
        (["--device", "xpu"], ["device: xpu"]),
        (["--device", "meta"], ["device: meta"]),
        (["--dtype", "float31"], ["dtype: unknown 'float31'", "did you mean float32", "bfloat16"]),
        (["--prompt", ""], ["the prompt is empty"]),
        (["--prompt", "a" * 127], [f"127 tokens, and 2 more would exceed the context length of {CONTEXT}", "shorten"]),
        (["--prompt", "a" * 127, "--stream"], ["127 tokens, and 2 more would exceed"]),
        (["--stop", ""], ["stop: a stop string must not be empty"]),
        (["--seed", str(10**20)], ["seed", "got 1" + "0" * 20]),
    ],
    ids=lambda part: " ".join(part)[:40],
)
def test_what_cannot_run(
    capsys: pytest.CaptureFixture[str], no_gpu: None, originals: dict[str, Path], arguments: list[str], said: list[str]
) -> None:
    """Would break: a silent fall-back to another backend or device, a prompt cut short, output before the check."""
    line = refused(capsys, originals["qwen3"], *arguments)
    assert [part for part in said if part not in line] == []


def test_the_context_is_used_to_its_last_token(capsys: pytest.CaptureFixture[str], originals: dict[str, Path]) -> None:
    """Would break: the length check refuses one token too many."""
    options = ["--prompt", "a" * 126, "--max-new-tokens", "2", "--device", "cpu"]
    assert cli.main(["generate", "--checkpoint", str(originals["qwen3"]), *options]) == 0
    assert capsys.readouterr().out.startswith("a" * 126)


Spoil = Callable[[Path], object]


def named(rows: list[Any]) -> dict[str, Any]:
    return {"argvalues": rows, "ids": [str(row[-1])[-50:] for row in rows]}


def put(name: str, content: str | bytes) -> Spoil:
    return lambda directory: (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(name: str) -> Spoil:
    return lambda directory: (directory / name).unlink()


def config(**changes: Any) -> Spoil:
    """Sets keys of config.json; None removes."""

    def spoil(directory: Path) -> None:
        merged = {**json.loads((directory / CONFIG).read_text()), **changes}
        kept = {key: value for key, value in merged.items() if value is not None}
        (directory / CONFIG).write_text(json.dumps(kept))

    return spoil


def weights(changes: dict[str, Tensor | None], keep: bool = True) -> Spoil:
    """Replaces, adds or (None) removes tensors."""

    def spoil(directory: Path) -> None:
        merged = {**(load_file(directory / WEIGHTS) if keep else {}), **changes}
        save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, directory / WEIGHTS)

    return spoil


def shards(damage: Callable[[Path, Path], object]) -> Spoil:
    """Turns the single file into two indexed shards, then damages them."""

    def spoil(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        (directory / WEIGHTS).unlink()
        names = sorted(tensors)
        first, second = directory / SHARDS[0], directory / SHARDS[1]
        save_file({name: tensors[name] for name in names[::2]}, first)
        save_file({name: tensors[name] for name in names[1::2]}, second)
        weight_map = {name: SHARDS[index % 2] for index, name in enumerate(names)}
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        damage(first, second)

    return spoil


def tokenizer_with_one_more(directory: Path) -> None:
    fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
    fast.add_special_tokens(["<one>"])
    fast.save(str(directory / "tokenizer.json"))


def rope(**keys: Any) -> Spoil:
    return config(rope_parameters={"rope_theta": 1e4, **keys})


QWEN3_CONFIGS: list[tuple[Spoil, str]] = [
    (put(CONFIG, '{"model_type": '), "not valid JSON (line 1"),
    (put(CONFIG, "[1]"), "must hold a JSON object, got list"),
    (put(CONFIG, b"\xff\xfe{}"), "not UTF-8"),
    (config(model_type="qwen9"), "unknown model_type 'qwen9'; did you mean qwen or qwen3 or"),
    (config(model_type=None), "model_type"),
    (config(model_type=["qwen3"]), "model_type ['qwen3']"),
    (config(hidden_size=None), "embedding_dim needs the key hidden_size, which is missing"),
    (config(hidden_size="16"), "embedding_dim: must be a whole number, got '16' (remove the quotes)"),
    (config(num_hidden_layers=2.5), "num_layers: must be a whole number, got 2.5"),
    (config(tie_word_embeddings=1), "tie_embeddings: must be true or false, got 1"),
    (config(dtype="float8"), "dtype: must be one of bfloat16, float16, float32, got 'float8'"),
    (config(num_key_value_heads=3), "num_heads (4) must be a multiple of num_kv_heads (3)"),
    (config(head_dim=7), "head_dim must be even for rope, got 7"),
    (config(hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu' is supported"),
    (config(use_sliding_window=True), "use_sliding_window is True; only False is supported"),
    (rope(rope_type="longrope", factor=2.0), "unknown rope_type 'longrope'; known: dynamic, qwen_ntk, yarn, llama3"),
    (rope(rope_type=["yarn"]), "rope_type ['yarn']"),
    (rope(rope_type="yarn", factor=2.0), "yarn lacks original_max_position_embeddings; it takes factor"),
    (rope(rope_type="yarn", factor=0, original_max_position_embeddings=64), "factor must be above 0, got 0"),
    (rope(rope_type="yarn", factor=2, original_max_position_embeddings=0), "embeddings must be above 0, got 0"),
]
MOBILELLM_CONFIGS: list[tuple[Spoil, str]] = [
    (config(layer_types=["full_attention", "chunked_attention"]), "layer_types has 'chunked_attention'; only 'full_a"),
    (config(attn_temperature_tuning=True), "attn_temperature_tuning is True; only False is supported"),
    (config(attn_temperature_tuning=None), "attn_temperature_tuning is True; only False is supported"),
    (config(no_rope_layers=None), "no_rope_layers must be a list with one entry a layer"),
    (config(no_rope_layers=[1]), "rope_layers has 1 entries for 2 layers"),
]
CONFIGS = [*(("qwen3", *row) for row in QWEN3_CONFIGS), *(("mobilellm", *row) for row in MOBILELLM_CONFIGS)]
SPOILT: list[tuple[Spoil, list[str]]] = [
    (remove(CONFIG), ["{ck}: not a checkpoint, it has no config.json"]),
    (remove(WEIGHTS), ["{ck}: has no model.safetensors or model.safetensors.index.json"]),
    (lambda ck: (ck / WEIGHTS).rename(ck / "pytorch_model.bin"), ["pytorch_model.bin is a pickle", "convert it to"]),
    (shards(lambda first, second: second.unlink()), [f"{{ck}}: the shard {SHARDS[1]} is missing"]),
    (
        shards(lambda first, second: save_file({**load_file(first), **load_file(second)}, second)),
        [f"{{ck}}/{SHARDS[1]}: the tensor model.", "or also in another shard"],
    ),
    (put(INDEX, '{"metadata": {}}'), [f"{{ck}}/{INDEX}: has no weight_map"]),
    (put(INDEX, '{"weight_map": ["a"]}'), [f"{{ck}}/{INDEX}: has no weight_map"]),
    (
        weights(
            {
                NORM: None,
                "model.surplus.weight": torch.zeros(3),
                "model.layers.0.mlp.up_proj.weight": torch.zeros(7, 16),
                "model.layers.1.self_attn.q_norm.weight": torch.zeros(8, 1),
            }
        ),
        [
            "{ck}: tensors do not fit the model: missing 1: model.norm.weight; unknown 1: model.surplus.weight;",
            "wrong shape 2: ",
            "model.layers.0.mlp.up_proj.weight is [7, 16], expected [24, 16]",
            "model.layers.1.self_attn.q_norm.weight is [8, 1], expected [8]",
        ],
    ),
    (weights({NORM: torch.ones(16)}, keep=False), ["missing 23: ", "and 18 more"]),
    *(
        (weights({NORM: torch.ones(16).to(dtype)}), [f"{{ck}}/{WEIGHTS}: {NORM} is {name};", "only unquantised"])
        for name, dtype in (("I8", torch.int8), ("I64", torch.int64), ("BOOL", torch.bool))
    ),
    (remove("tokenizer.json"), ["no tokenizer file", "model.generate"]),
    (put("tokenizer.json", "{}"), ["{ck}/tokenizer.json: not a tokenizer"]),
    (tokenizer_with_one_more, [f"the tokenizer has {VOCAB + 1} tokens, more than the model's {VOCAB}"]),
    (put("generation_config.json", '{"temperature": "hot"}'), ["temperature", "hot"]),
    (put("generation_config.json", '{"top_p": 7}'), ["top_p: must be above 0 and at most 1, got 7"]),
    (put("chat_template.jinja", b"\xff"), ["{ck}/chat_template.jinja: not UTF-8"]),
]


@pytest.mark.parametrize(("family", "spoil", "said"), **named(CONFIGS))
def test_config(
    capsys: pytest.CaptureFixture[str], originals: dict[str, Path], tmp_path: Path, family: str, spoil: Spoil, said: str
) -> None:
    """Would break: a checkpoint that is not what the family computes runs anyway, or ends in a traceback."""
    directory = Path(shutil.copytree(originals[family], tmp_path / "ck"))
    spoil(directory)
    line = refused(capsys, directory)
    assert line.startswith(f"tritium: error: {directory / CONFIG}: ")
    assert said in line


@pytest.mark.parametrize(("spoil", "said"), **named(SPOILT))
def test_spoilt_checkpoint(capsys: pytest.CaptureFixture[str], checkpoint: Path, spoil: Spoil, said: list[str]) -> None:
    """Would break: a parameter stays uninitialised, codes pass for weights, or faults have to be mended one by one."""
    spoil(checkpoint)
    line = refused(capsys, checkpoint)
    assert [part for part in said if part.replace("{ck}", str(checkpoint)) not in line] == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-10],
        lambda whole: whole[:40],
        lambda whole: b"",
        lambda whole: b"\xff" * 8 + whole[8:],
        lambda whole: whole[:8] + b"?" + whole[9:],
        lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["cut", "cut in the header", "empty", "absurd header size", "header not JSON", "git-lfs pointer"],
)
def test_damaged_shard(capsys: pytest.CaptureFixture[str], checkpoint: Path, damage: Callable[[bytes], bytes]) -> None:
    """Would break: a download that ended early runs with garbage weights."""
    shards(lambda first, second: second.write_bytes(damage(second.read_bytes())))(checkpoint)
    assert f"{checkpoint / SHARDS[1]}: not a whole safetensors file (" in refused(capsys, checkpoint)


@pytest.mark.parametrize("name", ["../x.safetensors", "{ck}/x.safetensors", "sub/x.safetensors", "x.bin", 5])
def test_weight_map_stays_in_the_folder(capsys: pytest.CaptureFixture[str], checkpoint: Path, name: Any) -> None:
    """Would break: an index makes us read any file of this machine, or a pickle."""
    for there in (checkpoint.parent / "x.safetensors", checkpoint / "x.safetensors", checkpoint / "x.bin"):
        shutil.copy(checkpoint / WEIGHTS, there)
    name = name.replace("{ck}", str(checkpoint)) if isinstance(name, str) else name
    put(INDEX, json.dumps({"weight_map": {NORM: name}}))(checkpoint)
    line = refused(capsys, checkpoint)
    assert f"{checkpoint / INDEX}: weight_map names {str(name)!r}; only .safetensors files beside it" in line


def test_null_sampling_defaults_are_no_defaults(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    """`transformers` writes null for what is not set: the library's own defaults then hold."""
    options = ["--prompt", "a", "--max-new-tokens", "9", "--seed", "1", "--device", "cpu"]
    texts = []
    for _ in range(2):
        assert cli.main(["generate", "--checkpoint", str(checkpoint), *options]) == 0
        texts.append(capsys.readouterr().out)
        put("generation_config.json", '{"temperature": null, "top_k": null, "top_p": null}')(checkpoint)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no roles\nplease') }}", "TemplateError: no roles"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% set x = 1 // 0 %}", "ZeroDivisionError"),
        (None, "no chat template"),
    ],
)
def test_chat_template(capsys: pytest.CaptureFixture[str], checkpoint: Path, template: str | None, said: str) -> None:
    """Would break: a template's refusal is a traceback, or a system message without a template is dropped."""
    if template is not None:
        put("chat_template.jinja", template)(checkpoint)
    line = refusal(capsys, "chat", "--checkpoint", str(checkpoint), "--prompt", "a", "--system", "b")
    assert f"{checkpoint}: " in line
    assert said in line


# From Python


@pytest.mark.parametrize("token", [-1, VOCAB])
@pytest.mark.parametrize("use", ["forward", "generate", "loop"])
def test_token_ids(model: Decoder, use: str, token: int) -> None:
    """Would break: an id outside the vocabulary reaches an index, on a GPU a fault of the whole process."""
    ids = [3, token, 5]
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: model(torch.tensor([ids])),
        "generate": lambda: model.generate(torch.tensor([ids]), 2),
        "loop": lambda: list(generate(model, [ids], SamplingOptions(2))),
    }
    with pytest.raises(TritiumError, match=rf"token id {token} lies outside 0 to {VOCAB - 1}$"):
        calls[use]()


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
CALLS: list[tuple[Callable[[Decoder], object], str]] = [
    (lambda model: model(IDS.float()), "input_ids: must hold whole numbers .int64., got torch.float32"),
    (lambda model: model.generate(IDS.float(), 2), "must hold whole numbers .int64., got torch.float32"),
    (lambda model: model(IDS[0]), r"input_ids: must be \[batch, length\], got \[3\]"),
    (lambda model: model.generate(IDS[0], 2), r"input_ids: must be \[batch, length\], got \[3\]"),
    (lambda model: model(IDS, attention_mask=torch.ones(2, 4)), r"attention_mask: .*\[2, 3\], got \[2, 4\]"),
    (lambda model: model.generate(IDS, 2, attention_mask=torch.ones(3)), r"attention_mask: .*\[2, 3\], got \[3\]"),
    (lambda model: model(IDS, labels=IDS[:, 1:]), r"labels: must be \[2, 3\] like input_ids, got \[2, 2\]"),
    (lambda model: model(IDS, labels=IDS + VOCAB), rf"labels: token id 102 lies outside 0 to {VOCAB - 1}"),
    (lambda model: model(IDS, labels=IDS.float()), r"labels: must hold whole numbers"),
    (lambda model: model(IDS.repeat(1, 43)), f"row of 129 tokens exceeds the context length of {CONTEXT}"),
    (lambda model: model.generate(IDS[:, :0], 2), "prompt 0 is empty: give at least one token"),
    (lambda model: model.generate(IDS, 2, attention_mask=IDS > 3), "prompt 0 is empty: give at least one token"),
    (lambda model: model.generate(IDS, 126), f"3 tokens, and 126 more would exceed the context length of {CONTEXT}"),
    (lambda model: model.generate(IDS, -1), "max_new_tokens: must be 0 or more, got -1"),
    (lambda model: tritium.load_model(model.config, "mobilellm"), "'mobilellm' does not fit .* family 'qwen3'"),
    (lambda model: tritium.load_model(model.config, "qwen9"), "unknown model family 'qwen9'; did you mean qwen3 or"),
]


@pytest.mark.parametrize(("call", "said"), **named(CALLS))
def test_calls(model: Decoder, call: Callable[[Decoder], object], said: str) -> None:
    with pytest.raises(TritiumError, match=said) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def as_yaml(**changes: Any) -> str:
    """A good size file with changes; None removes."""
    values = {"family": "qwen3", **SIZES, **changes}
    return str(yaml.safe_dump({key: value for key, value in values.items() if value is not None or key not in changes}))


YAMLS: list[tuple[str | None, str]] = [
    (as_yaml(num_head=4), "unknown key 'num_head'; did you mean num_heads or num_kv_heads"),
    (as_yaml(hidden_dim=None, dtype=None), "missing hidden_dim, dtype"),
    (as_yaml(norm_eps=None) + "norm_eps: 1e-6\n", "norm_eps: must be a number, got '1e-6' (YAML reads 1e-6 as text: "),
    (as_yaml(vocab_size="seven"), "vocab_size: must be a whole number, got 'seven'"),
    (as_yaml(num_kv_heads=3), "num_heads (4) must be a multiple of num_kv_heads (3)"),
    (as_yaml(num_layers=0), "num_layers must be above 0, got 0"),
    (as_yaml(vocab_size=-5), "vocab_size must be above 0, got -5"),
    (as_yaml(norm_eps=float("nan")), "norm_eps must be above 0, got nan"),
    (as_yaml(num_heads=True), "num_heads: must be a whole number, got True"),
    (as_yaml(family="qwen9"), "unknown model family 'qwen9'; did you mean qwen3 or"),
    ("vocab_size: 1\n", "which family? put a family.yaml beside it or a `family` key in it"),
    ("family: qwen3\nvocab_size: [1\n", "not valid YAML (line "),
    ("", "must hold keys and values"),
    (None, "no such file"),
]


@pytest.mark.parametrize(("content", "said"), **named(YAMLS))
def test_load_config(tmp_path: Path, content: str | None, said: str) -> None:
    """Would break: a typing error in a YAML file becomes a silent default, or a message that names no file."""
    path = tmp_path / "size.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TritiumError) as caught:
        tritium.load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message
    assert message.count("(") == said.count("("), "a hint that does not apply"


def test_the_unspoilt_yaml_loads(tmp_path: Path) -> None:
    (tmp_path / "size.yaml").write_text(as_yaml())
    assert tritium.load_config(tmp_path / "size.yaml") == get_family("qwen3").spec_from(SIZES, "tiny")
    assert issubclass(TritiumError, ValueError)

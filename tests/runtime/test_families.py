"""family.yaml and size files as a user writes them: what extends what, and one clear line for each mistake."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tritium.runtime import registry
from tritium.runtime.checkpoint import read_spec
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import TritiumError
from tritium.runtime.hf_config import config_from_spec, spec_from_config
from tritium.runtime.registry import get_family, read_family, read_size
from tritium.runtime.weight_map import PARAMETERS, WeightMap

import tritium
from tests import oracle

OWN: dict[str, Any] = {"name": "own", "extends": "llama", "model_types": ["own"]}
UP = "stack.layers.{layer}.mlp.up.weight"
RATIO = {"quotient": ["hidden_size", "num_attention_heads"]}
SIZE = {
    "vocab_size": 40, "context_length": 64, "embedding_dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 4, "hidden_dim": 24, "norm_eps": 1e-5, "rope_base": 1e4, "rope_scaling": None, "tie_embeddings": False,
    "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a family.yaml of these changes over OWN into a folder, and gives its path."""

    def write(folder: str = "own", **changes: Any) -> Path:
        path = tmp_path / folder / "family.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({**OWN, **changes}), encoding="utf-8")
        return path

    return write


def test_extending(write: Callable[..., Path]) -> None:
    """What is said is laid over what is extended, entry by entry; null takes one away, and is a trait's value."""
    llama = get_family("llama")
    own = read_family(
        write(
            traits={"qkv_bias": True, "windows": None},
            config={"qkv_bias": None, "norm_eps": "eps"},
            weights={"head.weight": None},
            require={"hidden_act": None, "other": {"equals": 1}},
            export={"bos_token_id": 7},
        )
    )
    assert own.traits == {**llama.traits, "qkv_bias": True}
    assert own.config == {k: v for k, v in llama.config.items() if k != "qkv_bias"} | {"norm_eps": "eps"}
    assert set(own.weights) == set(llama.weights) - {"head.weight"}
    assert own.require == {k: v for k, v in llama.require.items() if k != "hidden_act"} | {"other": {"equals": 1}}
    assert own.export == {**llama.export, "bos_token_id": 7}
    assert own.ignore == llama.ignore
    assert (own.hub, own.published, own.default_size) == ({}, (), None)


def test_a_size_of_another_family(write: Callable[..., Path]) -> None:
    path = write(hub={"base": "someone/own-{size}-{SIZE}"}, published=["1b"], default={"size": "1b", "variant": "base"})
    (path.parent / "1b.yaml").write_text(yaml.safe_dump(SIZE))
    (path.parent / "2b.yaml").write_text(yaml.safe_dump({**SIZE, "family": "qwen2", "hub": {"chat": "else/where"}}))
    own = read_family(path)
    assert own.sizes == ["1b", "2b"]
    assert own.spec("1b").family == "own"
    assert own.spec("2b").family == "qwen2"
    assert own.spec("2b").qkv_bias
    assert own.members == {"own", "qwen2"}
    assert own.checkpoint("1b") == "someone/own-1b-1B"
    assert own.checkpoint("2b") == "else/where"  # it has no base: its first variant
    with pytest.raises(TritiumError, match=r"own 2b: unknown variant 'base'; .*known: chat"):
        own.checkpoint("2b", "base")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extends": "lama"}, "extends the unknown family 'lama'; did you mean llama"),
        ({"extends": "own"}, "extends 'own', which extends this family"),
        ({"traits": None}, "traits must be keys and values, got None"),
        ({"weights": ["x"]}, "weights must be keys and values"),
        ({"hub": "a/b"}, "hub must be keys and values, got 'a/b'"),
        ({"hub": {"base": None}}, "hub: base must be a repository"),
        ({"hub": {"base": "a/{sze}"}}, "hub: base must be a repository"),
        ({"hub": {"base": "a/{"}}, "hub: base must be a repository"),
        ({"model_types": "own"}, "model_types must be a list, got 'own'"),
        ({"ignore": None}, "ignore must be a list, got None"),
        ({"traits": {"qk_nrom": "none"}}, "traits: unknown spec field 'qk_nrom'; did you mean qk_norm"),
        ({"config": {"hiden_dim": "x"}}, "config: unknown spec field 'hiden_dim'; did you mean hidden_dim"),
        ({"require": {"x": False}}, r"require: x must be \{equals: ...\} or \{each: ...\}, got False"),
        ({"require": {"x": {"eq": 1}}}, "require: x must be"),
        ({"default": {"size": "1b"}}, "default must be {size: ..., variant: ...}"),
        ({"wieghts": {}}, "unknown key 'wieghts'; did you mean weights"),
    ],
    ids=str,
)
def test_wrong_families_say_what_is_wrong(write: Callable[..., Path], changes: dict[str, Any], said: str) -> None:
    path = write(**changes)
    with pytest.raises(TritiumError, match=said) as caught:
        read_family(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"stack.norm.weight": {"stak": "x", "over": "num_heads"}}, "unknown weight rule"),
        ({"stack.norm.weight": {"one_of": []}}, "unknown weight rule"),
        (
            {"stack.layers.{layer}.mlp.up.weight": {"cat": ["a", "b"], "rows": ["hiden_dim"] * 2}},
            "by 'hiden_dim', which",
        ),
        (
            {"stack.layers.{layer}.mlp.up.weight": {"cat": ["a"], "rows": ["hidden_dim"]}},
            r"has 48 rows, its map \[24\]",
        ),
        ({"stack.norm.weight": "model.embed_tokens.weight"}, "is mapped to stack.norm.weight and to what is before it"),
        ({"stack.norm.weight": None}, "weights does not map stack.norm.weight"),
    ],
    ids=str,
)
def test_wrong_weight_maps_say_what_is_wrong(write: Callable[..., Path], weights: dict[str, Any], said: str) -> None:
    """A tensor for two parameters would leave one of them unwritten."""
    family = read_family(write(weights=weights))
    spec = family.spec_from(SIZE, "test")
    with torch.device("meta"):
        model = Decoder(spec)
    with pytest.raises(TritiumError, match=said):
        WeightMap(family, spec, model.named_parameters())


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"firstof": ["x"]}, "hidden_dim: unknown converter"),
        (5, "must be a key or a converter, got 5"),
        (
            {"quotient": ["hidden_size", "num_attention_heads"]},
            r"hidden_size \(16\) must be a multiple of num_attention_heads \(3\)",
        ),
        ({"quotient": [{"first_of": ["ffn", "odd"]}, 2]}, r"ffn or odd \(9\) must be a multiple of 2$"),
        ({"first_of": ["listed"], "names": {"a": 1}}, r"listed is \['a'\]; supported are a"),
        ({"first_of": ["odd"], "when": "word"}, "word must be true or false, got 'yes'"),
        ({"first_of": ["absent", "missing"]}, "needs the key absent or missing, which is missing"),
        ({"sparse": ["odd", "hidden_size"], "layers": "num_hidden_layers"}, "hidden_size a list of layers"),
    ],
    ids=str,
)
def test_wrong_converters_and_values_say_what_is_wrong(write: Callable[..., Path], entry: Any, said: str) -> None:
    family = read_family(write(config={"hidden_dim": entry}))
    config = {
        "vocab_size": 40, "max_position_embeddings": 64, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 3, "head_dim": 4, "odd": 9, "listed": ["a"], "word": "yes",
    }  # fmt: skip
    with pytest.raises(TritiumError, match=said):
        spec_from_config(family, config, "test")


def test_the_names_of_parameters_are_all_there_are() -> None:
    """Would break: a module renamed, and every family's map with it refused, or a misspelt one not."""
    found = {"embedding.weight"}
    biased = {"qkv_bias": True, "out_bias": True}
    experts = {"expert_layers": True, "num_experts": 2, "experts_per_token": 1, "expert_dim": 4}
    for changes in (
        {"norm": "layer", "positions": "learned", "mlp": "plain", "activation": "relu", "mlp_bias": True, **biased},
        {"qk_norm": "weighted", "qk_norm_layers": True, **experts},
    ):
        with torch.device("meta"):
            model = Decoder(get_family("llama").spec_from({**SIZE, **changes}, "test"))
        found |= {re.sub(r"layers\.\d+\.", "layers.{layer}.", name) for name, _ in model.named_parameters()}
    assert found == set(PARAMETERS)


def test_families_without_sizes_name_who_lists_them() -> None:
    for name, listed in (("qwen3_moe", "qwen3"), ("mobilellm1", "mobilellm")):
        with pytest.raises(
            TritiumError, match=f"{name}: has no sizes of its own; its sizes are listed under {listed}$"
        ):
            get_family(name).size_name("125m")
    with pytest.raises(TritiumError, match="unknown size '8'"):
        get_family("qwen3").size_name(8)  # type: ignore[arg-type]


def test_size_files_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "1b.yaml"
    for values, said in (
        ({**SIZE, "hub": "a/b"}, "hub must be a mapping"),
        ({**SIZE, "family": "own"}, "unknown model family 'own'"),
        (SIZE, "which family"),
        ({**SIZE, "family": "llama", "num_expert": 3}, "unknown key 'num_expert'; did you mean num_experts"),
        ({**SIZE, "family": "llama", "num_experts": 3}, "must be 0 where no layer has experts"),
        ({**SIZE, "family": "llama", "expert_layers": True}, "num_experts must be above 0 where a layer has experts"),
        (
            {
                **SIZE,
                "family": "llama",
                "expert_layers": True,
                "num_experts": 2,
                "experts_per_token": 3,
                "expert_dim": 8,
            },
            r"experts_per_token \(3\) must be at most num_experts \(2\)",
        ),
        ({**SIZE, "family": "llama", "logn_length": 1}, "logn_length must be above 1"),
    ):
        path.write_text(yaml.safe_dump(values))
        with pytest.raises(TritiumError, match=said):
            read_size(path)


# Overrides of a checkpoint's config.json.


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    config = config_from_spec(get_family("qwen3"), get_family("qwen3").spec("0.6B"))
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def test_overrides_have_effect_or_are_refused(qwen3: Path) -> None:
    """Wherever the file has it: transformers 5 writes the base and the scaling into one mapping."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32768}
    assert read_spec(qwen3, {"rope_theta": 300.0}).rope_base == 300.0
    spec = read_spec(qwen3, {"rope_scaling": yarn})
    assert spec.rope_scaling is not None
    assert (spec.rope_scaling.rope_type, spec.rope_base, spec.context_length) == ("yarn", 1e6, 65536)
    (qwen3 / "config.json").write_text(json.dumps(config_from_spec(get_family("qwen3"), spec)))
    assert read_spec(qwen3, {"rope_scaling": None}).rope_scaling is None
    assert read_spec(qwen3, {"rope_scaling": {**yarn, "factor": 4.0}}).context_length == 131_072
    for overrides, said in (
        ({"rope_thta": 3}, "nothing reads the key 'rope_thta'; did you mean rope_theta"),
        ({"context_length": 1000}, "nothing reads the key 'context_length'"),
        ({"rope_parameters.rope_theta": 1.0}, "nothing reads the key"),
        ("x", "overrides: must be a mapping"),
    ):
        with pytest.raises(TritiumError, match=said):
            read_spec(qwen3, overrides)  # type: ignore[arg-type]


def test_neutral_rope_keys_are_no_keys(qwen3: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    more = {"truncate": True, "mscale": None, "mscale_all_dim": None, "attn_factor": 0.7}
    assert read_spec(qwen3, {"rope_scaling": {**yarn, **more}}) == read_spec(qwen3, {"rope_scaling": yarn})
    for key, value in (("truncate", False), ("mscale", 0.7)):
        with pytest.raises(TritiumError, match=f"unknown key '{key}'"):
            read_spec(qwen3, {"rope_scaling": {**yarn, key: value}})
    rotation = {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.5}
    with pytest.raises(TritiumError, match=r"partial_rotary_factor is 0\.5; only 1\.0 is supported"):
        read_spec(qwen3, {"rope_parameters": rotation})


# What was published, word for word where it differs from the rest.

QWEN1_7B = {
    "model_type": "qwen", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "kv_channels": 128,
    "intermediate_size": 22016, "vocab_size": 151936, "seq_length": 8192, "max_position_embeddings": 32768,
    "rotary_emb_base": 10000, "use_dynamic_ntk": True, "use_logn_attn": True, "layer_norm_epsilon": 1e-6,
    "rotary_pct": 1.0, "no_bias": True, "scale_attn_weights": True, "tie_word_embeddings": False, "bf16": False,
    "fp16": False, "fp32": False, "transformers_version": "4.32.0",
}  # fmt: skip
OLDER = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "ffn_hidden_size", "vocab_size": "padded_vocab_size", "max_position_embeddings": "n_positions",
}  # fmt: skip


@pytest.mark.parametrize("older", [False, True])
def test_qwen1_as_it_was_published(older: bool, tmp_path: Path) -> None:
    """The size's YAML, dtype included, by the names of the first uploads too."""
    config = {OLDER.get(key, key) if older else key: value for key, value in QWEN1_7B.items()}
    config |= {"params_dtype": "torch.bfloat16"} if older else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_spec(tmp_path) == get_family("qwen1").spec("7B")


def test_what_is_published_as_pickles_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(oracle.own_config(oracle.CASES[8])))
    with pytest.raises(TritiumError, match=r"has no model\.safetensors .* pickles are not even downloaded"):
        tritium.load(tmp_path, device="cpu")


def test_the_folders_are_the_families() -> None:
    """Would break: a family whose folder has another name is found by neither."""
    for name, family in registry.families().items():
        assert family.folder.name == name
        assert family.default_size is None or family.default_size in family.sizes

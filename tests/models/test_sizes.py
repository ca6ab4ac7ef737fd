"""Every size YAML builds, and counts the parameters that are published or follow from the published shapes."""

import pytest
import torch
from tritium.runtime.decoder import Decoder
from tritium.runtime.hf_config import config_from_spec, spec_from_config
from tritium.runtime.registry import families, get_family
from tritium.runtime.summary import cache_bytes_per_token, model_table, parameter_count
from tritium.runtime.weight_map import WeightMap

# Qwen3: the checkpoints' own sizes in bytes, halved. MobileLLM-R1: the advertised 140M, 359M and 950M, worked out.
PUBLISHED = {
    ("qwen3", "0.6B"): 596_049_920,
    ("qwen3", "1.7B"): 1_720_574_976,
    ("qwen3", "4B"): 4_022_468_096,
    ("qwen3", "8B"): 8_190_735_360,
    ("qwen3", "14B"): 14_768_307_200,
    ("qwen3", "32B"): 32_762_123_264,
    ("mobilellm", "140m"): 140_248_512,
    ("mobilellm", "360m"): 359_431_168,
    ("mobilellm", "950m"): 949_685_760,
}
ALL = [(family.name, size) for family in families().values() for size in family.sizes]


def test_all_promised_sizes_are_there() -> None:
    assert get_family("qwen3").sizes == ["0.6B", "1.7B", "4B", "8B", "14B", "32B"]
    assert [size for size in get_family("mobilellm").sizes if size != "shakespeare"] == [
        "140m", "360m", "950m", "7b", "70b",
    ]  # fmt: skip
    assert set(PUBLISHED) <= set(ALL)


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_parameter_counts_equal_the_published_ones(family: str, size: str) -> None:
    assert parameter_count(get_family(family).spec(size)) == PUBLISHED[family, size]


@pytest.mark.parametrize(("name", "size"), ALL)
def test_every_size_survives_the_way_through_a_config_json(name: str, size: str) -> None:
    """spec -> config.json -> spec is the identity, and the weight map covers every parameter."""
    family = get_family(name)
    spec = family.spec(size)
    assert spec_from_config(family, config_from_spec(family, spec), "test") == spec
    with torch.device("meta"):
        model = Decoder(spec)
    pieces = WeightMap(family, spec, model.named_parameters()).pieces.values()
    assert sum(torch.Size(piece.shape).numel() for piece in pieces) == model.num_parameters()


@pytest.mark.parametrize("name", families())
def test_every_variant_names_a_repository(name: str) -> None:
    family = get_family(name)
    assert family.default_size in family.published
    assert family.default_variant in family.variants
    assert set(family.variants) >= {"base", "instruct", "reasoning", "chat"}
    expected = {"qwen3": "Qwen/Qwen3-1.7B-Base", "mobilellm": "facebook/MobileLLM-R1-950M-base"}
    size = {"qwen3": "1.7B", "mobilellm": "950m"}[name]
    assert family.checkpoint(size, "base") == expected[name]
    assert family.checkpoint(size, "instruct") == expected[name].removesuffix("-Base").removesuffix("-base")


def test_the_table_says_what_the_specs_say() -> None:
    lines = {tuple(line.split()[:2]): line for line in model_table().splitlines()}
    assert "596,049,920" in lines["qwen3", "0.6B"]
    assert "40,960" in lines["qwen3", "0.6B"]
    assert "112 KiB" in lines["qwen3", "0.6B"]  # 28 layers * (K and V) * 8 heads * 128 * 2 bytes
    assert cache_bytes_per_token(get_family("qwen3").spec("0.6B")) == 28 * 2 * 8 * 128 * 2
    assert "random weights only" in lines["mobilellm", "70b"]
    assert set(lines) >= set(ALL)

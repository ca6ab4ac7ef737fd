"""Families and sizes as data: models/<family>/family.yaml and a YAML per size."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import TritiumError, nearest
from .files import read_yaml
from .spec import ModelSpec

MODELS = Path(__file__).resolve().parent.parent / "models"


@dataclass(frozen=True)
class Family:
    """One family.yaml."""

    name: str
    folder: Path
    model_types: tuple[str, ...]  # `model_type` of the checkpoints it reads
    default_size: str
    default_variant: str
    hub: Mapping[str, str]  # variant -> repository pattern
    published: tuple[str, ...]  # sizes that the hub has
    bundled: Mapping[str, str]  # size -> checkpoint folder beside family.yaml
    traits: Mapping[str, Any]
    config: Mapping[str, Any]
    require: Mapping[str, Any]
    export: Mapping[str, Any]
    weights: Mapping[str, Any]
    ignore: tuple[str, ...]

    @property
    def sizes(self) -> list[str]:
        """Size names, smallest model first."""
        names = [path.stem for path in self.folder.glob("*.yaml") if path.name != "family.yaml"]
        return sorted(names, key=lambda name: _matrix_elements(self.spec(name)))

    @property
    def variants(self) -> list[str]:
        return list(self.hub)

    def size_name(self, size: str) -> str:
        """The size as its file is named, whatever case it was asked for in. Raises TritiumError if unknown."""
        for path in self.folder.glob("*.yaml"):
            if path.stem.lower() == size.lower() and path.name != "family.yaml":
                return path.stem
        raise TritiumError(f"{self.name}: unknown size {size!r}; {nearest(size, self.sizes)}")

    def spec(self, size: str) -> ModelSpec:
        path = self.folder / f"{size}.yaml"
        return self.spec_from(read_yaml(path), str(path))

    def spec_from(self, values: Mapping[str, Any], where: str) -> ModelSpec:
        """A spec from a size's values over this family's traits."""
        return ModelSpec.from_dict({"family": self.name, **self.traits, **values}, where)

    def checkpoint(self, size: str, variant: str) -> str:
        """Where a size's weights are: a local folder for a bundled one, else a hub id.

        Raises TritiumError for an unknown variant and for a size without published weights.
        """
        if size in self.bundled:
            return str(self.folder / self.bundled[size])
        if variant not in self.hub:
            raise TritiumError(f"{self.name}: unknown variant {variant!r}; {nearest(variant, self.hub)}")
        if size not in self.published:
            raise TritiumError(
                f"{self.name} {size} has no published weights; load_model(load_config(...), {self.name!r}) builds it "
                f"with random ones (published: {', '.join(self.published)})"
            )
        return self.hub[variant].format(size=size, SIZE=size.upper())


def _matrix_elements(spec: ModelSpec) -> int:
    attention = spec.embedding_dim * (2 * spec.query_dim + 2 * spec.kv_dim)
    return spec.num_layers * (attention + 3 * spec.embedding_dim * spec.hidden_dim)


def read_family(path: Path) -> Family:
    """A Family from its family.yaml."""
    raw = read_yaml(path)
    default = raw.pop("default", {})
    optional: dict[str, Any] = {"bundled": {}, "published": [], "require": {}, "export": {}, "ignore": []}
    names = set(Family.__dataclass_fields__) - {"folder", "default_size", "default_variant"}
    unknown, missing = sorted(set(raw) - names), sorted(names - set(raw) - set(optional))
    if unknown:
        raise TritiumError(f"{path}: unknown key {unknown[0]!r}; {nearest(unknown[0], sorted(names))}")
    if missing or set(default) != {"size", "variant"}:
        raise TritiumError(f"{path}: missing {', '.join(missing) or 'default: {size: ..., variant: ...}'}")
    values = {**optional, **raw}
    for name in ("model_types", "published", "ignore"):
        values[name] = tuple(str(entry) for entry in values[name])
    return Family(
        folder=path.parent, default_size=str(default["size"]), default_variant=str(default["variant"]), **values
    )


@cache
def families() -> dict[str, Family]:
    """Every family in models/, by name."""
    found = [read_family(path) for path in sorted(MODELS.glob("*/family.yaml"))]
    return {family.name: family for family in found}


def get_family(name: str) -> Family:
    """Raises TritiumError for an unknown name, offering the nearest."""
    if name.lower() not in families():
        raise TritiumError(f"unknown model family {name!r}; {nearest(name, families())}")
    return families()[name.lower()]


def family_of_model_type(model_type: str, where: str) -> Family:
    """The family that reads checkpoints of a config.json's `model_type`."""
    known = {kind: family for family in families().values() for kind in family.model_types}
    if not isinstance(model_type, str) or model_type not in known:
        raise TritiumError(f"{where}: unknown model_type {model_type!r}; {nearest(str(model_type), known)}")
    return known[model_type]

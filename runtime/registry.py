"""Families and sizes as data: models/<family>/family.yaml and a YAML per size.

A family.yaml may extend another family's: what it says of `traits`, `config`, `require`, `export` and `weights` is laid
over the other's, an entry of null takes one away (but for traits and exports, of which null is a value), and `ignore`
is the other's where it has none of its own.

A size's YAML holds spec fields, and besides may say `family`, whose rules read its checkpoints where that is not the
folder's own (Qwen3-30B-A3B is read as qwen3_moe), and `hub`, its repositories where the family's pattern does not hold.
"""

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
    default_size: str | None  # None: it has no sizes of its own
    default_variant: str
    hub: Mapping[str, str]  # variant -> repository pattern
    published: tuple[str, ...]  # sizes that the hub has by that pattern
    bundled: Mapping[str, str]  # size -> checkpoint folder beside family.yaml
    traits: Mapping[str, Any]
    config: Mapping[str, Any]
    require: Mapping[str, Any]
    export: Mapping[str, Any]
    weights: Mapping[str, Any]
    ignore: tuple[str, ...]
    optional_prefix: str  # that checkpoints may put before every tensor's name, or not
    tokenizer: Mapping[str, Any] | None  # how to build one where a checkpoint has no tokenizer.json

    @property
    def sizes(self) -> list[str]:
        """Size names, smallest model first."""
        names = [path.stem for path in self.folder.glob("*.yaml") if path.name != "family.yaml"]
        return sorted(names, key=lambda name: (_matrix_elements(self.spec(name)), name))

    def size_name(self, size: str | None) -> str:
        """The size as its file is named, whatever case it was asked for in; None is the default.

        Raises TritiumError if unknown.
        """
        if self.default_size is None:
            others = [family for family in families().values() if family.name != self.name]
            listed = [family.name for family in others if self.name in family.members]
            where = f"; its sizes are listed under {' and '.join(listed)}" if listed else ""
            raise TritiumError(f"{self.name}: has no sizes of its own{where}")
        size = self.default_size if size is None else str(size)
        for path in self.folder.glob("*.yaml"):
            if path.stem.lower() == size.lower() and path.name != "family.yaml":
                return path.stem
        raise TritiumError(f"{self.name}: unknown size {size!r}; {nearest(size, self.sizes)}")

    @property
    def members(self) -> set[str]:
        """The families that this one's sizes are read as, its own name included."""
        return {self.name, *(self.spec(size).family for size in self.sizes)}

    def spec(self, size: str) -> ModelSpec:
        return read_size(self.folder / f"{size}.yaml", self)[0]

    def repositories(self, size: str) -> dict[str, str]:
        """Variant -> hub repository of a size; none where it is not published."""
        hub = read_size(self.folder / f"{size}.yaml", self)[1]
        if hub or size not in self.published:
            return hub
        return {variant: pattern.format(size=size, SIZE=size.upper()) for variant, pattern in self.hub.items()}

    def spec_from(self, values: Mapping[str, Any], where: str) -> ModelSpec:
        """A spec from a size's values over this family's traits."""
        return ModelSpec.from_dict({"family": self.name, **self.traits, **values}, where)

    def checkpoint(self, size: str, variant: str | None = None) -> str:
        """Where a size's weights are: a local folder for a bundled one, else a hub id.

        `variant=None` is the family's default, or where the size does not have that, its first. Raises TritiumError for
        an unknown variant and for a size without published weights.
        """
        if size in self.bundled:
            return str(self.folder / self.bundled[size])
        repositories = self.repositories(size)
        if not repositories:
            sizes = [name for name in self.sizes if self.repositories(name)]
            raise TritiumError(
                f"{self.name} {size} has no published weights; load_model(load_config(...), {self.name!r}) builds it "
                f"with random ones (published: {', '.join(sizes)})"
            )
        if variant is None:
            variant = self.default_variant if self.default_variant in repositories else next(iter(repositories))
        if str(variant) not in repositories:
            raise TritiumError(
                f"{self.name} {size}: unknown variant {variant!r}; {nearest(str(variant), repositories)}"
            )
        return repositories[variant]


def _matrix_elements(spec: ModelSpec) -> int:
    attention = spec.num_layers * spec.embedding_dim * (2 * spec.query_dim + 2 * spec.kv_dim)
    experts = sum(spec.expert_layers)
    widths = (spec.num_layers - experts) * spec.hidden_dim + experts * spec.num_experts * spec.expert_dim
    return attention + 3 * spec.embedding_dim * widths


def read_size(path: Path, family: Family | None = None) -> tuple[ModelSpec, dict[str, str]]:
    """(spec, variant -> hub repository) of a size's YAML. Its family is the one it names, else `family`, else the
    family.yaml beside it. Raises TritiumError.
    """
    values = read_yaml(path)
    hub = values.pop("hub", {})
    if not isinstance(hub, dict) or not all(isinstance(text, str) for pair in hub.items() for text in pair):
        raise TritiumError(f"{path}: hub must be a mapping of variants to repositories, got {hub!r}")
    if "family" in values:
        try:
            family = get_family(str(values.pop("family")))
        except TritiumError as error:
            raise TritiumError(f"{path}: {error}") from None
    elif family is None:
        if not (path.parent / "family.yaml").is_file():
            raise TritiumError(f"{path}: which family? put a family.yaml beside it or a `family` key in it")
        family = read_family(path.parent / "family.yaml")
    return family.spec_from(values, str(path)), hub


_MERGED = ("traits", "config", "require", "export", "weights")
_REMOVABLE = ("config", "require", "weights")  # sections in which null is not a value
_OPTIONAL: dict[str, Any] = {
    "default": {"variant": "base"},
    "hub": {},
    "bundled": {},
    "published": [],
    "require": {},
    "export": {},
    "ignore": [],
    "optional_prefix": "",
    "tokenizer": None,
}


def _read_merged(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A family.yaml with what it extends beneath it."""
    raw = read_yaml(path)
    _check_sections(raw, path)
    if "extends" not in raw:
        return raw
    base = str(raw.pop("extends"))
    files = (path.parent.parent / base / "family.yaml", MODELS / base / "family.yaml")
    beneath = next((file for file in files if file.is_file()), None)
    if beneath is None:
        raise TritiumError(f"{path}: extends the unknown family {base!r}; {nearest(base, _folders())}")
    if beneath in (path, *extending):
        raise TritiumError(f"{path}: extends {base!r}, which extends this family")
    parent = _read_merged(beneath, (*extending, path))
    for section in _MERGED:
        merged = {**parent.get(section, {}), **raw.get(section, {})}
        removed = [key for key, value in merged.items() if value is None and section in _REMOVABLE]
        raw[section] = {key: value for key, value in merged.items() if key not in removed}
    return {"ignore": parent.get("ignore", []), **raw}


def _check_sections(raw: Mapping[str, Any], path: Path) -> None:
    """Raises TritiumError for a section that is not of its kind, or names what there is not."""
    for section in (*_MERGED, "hub", "bundled"):
        if not isinstance(raw.get(section, {}), dict):
            raise TritiumError(f"{path}: {section} must be keys and values, got {raw[section]!r}")
    for section in ("model_types", "published", "ignore"):
        if not isinstance(raw.get(section, []), list):
            raise TritiumError(f"{path}: {section} must be a list, got {raw[section]!r}")
    for section in ("traits", "config"):
        for name in raw.get(section, {}):
            if name not in ModelSpec.__dataclass_fields__:
                known = nearest(str(name), ModelSpec.__dataclass_fields__)
                raise TritiumError(f"{path}: {section}: unknown spec field {name!r}; {known}")
    for key, rule in raw.get("require", {}).items():
        if rule is not None and (not isinstance(rule, dict) or not {"equals", "each"} & set(rule)):
            raise TritiumError(f"{path}: require: {key} must be {{equals: ...}} or {{each: ...}}, got {rule!r}")
    for variant, pattern in raw.get("hub", {}).items():
        try:
            assert pattern.format(size="", SIZE="")
        except (AssertionError, AttributeError, IndexError, KeyError, ValueError):
            message = f"must be a repository, with {{size}} or {{SIZE}} in it, got {pattern!r}"
            raise TritiumError(f"{path}: hub: {variant} {message}") from None


def _folders() -> list[str]:
    return sorted(path.parent.name for path in MODELS.glob("*/family.yaml"))


def read_family(path: Path) -> Family:
    """A Family from its family.yaml."""
    raw = _read_merged(path)
    names = set(Family.__dataclass_fields__) - {"folder", "default_size", "default_variant"} | {"default"}
    unknown, missing = sorted(set(raw) - names), sorted(names - set(raw) - set(_OPTIONAL))
    if unknown:
        raise TritiumError(f"{path}: unknown key {unknown[0]!r}; {nearest(unknown[0], [*sorted(names), 'extends'])}")
    if missing:
        raise TritiumError(f"{path}: missing {', '.join(missing)}")
    values = {**_OPTIONAL, **raw}
    default = values.pop("default")
    if not isinstance(default, dict) or not {"variant"} <= set(default) <= {"size", "variant"}:
        raise TritiumError(f"{path}: default must be {{size: ..., variant: ...}}, got {default!r}")
    for name in ("model_types", "published", "ignore"):
        values[name] = tuple(str(entry) for entry in values[name])
    size = default.get("size")
    return Family(
        folder=path.parent,
        default_size=None if size is None else str(size),
        default_variant=str(default["variant"]),
        **values,
    )


@cache
def families() -> dict[str, Family]:
    """Every family in models/, by name."""
    found = [read_family(path) for path in sorted(MODELS.glob("*/family.yaml"))]
    return {family.name: family for family in found}


def get_family(name: str) -> Family:
    """Raises TritiumError for an unknown name, offering the nearest."""
    if not isinstance(name, str) or name.lower() not in families():
        raise TritiumError(f"unknown model family {name!r}; {nearest(str(name), families())}")
    return families()[name.lower()]


def family_of_model_type(model_type: str, where: str) -> Family:
    """The family that reads checkpoints of a config.json's `model_type`."""
    known = {kind: family for family in families().values() for kind in family.model_types}
    if not isinstance(model_type, str) or model_type not in known:
        raise TritiumError(f"{where}: unknown model_type {model_type!r}; {nearest(str(model_type), known)}")
    return known[model_type]

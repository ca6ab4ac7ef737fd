"""A checkpoint's config.json as a ModelSpec and back, by the `config`, `require` and `export` tables of a family.yaml.

Only the keys that the family lists are read: nothing else in a config.json has any effect. An entry is the key itself
(dots reach into nested mappings) or one converter of a closed list:

    {first_of: [KEY, ...], default: VALUE}   the first key that is there
    {per_layer: KEY, layers: KEY}            a list with one truth value a layer, cut to the number of layers
    {rope_scaling: [KEY, ...]}               the first mapping that names a scaling rule; absent or `default`: none
"""

from collections.abc import Mapping
from typing import Any

from .errors import TritiumError
from .registry import Family
from .rope import RopeScaling
from .spec import ModelSpec

_MISSING = object()


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        config = config.setdefault(part, {})
    config[last] = value


def spec_from_config(family: Family, config: Mapping[str, Any], where: str) -> ModelSpec:
    """Raises TritiumError for a missing key, a wrong type, and a setting that the family does not support."""
    for key, rule in family.require.items():
        _check_required(config, key, rule, where)
    values = {field: _read(config, entry, f"{where}: {field}") for field, entry in family.config.items()}
    return family.spec_from(values, where)


def _check_required(config: Mapping[str, Any], key: str, rule: Mapping[str, Any], where: str) -> None:
    value = _get(config, key)
    if value is _MISSING or value is None:
        value = rule.get("default", _MISSING)
        if value is _MISSING:
            return
    if "unless" in rule:
        reach, length = (_get(config, name) for name in rule["unless"])
        if isinstance(reach, int) and isinstance(length, int) and reach >= length:
            return
    if "each" in rule:
        entries = value if isinstance(value, list) else [value]
        wrong = [entry for entry in entries if entry != rule["each"]]
        if wrong:
            raise TritiumError(f"{where}: {key} has {wrong[0]!r}; only {rule['each']!r} is supported")
    elif value != rule["equals"]:
        raise TritiumError(f"{where}: {key} is {value!r}; only {rule['equals']!r} is supported")


def _read(config: Mapping[str, Any], entry: Any, where: str) -> Any:
    if isinstance(entry, str):
        entry = {"first_of": [entry]}
    if "first_of" in entry:
        for key in entry["first_of"]:
            value = _get(config, key)
            if value is not _MISSING and value is not None:
                return value.removeprefix("torch.") if isinstance(value, str) else value
        if "default" in entry:
            return entry["default"]
        raise TritiumError(f"{where} needs the key {' or '.join(entry['first_of'])}, which is missing")
    if "per_layer" in entry:
        value = _get(config, entry["per_layer"])
        if not isinstance(value, list) or not value:
            raise TritiumError(f"{where}: {entry['per_layer']} must be a list with one entry a layer")
        layers = _get(config, entry["layers"])  # published lists can be longer than the layers
        return [bool(flag) for flag in value[: layers if isinstance(layers, int) else None]]
    for key in entry["rope_scaling"]:
        value = _get(config, key)
        if isinstance(value, Mapping) and value.get("rope_type", value.get("type", "default")) != "default":
            rule = {name: number for name, number in value.items() if name != "rope_theta"}
            return RopeScaling.parse(rule, f"{where} ({key})")
    return None


def config_from_spec(family: Family, spec: ModelSpec) -> dict[str, Any]:
    """The config.json that `spec_from_config` and `transformers` read as this spec."""
    config: dict[str, Any] = {"model_type": family.model_types[0]}
    for key, rule in family.require.items():
        _set(config, key, [rule["each"]] * spec.num_layers if "each" in rule else rule["equals"])
    for field, entry in family.config.items():
        value = spec[field]
        if isinstance(entry, str):
            _set(config, entry, value)
        elif "first_of" in entry:
            _set(config, entry["first_of"][0], value)
        elif "per_layer" in entry:
            _set(config, entry["per_layer"], [int(flag) for flag in value])
        else:
            scaling = {"rope_type": "default"} if value is None else value.as_dict()
            for name, number in scaling.items():
                _set(config, f"{entry['rope_scaling'][0]}.{name}", number)
    for key, value in family.export.items():
        _set(config, key, value)
    again = spec_from_config(family, config, "config.json").as_dict()
    lost = [name for name, value in spec.as_dict().items() if again[name] != value]
    if lost:
        raise TritiumError(f"{family.name}: its config.json cannot express this model's {', '.join(lost)}")
    return config

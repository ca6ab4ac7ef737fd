"""A checkpoint's config.json as a ModelSpec and back, by the `config`, `require` and `export` tables of a family.yaml.

Only the keys that the family lists are read: nothing else in a config.json has any effect. An entry is the key itself
(dots reach into nested mappings) or one converter of a closed list:

    {first_of: [KEY, ...], default: VALUE}      the first key that is there; the default may be a quotient or a product
        names: {THEIRS: OURS, ...}              besides: values that have another name here
        when: KEY                               besides: null unless that key is true
    {negate: KEY, default: VALUE}               the opposite of a truth value
    {quotient: [KEY, KEY OR NUMBER]}            one number over another, where that is whole; a key may be a first_of
    {product: [KEY, KEY OR NUMBER]}
    {per_layer: KEY, layers: KEY}               a list with one truth value a layer, cut to the number of layers
    {sparse: [STEP, DENSE], layers: KEY}        true where a layer's number, from 1, is a multiple of STEP, but for the
                                                layers listed (from 0) in DENSE
    {rope_scaling: [KEY, ...], trained: KEY}    the first mapping that names a scaling rule; absent or `default`: none.
                                                `dynamic` goes by the trained length
    {rule: NAME, trained: KEY, when: KEY}       that scaling rule by the trained length, where the key is true
    {context: KEY, scaling: [KEY, ...]}         a number of positions, or those that such a mapping stretches to
"""

from collections.abc import Iterator, Mapping
from typing import Any

from .errors import TritiumError
from .registry import Family
from .rope import RopeScaling
from .spec import MAX_LAYERS, ModelSpec

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
    entry = _keys(entry)
    if "when" in entry and not _flag(config, entry["when"], where):
        return None
    if "first_of" in entry:
        return _first(config, entry, where)
    if "negate" in entry:
        return not _first(config, {**entry, "first_of": [entry["negate"]]}, where)
    if "quotient" in entry or "product" in entry:
        return _arithmetic(config, entry, where)
    if "per_layer" in entry:
        value = _get(config, entry["per_layer"])
        if not isinstance(value, list) or not value:
            raise TritiumError(f"{where}: {entry['per_layer']} must be a list with one entry a layer")
        layers = _get(config, entry["layers"])  # published lists can be longer than the layers
        return [bool(flag) for flag in value[: layers if isinstance(layers, int) else None]]
    if "sparse" in entry:
        return _sparse(config, entry, where)
    if "rule" in entry:
        trained = _first(config, _keys(entry["trained"]), where)
        return RopeScaling.parse({"rope_type": entry["rule"], _TRAINED: trained}, where)
    if "context" in entry:
        value = _first(config, _keys(entry["context"]), where)
        scaling = _scaling(config, entry["scaling"], entry["context"], where)
        stretched = 0 if scaling is None or not isinstance(value, int) else round(scaling.context)
        return max(value, stretched) if stretched else value
    if set(entry) != {"rope_scaling", "trained"}:
        raise TritiumError(f"{where}: unknown converter {dict(entry)!r}")
    return _scaling(config, entry["rope_scaling"], entry["trained"], where)


_TRAINED = "original_max_position_embeddings"


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = _first(config, {"first_of": [key], "default": False}, where)
    if not isinstance(value, bool):
        raise TritiumError(f"{where}: {key} must be true or false, got {value!r}")
    return value


def _first(config: Mapping[str, Any], entry: Mapping[str, Any], where: str) -> Any:
    for key in entry["first_of"]:
        value = _get(config, key)
        if value is _MISSING or value is None:
            continue
        if "names" in entry:
            if not isinstance(value, str | bool | int) or value not in entry["names"]:
                raise TritiumError(f"{where}: {key} is {value!r}; supported are {', '.join(map(str, entry['names']))}")
            return entry["names"][value]
        return value.removeprefix("torch.") if isinstance(value, str) else value
    if "default" in entry:
        default = entry["default"]
        return _arithmetic(config, default, where) if isinstance(default, Mapping) else default
    raise TritiumError(f"{where} needs the key {' or '.join(entry['first_of'])}, which is missing")


def _keys(entry: Any) -> Mapping[str, Any]:
    """A key by itself is the first of one."""
    if not isinstance(entry, str | Mapping):
        raise TritiumError(f"config: must be a key or a converter, got {entry!r}")
    return {"first_of": [entry]} if isinstance(entry, str) else entry


def _arithmetic(config: Mapping[str, Any], entry: Mapping[str, Any], where: str) -> int:
    (name, terms) = next(iter(entry.items()))
    left, right = (term if isinstance(term, int) else _first(config, _keys(term), where) for term in terms)
    names = [term if isinstance(term, str | int) else " or ".join(term["first_of"]) for term in terms]
    for term, value in zip(names, (left, right), strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise TritiumError(f"{where}: {term} must be a whole number above 0, got {value!r}")
    if name == "product":
        return left * right
    if left % right:
        other = names[1] if isinstance(names[1], int) else f"{names[1]} ({right})"
        raise TritiumError(f"{where}: {names[0]} ({left}) must be a multiple of {other}")
    return left // right


def _sparse(config: Mapping[str, Any], entry: Mapping[str, Any], where: str) -> list[bool]:
    step_key, dense_key = entry["sparse"]
    layers, step, dense = (
        _first(config, {"first_of": [key], "default": default}, where)
        for key, default in ((entry["layers"], 0), (step_key, 1), (dense_key, []))
    )
    numbers = all(isinstance(value, int) for value in (layers, step))
    if not numbers or step < 1 or not isinstance(dense, list) or layers > MAX_LAYERS:
        raise TritiumError(f"{where}: {step_key} must be 1 or more and {dense_key} a list of layers")
    return [(layer + 1) % step == 0 and layer not in dense for layer in range(layers)]


def _scaling(config: Mapping[str, Any], keys: list[str], trained: str, where: str) -> RopeScaling | None:
    for key in keys:
        value = _get(config, key)
        if not isinstance(value, Mapping):
            continue
        rope_type = value.get("rope_type", value.get("type", "default"))
        if rope_type != "default":
            beside = ("rope_theta", "partial_rotary_factor")  # read, or required, by themselves
            rule = {name: number for name, number in value.items() if name not in beside}
            if rope_type == "dynamic":
                rule[_TRAINED] = _first(config, _keys(trained), where)
            return RopeScaling.parse(rule, f"{where} ({key})")
    return None


def keys_read(family: Family) -> set[str]:
    """The keys of a config.json, without what is nested in them, that the family reads or requires something of."""
    words = [text for entry in family.config.values() for text in _texts(entry)]
    return {word.partition(".")[0] for word in (*words, *family.require)}


def _texts(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, list):
        for part in entry:
            yield from _texts(part)
    elif isinstance(entry, Mapping):
        for name, part in entry.items():
            if name not in ("default", "names", "rule"):
                yield from _texts(part)


def config_from_spec(family: Family, spec: ModelSpec) -> dict[str, Any]:
    """The config.json that `spec_from_config` and `transformers` read as this spec."""
    config: dict[str, Any] = {"model_type": family.model_types[0]}
    for key, rule in family.require.items():
        _set(config, key, [rule["each"]] * spec.num_layers if "each" in rule else rule["equals"])
    for field, entry in family.config.items():
        for key, value in _written(_keys(entry), spec[field], spec):
            _set(config, key, value)
    for key, value in family.export.items():
        _set(config, key, value)
    lost = []
    try:
        again = spec_from_config(family, config, "config.json").as_dict()
        # Dropout is how a model is trained, not what it computes: no config.json need hold it.
        lost = [name for name, value in spec.as_dict().items() if again[name] != value and name != "dropout"]
    except TritiumError as error:
        lost = [str(error)]
    if lost:
        raise TritiumError(
            f"{family.name}: its config.json cannot express this model's {', '.join(lost)}; save it with "
            f'layout="tritium"'
        )
    return config


def _written(entry: Mapping[str, Any], value: Any, spec: ModelSpec) -> Iterator[tuple[str, Any]]:
    """The keys of a config.json, with their values, that `_read` reads as `value`."""
    if "when" in entry:
        yield entry["when"], value is not None
        if value is None:
            return
    if "first_of" in entry:
        if "names" in entry:
            value = next((theirs for theirs, ours in entry["names"].items() if ours == value), value)
        yield entry["first_of"][0], value
    elif "negate" in entry:
        yield entry["negate"], not value
    elif "quotient" in entry:
        key, divisor = entry["quotient"]
        if isinstance(divisor, int):  # what is one key over another is written by the fields of those
            yield _keys(key)["first_of"][0], value * divisor
    elif "per_layer" in entry:
        yield entry["per_layer"], [int(flag) for flag in value]
    elif "sparse" in entry:
        step, dense = entry["sparse"]
        yield from ((step, 1), (dense, [layer for layer, sparse in enumerate(value) if not sparse]))
    elif "rule" in entry:
        yield entry["trained"], round(dict(value.values)[_TRAINED])
    elif "context" in entry:
        scaling = spec.rope_scaling
        if scaling is not None and scaling.rope_type == "dynamic":  # transformers calls the trained length so
            value = round(dict(scaling.values)[_TRAINED] or 0)
        yield entry["context"], value
    else:
        for name, number in ({"rope_type": "default"} if value is None else value.as_dict()).items():
            yield f"{entry['rope_scaling'][0]}.{name}", number

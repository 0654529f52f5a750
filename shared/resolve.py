"""From preset, file and command line to one Config, and where each value came from.

Order: preset (or the config ingest left in the work folder), CONFIG file, MODEL, SET. Later wins.
"""

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shared.config import Config, leaf_keys
from shared.errors import ConfigError
from shared.files import write_json
from shared.models import ModelSpec, model_spec
from shared.spellings import respelled
from shared.weights import with_parts

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "16gb"
# names the training guide gives its presets
PRESET_ALIASES = {"lora": "16gb", "lora 8gb": "8gb", "finetune": "24gb-finetune", "embedding": "embedding"}
ASSIGNMENT = r"\s+(?=[A-Za-z_][\w.]*=)"  # spaces before the next key=; values may hold spaces

# what ingest alone obeys: given to encode or train it would change nothing
INGESTED = re.compile(
    r"(caption|gates)\..+|video_config\.(frame_sample_strategy|stretch|max_duration|min_resolution)|windows_per_clip"
    r"|crop|caption_prefix|concepts|prior\.folders|validation\.(fraction|folder)"
)


@dataclass(frozen=True)
class Resolved:
    """A complete config, the source of each dotted key ('preset 16gb', 'SET', ...), and remarks for the user."""

    config: Config
    sources: dict[str, str]
    remarks: tuple[str, ...] = ()

    @property
    def spec(self) -> ModelSpec:
        """Facts of the model the config names."""
        config = self.config
        return with_parts(model_spec(config.base_model_name), config.vae.model_name, config.text_encoder.model_name)


@dataclass(frozen=True)
class Choice:
    """What the user said on the command line; every field is a make variable."""

    preset: str | None = None
    config: Path | None = None
    model: str | None = None
    set: str = ""


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def preset_path(name: str) -> Path:
    """File of a preset, by name or by the guide's name; raises ConfigError with the nearest name."""
    plain = name.removesuffix(".json").removeprefix("#").strip()
    key = plain.lower().removeprefix("wan 2.2").strip()
    plain = PRESET_ALIASES.get(key, plain)
    if plain not in preset_names():
        near = difflib.get_close_matches(plain, preset_names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"PRESET={name}: no such preset; {hint}there are: {', '.join(preset_names())}")
    return PRESETS / f"{plain}.json"


def resolve(choice: Choice, work_config: Path | None = None) -> Resolved:
    """Build the config of a command. `work_config`: used in place of the default preset when no PRESET is given."""
    layers: list[tuple[str, dict[str, Any]]] = []
    if choice.preset is None and work_config is not None and work_config.is_file():
        layers.append((str(work_config), read_layer(work_config)))
    else:
        path = preset_path(choice.preset or DEFAULT_PRESET)
        layers.append((f"preset {path.stem}", read_layer(path)))
        layers += ingested_model(work_config)
    if choice.config is not None:
        layers.append((f"CONFIG {choice.config}", read_layer(choice.config)))
    if choice.model is not None:
        layers.append(("MODEL", {"base_model_name": choice.model}))
    layers.append(("SET", parse_set(choice.set)))
    values: dict[str, Any] = {}
    sources = dict.fromkeys(leaf_keys(), "default")
    for name, written in layers:
        layer = respelled(written, name)
        merge(values, layer)
        sources |= {key: name for key in leaves_of(layer) if key in sources}
        if work_config is not None and name == str(work_config):
            sources |= remembered(work_config, layer)
    return Resolved(validate(values, sources), sources)


def save_config(path: Path, resolved: Resolved) -> None:
    """Write a complete config, and beside it where each value came from, so that later commands can say."""
    values = to_json(resolved.config)
    write_json(path, values)
    told = {key: source.removesuffix(f", by way of {path}") for key, source in resolved.sources.items()}
    write_json(origins_of(path), {key: {"source": told[key], "value": value_in(values, key)} for key in told})


def origins_of(path: Path) -> Path:
    """File beside a saved config that tells where its values came from."""
    return path.with_name(f"{path.stem}_sources.json")


def remembered(path: Path, layer: dict[str, Any]) -> dict[str, str]:
    """Source of each value of a saved config that is still what was saved; what was edited has the file as source."""
    if not origins_of(path).is_file():
        return {}
    known = read_layer(origins_of(path))
    same = [key for key in leaves_of(layer) if key in known and value_in(layer, key) == known[key]["value"]]
    return {key: f"{known[key]['source']}, by way of {path}" for key in same}


def value_in(layer: dict[str, Any], key: str) -> Any:
    """Value of a dotted key in plain values; None where there is none."""
    value: Any = layer
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def ingested_model(work_config: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """A preset chosen after ingest keeps the model that was ingested for; MODEL, CONFIG and SET still win."""
    if work_config is None or not work_config.is_file():
        return []
    name = read_layer(work_config).get("base_model_name")
    return [(str(work_config), {"base_model_name": name})] if name else []


def read_layer(path: Path) -> dict[str, Any]:
    """Parse one JSON config file; raises ConfigError when it is missing, not JSON or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"CONFIG={path}: no such file; give the path of a JSON file of settings") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); mend it, or remove it and start again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a config is a JSON object {{...}}, not {type(value).__name__}")
    return value


def parse_set(text: str) -> dict[str, Any]:
    """'batch_size=1 video_config.max_frames=9' -> nested dict; values are JSON, else plain text."""
    values: dict[str, Any] = {}
    for part in re.split(ASSIGNMENT, text.strip()) if text.strip() else ():
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise ConfigError(f'SET: {part!r} is not key=value, as in SET="batch_size=1 seed=3"')
        if key != key.strip():
            raise ConfigError(f"SET: {part!r}: write key=value without spaces around =")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        merge(values, nest(key, parsed))
    return values


def nest(key: str, value: Any) -> dict[str, Any]:
    """('a.b', 1) -> {'a': {'b': 1}}."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


def merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    """Overlay `above` on `below` in place; objects merge, everything else is replaced."""
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            merge(below[key], value)
        else:
            below[key] = json.loads(json.dumps(value))


def leaves_of(layer: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys a layer sets; a dict-valued setting counts as one key too."""
    keys: list[str] = []
    for name, value in layer.items():
        keys.append(prefix + name)
        if isinstance(value, dict):
            keys += leaves_of(value, f"{prefix}{name}.")
    return keys


def validate(values: dict[str, Any], sources: dict[str, str]) -> Config:
    """Config from plain values; the first mistake becomes one ConfigError that names key, value and source."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        key = next(
            (".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in sources), ".".join(path)
        )
        where = sources.get(key, "default")
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{unknown_key('.'.join(path))} (from {where})") from None
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{key}: {message} (value {first['input']!r}, from {where})") from None


def unknown_key(key: str) -> str:
    """One line naming the nearest known key: same last word in another section, else nearest spelling."""
    last = key.rpartition(".")[2]
    known = leaf_keys()
    near = [other for other in known if other.rpartition(".")[2] == last]
    near += difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"{key}: unknown key" + (f", did you mean {near[0]}?" if near else "; known keys are in the README")


def value_at(config: Config, key: str) -> Any:
    """Value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def refuse_late(resolved: Resolved, work_config: Path) -> None:
    """Raise ConfigError for a setting of CONFIG or SET that comes too late: the clips were made with another value."""
    if not work_config.is_file():
        return
    asked, made = to_json(resolved.config), read_layer(work_config)
    for key, source in resolved.sources.items():
        late = INGESTED.fullmatch(key) and (source == "SET" or source.startswith("CONFIG "))
        if late and ", by way of " not in source and value_in(asked, key) != value_in(made, key):
            raise ConfigError(
                f"{key}={json.dumps(value_in(asked, key))} (from {source}): ingest alone obeys it, and made the clips "
                f"with {json.dumps(value_in(made, key))}; give it to make ingest, then run make encode, or leave it out"
            )


def to_json(config: Config) -> dict[str, Any]:
    """Plain values of a config, complete, as they are written beside each output."""
    return dict(config.model_dump(mode="json"))

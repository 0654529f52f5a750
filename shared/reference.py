"""The configuration reference, generated from the schema: python -m shared.reference > shared/CONFIG.md"""

import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from shared.config import Config, leaf_keys

HEAD = """# Settings

Every key of a config, generated from `shared/config.py` by `python -m shared.reference > shared/CONFIG.md`. Give a key
in a JSON file (`CONFIG=my.json`, sections as objects) or on the command line (`SET="lora_rank=16 vae.tiling=true"`).
Defaults are the schema's; a preset in `shared/presets/` sets all keys, and `make explain PRESET=...` prints them with
the source of each. The spellings of OneTrainer's configs are read too (`shared/spellings.py`).
"""
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
HUGE = 2**63  # a bound that only computers meet


def reference() -> str:
    """The whole Markdown file."""
    schema = Config.model_json_schema()
    sections = [HEAD, *table("General", Config, schema, "")]
    for name, field in Config.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            doc = (nested.__doc__ or "").strip().split("\n\n")[0]
            sections += [*table(f"{name}: {doc.rstrip('.')}", nested, schema, f"{name}.")]
    return "\n".join(sections) + "\n"


def table(title: str, model: type[BaseModel], schema: dict[str, Any], prefix: str) -> Iterator[str]:
    """One section: a row per key that is no section itself."""
    yield f"## {title}\n\n| key | values | default | meaning |\n|---|---|---|---|"
    properties = schema["$defs"][model.__name__]["properties"] if prefix else schema["properties"]
    leaves, defaults = set(leaf_keys()), model().model_dump(mode="json")
    for name, entry in properties.items():
        key = prefix + name
        if key in leaves:
            meaning = cell(entry.get("description", ""))
            yield f"| `{key}` | {cell(values(entry, schema))} | {default(defaults[name])} | {meaning} |"
    yield ""


def values(entry: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a key may be, in words."""
    if "$ref" in entry:
        return "object"
    if "anyOf" in entry:
        return ", ".join(values(item, schema) for item in entry["anyOf"])
    if "enum" in entry or "const" in entry:
        return ", ".join(str(item) for item in entry.get("enum", [entry.get("const")]))
    if entry.get("type") == "array":
        return f"list of {values(entry['items'], schema)}"
    if entry.get("type") == "object":
        return "object of objects by name"
    bounds = [f"{sign} {entry[key]:g}" for key, sign in BOUNDS.items() if key in entry and abs(entry[key]) < HUGE]
    return " ".join([TYPES[entry["type"]], *bounds])


def default(value: Any) -> str:
    """A default as JSON, which a reader may paste."""
    return "`" + json.dumps(value).replace("|", "\\|") + "`"


def cell(text: str) -> str:
    """Text that neither ends a table's cell nor is taken for HTML."""
    return re.sub(r"<(?=[a-z])", "&lt;", text.replace("|", "\\|"))


if __name__ == "__main__":
    print(reference(), end="")

"""The JSON schema of a script's config files, from which an editor completes, explains and checks their fields.

    python -m difftrain_utils.config.schema

writes configs/schema.json anew, which the configs name in their first line. It knows names, types and choices; ranges,
and what has to fit between fields, `difftrain validate-config` checks.
"""

import dataclasses
import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from difftrain_utils.config.audio_data import AudioSourceConfig
from difftrain_utils.config.config import RENAMED, Config
from difftrain_utils.config.data import SourceConfig
from difftrain_utils.config.few_step import FewStepConfig
from difftrain_utils.config.help import NESTED, Field, describe, sections
from difftrain_utils.config.pairs import PairSourceConfig
from difftrain_utils.config.preference import PreferenceConfig
from difftrain_utils.config.text import TextConfig
from difftrain_utils.config.text_data import TextSourceConfig
from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.config.video_data import VideoSourceConfig
from difftrain_utils.files import write_file

FILES = {
    "schema.json": TextToImageConfig,
    "schema_few_step.json": FewStepConfig,
    "schema_preference.json": PreferenceConfig,
    "schema_text.json": TextConfig,
    "schema_video.json": TextToVideoConfig,
    "schema_audio.json": TextToAudioConfig,
}
TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}
SOURCES = (SourceConfig, PairSourceConfig, TextSourceConfig, VideoSourceConfig, AudioSourceConfig)
OBJECTS = {cls: name for name, cls in NESTED.items()} | dict.fromkeys(SOURCES, "data.sources")


def config_schema(config_class: type[Config]) -> dict[str, Any]:
    """The JSON schema (draft 7, which editors know best) of a YAML file with some or all fields of the config.

    No field is required: several files may make up one config, and the command line adds to it.
    """
    described = sections(config_class)
    properties = {name: _object(*described[name]) for name in described if "." not in name}
    for old, new in RENAMED.items():
        section, name = old.split(".")
        if section in properties:
            properties[section]["properties"][name] = {"deprecated": True, "description": f"Called {new} now."}
    data = next(section.type for section in dataclasses.fields(config_class) if section.name == "data")
    definitions = {OBJECTS[cls]: _object(*describe(OBJECTS[cls], cls)) for cls in (*NESTED.values(), data.SOURCE)}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": " ".join((config_class.__doc__ or "").split()),
        **_closed(properties),
        "definitions": definitions,
    }


def _object(text: str, fields: list[Field]) -> dict[str, Any]:
    return {"description": text, **_closed({field.name.rpartition(".")[2]: _field(field) for field in fields})}


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _field(field: Field) -> dict[str, Any]:
    schema = _kind(field.kind) | {"description": field.text}
    return schema if field.default in (None, dataclasses.MISSING) else schema | {"default": field.default}


def _kind(kind: Any) -> dict[str, Any]:
    """The schema of a type that a field of a config has."""
    if kind in TYPES:
        return {"type": TYPES[kind]}
    if kind in OBJECTS:
        return {"$ref": f"#/definitions/{OBJECTS[kind]}"}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return {"anyOf": [_kind(argument) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": _kind(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _kind(arguments[1])}
    if kind is Any:
        return {}
    raise TypeError(f"no JSON schema for a field of type {kind}")


def to_json(config_class: type[Config]) -> str:
    """The schema as it is in the file."""
    return json.dumps(config_schema(config_class), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, config_class in FILES.items():
        write_file(Path("configs") / name, to_json(config_class))

"""Reads the settings of a run: a preset, then a YAML file, then NAME=VALUE."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from panfpn_fast._errors import UserError, one_line, similar
from panfpn_fast.models.config import PanopticFPNConfig
from panfpn_fast.training.config import TrainConfig, get_train_preset

_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "a list of whole numbers, such as [640,800]",
    list[str]: "a list of names, such as [sky,road]",
}
_EMPTY: dict[Any, Any] = {str: "", list[int]: [], list[str]: []}
"""Values of settings that may be empty, by their type."""


def read_settings(preset: str | TrainConfig, config: Path | None, settings: list[str]) -> TrainConfig:
    """Merges a preset, a YAML file and NAME=VALUE settings.

    A text or a list without a value (`init=` on the command line, `init:` in the file) becomes empty.

    Args:
        preset: A name for `get_train_preset`, or settings, such as those of a run that continues.
        config: The YAML file, or None.
        settings: Texts NAME=VALUE; NAME is a field of `TrainConfig`, such as "solver.steps", and VALUE is YAML.

    Raises:
        UserError: If the file cannot be read, a setting does not exist or has an invalid value, or omegaconf is not
            installed. The message names the setting.
    """
    values = [] if config is None else list(_flat(_read_yaml(config), f"{config}: "))
    for setting in settings:
        values += _parse(setting)
    return _merge(get_train_preset(preset) if isinstance(preset, str) else preset, values)


def settings_of_run(path: Path) -> TrainConfig:
    """Reads the settings of an earlier run.

    Args:
        path: Its `config.json`. Settings that it lacks, because they are newer, have their defaults.

    Raises:
        UserError: If the file cannot be read, or has an unknown setting or an invalid value. The message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"resume: cannot read the settings of the run in {path}: {one_line(error):.80}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"resume: {path}: expected settings by name, got {content!r:.40}")
    content = {name: value for name, value in content.items() if (name, value) != ("model", {})}
    return _merge(TrainConfig(), _flat(content, f"{path}: "))


def _merge(base: TrainConfig, values: Iterable[tuple[str, Any, str]]) -> TrainConfig:
    """Returns checked settings in which values, with their names and where they were read, replace those of `base`."""
    omegaconf = _omegaconf()
    merged = omegaconf.OmegaConf.structured(base)
    for name, value, where in values:
        _set(merged, name, value, where)
    try:
        result: TrainConfig = omegaconf.OmegaConf.to_object(merged)  # type: ignore[assignment]
    except omegaconf.errors.OmegaConfBaseException as error:  # of ${...}
        raise UserError(f"{error.full_key}: {error.msg}") from error
    result.check()
    return result


def _omegaconf() -> Any:
    try:
        import omegaconf
    except ImportError as error:
        raise UserError(
            f'{error}. Training needs it: run pip install ".[train]" in the checkout of panfpn_fast'
        ) from error
    return omegaconf


def _read_yaml(path: Path) -> Mapping[str, Any]:
    """Returns the content of a YAML file; an empty file has no settings."""
    omegaconf = _omegaconf()
    try:
        content: Any = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(path), resolve=False)
    except _yaml_errors() as error:
        raise UserError(f"--config: cannot read {path} as YAML: {_short(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config: {path}: expected settings, lines 'NAME: VALUE', got {content!r:.40}")
    return content  # type: ignore[no-any-return]


def _yaml_errors() -> tuple[type[Exception], ...]:
    """Returns the errors of files that cannot be read, and of text that is not YAML or that OmegaConf does not take."""
    import yaml  # type: ignore[import-untyped]
    from omegaconf.errors import OmegaConfBaseException

    return (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException)


def _short(error: Exception) -> str:
    """Returns where YAML is damaged, without the excerpt that the parser adds."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return one_line(error) if mark is None else f"line {mark.line + 1}: {problem}"


def _parse(setting: str) -> Iterator[tuple[str, Any, str]]:
    """Yields the names and values in one argument of the command line."""
    omegaconf = _omegaconf()
    name, equals, value = setting.partition("=")
    if not equals or not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"settings: expected NAME=VALUE, such as solver.steps=100, got {setting!r}")
    try:
        content = omegaconf.OmegaConf.from_dotlist([setting])
    except _yaml_errors() as error:
        raise UserError(f"{name}: expected a value in YAML, got {value!r}: {_short(error)}") from error
    yield from _flat(omegaconf.OmegaConf.to_container(content, resolve=False), "")  # type: ignore[arg-type]


def _flat(content: Any, where: str, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields the settings in nested dictionaries: the name with dots, the value, and where it was read."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and _type_of(name, where) is dict:
            yield from _flat(value, where, f"{name}.")
        else:
            yield name, value, where


def _type_of(name: str, where: str) -> Any:
    """Returns the type of a setting: a key of `_EXPECTED`, or Any for a field of the network's settings.

    Raises:
        UserError: If there is no such setting.
    """
    kind: Any = TrainConfig
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if kind is dict:  # `model`: its values are checked when the network is made
            if part in PanopticFPNConfig.__dataclass_fields__ and depth == len(parts) - 1:
                return Any
            break
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in hints:
            break
        kind = hints[part]
        if get_origin(kind) is dict:
            kind = dict
    else:
        return dict if dataclasses.is_dataclass(kind) else kind
    raise UserError(f"{where}{name}: no such setting; similar ones: {similar(name, _names())}")


def _names() -> list[str]:
    """Returns the names of all settings."""
    found = [f"model.{name}" for name in PanopticFPNConfig.__dataclass_fields__]
    for name, kind in get_type_hints(TrainConfig).items():
        inner = list(get_type_hints(kind)) if dataclasses.is_dataclass(kind) else []
        found += [f"{name}.{field}" for field in inner] or [name]
    return found


def _set(merged: Any, name: str, value: Any, where: str) -> None:
    """Replaces one setting."""
    omegaconf = _omegaconf()
    kind = _type_of(name, where)
    if value is None and kind in _EMPTY:
        value = _EMPTY[kind]
    if kind is dict:
        field = next(one for one in _names() if one.startswith(f"{name}."))
        got = "nothing" if value is None else f"{value!r:.60}"
        raise UserError(f"{where}{name}: expected a field and its value, such as {field}, got {got}")
    if value is None:
        expected = _EXPECTED.get(kind, "a value")
        raise UserError(f"{where}{name}: expected {expected}, got nothing; leave it out for the default")
    try:
        omegaconf.OmegaConf.update(merged, name, value, merge=False, force_add=kind is Any)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise UserError(f"{where}{name}: expected {_EXPECTED[kind]}, got {value!r:.60}") from error

"""From YAML files and key=value arguments to a RunConfig, with the origin of every key. The only user of OmegaConf.

Later wins: defaults, parents named by `extends`, files from left to right, key=value. Paths in values are relative to
the current folder, paths in `extends` to the file that names them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdtrain.config.keys import MUST_BE_SET, Key, all_keys, expected
from kdtrain.config.problems import DEFAULT, Problem, format_problems
from kdtrain.config.schema import RunConfig
from kdtrain.config.source import COMMAND_LINE, Dumper, Setting, read_words
from kdtrain.errors import ConfigError

LAUNCHER_ARGUMENTS = ("--local_rank", "--local-rank", "--deepspeed", "--deepspeed_config")
"""What launchers append to a script's own arguments, as `--local_rank=3` or `--local-rank 3`."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and, for every dotted key, "file.yaml:12", "command line" or "default"."""

    config: RunConfig
    origins: dict[str, str]


def drop_launcher_arguments(argv: Sequence[str]) -> list[str]:
    """`argv` without what launchers append."""
    kept: list[str] = []
    takes_value = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if takes_value and not word.startswith("-") and not equals and not word.endswith((".yaml", ".yml")):
            takes_value = False
        elif name in LAUNCHER_ARGUMENTS:
            takes_value = not equals
        else:
            takes_value = False
            kept.append(word)
    return kept


def load_run(argv: Sequence[str]) -> Loaded:
    """`CONFIG.yaml [MORE.yaml ...] [key=value ...]` -> Loaded. Raises ConfigError listing every problem at once."""
    known = all_keys()
    problems: list[Problem] = []
    settings = read_words(drop_launcher_arguments(argv), known, problems)
    tree = OmegaConf.structured(RunConfig)
    origins = {name: DEFAULT for name, key in known.items() if not key.section}
    refused, unset = _apply(settings, tree, known, origins, problems)
    # if no file could be read, every setting is missing: these problems would only hide that one
    if not problems or any(setting.origin != COMMAND_LINE for setting in settings):
        for name in (name for name in known if name in unset - refused):
            problems.append(Problem(name, MUST_BE_SET, "has no default and must be set", f"set it, e.g. {name}=..."))
    _resolve(tree, known, origins, refused | unset, problems)
    if problems:
        raise ConfigError(format_problems(problems, origins))
    config = OmegaConf.to_object(tree)
    assert isinstance(config, RunConfig)
    return Loaded(config, origins)


def _apply(
    settings: Sequence[Setting],
    tree: DictConfig,
    known: dict[str, Key],
    origins: dict[str, str],
    problems: list[Problem],
) -> tuple[set[str], set[str]]:
    """Write the settings into `tree` and `origins`. Returns the keys that were refused, and those left at ???."""
    refused: set[str] = set()
    placeholders = {name for name, key in known.items() if key.default == MUST_BE_SET}
    for setting in settings:
        key = known.get(setting.key)
        placeholders.discard(setting.key)
        if setting.value == MUST_BE_SET:
            placeholders.add(setting.key)
            origins[setting.key] = setting.origin
            continue
        try:
            value = setting.value if key is None else _exact(setting.value, key.hint)
            OmegaConf.update(tree, setting.key, value, merge=False)
        except (OmegaConfBaseException, _WrongType, OverflowError) as error:
            hint = Any if key is None else key.hint
            problems.append(_bad_value(setting.key, setting.value, hint, setting.origin, error))
            refused.add(setting.key)
            continue
        origins[setting.key] = setting.origin
        if key is None:  # a member of a free-form mapping
            origins[setting.key.rpartition(".")[0]] = setting.origin
    return refused, placeholders


class _WrongType(ValueError):
    """A value that OmegaConf would convert and a reader would not."""


def _exact(value: Any, hint: Any) -> Any:
    """`value`, with 2e9 made an integer where one is expected. Raises _WrongType where 0 or 1 stand for a boolean."""
    members = get_args(hint) or (hint,)
    choices = members if get_origin(hint) is Literal else ()
    if isinstance(value, int) and not isinstance(value, bool) and bool in members:
        raise _WrongType
    integral = int in members or any(isinstance(choice, int) for choice in choices)
    if isinstance(value, float) and integral and float not in members and value.is_integer():
        return int(value)
    return value


def _bad_value(key: str, value: Any, hint: Any, origin: str, error: Exception) -> Problem:
    reason = str(error).strip().splitlines()
    if reason and "interpolation" in str(error).lower():
        return Problem(key, value, f"cannot be resolved: {reason[0]}", "write ${oc.env:NAME} or ${section.key}", origin)
    listed = [part for part in (hint, *get_args(hint)) if get_origin(part) in (list, tuple)]
    as_list = f"write it as a list: {key}: [...], or {key}=[...] on the command line"
    example = as_list if listed and not isinstance(value, list) else None
    return Problem(key, value, f"is not {expected(hint)}", example or f"--help {key} explains it", origin)


def _resolve(
    tree: DictConfig, known: dict[str, Key], origins: dict[str, str], settled: set[str], problems: list[Problem]
) -> None:
    """Replace ${...} by values; the problems of `settled` keys have been reported already."""
    for name, key in known.items():
        if key.section or name in settled:
            continue
        try:
            value = OmegaConf.select(tree, name)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            elif key.is_list and isinstance(value, str):
                raise _WrongType  # OmegaConf takes any text with ${ in it for a list to come
            exact = value if key.is_free_form else _exact(value, key.hint)
            OmegaConf.update(tree, name, _escaped(exact), merge=False)
        except (OmegaConfBaseException, _WrongType, OverflowError) as error:
            problems.append(_unresolved(name, _raw(tree, name), key, origins[name], error))


def _raw(tree: DictConfig, name: str) -> Any:
    """The value as written, ${...} included."""
    parent, _, leaf = name.rpartition(".")
    return OmegaConf.to_container(OmegaConf.select(tree, parent), resolve=False).get(leaf)  # type: ignore[union-attr]


def _unresolved(name: str, raw: Any, key: Key, origin: str, error: Exception) -> Problem:
    variable = re.search(r"Environment variable '(.*?)' not found", str(error))
    if variable:
        why = f"needs the environment variable {variable[1]}, which is not set"
        return Problem(name, raw, why, f"export {variable[1]}=..., or set {name}=... here", origin)
    if "${" not in str(raw):
        return _bad_value(name, raw, key.hint, origin, error)
    reason = "".join(str(error).strip().splitlines()[:1])
    if isinstance(error, _WrongType) or any(
        words in reason for words in ("could not be converted", "Invalid value", "not a valid")
    ):
        why = f"stands for something that is not {expected(key.hint)}"
    else:
        why = f"cannot be resolved: {reason}"
    return Problem(name, raw, why, "write ${oc.env:NAME} or ${section.key}", origin)


def as_dict(cfg: RunConfig) -> dict[str, Any]:
    """The configuration as plain nested values that JSON can hold (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(cfg)))
    return plain


def to_yaml(cfg: RunConfig) -> str:
    """YAML that `load_run` loads back to an equal object."""
    return "".join(f"{line}\n" for _, line in yaml_lines(cfg))


def yaml_lines(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """(dotted key, line of YAML): one line per section and per setting, in schema order."""
    return _lines(cfg, "", 0)


def _lines(section: Any, prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    for field in fields(section):
        value, key, indent = getattr(section, field.name), f"{prefix}{field.name}", "  " * depth
        if is_dataclass(value):
            yield key, f"{indent}{field.name}:{'' if fields(value) else ' {}'}"
            yield from _lines(value, f"{key}.", depth + 1)
        else:
            yield key, f"{indent}{field.name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    text = yaml.dump(
        _escaped(value), Dumper=Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _escaped(value: Any) -> Any:
    """`value` with a literal ${ protected from being resolved again."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", value)
    if isinstance(value, (list, tuple)):
        return [_escaped(item) for item in value]
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return value


def config_hash(cfg: RunConfig) -> str:
    """sha256 of the resolved configuration, hexadecimal; equal for equal configurations, in any process."""
    return hashlib.sha256(json.dumps(asdict(cfg), sort_keys=True).encode()).hexdigest()

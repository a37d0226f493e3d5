"""From YAML files and key=value words to a RunConfig, with the origin of every key. The only user of OmegaConf.

Later wins: defaults, parents named by `extends`, files from left to right, key=value. Paths in values are relative to
the current folder, paths in `extends` to the file that names them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdtrain.config.problems import Problem, format_problems
from kdtrain.config.schema import RunConfig
from kdtrain.errors import ConfigError

COMMAND_LINE = "command line"
OPAQUE = ("zero.extra",)
"""Settings that are free-form mappings: taken whole."""
LAUNCHER_ARGUMENTS = ("--local_rank", "--local-rank", "--deepspeed", "--deepspeed_config")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and, for every dotted key that was set, "file.yaml:12" or "command line"."""

    config: RunConfig
    origins: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Setting:
    key: str
    value: Any
    origin: str


def drop_launcher_arguments(argv: Sequence[str]) -> list[str]:
    """`argv` without what launchers append (`--local_rank=3`, `--local-rank 3`)."""
    kept: list[str] = []
    skip_next = False
    for word in argv:
        if skip_next and not word.startswith("-") and "=" not in word and not word.endswith((".yaml", ".yml")):
            skip_next = False
            continue
        skip_next = False
        name, equals, _ = word.partition("=")
        if name in LAUNCHER_ARGUMENTS:
            skip_next = not equals
            continue
        kept.append(word)
    return kept


def load_run(argv: Sequence[str]) -> Loaded:
    """`CONFIG.yaml [MORE.yaml ...] [key=value ...]` -> Loaded. Raises ConfigError listing every problem at once."""
    problems: list[Problem] = []
    settings: list[_Setting] = []
    files = []
    for word in drop_launcher_arguments(argv):
        if word.startswith("-"):
            problems.append(Problem("", None, f"{word}: no such option", "use key=value; --help lists all keys"))
        elif "=" in word:
            settings.extend(_override(word, problems))
        elif word.endswith((".yaml", ".yml")):
            files.append(Path(word))
        else:
            problems.append(
                Problem("", None, f"{word!r} is neither a .yaml file nor key=value", "write key=value, without spaces")
            )
    if not files:
        problems.append(Problem("", None, "no CONFIG.yaml was given", "name one; configs/demo holds examples"))
    from_files = [setting for path in files for setting in _read(path, (), problems)]
    return _merge([*from_files, *settings], problems)


def _override(word: str, problems: list[Problem]) -> list[_Setting]:
    key, _, text = word.partition("=")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        problems.append(Problem("", None, f"{word!r} is not valid YAML: {_first_line(error)}", "quote the value"))
        return []
    return [_Setting(key, value, COMMAND_LINE)] if not isinstance(value, dict) or key in OPAQUE else [
        _Setting(f"{key}.{inner}", leaf, COMMAND_LINE) for inner, leaf in _leaves(value, key)
    ]


def _leaves(mapping: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, dict) and f"{prefix}.{name}" not in OPAQUE and value:
            for inner, leaf in _leaves(value, f"{prefix}.{name}"):
                yield f"{name}.{inner}", leaf
        else:
            yield str(name), value


def _read(path: Path, parents: tuple[Path, ...], problems: list[Problem]) -> list[_Setting]:
    """The settings of a file, its parents' first."""
    resolved = path.resolve()
    if resolved in parents:
        chain = " -> ".join(p.name for p in (*parents, resolved))
        problems.append(Problem("", None, f"{path}: `extends` goes in a circle: {chain}", "remove one of them"))
        return []
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        problems.append(Problem("", None, f"{path}: cannot be read: {error.strerror}", "check the path"))
        return []
    except UnicodeDecodeError as error:
        problems.append(Problem("", None, f"{path}: not UTF-8 at byte {error.start}", "save the file as UTF-8"))
        return []
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or _first_line(error)
        problems.append(Problem("", None, f"{path}{line}: not valid YAML: {reason}", "mend the file there"))
        return []
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        problems.append(Problem("", None, f"{path}: must be a mapping of sections", "begin with e.g. `run: {name: x}`"))
        return []
    own: list[_Setting] = []
    inherited: list[_Setting] = []
    for setting in _node_settings(root, "", path, problems):
        if setting.key != "extends":
            own.append(setting)
            continue
        names = setting.value if isinstance(setting.value, list) else [setting.value]
        for name in names:
            inherited.extend(_read(path.parent / str(name), (*parents, resolved), problems))
    return [*inherited, *own]


def _node_settings(node: yaml.MappingNode, prefix: str, path: Path, problems: list[Problem]) -> Iterator[_Setting]:
    """Leaves of a YAML mapping with the line each key stands on."""
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = f"{prefix}{key_node.value}"
        if key in seen:
            problems.append(
                Problem("", None, f"{path}:{line}: {key} is set twice, first in line {seen[key]}", "remove one of them")
            )
            continue
        seen[key] = line
        if isinstance(value_node, yaml.MappingNode) and key not in OPAQUE and value_node.value:
            yield from _node_settings(value_node, f"{key}.", path, problems)
        else:
            yield _Setting(key, _construct(value_node), f"{path}:{line}")


def _construct(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)  # type: ignore[no-untyped-call]
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def _merge(settings: list[_Setting], problems: list[Problem]) -> Loaded:
    tree = OmegaConf.structured(RunConfig)
    origins: dict[str, str] = {}
    reported: set[str] = set()
    for setting in settings:
        if isinstance(setting.value, dict) and not setting.value and setting.key not in OPAQUE:
            continue  # `section: {}` sets nothing
        try:
            OmegaConf.update(tree, setting.key, setting.value, merge=False, force_add=False)
            origins[setting.key] = setting.origin
        except OmegaConfBaseException as error:
            message = f"{setting.origin}: {setting.key}: {_first_line(error)}"
            if message not in reported:
                problems.append(Problem("", None, message, _fix_for(error)))
            reported.add(message)
    for key in sorted(OmegaConf.missing_keys(tree)):
        problems.append(Problem("", None, f"{key} is not set, and has no default", f"set it, e.g. {key}=..."))
    config = None
    if not problems:
        try:
            config = OmegaConf.to_object(tree)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "?"
            where = origins.get(key, "default")
            problems.append(
                Problem("", None, f"{where}: {key}: {_first_line(error)}", "set the environment variable, or the key")
            )
    if problems:
        raise ConfigError(format_problems(problems, origins))
    assert isinstance(config, RunConfig)
    return Loaded(config, origins)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _fix_for(error: OmegaConfBaseException) -> str:
    kind = type(error).__name__
    if kind in ("ConfigKeyError", "ConfigAttributeError"):
        return "correct the name; --help lists every key"
    return "give a value of the type that --help states"


def as_dict(cfg: RunConfig) -> dict[str, Any]:
    """The configuration as plain nested values (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(cfg)))
    return plain


def to_yaml(cfg: RunConfig) -> str:
    """YAML that loads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.create(as_dict(cfg)))


def config_hash(cfg: RunConfig) -> str:
    """sha256 of the resolved configuration, hexadecimal; equal for equal configurations."""
    return hashlib.sha256(json.dumps(asdict(cfg), sort_keys=True).encode()).hexdigest()

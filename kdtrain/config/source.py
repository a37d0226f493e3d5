"""Command line and YAML files to single settings, each with its origin. Their meaning is not interpreted here.

Numbers are those of YAML 1.2 and Python: 1e-3 is a number, 010 is ten, 1_000 is a thousand; yes and on are strings.
A mapping is taken apart into its keys, so that a later file replaces single settings, not whole sections.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdtrain.config.keys import Key, suggestion
from kdtrain.config.paths import look
from kdtrain.config.problems import Problem

COMMAND_LINE = "command line"
YAML_SUFFIXES = (".yaml", ".yml")
_TAG = "tag:yaml.org,2002:"
_KEY = re.compile(r"[A-Za-z0-9_.\[\]-]*")


@dataclass(frozen=True, slots=True)
class Setting:
    """key: dotted; value: plain Python; origin: "file.yaml:12" or "command line"."""

    key: str
    value: Any
    origin: str


class _Loader(yaml.SafeLoader):
    """SafeLoader that resolves unquoted words by YAML 1.2."""


class Dumper(yaml.SafeDumper):
    """Writes YAML that this module's loader and a YAML 1.1 loader read alike; every scalar on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never writes anchors."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if not text.isprintable() else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


Dumper.add_representer(str, _represent_text)
_Loader.yaml_implicit_resolvers = {}
for _reader in (_Loader, Dumper):
    _reader.add_implicit_resolver(f"{_TAG}null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
    _reader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    _reader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
    _reader.add_implicit_resolver(
        f"{_TAG}float",
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
            r"|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    )


def read_words(words: Sequence[str], known: dict[str, Key], problems: list[Problem]) -> list[Setting]:
    """`CONFIG.yaml [MORE.yaml ...] [key=value ...]` -> settings, in the order in which later ones win."""
    from_files: list[Setting] = []
    overrides: list[Setting] = []
    has_file = False
    for word in words:
        key, equals, text = word.partition("=")
        if word.startswith("-"):
            why = f"{word}: there is no such option"
            problems.append(Problem("", None, why, "write key=value; --help lists every key", COMMAND_LINE))
        elif equals and _KEY.fullmatch(key):
            overrides.extend(_override(key, text, known, problems))
        elif word.endswith(YAML_SUFFIXES):
            has_file = True
            from_files.extend(_Reader(known, problems).read(Path(word)))
        else:
            why = f"{word!r} is neither a .yaml file nor key=value"
            problems.append(Problem("", None, why, "write key=value, without spaces around =", COMMAND_LINE))
    if not has_file:
        why = "no CONFIG.yaml was given"
        problems.append(Problem("", None, why, "name one first; configs/demo holds examples", COMMAND_LINE))
    return [*from_files, *overrides]


def _override(key: str, text: str, known: dict[str, Key], problems: list[Problem]) -> list[Setting]:
    reader = _Reader(known, problems)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        if key in known and known[key].is_text:
            return [Setting(key, text, COMMAND_LINE)]  # a path or name needs no YAML quotes
        why = f"is not valid YAML: {_reason(error)}"
        problems.append(Problem(key, text, why, "quote the value, for the shell too", COMMAND_LINE))
        return []
    if node is None:
        node = yaml.ScalarNode(f"{_TAG}null", "")
    return list(reader.settings(key, node, COMMAND_LINE))


def _reason(error: yaml.YAMLError) -> str:
    words = [getattr(error, name, None) for name in ("context", "problem")]
    return ", ".join(word for word in words if word) or " ".join(str(error).split())


class _Reader:
    """Turns YAML nodes into settings; everything else becomes a problem."""

    def __init__(self, known: dict[str, Key], problems: list[Problem]) -> None:
        self._known = known
        self._problems = problems

    def _problem(self, origin: str, why: str, fix: str) -> None:
        self._problems.append(Problem("", None, why, fix, origin))

    def read(self, path: Path, parents: tuple[Path, ...] = (), named_by: str | None = None) -> list[Setting]:
        """Settings of a file, those of the files it extends first."""
        shown, found = os.path.normpath(path), look(path)
        if isinstance(found, str):
            shown = shown if shown.isprintable() else repr(shown)
            self._problem(named_by or COMMAND_LINE, f"{shown} {found}", _relative_to(named_by))
            return []
        real = path.resolve()
        if real in parents:
            chain = " -> ".join(p.name for p in (*parents[parents.index(real) :], real))
            self._problem(named_by or shown, f"`extends` goes in a circle: {chain}", "remove one of them")
            return []
        root = self._compose(path, shown, named_by)
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            self._problem(shown, "the file is not a mapping of sections", "begin with e.g. `run: {name: my-run}`")
            return []
        own: list[Setting] = []
        inherited: list[Setting] = []
        seen: dict[str, int] = {}
        for key_node, value in root.value:
            if key_node.value == "extends":
                origin = f"{shown}:{_line(key_node)}"
                if self._first_time("extends", key_node, shown, seen):
                    for name in self._extends(value, origin):
                        inherited += self.read(path.parent / name, (*parents, real), origin)
            else:
                own += self._pair("", key_node, value, shown, seen)
        return [*inherited, *own]

    def _compose(self, path: Path, shown: str, named_by: str | None) -> yaml.Node | None:
        try:
            return yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
        except OSError as error:
            why = f"{shown} cannot be read: {error.strerror}"
            self._problem(named_by or COMMAND_LINE, why, _relative_to(named_by))
        except UnicodeDecodeError as error:
            self._problem(shown, f"the file is not UTF-8 at byte {error.start}", "save it as UTF-8")
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = "" if mark is None else f":{mark.line + 1}"
            self._problem(f"{shown}{line}", f"the file is not valid YAML: {_reason(error)}", "correct it there")
        return None

    def _extends(self, node: yaml.Node, origin: str) -> list[str]:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if all(isinstance(item, yaml.ScalarNode) and item.tag == f"{_TAG}str" for item in items):
            return [item.value for item in items]
        self._problem(origin, "`extends` is neither a path nor a list of paths", "write extends: ../base/pretrain.yaml")
        return []

    def _first_time(self, key: str, key_node: yaml.Node, shown: str, seen: dict[str, int]) -> bool:
        line = _line(key_node)
        if key in seen:
            self._problem(f"{shown}:{line}", f"{key} is set twice, first in line {seen[key]}", "remove one of them")
            return False
        seen[key] = line
        return True

    def _pair(
        self, prefix: str, key_node: yaml.Node, value: yaml.Node, shown: str, seen: dict[str, int]
    ) -> Iterator[Setting]:
        origin = f"{shown}:{_line(key_node)}" if shown != COMMAND_LINE else shown
        if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
            self._problem(origin, "a key is not a plain word", "use `extends` to share settings between files")
            return
        key = f"{prefix}{key_node.value}"
        if self._first_time(key, key_node, shown, seen):
            yield from self.settings(key, value, origin, shown, seen)

    def settings(
        self, key: str, node: yaml.Node, origin: str, shown: str = COMMAND_LINE, seen: dict[str, int] | None = None
    ) -> Iterator[Setting]:
        """The settings in `key: node`: one, or one per key of a section."""
        known = self._known.get(key)
        if known is None and not self._below_free_form(key):
            self._unknown(key, origin)
        elif known is not None and (known.section or known.is_free_form) and isinstance(node, yaml.MappingNode):
            seen = {} if seen is None else seen
            for inner, value in node.value:
                yield from self._pair(f"{key}.", inner, value, shown, seen)
        elif known is not None and (known.section or known.is_free_form):
            if isinstance(node, yaml.ScalarNode) and not node.value and node.style is None and shown != COMMAND_LINE:
                return  # `optim:` with everything below it commented out
            shape = "a section" if known.section else "a mapping"
            why = f"is {shape}: it holds key: value pairs, not a value"
            self._problems.append(Problem(key, _text_of(node), why, f"--help {key} lists what it holds", origin))
        else:
            try:
                yield Setting(key, self._value(node, known is not None and known.is_text, ()), origin)
            except ValueError as error:
                self._problems.append(Problem(key, _text_of(node), str(error), "write a plain value", origin))

    def _below_free_form(self, key: str) -> bool:
        parent, _, leaf = key.rpartition(".")
        return bool(leaf) and parent in self._known and self._known[parent].is_free_form

    def _unknown(self, key: str, origin: str) -> None:
        if not key.strip("."):
            self._problem(origin, "a value stands without a key", "write key=value")
            return
        meant = suggestion(key, self._known)
        parent = key.rpartition(".")[0]
        while parent and not (parent in self._known and self._known[parent].section):
            parent = parent.rpartition(".")[0]
        fix = f"--help{' ' + parent if parent else ''} lists every key"
        self._problem(origin, f"{key} is not a setting", f"did you mean {meant}? {fix}" if meant else fix)

    def _value(self, node: yaml.Node, as_text: bool, above: tuple[yaml.Node, ...]) -> Any:
        """Plain Python value of a node. Raises ValueError for YAML that no setting accepts."""
        if node in above:
            raise ValueError("holds itself")
        if isinstance(node, yaml.MappingNode):
            if as_text or any(not isinstance(key, yaml.ScalarNode) for key, _ in node.value):
                raise ValueError("is a mapping, not a value")
            names = [key.value for key, _ in node.value]
            if len(set(names)) < len(names):
                raise ValueError("sets one of its keys twice")
            return {key.value: self._value(value, False, (*above, node)) for key, value in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, as_text, (*above, node)) for item in node.value]
        kind = node.tag.removeprefix(_TAG)
        if kind not in ("str", "int", "float", "bool", "null"):
            raise ValueError(f"has the tag {node.tag}, which is not understood")
        if kind == "str" or (as_text and kind != "null"):
            return str(node.value)
        if kind == "null":
            return None
        if kind == "bool":
            return node.value.lower() == "true"
        # By Python's rules, not YAML 1.1's, where 010 is eight.
        text = node.value.replace("_", "")
        return int(text) if kind == "int" else float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _relative_to(named_by: str | None) -> str:
    where = (
        "in `extends` it is relative to the file that contains it"
        if named_by
        else "it is relative to the current folder"
    )
    return f"check the path; {where}"


def _line(node: yaml.Node) -> int:
    return 0 if node.start_mark is None else node.start_mark.line + 1


def _text_of(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return str(node.value) or "null"
    return "[...]" if isinstance(node, yaml.SequenceNode) else "{...}"

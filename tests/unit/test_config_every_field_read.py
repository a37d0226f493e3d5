"""Every setting is read: one that is not would be accepted without effect."""

import ast
from pathlib import Path

from kdtrain.config.keys import all_keys
from kdtrain.config.schema import DistillObjective, RunConfig
from kdtrain.config.schema.objective import parameters
from kdtrain.engine.settings import EngineSettings
from kdtrain.planning.estimate import MemoryInputs

PACKAGE = Path(__file__).resolve().parents[2] / "kdtrain"
KEYS = all_keys()
PARTS = (RunConfig, EngineSettings, MemoryInputs)
"""Classes whose attributes have the names and types of the sections."""
SECTION_OF_CLASS = {part.__name__: "" for part in PARTS} | {
    key.section.__name__: name for name, key in KEYS.items() if key.section
}
ROOTS = ("cfg", "config")
"""Names and attributes that hold a whole RunConfig."""
READ_ELSEWHERE = {
    "parallel.world_size": "kdtrain.config.checks.parallel refuses a job of another number of ranks",
    "teacher.in_flight": "kdtrain.config.ranks.in_flight, whose result the jobs pass on, reads it",
    "teacher.ranks": "kdtrain.config.ranks.teacher_ranks, which splits the job, reads it",
    "teacher.tp": "kdtrain.config.ranks.teacher_tp, which training calls, reads it",
}
"""Settings that no module outside kdtrain.config reads, and why that misleads no user."""

READ_BY_NAME = {f"objective.distill.{name}" for name in parameters(DistillObjective)}
"""Parameters of divergences: kdtrain.objectives.distill.divergence_of reads those that the kernels' table names, and
tests/unit/test_losses_divergences.py shows that these are all and that each has an effect."""


class Reads:
    """Dotted keys that a class or a function reads, through `cfg.a.b`, `s = cfg.a; s.b`, `self._s = s; self._s.b` or
    a parameter annotated with a section's class."""

    def __init__(self, scope):
        self.keys = set()
        self._names = dict.fromkeys(ROOTS, "")
        for node in ast.walk(scope):
            if isinstance(node, ast.arg) and node.annotation is not None:
                section = SECTION_OF_CLASS.get(ast.unparse(node.annotation).rpartition(".")[2])
                if section is not None:
                    self._names[node.arg] = section
        for _ in range(3):  # an alias of an alias of an alias
            for node in ast.walk(scope):
                if isinstance(node, ast.Assign):
                    self._remember(node.targets[0], node.value)
        for node in ast.walk(scope):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                self.keys.add(self._key(node))

    def _remember(self, target, value):
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._remember(one, other)
        key = self._key(value)
        if key == "" or (key in KEYS and KEYS[key].section):
            self._names[ast.unparse(target)] = key

    def _key(self, node):
        """Dotted key that the expression stands for, "" for the whole configuration, None for anything else."""
        known = self._names.get(ast.unparse(node)) if isinstance(node, (ast.Name, ast.Attribute)) else None
        if known is not None or not isinstance(node, ast.Attribute):
            return known
        parent = self._key(node.value)
        if parent is None:
            return "" if node.attr in ROOTS else None
        key = f"{parent}.{node.attr}".lstrip(".")
        return key if key in KEYS else None


def keys_read(source):
    """Keys that top-level functions and classes of a module read."""
    scopes = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return set().union(*(Reads(scope).keys for scope in scopes))


def test_every_setting_is_read_outside_config():
    files = [path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "config")]
    assert len(files) > 40
    read = set().union(*(keys_read(path.read_text(encoding="utf-8")) for path in files))
    unread = {name for name, key in KEYS.items() if not key.section} - read
    assert unread == set(READ_ELSEWHERE) | READ_BY_NAME


def test_settings_are_read_where_the_exceptions_say():
    for key, module in (
        ("zero.extra", "deepspeed_config"),
        ("teacher.ranks", "ranks"),
        ("teacher.tp", "ranks"),
        ("teacher.in_flight", "ranks"),
    ):
        assert key in keys_read((PACKAGE / "config" / f"{module}.py").read_text(encoding="utf-8"))


def test_setting_counts_as_read_only_in_its_own_section():
    assert "train.kernels" not in keys_read("def f(cfg, call):\n    return call.kernels, cfg.log.kernels")
    assert "train.kernels" not in keys_read("def f(cfg):\n    cfg.train.kernels = 'torch'")
    assert "train.kernels" in keys_read("def f(self):\n    t, d = self.cfg.train, 1\n    return t.kernels")
    text = "class C:\n  def __init__(self, s: TrainSection): self._s = s\n  def f(self): return self._s.kernels"
    assert "train.kernels" in keys_read(text)

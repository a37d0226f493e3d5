import math
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml

from kdtrain.config.load import as_dict, config_hash, drop_launcher_arguments, load_run, to_yaml
from kdtrain.config.schema import DataSection, RunConfig, RunSection, StudentSection, TrainSection, ZeroSection
from kdtrain.errors import ConfigError

MINIMAL = "run: {name: a}\ntrain: {total_tokens: 7}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into an otherwise empty current folder."""
    monkeypatch.chdir(tmp_path)

    def _write(name, text):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return _write


def message(*argv):
    with pytest.raises(ConfigError) as caught:
        load_run(argv)
    return str(caught.value)


def leaves(section, prefix=""):
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def test_later_files_override_earlier_ones_and_the_command_line_overrides_all(write):
    write("one.yaml", MINIMAL + "optim: {lr: 1.0, eps: 2.0, weight_decay: 3.0}\n")
    write("two.yaml", "optim:\n  eps: 20\n  weight_decay: 30\n")
    loaded = load_run(["one.yaml", "two.yaml", "optim.weight_decay=300"])
    assert (loaded.config.optim.lr, loaded.config.optim.eps, loaded.config.optim.weight_decay) == (1.0, 20.0, 300.0)
    assert loaded.origins["optim.lr"] == "one.yaml:3"
    assert loaded.origins["optim.eps"] == "two.yaml:2"
    assert loaded.origins["optim.weight_decay"] == "command line"
    assert loaded.origins["optim.grad_clip"] == "default"


def test_every_setting_has_an_origin(write):
    loaded = load_run([write("one.yaml", MINIMAL), "zero.extra.reduce_bucket_size=5e8"])
    assert set(loaded.origins) == {key for key, _ in leaves(loaded.config)} | {"zero.extra.reduce_bucket_size"}
    assert loaded.origins["zero.extra"] == "command line"


def test_unset_settings_keep_the_schema_default(write):
    loaded = load_run([write("one.yaml", MINIMAL)])
    expected = RunConfig(run=RunSection(name="a"), train=TrainSection(total_tokens=7))
    assert loaded.config == expected


def test_extends_is_relative_to_the_file_which_overrides_it(write):
    write("base/a.yaml", MINIMAL + "optim: {lr: 1.0, eps: 1.0, weight_decay: 1.0}\n")
    write("base/b.yaml", "optim: {eps: 2.0, weight_decay: 2.0}\n")
    # its place in the file does not matter
    write("recipes/c.yaml", "optim: {weight_decay: 3.0}\nextends: [../base/a.yaml, ../base/b.yaml]\n")
    loaded = load_run(["recipes/c.yaml"])
    assert (loaded.config.optim.lr, loaded.config.optim.eps, loaded.config.optim.weight_decay) == (1.0, 2.0, 3.0)
    assert loaded.origins["optim.lr"] == "base/a.yaml:3"


def test_file_may_be_extended_twice(write):
    write("base.yaml", MINIMAL)
    write("x.yaml", "extends: base.yaml\n")
    write("y.yaml", "extends: base.yaml\n")
    assert load_run([write("z.yaml", "extends: [x.yaml, y.yaml]\n")]).config.run.name == "a"


def test_environment_variables_and_other_settings_are_resolved(write, monkeypatch):
    monkeypatch.setenv("KD_DATA", "/data/x")
    monkeypatch.setenv("KD_STEPS", "12")
    text = MINIMAL + "data: {train: ['${oc.env:KD_DATA}/a', b], validation: '${run.name}/v'}\n"
    cfg = load_run(
        [write("one.yaml", text), "log.every_steps=${oc.env:KD_STEPS}", "eval.max_tokens=${oc.env:KD_NOT,9}"]
    ).config
    assert cfg.data.train == ["/data/x/a", "b"]
    assert cfg.data.validation == "a/v"
    assert (cfg.log.every_steps, cfg.eval.max_tokens) == (12, 9)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("train.total_tokens=2e9", "train.total_tokens", 2_000_000_000),
        ("train.total_tokens=2_000", "train.total_tokens", 2000),
        ("train.total_tokens=010", "train.total_tokens", 10),
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.grad_clip=null", "optim.grad_clip", None),
        ("optim.grad_clip=", "optim.grad_clip", None),
        ("optim.betas=[0.5, 0.75]", "optim.betas", (0.5, 0.75)),
        ("zero.stage=3", "zero.stage", 3),
        ("run.name=007", "run.name", "007"),
        ("run.name=1.10", "run.name", "1.10"),
        ("run.name=on", "run.name", "on"),
        ("run.name='null'", "run.name", "null"),
        ("run.output_dir=a=b", "run.output_dir", "a=b"),
        ("run.output_dir=@x:[", "run.output_dir", "@x:["),
        ("teacher.weights=null", "teacher.weights", None),
        ("data.train=[1, 'b c']", "data.train", ["1", "b c"]),
        ("data.train_weights=[1, 2.5]", "data.train_weights", [1.0, 2.5]),
        ("debug.check_replicas=yes", "debug.check_replicas", True),
        ("debug.self_check=false", "debug.self_check", False),
        ("log.wandb.mode=off", "log.wandb.mode", "off"),
        ("log.wandb={mode: offline, entity: me}", "log.wandb.entity", "me"),
        ("zero.extra.sub_group_size=5e8", "zero.extra", {"sub_group_size": 5e8}),
        (r"run.output_dir=\${HOME}", "run.output_dir", "${HOME}"),
    ],
)
def test_command_line_value_is_parsed_by_the_type_of_its_key(write, word, key, value):
    found = dict(leaves(load_run([write("one.yaml", MINIMAL), word]).config))[key]
    assert found == value
    assert type(found) is type(value)


def test_free_form_settings_are_merged_key_by_key(write):
    text = MINIMAL + "zero: {extra: {reduce_bucket_size: 1, reduce_scatter: true}}\n"
    loaded = load_run([write("one.yaml", text), "zero.extra.reduce_bucket_size=2"])
    assert loaded.config.zero.extra == {"reduce_bucket_size": 2, "reduce_scatter": True}


def test_an_empty_section_sets_nothing(write):
    assert load_run([write("one.yaml", MINIMAL + "optim:\nschedule: {}\n")]).config.optim.lr == RunConfig().optim.lr


def test_launcher_arguments_are_dropped(write):
    words = ["--local_rank=1", "--local-rank", "3", "--deepspeed", "--deepspeed_config=ds.json", "a=b", "--local_rank"]
    assert drop_launcher_arguments([*words, "c.yaml"]) == ["a=b", "c.yaml"]
    assert load_run([write("one.yaml", MINIMAL), "--local_rank=0"]).config.run.name == "a"


def test_path_with_an_equals_sign_is_a_file(write):
    assert load_run([write("runs/lr=3/one.yaml", MINIMAL)]).config.run.name == "a"


def test_all_problems_of_files_and_command_line_are_reported_at_once(write):
    write("one.yaml", "run:\n  names: a\noptim:\n  lr: fast\n  betas: [1]\ndata: {seq_len: 1.5}\n")
    text = message("one.yaml", "optim.learning_rate=3", "zero.stage=4", "zero.stage", "parallel.tp=two")
    assert text.startswith("10 problems in this run's configuration\n")
    for line in (
        "one.yaml:2: run.names is not a setting\n      fix: did you mean run.name?",
        "optim.lr = fast    [one.yaml:4]\n      is not a number\n      fix: ",
        "optim.betas = [1]    [one.yaml:5]\n      is not a list of 2 numbers",
        "data.seq_len = 1.5    [one.yaml:6]\n      is not an integer",
        "command line: optim.learning_rate is not a setting",
        "zero.stage = 4    [command line]\n      is not one of 0, 1, 2, 3",
        "command line: 'zero.stage' is neither a .yaml file nor key=value",
        "parallel.tp = two    [command line]\n      is not an integer",
        "run.name = ???    [default]\n      has no default and must be set",
        "train.total_tokens = ???    [default]\n      has no default and must be set",
    ):
        assert line in text
    assert text.count("fix: ") == 10


def test_placeholder_is_replaced_by_a_later_value(write):
    write("base.yaml", MINIMAL + "data:\n  train: ???\n  seq_len: ???\noptim: {lr: '???'}\n")
    text = message("base.yaml", "data.seq_len=8")
    assert text.startswith("2 problems")
    assert "data.train = ???    [base.yaml:4]\n      has no default and must be set" in text
    assert load_run(["base.yaml", "data={train: [a], seq_len: 8}", "optim.lr=1"]).config.data.train == ["a"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("run.naem", "run.name"),
        ("objective.distil.kd_weight", "objective.distill.kd_weight"),
        ("kd_weight", "objective.distill.kd_weight"),
        ("train.seq_len", "data.seq_len"),
        ("optimizer.lr", "optim.lr"),
        ("log.wandb.projekt", "log.wandb.project"),
        ("tp", "teacher.tp or parallel.tp"),
    ],
)
def test_misspelt_or_misplaced_key_is_reported_with_the_right_one(write, name, meant):
    text = message(write("one.yaml", MINIMAL), f"{name}=1")
    assert f"command line: {name} is not a setting\n      fix: did you mean {meant}?" in text


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("zero.stage=true", "is not one of 0, 1, 2, 3"),
        ("debug.self_check=1", "is not true or false"),
        ("optim.lr=true", "is not a number"),
        ("train.total_tokens=1e-3", "is not an integer"),
        ("run.name=", "is not a string"),
        ("data.train=x", "is not a list of strings\n      fix: write it as a list: data.train: [...]"),
        ("data.train_weights=[1, x]", "is not a list of numbers or null"),
        ("optim=3", "is a section: it holds key: value pairs, not a value"),
        ("zero.extra=3", "is a mapping: it holds key: value pairs, not a value"),
        ("run.name={a: 1}", "is a mapping, not a value"),
        ("optim.lr={a: 1}", "is not a number"),
        ("optim.lr=[", "is not valid YAML"),
        (r"zero.extra=[\${a}]", "is not valid YAML"),
        ("optim.lr=!!python/name:os.system", "has the tag"),
        ("optim.betas.0=1", "optim.betas.0 is not a setting"),
        ("=3", "a value stands without a key"),
        ("--lr", "--lr: there is no such option"),
        ("optim.lr=${oc.env:KD_MISSING}", "needs the environment variable KD_MISSING, which is not set"),
        ("optim.lr=${run.nothing}", "cannot be resolved: Interpolation key 'run.nothing' not found"),
        ("optim.lr=${optim.lr}", "cannot be resolved: Recursive interpolation detected"),
        ("optim.lr=${run.name}", "stands for something that is not a number"),
        ("zero.stage=${debug.self_check}", "stands for something that is not one of 0, 1, 2, 3"),
        ("data.train=${run.output_dir}", "stands for something that is not a list of strings"),
        (r"data.train=\${a}", "stands for something that is not a list of strings"),
        (r"optim.betas=x\${a}", "stands for something that is not a list of 2 numbers"),
        ("data.train=['${oc.env:KD_MISSING}']", "needs the environment variable KD_MISSING"),
        ("run.name=???", "has no default and must be set"),
    ],
)
def test_invalid_command_line_value_is_refused_with_its_reason(write, word, why, monkeypatch):
    monkeypatch.delenv("KD_MISSING", raising=False)
    text = message(write("one.yaml", MINIMAL), word)
    assert text.startswith("1 problem in this run's configuration\n")
    assert why in text
    assert "command line" in text
    assert "fix: " in text


@pytest.mark.parametrize(
    ("content", "where", "why"),
    [
        ("run: {name: a\noptim: {}\n", "bad.yaml:2", "the file is not valid YAML"),
        ("run:\n\tname: a\n", "bad.yaml:2", "the file is not valid YAML"),
        ("- a\n", "bad.yaml", "the file is not a mapping of sections"),
        ("run: {name: a}\nrun: {name: b}\n", "bad.yaml:2", "run is set twice, first in line 1"),
        ("run:\n  name: a\n  name: b\n", "bad.yaml:3", "run.name is set twice, first in line 2"),
        ("run: {name: a}\nrun.name: b\n", "bad.yaml:2", "run.name is set twice, first in line 1"),
        ("zero: {extra: {a: {b: 1, b: 2}}}\n", "bad.yaml:1", "sets one of its keys twice"),
        ("zero: {extra: &x {a: [*x]}}\n", "bad.yaml:1", "holds itself"),
        ("run: &r {name: a}\noptim:\n  <<: *r\n", "bad.yaml:3", "a key is not a plain word"),
        ("? [1]\n: 2\n", "bad.yaml:1", "a key is not a plain word"),
        ("teacher: null\n", "bad.yaml:1", "is a section"),
        ("\nextends: missing.yaml\n", "bad.yaml:2", "missing.yaml does not exist"),
        (f"extends: {'x' * 300}.yaml\n", "bad.yaml:1", "holds a name of 305 bytes, longer than the 255"),
        ('extends: "a\\0b.yaml"\n', "bad.yaml:1", "holds characters that no path can hold"),
        ("extends: {a: b}\n", "bad.yaml:1", "`extends` is neither a path nor a list of paths"),
        ("extends: bad.yaml\n", "bad.yaml:1", "`extends` goes in a circle: bad.yaml -> bad.yaml"),
        ("extends: a.yaml\nextends: b.yaml\n", "bad.yaml:2", "extends is set twice, first in line 1"),
    ],
)
def test_invalid_file_is_refused_with_file_line_and_reason(write, content, where, why):
    write("bad.yaml", content)
    text = message(write("one.yaml", MINIMAL), "bad.yaml")
    assert why in text
    assert f"{where}: " in text or f"[{where}]" in text


@pytest.mark.parametrize("word", ["optim={lr: 1e-3, lr: 2e-3}", "train={total_tokens: 4096, total_tokens: 8192}"])
def test_key_set_twice_in_a_command_line_mapping_is_refused(write, word):
    assert "is set twice" in message(write("one.yaml", MINIMAL), word)


@pytest.mark.parametrize("word", [f"schedule.min_lr_ratio={'9' * 400}", f"optim.betas=[0.9, {'9' * 400}]"])
def test_number_too_large_for_a_float_is_refused(write, word):
    text = message(write("one.yaml", MINIMAL), word)
    assert f"  {word.partition('=')[0]} = " in text
    assert "number" in text.splitlines()[3]


def test_circular_extends_is_reported_with_its_files(write):
    write("a.yaml", "extends: sub/b.yaml\n")
    write("sub/b.yaml", "extends: ../c.yaml\n")
    write("c.yaml", "extends: sub/b.yaml\n")
    assert "c.yaml:1: `extends` goes in a circle: b.yaml -> c.yaml -> b.yaml" in message("a.yaml")


def test_unreadable_file_is_the_only_problem_reported(write, tmp_path):
    assert message("nowhere.yaml").splitlines()[0] == "1 problem in this run's configuration"
    assert "nowhere.yaml does not exist" in message("nowhere.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml cannot be read: Is a directory" in message("folder.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xe9}\n")
    assert "latin.yaml: the file is not UTF-8 at byte 12" in message("latin.yaml")
    assert "no CONFIG.yaml was given" in message("run.name=a")


def test_empty_file_reports_the_settings_without_default(write):
    for text in ("", "# nothing\n", "extends: []\n"):
        found = message(write("empty.yaml", text))
        assert "run.name = ???" in found
        assert "train.total_tokens = ???" in found


def test_to_yaml_loads_back_to_an_equal_object(write):
    cfg = RunConfig(
        run=RunSection(name="007", output_dir="a: ${b} \\${c} # 'd'\n\té", resume="on"),
        student=StudentSection(weights="null", architecture=None),
        data=DataSection(train=["1e3", "x, y", ""], train_weights=[1e-30, 1 / 3]),
        zero=ZeroSection(extra={"a": "5e8", "b": 5e8, "c": {"d": [1, None, True, "010", "yes"]}}),
        train=TrainSection(total_tokens=2**62),
    )
    cfg.optim.betas = (0.1 + 0.2, math.nextafter(1.0, 0.0))
    assert load_run([write("back.yaml", to_yaml(cfg))]).config == cfg
    assert load_run([write("more.yaml", MINIMAL)]).config != cfg


def test_to_yaml_is_read_alike_by_a_plain_yaml_loader(write):
    cfg = load_run([write("one.yaml", MINIMAL), "log.wandb.mode=off", "run.resume=1e3", "optim.eps=1e-9"]).config
    assert yaml.safe_load(to_yaml(cfg)) == as_dict(cfg)


def test_config_hash_is_equal_in_every_process_and_only_for_equal_configurations(write):
    cfg = load_run([write("one.yaml", MINIMAL)]).config
    other = replace(cfg, run=replace(cfg.run, seed=2))
    assert config_hash(cfg) != config_hash(other)
    assert config_hash(replace(other, run=replace(other.run, seed=1))) == config_hash(cfg)
    one, two = (replace(cfg, zero=ZeroSection(extra=extra)) for extra in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert one == two
    assert config_hash(one) == config_hash(two) != config_hash(cfg)
    code = "import sys; from kdtrain.config.load import *; print(config_hash(load_run(sys.argv[1:]).config))"
    env = os.environ | {"PYTHONHASHSEED": "5", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, "one.yaml"], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == config_hash(cfg)
    assert len(config_hash(cfg)) == 64

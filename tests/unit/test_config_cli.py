import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdtrain.config import cli
from kdtrain.config.deepspeed_config import EXTRA_ZERO_KEYS, OWNED_ZERO_KEYS, REDUCE_BUCKET, deepspeed_config
from kdtrain.config.launcher import fill_launcher_environment, first_node, require_meeting_point, world_size
from kdtrain.config.load import load_run, to_yaml
from kdtrain.config.schema import RunConfig
from kdtrain.errors import ConfigError, DataError, KdtrainError, NonFiniteLoss, RunStopped
from kdtrain.testing.ranks import load_file

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [*LAUNCHER_VARIABLES, *(n for n in os.environ if n.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that what a test leaves behind is undone
        monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Words of a configuration that is valid, paths included, on one rank."""
    monkeypatch.chdir(tmp_path)
    for folder, file in (("store", "manifest.json"), ("teacher", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    (tmp_path / "run.yaml").write_text(
        "run: {name: a}\nstudent: {architecture: llama-5m}\nteacher: {weights: teacher}\n"
        "data: {train: [store], seq_len: 8, sequences_per_micro_batch: 2, tokens_per_step: 32}\n"
        "train: {total_tokens: 320}\n"
    )
    return ["run.yaml"]


def test_parse_returns_the_checked_configuration(config):
    request = cli.parse([*config, "optim.lr=1"], "doc")
    assert request.config.optim.lr == 1.0
    assert request.loaded.origins["optim.lr"] == "command line"
    assert not request.check_only
    assert cli.parse([*config, "--check", "--local_rank=0"], "doc").check_only


def test_world_size_of_the_launcher_is_used(config, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.parse([*config, "parallel.tp=2"], "").config.parallel.tp == 2
    with pytest.raises(ConfigError, match=r"does not divide the number of ranks \(2\)"):
        cli.parse([*config, "parallel.tp=4"], "")


def test_ranks_without_an_address_are_refused_except_with_check(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.parse([*config, "parallel.tp=2", "--check"], "").check_only
    with pytest.raises(ConfigError, match=r"(?s)RANK and MASTER_ADDR and MASTER_PORT are not set.*train alone.*fix: "):
        cli.parse(config, "")


def test_print_config_shows_values_with_origins_and_loads_back(config, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.parse([*config, "optim.lr=5e-1", "zero.extra.sub_group_size=7", "--print-config"], "")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    lines = {line.split("  # ")[0].strip(): line.partition("  # ")[2] for line in shown.splitlines()}
    assert lines["lr: 0.5"] == "command line"
    assert lines["extra: {sub_group_size: 7}"] == "command line"
    assert lines["train: [store]"] == "run.yaml:4"
    assert lines["eps: 1.0e-08"] == ""
    (tmp_path / "shown.yaml").write_text(shown)
    again = load_run(["shown.yaml"]).config
    assert to_yaml(again) == to_yaml(load_run([*config, "optim.lr=0.5", "zero.extra.sub_group_size=7"]).config)


def test_print_config_prints_an_invalid_configuration_and_check_refuses_it(config, capsys):
    with pytest.raises(SystemExit):
        cli.parse([*config, "optim.lr=-1", "--print-config"], "")
    assert "lr: -1.0" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is not a positive number"):
        cli.parse([*config, "optim.lr=-1", "--print-config", "--check"], "")
    assert "lr: -1.0" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_needs_no_configuration(word, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse([word], "Train a student.")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("Train a student.")
    with pytest.raises(SystemExit):
        cli.parse(["run.yaml", word, "optim.lr", "a=b"], "")
    assert capsys.readouterr().out.startswith("  optim.lr = ")


def test_only_rank_0_prints_help_and_configuration(config, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    for words in (["--help"], [*config, "--print-config"]):
        with pytest.raises(SystemExit):
            cli.parse(words, "doc")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (DataError, 3), (NonFiniteLoss, 4), (RunStopped, 75), (KdtrainError, 1)],
)
def test_error_becomes_exit_code_and_message_without_traceback(error, code, capsys):
    def main(argv):
        raise error("the cause\n  fix: repair it")

    assert cli.run_script(main, ["x"]) == code
    assert capsys.readouterr().err == "kdtrain: the cause\n  fix: repair it\n"


def test_main_gets_the_arguments_and_its_exit_code_is_returned():
    assert cli.run_script(len, ["a", "b"]) == 2


def test_ctrl_c_exits_with_130():
    def main(argv):
        raise KeyboardInterrupt

    assert cli.run_script(main, []) == 130


def test_unexpected_exception_passes_through():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run_script(main, [])


@pytest.mark.parametrize("script", ["prepare_corpus", "export_hf", "import_gguf"])
@pytest.mark.parametrize("kind", ["a long name", "a loop"])
def test_path_that_no_file_system_accepts_is_reported_without_traceback(kind, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    path = "x" * 300 if kind == "a long name" else str(tmp_path / "loop")
    words = ["--tokenizer", path, "--output", path, path] if script == "prepare_corpus" else [path, path]
    main = load_file(ROOT / "launch" / f"{script}.py").main
    assert cli.run_script(main, words) in (2, 3)
    assert path in (printed := capsys.readouterr().err)
    assert "fix: " in printed


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "lines"),
    [
        ("3", "3", ConfigError, 0),  # the first rank of this node prints it
        ("8", "0", ConfigError, 2),  # a path may be missing on this node only
        ("3", "3", NonFiniteLoss, 1),  # this rank may be the only one with the error
        ("8", "0", DataError, 1),
    ],
)
def test_errors_of_other_ranks_are_printed(rank, local_rank, error, lines, monkeypatch, capsys):
    def main(argv):
        raise error("the cause\n  fix: repair it")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert cli.run_script(main, []) == error.exit_code
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == lines
    assert not printed or (printed[0].startswith(f"kdtrain: rank {rank} on ") and printed[0].endswith(": the cause"))


SLURM_STEP = {
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}


def test_slurm_step_fills_rank_and_address_variables():
    environ = dict(SLURM_STEP)
    fill_launcher_environment(environ)
    assert {name: environ[name] for name in LAUNCHER_VARIABLES} == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "23458",
    }
    require_meeting_point(environ)


def test_exported_address_is_kept():
    environ = SLURM_STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}
    fill_launcher_environment(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "7")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SLURM_STEP | {"RANK": "0", "WORLD_SIZE": "1"},  # deepspeed or torchrun inside a job
        SLURM_STEP | {"SLURM_NTASKS": "1"},
        SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell in a job of several tasks
        SLURM_STEP | {"SLURM_STEP_ID": "4294967291"},  # the batch script itself
        {name: value for name, value in SLURM_STEP.items() if name != "SLURM_STEP_ID"},
    ],
)
def test_other_environments_are_unchanged(environ):
    before = dict(environ)
    fill_launcher_environment(environ)
    assert environ == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[3-10,12]", "gpu3"),
        ("gpu[003-010],login", "gpu003"),
        ("rack[12,14]-node,x", "rack12-node"),
        ("a-b-01.cluster,c", "a-b-01.cluster"),
        ("rack[0-1]node[2-3],x", "rack0node2"),
    ],
)
def test_first_node_of_a_slurm_list(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize("text", ["", "0", "two", "-1", "1.5"])
def test_invalid_world_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is .*not a number of ranks"):
        world_size({"WORLD_SIZE": text})
    assert world_size({}) == 1


def run_python(code, *argv, **environ):
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), **environ}
    return subprocess.run([sys.executable, "-c", code, *argv], env=env, capture_output=True, text=True, check=False)


SCRIPT = """
import sys, time, json
started = time.process_time()
from kdtrain.config.cli import parse, run_script
code = run_script(lambda argv: parse(argv, "doc") and 0, sys.argv[1:])
heavy = sorted({"torch", "numpy", "transformers", "deepspeed"} & set(sys.modules))
print(json.dumps({"seconds": time.process_time() - started, "heavy": heavy}))
sys.exit(code)
"""


def test_configuration_is_loaded_and_checked_in_half_a_second_without_torch(config):
    done = [run_python(SCRIPT, *config) for _ in range(3)]
    assert [d.returncode for d in done] == [0, 0, 0], done[0].stderr
    found = [json.loads(d.stdout) for d in done]
    assert found[0]["heavy"] == []
    assert min(f["seconds"] for f in found) < 0.5


def test_invalid_configuration_exits_with_code_2_and_all_problems(config):
    done = run_python(SCRIPT, *config, "optim.lr=-1", "parallel.tp=2")
    assert done.returncode == 2
    assert done.stderr.startswith("kdtrain: 2 problems in this run's configuration\n")
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["heavy"] == []


def test_closed_stdout_pipe_is_not_an_error():
    code = "from kdtrain.config.cli import parse\nparse(['--help'], 'doc')"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write_end)
    assert done.returncode == 0
    assert done.stderr == ""


def settings_of(cfg, **given):
    return deepspeed_config(
        cfg.zero,
        grad_clip=cfg.optim.grad_clip,
        dtype=cfg.student.dtype,
        sequences_per_micro_batch=cfg.data.sequences_per_micro_batch,
        **given,
    )


def test_deepspeed_sums_in_float32_and_has_no_optimizer_schedule_or_reports():
    cfg = RunConfig()
    cfg.data.sequences_per_micro_batch = 3
    found = settings_of(cfg, on_cuda=True, num_parameters=1000)
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert found["communication_data_type"] == "fp32"
    assert found["managed_gradient_accumulation"] is False
    assert found["gradient_accumulation_steps"] == 1
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["bf16"] == {"enabled": True}
    assert not {"optimizer", "scheduler", "wandb", "tensorboard", "train_batch_size"} & set(found)
    json.dumps(found)


@pytest.mark.parametrize(
    ("stage", "on_cuda", "overlap"),
    [(0, True, False), (1, True, False), (2, True, True), (3, True, True), (2, False, False), (3, False, False)],
)
def test_communication_overlaps_only_where_deepspeed_allows_it(stage, on_cuda, overlap):
    cfg = RunConfig()
    cfg.zero.stage = stage
    found = settings_of(cfg, on_cuda=on_cuda, num_parameters=1000)["zero_optimization"]
    assert found == {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": 1000}


@pytest.mark.parametrize(
    ("parameters", "extra", "size"),
    [(7, {}, 7), (10**9, {}, REDUCE_BUCKET), (0, {}, 1), (7, {"reduce_bucket_size": 5e8}, 500_000_000)],
)
def test_bucket_is_limited_to_the_model_unless_a_key_sets_it(parameters, extra, size):
    cfg = RunConfig()
    cfg.zero.extra = extra
    found = settings_of(cfg, on_cuda=True, num_parameters=parameters)["zero_optimization"]["reduce_bucket_size"]
    assert found == size
    assert isinstance(found, int)


@pytest.mark.parametrize("on_cuda", [True, False])
def test_offloaded_optimizer_is_not_compiled_by_deepspeed(on_cuda):
    cfg = RunConfig()
    assert "offload_optimizer" not in settings_of(cfg, on_cuda=on_cuda, num_parameters=1000)["zero_optimization"]
    cfg.zero.offload_optimizer = True
    found = settings_of(cfg, on_cuda=on_cuda, num_parameters=1000)
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": on_cuda}
    assert found["zero_force_ds_cpu_optimizer"] is False


def test_dtype_clipping_and_expert_keys_reach_deepspeed():
    cfg = RunConfig()
    cfg.student.dtype, cfg.optim.grad_clip, cfg.zero.extra = "float32", None, {"sub_group_size": 7}
    found = settings_of(cfg, on_cuda=False, num_parameters=1000)
    assert found["bf16"] == {"enabled": False}
    assert found["gradient_clipping"] == 0.0
    assert found["zero_optimization"]["sub_group_size"] == 7
    found["zero_optimization"]["sub_group_size"] = 8
    assert cfg.zero.extra == {"sub_group_size": 7}, "DeepSpeed writes into what it gets"
    cfg.optim.grad_clip = 0.25
    assert settings_of(cfg, on_cuda=False, num_parameters=1000)["gradient_clipping"] == 0.25


def test_no_zero_key_is_both_allowed_and_owned():
    assert not set(EXTRA_ZERO_KEYS) & set(OWNED_ZERO_KEYS)


def runnable_words(tmp_path, *more):
    for name, content in (("store/manifest.json", "{}"), ("c.yaml", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return [
        str(tmp_path / "c.yaml"),
        "run.name=a",
        f"run.output_dir={tmp_path}",
        "student.architecture=llama-5m",
        f"data.train=[{tmp_path / 'store'}]",
        "objective.name=pretrain",
        "train.total_tokens=2e9",
        "data.tokens_per_step=524288",
        *more,
    ]


def test_fewer_ranks_than_expected_are_refused_with_both_numbers(tmp_path, monkeypatch):
    words = runnable_words(tmp_path, "parallel.world_size=16")
    for name, value in zip(LAUNCHER_VARIABLES, ("0", "0", "8", "here", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        cli.parse(words, None)
    text = " ".join(str(caught.value).split())
    assert "parallel.world_size = 16 [command line] ranks are expected, and 8 were started fix: check the" in text
    assert "does not find its --hostfile" in text
    with pytest.raises(ConfigError, match=r"expected, and 8 were started"):
        cli.parse([*words, "--check"], None)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert cli.parse(words, None).world_size == 16


def test_check_without_a_launcher_uses_the_expected_number_of_ranks(tmp_path):
    words = runnable_words(tmp_path, "parallel.world_size=16", "parallel.tp=8", "--check")
    assert cli.parse(words, None).world_size == 16
    with pytest.raises(ConfigError, match=r"does not divide the number of ranks \(16\)"):
        cli.parse([*words, "parallel.tp=3"], None)
    with pytest.raises(ConfigError, match=r"16 (.|\n)*expected, and 1 was started"):
        cli.parse(words[:-1], None)

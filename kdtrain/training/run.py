"""A run from configuration to exported student: what `launch/train.py` and `launch/eval_model.py` do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from kdtrain.batch import Batch
from kdtrain.config.cli import Request
from kdtrain.config.load import as_dict, config_hash, to_yaml
from kdtrain.config.ranks import teacher_ranks
from kdtrain.config.schema import GuardSection, RunConfig
from kdtrain.distributed.collectives import gather_objects
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import bootstrap
from kdtrain.engine.zero import StudentEngine
from kdtrain.errors import ConfigError, KdtrainError, RunStopped
from kdtrain.evaluation.validation import Validation
from kdtrain.log import LOGGER, setup_logging
from kdtrain.models.backbone import call_with_head
from kdtrain.run_state.heartbeat import PhaseTracker, Watchdog, clear_heartbeats
from kdtrain.run_state.run_folder import RunFolder
from kdtrain.telemetry.environment import describe, headline
from kdtrain.telemetry.jsonl_sink import JsonlSink
from kdtrain.telemetry.wandb_sink import WandbSink
from kdtrain.training import build, dedicated
from kdtrain.training import describe as describing
from kdtrain.training.cadence import Cadence, StopRequest
from kdtrain.training.checkpoints import Checkpoints
from kdtrain.training.evaluator import Evaluator
from kdtrain.training.export import export_checkpoint, exported_prefix, write_model_files
from kdtrain.training.guards import Events, Guards
from kdtrain.training.inputs import Inputs, open_inputs
from kdtrain.training.progress import Progress
from kdtrain.training.quantized import quantize_teacher
from kdtrain.training.report import Reporter, Sink
from kdtrain.training.resume import ResumePoint
from kdtrain.training.self_check import check_alignment
from kdtrain.training.sequence_prefix import Prefix, PrefixChoice, decide_prefix, prefix_choice, require_shared
from kdtrain.training.start import find_start, kept_prefix
from kdtrain.training.timing import PhaseTimer
from kdtrain.training.trainer import Trainer

T = TypeVar("T")


def run_training(request: Request) -> int:
    """Train, save, evaluate, export; 0. Every rank calls it. Raises KdtrainError with the exit code to leave with."""
    cfg = request.config
    setup_logging()
    inputs = open_inputs(cfg, build.specs(cfg))
    build.check_lengths(cfg, inputs, trainable=True)
    choice = prefix_choice(cfg, inputs)
    if request.check_only:
        describing.print_check(cfg, inputs, choice, world_size=request.world_size)
        return 0
    stop = StopRequest(cfg.run.time_limit_s)
    stop.install()  # until the process ends: a second signal while ranks leave must not kill one of them
    with bootstrap.runtime(teacher_ranks(cfg), deterministic=cfg.debug.deterministic) as rank:
        if rank.roles.is_teacher:
            _serve(cfg, inputs, rank, folder=Path(cfg.run.output_dir) / cfg.run.name, wants_stop=lambda: stop.wanted)
            return 0
        with dedicated.student_side(cfg, rank):
            mesh = Mesh.build(cfg.parallel.tp, cfg.parallel.cp)
            _same_everywhere(mesh, "configuration", config_hash(cfg))
            with _run_folder(cfg, mesh) as (folder, opened):
                _train(request, inputs, choice, mesh, rank, folder, opened, stop)
                on_main(mesh, lambda: opened.mark_done() if opened is not None else None)
    return 0


def _serve(cfg: RunConfig, inputs: Inputs, rank: bootstrap.Runtime, **settings: Any) -> None:
    """What a rank of a dedicated teacher does from start to end."""
    spec = build.teacher_spec(cfg)
    assert spec is not None
    dedicated.serve(cfg, spec, inputs.vocab_size, rank, **settings)


def run_evaluation(request: Request) -> int:
    """Evaluate student.weights on data.validation and print one line; 0. Every rank calls it.

    With --check: say what would run, and stop.
    """
    cfg = request.config
    setup_logging()
    if cfg.student.weights is None:
        raise ConfigError("student.weights is not set\n  fix: name the Hugging Face folder to evaluate")
    inputs = open_inputs(cfg, build.specs(cfg))
    build.check_lengths(cfg, inputs, trainable=False)
    choice = prefix_choice(cfg, inputs)
    if request.check_only:
        build.evaluation_batches(cfg, inputs, Mesh())  # refuses what has nothing to evaluate on
        _trained_prefix(cfg, inputs, choice)
        describing.print_check(cfg, inputs, choice, world_size=request.world_size, trains=False)
        return 0
    with bootstrap.runtime(teacher_ranks(cfg), deterministic=cfg.debug.deterministic) as rank:
        if rank.roles.is_teacher:
            _serve(cfg, inputs, rank)
            return 0
        with dedicated.student_side(cfg, rank):
            mesh = Mesh.build(cfg.parallel.tp, cfg.parallel.cp)
            models = build.build_models(cfg, inputs, mesh, rank.device, trainable=False, wire=rank.wire)
            if cfg.teacher.quantize is not None:
                first = next(build.evaluation_batches(cfg, inputs, mesh, choice.likely)).to(rank.device)
                quantize_teacher(cfg, models, first, mesh)
            prefix = _evaluation_prefix(cfg, inputs, choice, models, mesh, rank)

            def student(batch: Any, head_fn: Any) -> Any:
                return call_with_head(models.student, batch, head_fn)

            validation = Validation(student, models.teacher, models.layout, mesh)
            means = validation.run(build.evaluation_batches(cfg, inputs, mesh, prefix), rank.device)
            if mesh.is_main:
                print(json.dumps(means, sort_keys=True))
    return 0


def _evaluation_prefix(
    cfg: RunConfig, inputs: Inputs, choice: PrefixChoice, models: build.Models, mesh: Mesh, rank: bootstrap.Runtime
) -> Prefix:
    """What student.weights was trained with, if it is an export of kdtrain and the configuration names no other."""
    trained = on_main(mesh, lambda: _trained_prefix(cfg, inputs, choice))
    if trained is not None and choice.configured in (None, trained):
        if trained or choice.usual:
            LOGGER.info("prefix   %s, as in the run that made student.weights", choice.name(trained))
        return trained
    if trained is not None:
        LOGGER.warning(
            "data.sequence_prefix = %s, but student.weights was trained with %s: its numbers are not those of its run",
            cfg.data.sequence_prefix,
            choice.name(trained),
        )
    return decide_prefix(cfg, choice, inputs, models, mesh, rank.device)


def _trained_prefix(cfg: RunConfig, inputs: Inputs, choice: PrefixChoice) -> Prefix | None:
    """What the note of the export student.weights says; None for another folder. Reads the note alone.

    Raises ConfigError for a damaged one, StoreMismatch for a prefix that would be used and is not in the softmax.
    """
    trained = exported_prefix(Path(cfg.student.weights or ""))
    if trained is not None and choice.configured in (None, trained):
        require_shared(trained, inputs, f"the run that made student.weights = {cfg.student.weights}")
    return trained


def _train(
    request: Request,
    inputs: Inputs,
    choice: PrefixChoice,
    mesh: Mesh,
    rank: bootstrap.Runtime,
    folder: Path,
    opened: RunFolder | None,
    stop: StopRequest,
) -> None:
    cfg, device = request.config, rank.device
    models = build.build_models(
        cfg,
        inputs,
        mesh,
        device,
        trainable=True,
        wire=rank.wire,
        on_stop=lambda: stop.ask("a dedicated teacher's rank was asked to stop"),
    )
    resume_from = on_main(mesh, lambda: find_start(cfg, inputs, folder))
    prefix = _prepare_teacher(cfg, inputs, choice, models, mesh, rank, resume_from)
    loader = build.build_loader(cfg, inputs, mesh, prefix, pin_memory=device.type == "cuda")
    describing.log_header(cfg, inputs, models, mesh, device)
    describing.log_stores(cfg, inputs, loader)
    # Last: DeepSpeed keeps process-wide state that the most recent engine owns.
    engine = StudentEngine(models.student, mesh, cfg, device=device)
    progress = Progress()
    checkpoints = Checkpoints(cfg, folder, mesh, device, None if resume_from is None else resume_from.origin)
    if resume_from is not None:
        progress = checkpoints.load(resume_from, engine, loader)
    # Only now: a resume that is refused must leave the folder as it was.
    on_main(mesh, lambda: _describe_run(request, inputs, opened, folder))
    sinks, events = on_main(mesh, lambda: _sinks(cfg, folder, progress), share=False) or ([], None)
    pulse = PhaseTracker(mesh.rank)
    timer = PhaseTimer(device, pulse)
    costs, last_step = build.costs_of(cfg, models, mesh, device), Cadence(cfg, progress).last_step
    reporter = Reporter(sinks, mesh, device, costs, last_step)
    reporter.resumed(progress)
    evaluator = Evaluator(
        Validation(engine, models.teacher, models.layout, mesh),
        engine,
        lambda: build.evaluation_batches(cfg, inputs, mesh, prefix),
        reporter,
        device,
    )
    trainer = Trainer(
        cfg=cfg,
        mesh=mesh,
        device=device,
        engine=engine,
        objective=build.build_objective(cfg, engine, models, timer),
        loader=loader,
        evaluator=evaluator,
        checkpoints=checkpoints,
        reporter=reporter,
        guards=Guards(cfg.guard, mesh, device, progress, events),
        timer=timer,
        stop=stop,
        progress=progress,
        looks_ahead=cfg.teacher.layout == "dedicated",
    )
    try:
        with _watchdog(cfg.guard, pulse, mesh, folder, opened, rank.roles.teachers):
            trainer.run()
    except RunStopped:
        on_main(mesh, trainer.close, share=False)
        raise
    except BaseException:
        trainer.close(failed=True)
        raise
    finally:
        loader.close()
    on_main(mesh, trainer.close, share=False)
    if cfg.checkpoint.export:
        on_main(mesh, lambda: _export(cfg, folder))


def _prepare_teacher(
    cfg: RunConfig,
    inputs: Inputs,
    choice: PrefixChoice,
    models: build.Models,
    mesh: Mesh,
    rank: bootstrap.Runtime,
    resume_from: ResumePoint | None,
) -> Prefix:
    """Quantise the teacher, find the run's sequence prefix and, in a new run, check that the teacher knows the data.

    A resumed run has the prefix of its checkpoint, and the loader refuses a configuration that names another one; of a
    new stage see `kept_prefix`.
    """
    stored = on_main(mesh, lambda: kept_prefix(resume_from, choice))

    def first(prefix: Prefix) -> Batch:
        return next(build.build_loader(cfg, inputs, mesh, prefix, prefetch=0))[0].to(rank.device)

    if cfg.teacher.quantize is not None:
        quantize_teacher(cfg, models, first(choice.likely if stored is None else stored), mesh)
    if stored is not None:
        if resume_from is not None and resume_from.is_stage and stored:
            LOGGER.info("prefix   %s, as in the run that goes on", choice.name(stored))
        return stored if choice.configured is None else choice.configured
    prefix = decide_prefix(cfg, choice, inputs, models, mesh, rank.device)
    if models.teacher is not None and cfg.debug.self_check:
        found = check_alignment(models.teacher, first(prefix), models.layout, mesh)
        LOGGER.info("check    teacher's nll on labels %.3f, shifted -1 %.3f, +1 %.3f", *found.values())
    return prefix


def _export(cfg: RunConfig, folder: Path) -> None:
    LOGGER.info("export   %s", export_checkpoint(folder, folder / "export", dtype=cfg.student.dtype, replace=True))


def _sinks(cfg: RunConfig, folder: Path, progress: Progress) -> tuple[list[Sink], Events]:
    clear_heartbeats(folder)
    jsonl = JsonlSink(folder / "metrics.jsonl", resume_step=progress.step)
    wandb = WandbSink(cfg.log.wandb, folder, name=cfg.run.name, config=as_dict(cfg), resume_step=progress.step)
    found = [
        JsonlSink(folder / f"{name}.jsonl", resume_step=progress.step, lazy=True) for name in ("skipped", "spikes")
    ]
    return [jsonl, wandb], Events(*found)


def _watchdog(
    settings: GuardSection, pulse: PhaseTracker, mesh: Mesh, folder: Path, opened: RunFolder | None, teachers: range
) -> AbstractContextManager[object]:
    """Who notices on this rank that nothing moves; ending the run, rank 0 says so in STATUS."""
    if settings.stall_warn_s is None:
        return nullcontext()

    def give_up(why: str) -> None:
        if opened is not None:
            opened.set_status("failed", why)

    return Watchdog(
        pulse,
        folder,
        mesh.world_size,
        teachers=teachers,
        warn_s=settings.stall_warn_s,
        exit_s=settings.stall_exit_s,
        on_exit=give_up,
    )


@contextmanager
def _run_folder(cfg: RunConfig, mesh: Mesh) -> Iterator[tuple[Path, RunFolder | None]]:
    """The run's folder, held by rank 0: its path on every rank, the open folder on rank 0."""
    run = cfg.run
    opened = on_main(mesh, lambda: RunFolder.open(run.output_dir, run.name, lease_s=run.lock_lease_s), share=False)
    path = Path(cfg.run.output_dir) / cfg.run.name
    with opened if opened is not None else nullcontext(), opened.lock_kept() if opened is not None else nullcontext():
        setup_logging(mesh.rank, path)
        if opened is not None:
            LOGGER.info(headline(describe(world_size=mesh.world_size)))
        yield path, opened


def _describe_run(request: Request, inputs: Inputs, opened: RunFolder | None, folder: Path) -> None:
    """On rank 0: what was asked, where it runs, and the tokenizer an export will need."""
    assert opened is not None
    origins = "".join(f"{key}  {where}\n" for key, where in sorted(request.loaded.origins.items()))
    opened.write_config(to_yaml(request.config), origins)
    opened.write_environment(describe(world_size=request.world_size))
    write_model_files(folder, inputs.tokenizer_dir, request.config.student.weights)


def on_main(mesh: Mesh, work: Callable[[], T], *, share: bool = True) -> T | None:
    """Do `work` on rank 0 only. If it raises a KdtrainError or OSError there, every rank raises: none is left waiting.

    Returns work's answer on rank 0 and, with `share`, on all ranks (it must pickle); else None there.
    Communicates: one broadcast over the world.
    """
    answer: T | None = None
    failure: KdtrainError | None = None
    if mesh.is_main:
        try:
            answer = work()
        except KdtrainError as error:
            failure = error
        except OSError as error:
            failure = ConfigError(
                f"{error.filename or 'the run folder'}: [Errno {error.errno}] {error.strerror}\n"
                "  fix: free space, check quota and permissions of run.output_dir"
            )
    if mesh.world_size > 1:
        told: list[Any] = [(answer if share else None, failure)]
        dist.broadcast_object_list(told, src=0, group=mesh.world_group)
        if not mesh.is_main:
            answer, failure = told[0]
    if failure is not None:
        raise failure
    return answer


def _same_everywhere(mesh: Mesh, what: str, digest: str) -> None:
    """ConfigError on every rank unless all have the same `digest`. One gather over the world."""
    found = gather_objects(digest, mesh.world_group)
    odd = [rank for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise ConfigError(
            f"the {what} of ranks {odd} differs from rank 0's ({found[odd[0]][:12]} and {found[0][:12]})\n"
            "  why: ranks that disagree would hang or train different models\n"
            "  fix: give every node the same files and the same command line"
        )

"""A training run from configuration to exported student: `launch/train.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from kdtrain.batch import Batch
from kdtrain.config.cli import Request
from kdtrain.config.load import as_dict, config_hash, to_yaml
from kdtrain.config.ranks import teacher_ranks
from kdtrain.config.schema import GuardSection, RunConfig
from kdtrain.data.loader import StepLoader
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import bootstrap
from kdtrain.engine.zero import StudentEngine
from kdtrain.errors import RunStopped
from kdtrain.evaluation.validation import Validation
from kdtrain.jobs import dedicated
from kdtrain.jobs.build.batches import build_loader, evaluation_batches
from kdtrain.jobs.build.loop import cadence_of, loop_settings
from kdtrain.jobs.build.models import Models, build_models, check_lengths, engine_settings, model_specs
from kdtrain.jobs.build.objective import build_objective, costs_of
from kdtrain.jobs.build.teacher import teacher_spec
from kdtrain.jobs.check import print_check
from kdtrain.jobs.export_hf import export_checkpoint, write_model_files
from kdtrain.jobs.header import log_header, log_stores
from kdtrain.jobs.inputs import Inputs, open_inputs
from kdtrain.jobs.quantized import quantize_teacher
from kdtrain.jobs.ranks import on_main, require_same
from kdtrain.jobs.self_check import check_alignment
from kdtrain.jobs.sequence_prefix import Prefix, PrefixChoice, decide_prefix, prefix_choice
from kdtrain.jobs.start import find_start, kept_prefix
from kdtrain.log import LOGGER, setup_logging
from kdtrain.run_state.heartbeat import PhaseTracker, Watchdog, clear_heartbeats
from kdtrain.run_state.run_folder import RunFolder
from kdtrain.telemetry.environment import environment_record, headline
from kdtrain.telemetry.jsonl_sink import JsonlSink
from kdtrain.telemetry.wandb_sink import WandbSink
from kdtrain.training.cadence import StopRequest
from kdtrain.training.checkpoints import Checkpoints, ResumePoint
from kdtrain.training.evaluator import Evaluator
from kdtrain.training.guards import Events, Guards
from kdtrain.training.progress import Progress
from kdtrain.training.report import Reporter, Sink
from kdtrain.training.timing import PhaseTimer
from kdtrain.training.trainer import Trainer


def run_training(request: Request) -> int:
    """Train, save, evaluate, export; returns 0. Every rank must call it.

    Raises a KdtrainError, which holds the exit code of the process.
    """
    cfg = request.config
    setup_logging()
    inputs = open_inputs(cfg, model_specs(cfg))
    check_lengths(cfg, inputs, trainable=True)
    choice = prefix_choice(cfg, inputs)
    if request.check_only:
        print_check(cfg, inputs, choice, world_size=request.world_size)
        return 0
    stop = StopRequest(cfg.run.time_limit_s)
    stop.install()  # for the rest of the process: a second signal during the shutdown must not kill a rank
    with bootstrap.runtime(teacher_ranks(cfg), deterministic=cfg.debug.deterministic) as rank:
        if rank.roles.is_teacher:
            folder = Path(cfg.run.output_dir) / cfg.run.name
            spec = teacher_spec(cfg)
            dedicated.serve(cfg, spec, inputs.vocab_size, rank, folder=folder, wants_stop=lambda: stop.requested)
            return 0
        with dedicated.student_side(cfg, rank):
            mesh = Mesh.build(cfg.parallel.tp, cfg.parallel.cp)
            require_same(mesh, "configuration", config_hash(cfg))
            with _run_folder(cfg, mesh) as (folder, opened):
                _Run(request, inputs, choice, mesh, rank, folder, opened, stop).train()
                on_main(mesh, lambda: opened.mark_done() if opened is not None else None)
    return 0


@dataclass(frozen=True, slots=True)
class _Run:
    """A run on a rank of the student. opened: the run folder `folder`, held open on rank 0 only."""

    request: Request
    inputs: Inputs
    choice: PrefixChoice
    mesh: Mesh
    rank: bootstrap.Runtime
    folder: Path
    opened: RunFolder | None
    stop: StopRequest

    @property
    def cfg(self) -> RunConfig:
        return self.request.config

    def train(self) -> None:
        """Build models, engine and trainer, load a checkpoint, train and export."""
        cfg, mesh, device = self.cfg, self.mesh, self.rank.device
        models = self._build_models()
        resume_from = on_main(mesh, lambda: find_start(cfg, self.inputs, self.folder))
        prefix = self._prepare_teacher(models, resume_from)
        loader = build_loader(cfg, self.inputs, mesh, prefix, pin_memory=device.type == "cuda")
        if models.teacher is not None:
            models.teacher.check(loader)
        log_header(cfg, self.inputs, models, mesh, device)
        # After all other engines and groups: DeepSpeed keeps process-wide state of the engine that was built last.
        engine = StudentEngine(models.student, mesh, engine_settings(cfg), device=device)
        origin = None if resume_from is None else resume_from.origin
        checkpoints = Checkpoints(cfg.checkpoint, self.folder, mesh, device, config=as_dict(cfg), origin=origin)
        progress = Progress() if resume_from is None else checkpoints.load(resume_from, engine, loader)
        log_stores(cfg, self.inputs, loader)  # by the stores' numbers in the checkpoint, on which the draws depend
        # After loading: a resume that is refused must leave the folder unchanged.
        on_main(mesh, self._write_about)
        tracker = PhaseTracker(mesh.rank)
        trainer = self._trainer(models, engine, loader, prefix, checkpoints, progress, PhaseTimer(device, tracker))
        try:
            with self._watchdog(cfg.guard, tracker):
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
            on_main(mesh, self._export)

    def _build_models(self) -> Models:
        return build_models(
            self.cfg,
            self.inputs,
            self.mesh,
            self.rank.device,
            trainable=True,
            channel=self.rank.channel,
            on_stop=lambda: self.stop.request("a rank of the dedicated teacher received a stop request"),
        )

    def _prepare_teacher(self, models: Models, resume_from: ResumePoint | None) -> Prefix:
        """Quantise the teacher, decide the sequence prefix and, in a new run, check the teacher against the data.

        A resumed run has the prefix of its checkpoint, and the loader refuses a configuration that names another one;
        for a new stage see `kept_prefix`.
        """
        cfg, choice, mesh, device = self.cfg, self.choice, self.mesh, self.rank.device
        stored = on_main(mesh, lambda: kept_prefix(resume_from, choice))

        def first(prefix: Prefix) -> Batch:
            return next(build_loader(cfg, self.inputs, mesh, prefix, prefetch=0))[0].to(device)

        if cfg.teacher.quantize is not None:
            quantize_teacher(cfg, models, first(choice.likely if stored is None else stored), mesh)
        if stored is not None:
            if resume_from is not None and resume_from.is_stage and stored:
                LOGGER.info("prefix   %s, as in the run that is continued", choice.name(stored))
            return stored if choice.configured is None else choice.configured
        prefix = decide_prefix(cfg, choice, self.inputs, models, mesh, device)
        if models.teacher is not None and cfg.debug.self_check:
            found = check_alignment(models.teacher, first(prefix), models.layout, mesh)
            LOGGER.info("check    teacher's nll on labels %.3f, shifted -1 %.3f, +1 %.3f", *found.values())
        return prefix

    def _trainer(
        self,
        models: Models,
        engine: StudentEngine,
        loader: StepLoader,
        prefix: Prefix,
        checkpoints: Checkpoints,
        progress: Progress,
        timer: PhaseTimer,
    ) -> Trainer:
        cfg, mesh, device = self.cfg, self.mesh, self.rank.device
        sinks, events = on_main(mesh, lambda: self._sinks(progress), share=False) or ([], None)
        cadence = cadence_of(cfg, progress)
        reporter = Reporter(sinks, mesh, device, costs_of(cfg, models, mesh, device), cadence.last_step)
        reporter.resumed(progress)
        validation = Validation(engine, models.teacher, models.layout, mesh)
        return Trainer(
            settings=loop_settings(cfg),
            cadence=cadence,
            mesh=mesh,
            device=device,
            engine=engine,
            objective=build_objective(cfg, engine, models, timer),
            batches=loader,
            evaluator=Evaluator(
                validation, engine, lambda: evaluation_batches(cfg, self.inputs, mesh, prefix), reporter, device
            ),
            checkpoints=checkpoints,
            reporter=reporter,
            guards=Guards(cfg.guard, mesh, device, progress, events, loader.keys),
            timer=timer,
            stop=self.stop,
            progress=progress,
        )

    def _sinks(self, progress: Progress) -> tuple[list[Sink], Events]:
        folder, cfg, step = self.folder, self.cfg, progress.step
        clear_heartbeats(folder)
        jsonl = JsonlSink(folder / "metrics.jsonl", resume_step=step)
        wandb = WandbSink(cfg.log.wandb, folder, name=cfg.run.name, config=as_dict(cfg), resume_step=step)
        found = [JsonlSink(folder / f"{name}.jsonl", resume_step=step, lazy=True) for name in ("skipped", "spikes")]
        return [jsonl, wandb], Events(*found)

    def _watchdog(self, settings: GuardSection, tracker: PhaseTracker) -> AbstractContextManager[object]:
        """Detects on this rank that no rank makes progress; if it ends the run, rank 0 writes the reason to STATUS."""
        if settings.stall_warn_s is None:
            return nullcontext()

        def set_failed(why: str) -> None:
            if self.opened is not None:
                self.opened.set_status("failed", why)

        return Watchdog(
            tracker,
            self.folder,
            self.mesh.world_size,
            teachers=self.rank.roles.teachers,
            warn_s=settings.stall_warn_s,
            exit_s=settings.stall_exit_s,
            on_exit=set_failed,
        )

    def _write_about(self) -> None:
        """On rank 0: write configuration, environment and the files that an export needs to the run folder."""
        assert self.opened is not None
        origins = "".join(f"{key}  {where}\n" for key, where in sorted(self.request.loaded.origins.items()))
        self.opened.write_config(to_yaml(self.cfg), origins)
        self.opened.write_environment(environment_record(world_size=self.request.world_size))
        write_model_files(self.folder, self.inputs.tokenizer_dir, self.cfg.student.weights)

    def _export(self) -> None:
        output = export_checkpoint(self.folder, self.folder / "export", dtype=self.cfg.student.dtype, replace=True)
        LOGGER.info("export   %s", output)


@contextmanager
def _run_folder(cfg: RunConfig, mesh: Mesh) -> Iterator[tuple[Path, RunFolder | None]]:
    """The run folder: its path on every rank and, on rank 0, which locks it, the open folder."""
    run = cfg.run
    opened = on_main(mesh, lambda: RunFolder.open(run.output_dir, run.name, lease_s=run.lock_lease_s), share=False)
    path = Path(cfg.run.output_dir) / cfg.run.name
    with opened if opened is not None else nullcontext(), opened.lock_kept() if opened is not None else nullcontext():
        setup_logging(mesh.rank, path)
        if opened is not None:
            LOGGER.info(headline(environment_record(world_size=mesh.world_size)))
        yield path, opened

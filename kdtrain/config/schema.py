"""Every setting of a run. Standard library only; the string below a field is its documentation (see explain.py).

Sizes are in tokens unless the name says otherwise. `None` means "decide for me" or "off", as documented.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "alpha_beta", "logit_mse"]
Attention = Literal["auto", "eager", "sdpa", "packed", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
Dtype = Literal["float32", "bfloat16"]
Quantization = Literal["int8", "fp8"]


@dataclass(kw_only=True, slots=True)
class RunSection:
    """Identity and life of a run."""

    name: str = "???"
    """Names the run folder `<output_dir>/<name>` and the wandb run."""
    output_dir: str = "runs"
    """Folder that holds run folders."""
    seed: int = 1
    """Seeds initialisation and data order. The same seed gives the same run in any layout."""
    resume: str = "auto"
    """auto: continue from the newest good checkpoint of this run folder, if any. never: refuse a folder that holds
    checkpoints. Anything else: path of a checkpoint to continue from, on the same data in the same order."""
    continue_from: str | None = None
    """Begin a new stage, e.g. of annealing, with the student and the optimizer's state of this checkpoint, or of the
    newest one of this run folder: weights, AdamW's moments and step counts. Steps, tokens, learning-rate schedule and
    data position start at 0, so stores, weights, seq_len, schedule and teacher may differ; student and tokenizer may
    not. The same command repeated resumes the new run."""
    time_limit_s: float | None = None
    """Wall-clock seconds after which the run saves and exits with code 75. null: no limit."""
    lock_lease_s: float | None = 60.0
    """The run touches its LOCK several times in this; a run on another host that finds it untouched for as long takes
    the folder over. null: a LOCK left by a killed run on another host has to be removed by hand."""


@dataclass(kw_only=True, slots=True)
class StudentSection:
    """The trained model: Hugging Face weights, or a named architecture initialised from run.seed."""

    weights: str | None = None
    """Hugging Face model folder to start from. null: initialise `architecture`."""
    architecture: str | None = None
    """A name from `kdtrain.models.architectures`, or a folder or file with a Hugging Face config.json. The
    vocabulary size always comes from the tokenizer of the training store."""
    dtype: Dtype = "bfloat16"
    """Dtype of weights and activations, but for tensors that transformers keeps in float32 (refused at zero.stage 3).
    Master weights and optimizer states are always float32."""
    attention: Attention = "auto"
    """Attention implementation; auto takes the first that works and keeps documents apart: flash_attention_2 on CUDA,
    packed, sdpa, eager; with data.reset_positions=false sdpa before packed (docs/models.md)."""
    activation_checkpointing: bool = False
    """Recompute each layer in backward: less memory, about a third more time."""
    allow_unused_weights: bool = False
    """Start although the files of `weights` hold tensors that have no place in the model, or are marked as quantised
    while their numbers are ordinary (docs/models.md). Parameters that are stored quantised are refused all the same."""


@dataclass(kw_only=True, slots=True)
class TeacherSection:
    """The frozen model."""

    weights: str | None = None
    """Hugging Face model folder. Needed by objective distill, optional (for evaluation only) with pretrain. Its
    tokenizer may differ from the data's in added tokens that the data does not hold."""
    dtype: Dtype = "bfloat16"
    """Dtype of weights and activations, but for tensors that transformers keeps in float32 (routers of mixtures)."""
    attention: Attention = "auto"
    """As student.attention."""
    allow_unused_weights: bool = False
    """As student.allow_unused_weights."""
    layout: Literal["plain", "tp", "dedicated"] = "plain"
    """plain: a whole copy per rank; tp ranks share out the sequences. tp: cut over teacher.tp ranks. dedicated: on
    teacher.ranks ranks of its own, which hold no student and work ahead while the student's ranks train."""
    tp: int | None = None
    """With layout tp: ranks over which the teacher is cut, parallel.tp or a multiple of it; replicas of the student
    then share one teacher; null: parallel.tp. With layout dedicated: ranks that hold one teacher together; null: 1."""
    ranks: int | None = None
    """With layout dedicated: how many of the job's ranks, the last ones, hold only the teacher. They make
    teacher.ranks / teacher.tp teachers, which share out the micro-batches."""
    in_flight: int | None = None
    """With layout dedicated: micro-batches of a data rank that may be under way at a time; each needs room for its
    hidden states in host memory, there and here. null: two per teacher, at least 4."""
    zero_stage: int = 0
    """0: weights stay on every data rank. 3: they are divided among data ranks by ZeRO-3 and gathered layer by layer;
    the teacher then runs once over all micro-batches of a step."""
    offload: bool = False
    """With zero_stage 3: keep the divided weights in host memory."""
    quantize: Quantization | None = None
    """Weights of the decoder's linear layers in 8 bits, one scale per output row, by torchao: int8, or fp8
    (float8_e4m3). Activations, embedding, norms and head keep their dtype. The divergence from the unquantised teacher
    is measured on the first micro-batch. Not with zero_stage 3."""
    max_tokens_per_forward: int | None = None
    """Limit of one forward pass of the teacher on a rank; bounds its activations, never changes the result. With
    zero_stage 3 every pass gathers all weights once. null: a micro-batch, with zero_stage 3 a whole step, at once."""
    overlap: bool = False
    """On CUDA: run the teacher on the next micro-batch while the student learns from the present one, on a second
    stream. Costs the hidden states of one more micro-batch. Anywhere else the same calls are made one by one."""


@dataclass(kw_only=True, slots=True)
class DataSection:
    """Where tokens come from and how many make a step."""

    train: list[str] = field(default_factory=list)
    """Token stores, one path or several to blend."""
    train_weights: list[float] | None = None
    """Share of each store in data.train, normalised to sum 1. null: in proportion to their tokens."""
    validation: str | None = None
    """Token store for evaluation. null: no evaluation."""
    seq_len: int = 1024
    """Tokens per packed sequence. More than either model has positions for is refused, and more than its config names
    (`max_position_embeddings`) warned of."""
    tokens_per_step: int = 524288
    """Tokens per optimizer step over all ranks; a multiple of seq_len * sequences_per_micro_batch * dp."""
    sequences_per_micro_batch: int = 8
    """Sequences per data rank in one forward and backward pass. Changes memory and speed, never the result."""
    reset_positions: bool = True
    """Restart position_ids at each document and hide documents packed together from each other."""
    sequence_prefix: str = "auto"
    """What begins every packed sequence: a token of the tokenizer, none, or auto. auto takes what the teacher's
    tokenizer puts before a text, most often one `<bos>`, if the teacher predicts 64 sequences that begin inside a
    document better with it than without; with student.weights and no teacher, the student's; else none. Decided once,
    when a run begins; a new stage (run.continue_from) without a teacher keeps that of the run it goes on with. A prefix
    takes its place from the seq_len tokens and is not predicted."""
    allow_worse_prefix: bool = False
    """Accept an explicit sequence_prefix with which the teacher is worse by 0.05 nats per token or more."""
    prefetch: int = 2
    """Steps prepared ahead by a background thread; 0 prepares in line."""


@dataclass(kw_only=True, slots=True)
class PretrainObjective:
    """Plain next-token cross-entropy. Has no settings."""


@dataclass(kw_only=True, slots=True)
class DistillObjective:
    """kd_weight * temperature^2 * D(teacher, student) + (1 - kd_weight) * cross-entropy, summed over valid tokens."""

    divergence: Divergence = "forward_kl"
    """forward_kl is KL(teacher || student); reverse_kl is KL(student || teacher); jsd is divided by
    teacher_share * (1 - teacher_share); logit_mse compares centred logits."""
    temperature: float = 1.0
    """Divides both models' logits in the divergence, whose value is multiplied by its square. Not in the CE."""
    kd_weight: float = 0.5
    """Weight of the divergence, in [0, 1]; the cross-entropy on the data gets 1 - kd_weight."""
    teacher_share: float = 0.5
    """jsd: share b of the teacher in the mixture b p + (1 - b) q, in (0, 1)."""
    skew: float = 0.1
    """skew_kl: KL(p || skew p + (1 - skew) q); skew_reverse_kl: KL(q || (1 - skew) p + skew q). In (0, 1)."""
    ab_alpha: float = 0.5
    """alpha_beta: exponent of the teacher; at least 0.01 in size, and ab_alpha + ab_beta above 0."""
    ab_beta: float = 0.5
    """alpha_beta: exponent of the student; at least 0.01 in size."""


@dataclass(kw_only=True, slots=True)
class ObjectiveSection:
    """What the student learns. Only the section named by `name` may be set."""

    name: Literal["pretrain", "distill"] = "distill"
    """pretrain: cross-entropy alone. distill: divergence from a teacher that runs along, plus cross-entropy."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the student's logits, per valid token; 1e-4 is usual, 0: none."""
    pretrain: PretrainObjective = field(default_factory=PretrainObjective)
    """Settings of objective pretrain."""
    distill: DistillObjective = field(default_factory=DistillObjective)
    """Settings of objective distill."""


@dataclass(kw_only=True, slots=True)
class ParallelSection:
    """How ranks share the work. dp is the world size divided by tp and cp."""

    world_size: int | None = None
    """Ranks that the job must have, a dedicated teacher's included; with another number the run is refused. A launcher
    that finds no hostfile starts this node alone. `--check` without a launcher checks for this number. null: as many as
    are started."""
    tp: int = 1
    """Tensor-parallel ranks per replica of the student."""
    sequence: bool = False
    """Megatron sequence parallelism of the student: between attention and MLP blocks each tp rank keeps its share of
    the tokens. The same result from less activation memory, for as many bytes over the network; needs tp > 1."""
    cp: int = 1
    """Context-parallel ranks: they share the sequences of a micro-batch, each holding seq_len / cp consecutive tokens
    of every one, and share out the attention heads (Ulysses), in the student and in the teacher. The query heads on
    each rank must divide by cp. For ZeRO they count as data ranks."""


@dataclass(kw_only=True, slots=True)
class ZeroSection:
    """DeepSpeed ZeRO for the student."""

    stage: Literal[0, 1, 2, 3] = 1
    """0: nothing is partitioned over dp; 1: optimizer states; 2: and gradients; 3: and weights."""
    offload_optimizer: bool = False
    """With stage 1 to 3: keep master weights and AdamW's moments in host memory and run AdamW there: 12 bytes less
    on the device per parameter that ZeRO gives to this rank; but every step waits for the host. It runs on this rank's
    part of the cores, or on OMP_NUM_THREADS threads if that is set (to 1 by torchrun: then it does not count)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Expert: further keys of DeepSpeed's zero_optimization section, e.g. {reduce_bucket_size: 2e8}; only keys
    that trade memory for speed are accepted. Without that one a bucket has 5e8 elements, or as many as a rank has
    parameters; with it, as many as it says, and `--check` prints what they cost."""


@dataclass(kw_only=True, slots=True)
class OptimSection:
    """AdamW."""

    lr: float = 3.0e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    eps: float = 1.0e-8
    """AdamW epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; norms, biases and other vectors get none."""
    grad_clip: float | None = 1.0
    """Largest global gradient norm. null: no clipping."""


@dataclass(kw_only=True, slots=True)
class ScheduleSection:
    """Learning rate as a function of tokens seen."""

    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine or linear decay to the end; wsd stays at the peak, then decays linearly over
    decay_tokens; constant stays."""
    warmup_tokens: int = 0
    """Linear warm-up from 0."""
    decay_tokens: int | None = None
    """wsd: length of the final decay. null: a tenth of train.total_tokens."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""


@dataclass(kw_only=True, slots=True)
class TrainSection:
    """Length of the run and how the loss is computed."""

    total_tokens: int = "???"  # type: ignore[assignment]
    """The run ends once this many tokens (over all ranks, padding and sequence prefixes included) have been seen."""
    slab_bytes: int = 1 << 30
    """Budget in bytes for the loss's temporary logits; larger is faster up to a point."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Backend of the loss's row kernels. auto: triton on CUDA where one row can be launched, else torch; the log says
    why. An explicit choice never falls back."""


@dataclass(kw_only=True, slots=True)
class CheckpointSection:
    """Resumable states."""

    every_steps: int | None = None
    """Steps between checkpoints. null: only at the end and when stopped."""
    keep_last: int = 2
    """How many of the newest checkpoints stay."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this stay for ever, besides; a multiple of every_steps. null: none."""
    async_write: bool = False
    """Copy to host memory (12 bytes per parameter that a rank owns, pinned on CUDA, kept for the whole run) and write
    while training goes on. The next save, a stop and the end of the run wait until it is on disk."""
    export: bool = True
    """Write the finished student as a Hugging Face folder `<run>/export`, without rows of the vocabulary that the run's
    softmax does not have; docs/export.md says what else."""


@dataclass(kw_only=True, slots=True)
class EvalSection:
    """Validation on data.validation."""

    every_steps: int | None = None
    """Steps between evaluations; also run before the first and after the last step. null: only those two."""
    max_tokens: int | None = None
    """Evaluate on at most this many tokens of the store (the same ones each time). null: all."""


@dataclass(kw_only=True, slots=True)
class WandbSection:
    """Weights & Biases."""

    mode: Literal["off", "offline", "online"] = "off"
    """offline needs neither account nor network; the console names the `wandb sync` that uploads all parts of the run
    later, as one curve over optimizer steps."""
    project: str = "kdtrain"
    """Project name."""
    entity: str | None = None
    """Team or user. null: the account's default."""


@dataclass(kw_only=True, slots=True)
class LogSection:
    """Reports."""

    every_steps: int = 10
    """Steps between console lines and metric records (means over the steps between)."""
    wandb: WandbSection = field(default_factory=WandbSection)
    """Weights & Biases sink."""


@dataclass(kw_only=True, slots=True)
class GuardSection:
    """What a long run watches for. Only max_skipped_steps and stall_exit_s ever act; everything else warns."""

    max_skipped_steps: int = 0
    """Consecutive steps with a non-finite loss or gradient that are skipped (weights, optimizer and its step counts
    stay; the step's tokens count as seen) before the run ends with exit code 4. 0: the first one ends it."""
    spike_sigmas: float | None = 6.0
    """Warn of a step whose loss is this many standard deviations above the mean of up to 100 steps before it. Looked
    at when steps are reported or saved. null: off."""
    stall_warn_s: float | None = 300.0
    """Seconds a step, an evaluation or a save may take before every rank names those that are behind. null: nobody
    watches."""
    stall_exit_s: float | None = None
    """Seconds after which a rank that waits shows what all ranks were doing, its stack traces, and exits with code 1.
    null: collectives end the wait (DEEPSPEED_TIMEOUT minutes)."""
    data_wait_share: float = 0.1
    """Warn when a rank waits for data during more than this share of the steps' time. 1: never."""


@dataclass(kw_only=True, slots=True)
class DebugSection:
    """Switches for finding faults."""

    check_replicas: bool = False
    """Compare the micro-batches of all tp ranks, element for element, and the borders of cp ranks' parts, each step;
    slow."""
    deterministic: bool = False
    """Use only operations that give the same bits twice: slower, with more memory, and an operation that has no such
    form ends the run. Without it attention's backward on CUDA adds in an order that varies, so a resumed run differs
    in rounding; on the CPU it changes no number. It does not control the order in which NCCL adds."""
    self_check: bool = True
    """Before the first step: label cross-entropy of the teacher must beat its +-1 shifts, and tokenizers must agree."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A whole run."""

    run: RunSection = field(default_factory=RunSection)
    """Identity and life of the run."""
    student: StudentSection = field(default_factory=StudentSection)
    """The trained model."""
    teacher: TeacherSection = field(default_factory=TeacherSection)
    """The frozen model."""
    data: DataSection = field(default_factory=DataSection)
    """Tokens."""
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    """What to learn."""
    parallel: ParallelSection = field(default_factory=ParallelSection)
    """Layout."""
    zero: ZeroSection = field(default_factory=ZeroSection)
    """DeepSpeed ZeRO."""
    optim: OptimSection = field(default_factory=OptimSection)
    """Optimizer."""
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    """Learning rate."""
    train: TrainSection = field(default_factory=TrainSection)
    """Length."""
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    """Resumable states."""
    eval: EvalSection = field(default_factory=EvalSection)
    """Validation."""
    log: LogSection = field(default_factory=LogSection)
    """Reports."""
    guard: GuardSection = field(default_factory=GuardSection)
    """Watching a long run."""
    debug: DebugSection = field(default_factory=DebugSection)
    """Fault finding."""

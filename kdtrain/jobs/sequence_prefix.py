"""data.sequence_prefix: the ids at the beginning of every packed sequence, decided once per run, if needed measured.

Most sequences of a packed stream begin inside a document, where the text has no <bos>. A model that was never trained
on text without it (Gemma: its perplexity explodes) is then a wrong teacher for a part of all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.config.schema import RunConfig
from kdtrain.data.context import cut_sequences
from kdtrain.data.order import BlendOrder, numbering_of
from kdtrain.data.packing import Packed, PackingSpec, num_sequences, pack_from, sequence_keys, stack
from kdtrain.data.token_store import TokenStore
from kdtrain.data.tokenizer import document_prefix, load_tokenizer
from kdtrain.distributed.collectives import gather_objects, reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import HeadShard
from kdtrain.errors import ConfigError, DataError, KdtrainError, StoreMismatch
from kdtrain.jobs.build.models import Models
from kdtrain.jobs.inputs import Inputs
from kdtrain.log import LOGGER
from kdtrain.models.backbone import call_with_head
from kdtrain.teacher.signal import DenseSignal
from kdtrain.teacher.signal_measures import nll_sums

NUM_SEQUENCES = 64
"""Sequences that the measurement uses."""
MAX_SEARCHED = 4096
"""Sequences that are searched for those that begin inside a document."""
TOLERANCE = 0.05
"""An explicit choice must be worse than the best prefix by less than this, in nats per token."""

Prefix = tuple[int, ...]
"""Ids at the beginning of every sequence; () for none."""


@dataclass(frozen=True, slots=True)
class PrefixChoice:
    """The setting data.sequence_prefix, and the prefixes to choose from.

    configured: the ids that it names; None: auto. usual: ids that the tokenizer of the measured model puts before a
    text, or else those before the stores' documents. model: the one to measure, "teacher" or "student"; None: none.
    tokenizer: of the stores.
    """

    configured: Prefix | None
    usual: Prefix
    model: str | None
    tokenizer: Tokenizer

    @property
    def rivals(self) -> list[Prefix]:
        """The prefixes to measure, the empty one first; if there are fewer than two, nothing is measured."""
        if self.model is None or (self.configured is not None and self.model != "teacher"):
            return []
        return list(dict.fromkeys([(), self.usual, self.configured or ()]))

    @property
    def likely(self) -> Prefix:
        """The prefix that the run will most likely have, without a measurement."""
        return self.usual if self.configured is None else self.configured

    def name(self, prefix: Prefix) -> str:
        """A prefix for messages: "'<bos>' (id 2)", "no prefix"."""
        return " ".join(f"{self.tokenizer.id_to_token(token)!r} (id {token})" for token in prefix) or "no prefix"

    def line(self) -> str | None:
        """What a new run will do, for --check; None without any prefix."""
        names = ", ".join(self.name(prefix) for prefix in self.rivals)
        if len(self.rivals) > 1 and self.configured is None:
            return f"auto: a new run measures the {self.model} with {names} and takes the better"
        if len(self.rivals) > 1:
            return f"{self.name(self.likely)}: a new run measures the teacher with {names} and refuses a worse choice"
        return self.name(self.likely) if self.likely else None


def prefix_choice(cfg: RunConfig, inputs: Inputs) -> PrefixChoice:
    """Read data.sequence_prefix and the tokenizer of the model that a new run will measure.

    That is the teacher, or else a student that starts from weights; without either, auto means none. Reads files only.
    Raises ConfigError for a token that the tokenizer lacks or a prefix as long as a sequence, StoreMismatch for one
    with different ids in different models.
    """
    named, folder = cfg.data.sequence_prefix, inputs.tokenizer_dir
    tokenizer = load_tokenizer(folder)
    configured: Prefix | None = () if named == "none" else None
    if named not in ("auto", "none"):
        token = tokenizer.token_to_id(named)
        if token is None:
            raise ConfigError(
                f"data.sequence_prefix = {named}: {folder} has no such token\n"
                "  fix: name a token of the tokenizer, or auto (the teacher's own, measured), or none"
            )
        configured = (token,)
        require_shared(configured, inputs, f"data.sequence_prefix = {named}")
    weights = cfg.teacher.weights or cfg.student.weights
    model = None if weights is None else "teacher" if cfg.teacher.weights is not None else "student"
    usual: Prefix = () if weights is None else tuple(document_prefix(weights))
    if weights is not None and not usual:  # a tokenizer that adds nothing, before which `--bos TOKEN` put something
        usual = tuple(inputs.train[0].manifest.document_prefix)
    if configured is None:
        require_shared(usual, inputs, f"data.sequence_prefix = auto: the tokenizer of {model}.weights = {weights}")
    elif any(_unshared_reason(token, inputs) for token in usual):
        usual = ()
    found = PrefixChoice(configured, usual, model, tokenizer)
    for prefix in (found.likely, *found.rivals):
        PackingSpec(cfg.data.seq_len, cfg.data.reset_positions, prefix)
    return found


def require_shared(prefix: Prefix, inputs: Inputs, what: str) -> None:
    """Raise StoreMismatch for ids of `prefix` that are not in the softmax or differ between the tokenizers.

    what: the origin of the prefix, for the message. On a GPU the embedding would return an untrained row, or that of
    another token, without an error.
    """
    for token in prefix:
        if (why := _unshared_reason(token, inputs)) is not None:
            raise StoreMismatch(
                f"{what} puts the id {token} before sequences: {why}\n"
                "  why: an id must mean one token to teacher and student and have a row in both\n"
                "  fix: prepare the corpus with a tokenizer whose prefix all models have, use a model that has it, or "
                "set data.sequence_prefix=none"
            )


def _unshared_reason(token: int, inputs: Inputs) -> str | None:
    outside = f"the softmax of the run has {inputs.vocab_size} ids" if token >= inputs.vocab_size else None
    return inputs.unshared.get(token, outside)


@dataclass(frozen=True, slots=True)
class Measured:
    """nll: nats per token of a model with each prefix, on the same num_tokens labels of num_sequences sequences."""

    nll: dict[Prefix, float]
    num_tokens: int
    num_sequences: int


def decide_prefix(
    cfg: RunConfig, choice: PrefixChoice, inputs: Inputs, models: Models, mesh: Mesh, device: torch.device
) -> Prefix:
    """The prefix of a new run, measured if there is a choice; logs one line.

    Every rank of the student must call it, before the student has an engine; all get the same result. Communicates as
    `measure_prefixes`. Raises ConfigError, on all ranks, for an explicit choice that is worse than another one by
    TOLERANCE or more, unless data.allow_worse_prefix.
    """
    rivals = choice.rivals
    if len(rivals) < 2:
        stored = tuple(inputs.train[0].manifest.document_prefix)
        if choice.configured is None and choice.model is None and stored:
            LOGGER.info("prefix   auto: none before sequences, as there are no weights of a model to measure with")
        return choice.likely
    found = measure_prefixes(nll_function(models), rivals, inputs.train, cfg, mesh, device)
    if found is None:
        taken = choice.configured or ()
        LOGGER.info("prefix   %s: no sequence of data.train begins inside a document", choice.name(taken))
        return taken
    return _choose(cfg, choice, found)


def _choose(cfg: RunConfig, choice: PrefixChoice, found: Measured) -> Prefix:
    """The best prefix, or the configured one; logs all numbers. Raises ConfigError as `decide_prefix`."""
    values, key = found.nll, "data.sequence_prefix"
    best = min(values, key=lambda prefix: values[prefix] if math.isfinite(values[prefix]) else math.inf)
    taken = best if choice.configured is None else choice.configured
    numbers = ", ".join(f"{value:.3f} with {choice.name(prefix)}" for prefix, value in values.items())
    where = f"{found.num_tokens} tokens of {found.num_sequences} sequences that begin inside a document"
    numbers = f"{choice.model}'s nll {numbers} ({where})"
    worse = math.isfinite(values[best]) and not values[taken] - values[best] < TOLERANCE
    if worse and not cfg.data.allow_worse_prefix:
        raise ConfigError(
            f"{key} = {cfg.data.sequence_prefix} is worse than {choice.name(best)}\n  {numbers}\n"
            f"  why: {TOLERANCE} nats or more are lost in the targets of the student\n"
            f"  fix: set {key}=auto, which takes the better, or data.allow_worse_prefix=true"
        )
    LOGGER.info("prefix   %s: %s", choice.name(taken), numbers)
    return taken


def nll_function(models: Models) -> Callable[[Batch], Tensor]:
    """A function from a batch to the summed cross-entropy of the teacher, or else the student; communicates over tp."""
    teacher, student, layout = models.teacher, models.student, models.layout
    if teacher is not None:
        return lambda batch: nll_sums(teacher.signal(batch), [batch.labels], batch.loss_mask, layout)[0]

    def of_student(batch: Batch) -> Tensor:
        def head_fn(hidden: Tensor, head: HeadShard) -> Tensor:
            return nll_sums(DenseSignal(hidden, head), [batch.labels], batch.loss_mask, layout)[0]

        trains = student.training
        student.eval()  # no dropout in a measurement
        try:
            return call_with_head(student, batch, head_fn)
        finally:
            student.train(trains)

    return of_student


@torch.no_grad()
def measure_prefixes(
    nll: Callable[[Batch], Tensor],
    prefixes: Sequence[Prefix],
    stores: Sequence[TokenStore],
    cfg: RunConfig,
    mesh: Mesh,
    device: torch.device,
) -> Measured | None:
    """A model's nll with each of `prefixes` before the same tokens; None if no sequence begins inside a document.

    Uses the first NUM_SEQUENCES sequences of the run's order that begin inside a document, fewer in a small corpus. The
    compared labels are those that every form predicts: with reset_positions only those of the document that was cut, as
    later documents of a sequence do not attend to the prefix.
    nll: see `nll_function`; every rank calls it equally often, with batches of one shape of at most
    data.sequences_per_micro_batch sequences. Communicates as `nll` does, one gather of errors over the world and one
    all-reduce over dp and cp. If one rank cannot read its data, all others raise DataError.
    """
    d = cfg.data
    batches: list[list[Batch]] = []
    places: list[tuple[int, int]] = []
    failure: Exception | None = None
    try:
        packing = PackingSpec(d.seq_len, d.reset_positions, max(prefixes, key=len))
        places = sequences_inside(stores, packing, d.train_weights, cfg.run.seed)
        batches = list(_batches(stores, places, prefixes, packing, d.sequences_per_micro_batch, mesh))
    except (KdtrainError, OSError) as error:
        failure = error
    # All ranks share their errors: a rank that raised alone would leave the others in a collective of the model.
    texts = gather_objects(None if failure is None else str(failure), mesh.world_group)
    if failure is not None:
        raise failure
    if (other := next((text for text in texts if text is not None), None)) is not None:
        raise DataError(other)
    if not places:
        return None
    sums = torch.zeros(len(prefixes) + 1, dtype=torch.float64, device=device)
    for forms in batches:
        for number, batch in enumerate(forms):
            sums[number] += nll(batch.to(device))
        sums[-1] += forms[0].loss_mask.sum(dtype=torch.float64).to(device)
    # the means are over the tokens of all data ranks, and all ranks must choose the same prefix
    *totals, count = reduce_sum_(sums, mesh.zero_group).tolist()
    means = (total / max(count, 1.0) for total in totals)
    return Measured(dict(zip(prefixes, means, strict=True)), int(count), len(places))


def sequences_inside(
    stores: Sequence[TokenStore], packing: PackingSpec, weights: Sequence[float] | None, seed: int
) -> list[tuple[int, int]]:
    """(store, sequence) of the first NUM_SEQUENCES in a run's order that begin inside a document, each once.

    The document has room for the whole prefix before the sequence, and a label in it. Searches MAX_SEARCHED sequences.
    """
    sizes = [num_sequences(store, packing) for store in stores]
    numbering = numbering_of([store.manifest.fingerprint for store in stores])
    order, room = BlendOrder(sizes, weights, seed, numbering), max(1, len(packing.sequence_prefix))
    found: dict[tuple[int, int], None] = {}
    for position in range(min(MAX_SEARCHED, 2 * sum(sizes))):
        store, sequence = order[position]
        start = sequence * packing.stride
        if len(stores[store].document_starts(max(0, start - room + 1), start + 2)) == 0:
            found[store, sequence] = None
        if len(found) == NUM_SEQUENCES:
            break
    return list(found)


def _batches(
    stores: Sequence[TokenStore],
    places: list[tuple[int, int]],
    prefixes: Sequence[Prefix],
    packing: PackingSpec,
    most: int,
    mesh: Mesh,
) -> Iterator[list[Batch]]:
    """This data rank's share of `places` in batches of at most `most`: for each its form with every prefix."""
    keys = [sequence_keys(store, packing) for store in stores]
    rows = max(1, min(most, -(-len(places) // mesh.dp_size)))
    for start in range(0, len(places), rows * mesh.dp_size):
        first = start + mesh.dp_rank * rows
        mine = places[first : first + rows]
        filled = [*mine, *places[:1] * (rows - len(mine))]
        ids = [keys[store].key(sequence) for store, sequence in filled]
        forms = []
        for prefix in prefixes:
            batch = stack([_form(stores[store], k, packing, prefix) for store, k in filled], ids)
            batch.loss_mask[len(mine) :] = 0.0
            forms.append(cut_sequences(batch, mesh.cp_rank, mesh.cp_size))
        yield forms


def _form(store: TokenStore, sequence: int, packing: PackingSpec, prefix: Prefix) -> Packed:
    """The tokens of a sequence of `packing` after another prefix; labels that are not compared are masked."""
    start = sequence * packing.stride
    ids, labels, mask, positions = pack_from(store, start, replace(packing, sequence_prefix=prefix))
    begins = store.document_starts(start, start + packing.stride) - start
    first = int(begins[0]) if len(begins) and packing.reset_positions else packing.stride
    mask[len(prefix) + first :] = 0.0
    return ids, labels, mask, positions

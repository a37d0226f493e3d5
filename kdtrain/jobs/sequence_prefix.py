"""data.sequence_prefix: what begins every packed sequence of a run, decided once, by measuring a model where need be.

A sequence of a packed stream mostly begins inside a document, where the text has no <bos>. Models that have never seen
text without it (Gemma's perplexity explodes) are then wrong teachers for a part of all tokens.
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
from kdtrain.data.order import STORE_SHIFT, BlendOrder
from kdtrain.data.packing import Packed, Packing, num_sequences, pack_from, stack
from kdtrain.data.token_store import TokenStore
from kdtrain.data.tokenizer import document_prefix, load_tokenizer
from kdtrain.distributed.collectives import gather_objects, reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import HeadShard
from kdtrain.errors import ConfigError, DataError, KdtrainError, StoreMismatch
from kdtrain.jobs.build.models import Models
from kdtrain.jobs.inputs import Inputs
from kdtrain.jobs.self_check import nll_sum
from kdtrain.log import LOGGER
from kdtrain.models.backbone import call_with_head
from kdtrain.teacher.signal import DenseSignal

NUM_SEQUENCES = 64
"""Measured on."""
MOST_LOOKED_AT = 4096
"""Sequences among which those that begin inside a document are looked for."""
TOLERANCE = 0.05
"""Nats per token by which an explicit choice must not be worse than another one."""

Prefix = tuple[int, ...]
"""Ids at the beginning of every sequence; () for none."""


@dataclass(frozen=True, slots=True)
class PrefixChoice:
    """What data.sequence_prefix says, and what there is to choose from.

    configured: the ids that it names; None: auto. usual: ids that the tokenizer of the measured model puts before a
    text, or else those before the stores' documents. model: which one that is, "teacher" or "student"; None: nothing to
    measure. tokenizer: of the stores.
    """

    configured: Prefix | None
    usual: Prefix
    model: str | None
    tokenizer: Tokenizer

    @property
    def rivals(self) -> list[Prefix]:
        """The prefixes to measure, no prefix first; fewer than two: nothing is measured."""
        if self.model is None or (self.configured is not None and self.model != "teacher"):
            return []
        return list(dict.fromkeys([(), self.usual, self.configured or ()]))

    @property
    def likely(self) -> Prefix:
        """The prefix before anything is measured."""
        return self.usual if self.configured is None else self.configured

    def name(self, prefix: Prefix) -> str:
        """A prefix in words: "'<bos>' (id 2)", "no prefix"."""
        return " ".join(f"{self.tokenizer.id_to_token(token)!r} (id {token})" for token in prefix) or "no prefix"

    def line(self) -> str | None:
        """What a new run will do, for --check; None if there is nothing to say."""
        names = ", ".join(self.name(prefix) for prefix in self.rivals)
        if len(self.rivals) > 1 and self.configured is None:
            return f"auto: a new run measures the {self.model} with {names} and takes the better"
        if len(self.rivals) > 1:
            return f"{self.name(self.likely)}: a new run measures the teacher with {names} and refuses a worse choice"
        return self.name(self.likely) if self.likely else None


def prefix_choice(cfg: RunConfig, inputs: Inputs) -> PrefixChoice:
    """Read data.sequence_prefix and the tokenizer of the model that a new run will measure.

    That is the teacher, or else a student that begins with weights; auto means none without either. Reads files only.
    Raises ConfigError for a token that the tokenizer has not or a prefix as long as a sequence, StoreMismatch for one
    that not all models know as the same tokens.
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
    elif any(_why_not(token, inputs) for token in usual):
        usual = ()
    found = PrefixChoice(configured, usual, model, tokenizer)
    for prefix in (found.likely, *found.rivals):
        Packing(cfg.data.seq_len, cfg.data.reset_positions, prefix)
    return found


def require_shared(prefix: Prefix, inputs: Inputs, what: str) -> None:
    """Raise StoreMismatch for ids of `prefix` that are not in the softmax or are not one token to all; what: its
    origin. In the embedding of a GPU such an id would be an untrained row, or another token, without a word."""
    for token in prefix:
        if (why := _why_not(token, inputs)) is not None:
            raise StoreMismatch(
                f"{what} puts the id {token} before sequences: {why}\n"
                "  why: an id must mean one token to teacher and student and have a row in both\n"
                "  fix: prepare the corpus with a tokenizer whose prefix all models have, use a model that has it, or "
                "set data.sequence_prefix=none"
            )


def _why_not(token: int, inputs: Inputs) -> str | None:
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
    """The prefix of a new run, measured if there is a choice, and one line that says so.

    Every rank of the student must call it, before the student has an engine; all get the same. Communicates as
    `measure_prefixes`. Raises ConfigError, on all ranks, for an explicit choice that is TOLERANCE or more worse than
    another one, unless data.allow_worse_prefix.
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
    return _judged(cfg, choice, found)


def _judged(cfg: RunConfig, choice: PrefixChoice, found: Measured) -> Prefix:
    """The better prefix, or the configured one, and a line with all numbers; ConfigError as `decide_prefix`."""
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
            f"  why: {TOLERANCE} nats or more are lost in the targets that the student learns from\n"
            f"  fix: set {key}=auto, which takes the better, or data.allow_worse_prefix=true"
        )
    LOGGER.info("prefix   %s: %s", choice.name(taken), numbers)
    return taken


def nll_function(models: Models) -> Callable[[Batch], Tensor]:
    """Summed cross-entropy on a batch's labels that count, of the teacher or else the student; communicates over tp."""
    teacher, student, layout = models.teacher, models.student, models.layout
    if teacher is not None:
        return lambda batch: nll_sum(teacher.signal(batch), batch.labels, batch.loss_mask, layout)

    def of_student(batch: Batch) -> Tensor:
        def head_fn(hidden: Tensor, head: HeadShard) -> Tensor:
            return nll_sum(DenseSignal(hidden, head), batch.labels, batch.loss_mask, layout)

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

    The sequences are the first NUM_SEQUENCES of the run's order that begin inside a document, fewer in a small corpus.
    Compared are labels that all forms predict: with reset_positions those of the document that was cut, as later
    documents of a sequence do not see the prefix; else all. nll: see `nll_function`; called equally often with batches
    of one shape on every rank, at most data.sequences_per_micro_batch sequences at a time. Communicates as it does,
    one gather of errors over the world and one all-reduce over dp and cp. Data that one rank cannot read are a
    DataError on all others.
    """
    d = cfg.data
    batches: list[list[Batch]] = []
    places: list[tuple[int, int]] = []
    failure: Exception | None = None
    try:
        packing = Packing(d.seq_len, d.reset_positions, max(prefixes, key=len))
        places = sequences_inside(stores, packing, d.train_weights, cfg.run.seed)
        batches = list(_batches(stores, places, prefixes, packing, d.sequences_per_micro_batch, mesh))
    except (KdtrainError, OSError) as error:
        failure = error
    # no rank may wait in a collective of the model for one that cannot read its data
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
    *totals, count = reduce_sum_(sums, mesh.zero_group).tolist()
    means = (total / max(count, 1.0) for total in totals)
    return Measured(dict(zip(prefixes, means, strict=True)), int(count), len(places))


def sequences_inside(
    stores: Sequence[TokenStore], packing: Packing, weights: Sequence[float] | None, seed: int
) -> list[tuple[int, int]]:
    """(store, sequence) of the first NUM_SEQUENCES in a run's order that begin inside a document, each once.

    With room for the whole prefix before the place in its document, and a label behind it. Looks at MOST_LOOKED_AT.
    """
    sizes = [num_sequences(store, packing) for store in stores]
    order, room = BlendOrder(sizes, weights, seed), max(1, len(packing.sequence_prefix))
    found: dict[tuple[int, int], None] = {}
    for position in range(min(MOST_LOOKED_AT, 2 * sum(sizes))):
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
    packing: Packing,
    most: int,
    mesh: Mesh,
) -> Iterator[list[Batch]]:
    """This data rank's share of `places`, at most `most` at a time: per batch its form with each of the prefixes."""
    rows = max(1, min(most, -(-len(places) // mesh.dp_size)))
    for start in range(0, len(places), rows * mesh.dp_size):
        first = start + mesh.dp_rank * rows
        mine = places[first : first + rows]
        filled = [*mine, *places[:1] * (rows - len(mine))]
        ids = [store << STORE_SHIFT | sequence for store, sequence in filled]
        forms = []
        for prefix in prefixes:
            batch = stack([_form(stores[store], k, packing, prefix) for store, k in filled], ids)
            batch.loss_mask[len(mine) :] = 0.0
            forms.append(cut_sequences(batch, mesh.cp_rank, mesh.cp_size))
        yield forms


def _form(store: TokenStore, sequence: int, packing: Packing, prefix: Prefix) -> Packed:
    """The tokens of a sequence of `packing` behind another prefix; only the labels that are compared count."""
    start = sequence * packing.stride
    ids, labels, mask, positions = pack_from(store, start, replace(packing, sequence_prefix=prefix))
    begins = store.document_starts(start, start + packing.stride) - start
    first = int(begins[0]) if len(begins) and packing.reset_positions else packing.stride
    mask[len(prefix) + first :] = 0.0
    return ids, labels, mask, positions

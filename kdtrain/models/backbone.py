"""The interface to a stock Hugging Face causal language model: hidden states and a head shard.

No method ever forms logits. T = B * S tokens, D width, v rows of the vocabulary on this rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from kdtrain.batch import Batch
from kdtrain.distributed.collectives import Group, group_size
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.documents import Documents
from kdtrain.errors import ConfigError
from kdtrain.models.attention import ONE_MASK, common_name
from kdtrain.models.context import ARGUMENT, PREFIX, Context, needs_mask, whole_sequences
from kdtrain.models.info import ModelInfo, info_of
from kdtrain.models.ties import kept_name
from kdtrain.parallel.layers import LmHead
from kdtrain.parallel.plan import vocabulary_modules
from kdtrain.parallel.shard_spec import ShardSpec

R = TypeVar("R")
HeadFn = Callable[[Tensor, HeadShard], R]


class Backbone(nn.Module):
    """The model, already cut for this rank (`kdtrain.parallel.shard_model`).

    model: the stock model, its embedding and head replaced. config: its Hugging Face config, of the full model.
    shard: this rank's vocabulary rows; equal to the head's. cuts: how each sharded parameter is cut, by Hugging Face
    name; a name that is absent is replicated over tp. cp_group: the ranks that hold parts of the same sequences, in
    order (`kdtrain.models.context`); None: batches hold whole ones. implementation: the attention of a run, if it
    differs from config: a model whose device is not known yet does not have flash-attention set.
    """

    def __init__(
        self,
        model: Any,
        shard: VocabShard,
        cuts: dict[str, ShardSpec],
        cp_group: Group = None,
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.config: Any = model.config
        self.shard = shard
        self.cuts = cuts
        self.cp_group = cp_group
        self._implementation = implementation
        self.elements_read = 0
        """Elements of weight files that this rank read to fill the model."""
        self._info: ModelInfo | None = None
        self._head_name = vocabulary_modules(model)[1]
        # Recorded now, because under ZeRO-3 parameters lose their shapes.
        self._full_shapes = {
            name: cuts[name].full_shape(tuple(param.shape)) if name in cuts else tuple(param.shape)
            for name, param in self.hf_parameters()
        }

    @property
    def attention(self) -> str:
        """The attention implementation in use, by its documented name."""
        return common_name(str(self.config._attn_implementation))

    @property
    def implementation(self) -> str:
        """The attention implementation of a run, by its name in a model's config, without the prefix for context
        parallelism."""
        return self._implementation or str(self.config._attn_implementation).removeprefix(PREFIX)

    @property
    def lm_head_module(self) -> LmHead:
        """The module that owns the head's weight; ZeRO-3 gathers it while this module runs."""
        return cast(LmHead, self.model.get_submodule(self._head_name))

    @property
    def lm_head_shard(self) -> HeadShard:
        """This rank's rows of the head. Raises ParallelError under ZeRO-3, where only `forward` can reach them."""
        return self.lm_head_module.head_shard()

    def hidden_states(self, batch: Batch) -> Tensor:
        """[T, D], output of the final norm, replicated over tp.

        Documents packed into one sequence do not attend to each other: position_ids restart, and neither a cache nor an
        attention mask is passed, because with either of them transformers would silently let documents attend to each
        other. Whether that is enough for this architecture is measured by `kdtrain.models.probe` when it is loaded.
        Raises ConfigError when the model returns a cache although none was requested, ValueError for documents of
        another batch. Communicates over tp: one all-reduce for the embedding and two per layer; in backward two per
        layer. Over cp: two all-to-alls per layer, in backward two per layer; one all-gather of position_ids where
        attention needs masks or batch.documents are not known. Where they are known, attention=packed does not
        synchronise the device.
        """
        if batch.position_ids.shape != batch.input_ids.shape:
            raise ValueError(
                f"position_ids {tuple(batch.position_ids.shape)} vs input_ids {tuple(batch.input_ids.shape)}"
            )
        out = self.model.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            use_cache=False,
            **self._attention_arguments(batch),
        )
        # transformers 5.23 has past_key_values; 5.24 has cache, and warns on access by the other name
        if any(vars(out).get(name) is not None for name in ("cache", "past_key_values")):
            raise ConfigError(
                f"{type(self.model).__name__} returns a cache although use_cache is False\n"
                "  why: a cache switches off the separation of packed documents\n  fix: use another architecture"
            )
        return cast(Tensor, out.last_hidden_state.flatten(0, 1))

    def forward(self, batch: Batch, head_fn: HeadFn[Any]) -> Any:
        """head_fn(hidden_states [T, D], this rank's HeadShard), called inside the head's module.

        Communicates and raises as `hidden_states`, and what head_fn communicates. Under ZeRO-3 use `call_with_head`,
        which works everywhere.
        """
        return self.lm_head_module(self.hidden_states(batch), head_fn)

    def hf_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(Hugging Face name, this rank's parameter), tied ones once, under the name that `save_pretrained` keeps."""
        for name, param in self.model.named_parameters():
            yield kept_name(self.model, name), param

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every full, unpadded parameter, by the names of `hf_parameters`; also under ZeRO-3."""
        return dict(self._full_shapes)

    def num_parameters(self) -> int:
        """Parameters of the full model over all tp ranks, tied ones once, padding not counted."""
        return sum(torch.Size(shape).numel() for shape in self._full_shapes.values())

    def info(self) -> ModelInfo:
        """Config and size of the full model, cached on the first call because ZeRO-3 removes shapes."""
        if self._info is None:
            dtypes = {name: param.dtype for name, param in self.hf_parameters()}
            self._info = info_of(self.model, self._full_shapes, dtypes)
        return self._info

    def _attention_arguments(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments for attention over whole sequences: a `Context` for kdtrain's attention functions, explicit
        document boundaries for flash-attention, which detects packing only in batches of one."""
        attention = str(self.config._attn_implementation)
        stock = attention.removeprefix(PREFIX)
        flash = stock.startswith("flash")
        if attention in ("sdpa", "eager", ONE_MASK):
            return {}
        position_ids, documents = None, batch.documents
        if documents is None or needs_mask(stock):
            position_ids = whole_sequences(batch.position_ids, self.cp_group)
            documents = Documents.of(position_ids) if documents is None else documents
        whole = (batch.input_ids.shape[0], batch.input_ids.shape[1] * group_size(self.cp_group))
        if documents.shape != whole:
            raise ValueError(f"documents of sequences {documents.shape} in a batch of {whole}")
        found: dict[str, Any] = {}
        if not flash or attention != stock:
            found[ARGUMENT] = Context(self.cp_group, position_ids, documents)
        if not flash:
            return found
        return found | {
            "cu_seq_lens_q": documents.offsets,
            "cu_seq_lens_k": documents.offsets,
            "max_length_q": documents.longest,
            "max_length_k": documents.longest,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """As nn.Module, but float32 buffers stay float32: RoPE frequencies in bfloat16 are wrong by 0.4 percent."""
        buffers = [(m, key, buf) for m in self.modules() for key, buf in m._buffers.items() if buf is not None]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, key, before in buffers:
            after = module._buffers[key]
            if before.dtype == torch.float32 and after is not None and after.dtype != before.dtype:
                module._buffers[key] = before.to(after.device)
        return self


def call_with_head(model: Callable[..., Any], batch: Batch, head_fn: HeadFn[R]) -> R:
    """What `head_fn` returns, computed inside the head of `model`: a Backbone, or a DeepSpeed engine around one.

    DeepSpeed's hooks look for tensors in tensors, tuples, lists and dicts only. So of a dataclass (LossParts) just the
    fields that carry a gradient leave the modules, as a tuple, and are put back afterwards.
    """
    answers: list[tuple[Any, tuple[str, ...]]] = []

    def plain(hidden: Tensor, head: HeadShard) -> Any:
        answer = head_fn(hidden, head)
        if not dataclasses.is_dataclass(answer):
            answers.append((answer, ()))
            return answer
        values = {f.name: getattr(answer, f.name) for f in dataclasses.fields(answer)}
        names = tuple(name for name, value in values.items() if isinstance(value, Tensor) and value.requires_grad)
        answers.append((answer, names))
        return tuple(values[name] for name in names)

    output = model(batch, plain)
    answer, names = answers.pop()
    if dataclasses.is_dataclass(answer):
        output = dataclasses.replace(answer, **dict(zip(names, output, strict=True)))  # type: ignore[type-var]
    return cast(R, output)

"""Measure, before a weight is read, whether a model satisfies kdtrain's assumptions. Nothing here communicates.

Three assumptions would otherwise fail silently: documents packed into one sequence do not attend to each other, no
token depends on a later one, and the logits are those that `HeadShard` defines. Each depends on code in transformers
that differs between architectures (attention masks come from position_ids, but states of recurrent layers and learned
positions do not), so each is measured on a tiny random copy of the config to be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.errors import ConfigError
from kdtrain.models.backbone import Backbone
from kdtrain.models.shrink import FULL_WIDTH, VOCAB_SIZE, num_layers, tiny_settings
from kdtrain.models.stock import BUILD_ERRORS, parameters_on_meta
from kdtrain.parallel.plan import plan_shards
from kdtrain.parallel.shard import shard_model

M = TypeVar("M")

LARGEST_COPY = 1_000_000_000
"""Parameters of the largest narrowed copy that is built and run: 20 seconds on one core, 4 GB. All but Phi-4-multimodal
(0.87 billion, its parts beside the language model) and LongCat-Flash (1.06 billion) have less than a tenth."""

LARGEST_WIDE_COPY = 30_000_000
"""Parameters of the largest copy of full width, which is tried last: about a second on one core."""

TOLERANCE = 1e-4
"""Largest relative difference that still counts as float32 rounding."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Largest differences, each relative to the largest value of the tensor that is compared; 0 means none.

    leak: a document's hidden states, when the document before it changes. joined: the same with positions that do not
    restart, where a difference is expected. future: hidden states before a changed token. logits: kdtrain's against the
    stock model's.
    """

    leak: float
    joined: float
    future: float
    logits: float


_KNOWN: dict[str, Findings] = {}


def check_model(model: Any, source: str, *, packed: bool = True) -> None:
    """Raise ConfigError unless the architecture of `model` separates documents, is causal and has a known head.

    model: the stock model, parameters possibly on meta; it is not run. source: its name in messages. packed: whether
    position_ids restart at documents, which then must not attend to each other. Builds and runs a tiny random copy on
    the CPU, once per process and config; leaves torch's random state unchanged.
    """
    found = measure(model, source)
    kind = f"{source} has model_type {model.config.model_type!r}"
    if found.future > TOLERANCE:
        raise ConfigError(
            f"{kind}, whose tokens see later tokens: changing the last one changes hidden states before it by "
            f"{found.future:.2g} of their size\n"
            "  why: it would be trained on, and distilled from, the token it has to predict\n"
            "  fix: use a decoder-only model (for a BERT-like one, a config with is_decoder=true)"
        )
    if found.logits > TOLERANCE:
        raise ConfigError(
            f"{kind}, whose logits are not those of its last hidden states and head as kdtrain computes them: they "
            f"differ by {found.logits:.2g} of their size\n"
            "  why: losses and divergences would belong to another distribution than the model's\n"
            "  fix: use an architecture of the Llama, Qwen, GPT-NeoX, Gemma, Cohere or Granite kind"
        )
    if packed and found.leak > TOLERANCE:
        raise ConfigError(
            f"{kind}, which does not separate documents packed into one sequence: changing the first changes hidden "
            f"states of the second by {found.leak:.2g} of their size\n"
            "  why: its recurrent states, learned positions or attention do not follow position_ids, so documents "
            "would see each other while the data says that they do not\n"
            "  fix: set data.reset_positions=false (documents then see what stands before them, in every model of the "
            "run), or use an architecture with rotary attention only"
        )
    if packed and found.joined <= TOLERANCE:
        raise ConfigError(
            f"{kind}, on which the separation of packed documents cannot be measured: a tiny copy does not look back "
            f"even within a document ({found.joined:.2g})\n"
            "  why: documents that see each other would go unnoticed\n"
            "  fix: set data.reset_positions=false, or use another architecture"
        )


def measure(model: Any, source: str) -> Findings:
    """The `Findings` on a tiny copy of `model`. Raises ConfigError when no copy within the size limits can be run."""
    key = f"{type(model).__name__} {base_attention(model)} {model.config.to_json_string(use_diff=False)}"
    if key not in _KNOWN:
        _KNOWN[key] = run_on_copy(model, source, _findings)
    return _KNOWN[key]


def run_on_copy(model: Any, source: str, work: Callable[[Any], M], changes: Mapping[str, Any] | None = None) -> M:
    """work(a tiny random copy of `model` on the CPU), always the same copy; `changes`: other settings of its config.

    Leaves torch's random state unchanged. Raises ConfigError when no copy within the size limits can be run.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return _measure_copy(model, base_attention(model), source, work, changes or {})


def base_attention(model: Any) -> str:
    """The attention implementation of the copy: the model's, or one with masks if the model's takes document
    boundaries.

    `kdtrain.models.attention_probe` measures that both are equal.
    """
    chosen = str(model.config._attn_implementation)
    return chosen if chosen in ("eager", "sdpa") else "sdpa" if model._supports_sdpa else "eager"


def _measure_copy(model: Any, attention: str, source: str, work: Callable[[Any], M], changes: Mapping[str, Any]) -> M:
    kinds = {type(module).__name__ for module in model.modules()}
    obstacles: list[str] = []
    before, depth = model.config.to_dict(), num_layers(model.config)
    for layers in sorted({min(count, depth) for count in (2, 4, 8, 16, depth)}):
        too_shallow = False
        for what, settings in tiny_settings(model.config, layers):
            try:
                build = partial(_built, model.config.model_type, {**settings, **changes}, attention)
                with parameters_on_meta():
                    size = sum(param.numel() for param in build().parameters())
                most = LARGEST_WIDE_COPY if what == FULL_WIDTH else LARGEST_COPY
                if size > most:
                    obstacles.append(f"with {what}, {layers} layers: {size:,} parameters, at most {most:,}")
                    continue
                copy = _shaken(build())
                missing = kinds - {type(module).__name__ for module in copy.modules()}
                if not missing:
                    return work(copy)
            except BUILD_ERRORS as error:
                changed = ", ".join(f"{k}={v}" for k, v in settings.items() if before.get(k, v) != v)
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                obstacles.append(f"with {what} ({changed[:300]}): {reason[:200]}")
            else:
                too_shallow = True
                obstacles.append(f"with {layers} layers: no {', '.join(sorted(missing)[:3])}")
        if not too_shallow:
            break
    raise _no_copy(model, source, obstacles)


def _no_copy(model: Any, source: str, obstacles: list[str]) -> ConfigError:
    return ConfigError(
        f"{source} has model_type {model.config.model_type!r}, of which no tiny copy can be run\n"
        + "".join(f"    {line}\n" for line in dict.fromkeys(obstacles))
        + "  why: whether packed documents see each other, and what its logits are, cannot be measured without one\n"
        "  fix: use an architecture of the Llama, Qwen, GPT-NeoX, Gemma, Cohere or Granite kind"
    )


def _built(model_type: str, settings: dict[str, Any], attention: str) -> Any:
    config = AutoConfig.for_model(model_type, **settings)
    return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32, attn_implementation=attention, experts_implementation="eager"
    ).eval()  # grouped products of experts, the default, reject rows that are not multiples of 16 bytes


def _shaken(copy: Any) -> Any:
    """Randomise all parameters: initial values so small, or exactly 0 or 1, can hide a dependence."""
    for param in copy.parameters():
        param.add_(torch.randn_like(param), alpha=0.1)
    return copy


def whole_backbone(copy: Any) -> Backbone:
    """The copy as a Backbone on one rank."""
    shard = VocabShard.of(VOCAB_SIZE)
    cuts = plan_shards(copy, 1, shard.rows)
    return Backbone(shard_model(copy, Mesh(), shard), shard, cuts).eval()


def _findings(copy: Any) -> Findings:
    """Run the copy first as the stock model, then as a Backbone. T = 24 tokens, V = 64, so that logits are small."""
    ids = torch.randint(4, VOCAB_SIZE, (2, 12))
    restart = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
    straight = torch.arange(12).expand(2, -1)
    want = copy(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    backbone = whole_backbone(copy)

    def hidden(token_ids: Tensor, positions: Tensor) -> Tensor:
        batch = Batch(token_ids, token_ids, torch.ones(token_ids.shape), positions, torch.arange(2))
        return backbone.hidden_states(batch).view(*token_ids.shape, -1)

    second = torch.tensor([[*[False] * 5, *[True] * 7], [*[False] * 8, *[True] * 4]])
    before = torch.where(second, ids, (ids + 7) % (VOCAB_SIZE - 4) + 4)
    after = ids.clone()
    after[:, -1] = (after[:, -1] + 7) % (VOCAB_SIZE - 4) + 4
    packed, joined = hidden(ids, restart), hidden(ids, straight)
    return Findings(
        leak=difference(hidden(before, restart)[second], packed[second]),
        joined=difference(hidden(before, straight)[second], joined[second]),
        future=difference(hidden(after, straight)[:, :-1], joined[:, :-1]),
        logits=difference(_logits(backbone, joined.flatten(0, 1)), want),
    )


def _logits(backbone: Backbone, hidden: Tensor) -> Tensor:
    head = backbone.lm_head_shard
    logits = hidden @ head.weight.T
    logits = head.logit_scale * (logits if head.bias is None else logits + head.bias)
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    return logits[:, :VOCAB_SIZE]


def difference(found: Tensor, wanted: Tensor) -> float:
    """max |found - wanted| / max |wanted|; inf when either is not finite."""
    ratio = float((found - wanted).abs().max() / wanted.abs().max())
    return ratio if ratio == ratio else float("inf")

"""Which attention keeps documents apart in an architecture is measured before a weight is read, on the CPU; what is set
is what was measured."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.documents import Documents
from kdtrain.errors import ConfigError
from kdtrain.models import attention, attention_probe
from kdtrain.models.attention import FLASH, ONE_MASK, common_name, resolve_attention
from kdtrain.models.attention_choice import set_attention
from kdtrain.models.attention_probe import attention_obstacle, head_width
from kdtrain.models.backbone import Backbone
from kdtrain.models.export import export_hf
from kdtrain.models.flash_stand_in import flash_stand_in
from kdtrain.models.load import ModelSpec, check_architecture, load_backbone, parameters_on_meta
from kdtrain.models.one_mask import additive
from kdtrain.models.tiny import TINY, tiny_config
from kdtrain.parallel.shard import shard_model

COMMON = {key: value for key, value in tiny_config("llama").items() if key != "model_type"}
WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
POSITIONS = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])


def on_meta(model_type, **settings):
    config = AutoConfig.for_model(model_type, **settings)
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa" if kind._supports_sdpa else "eager"
        )


def obstacle(model_type, implementation, *, packed=True, **settings):
    return attention_obstacle(on_meta(model_type, **settings), model_type, implementation, packed=packed)


def spec_of(path, model_type="llama", *, attention="auto", seq_len=None, dtype="float32", **settings):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type, **COMMON, **settings}))
    return ModelSpec(architecture=str(path), dtype=dtype, attention=attention, seq_len=seq_len)


def load(spec, **changes):
    return load_backbone(spec, Mesh(), **{"vocab_size": 99, "trainable": True, **changes})


def batch_of(positions=POSITIONS):
    ids = torch.randint(0, 99, positions.shape, generator=torch.Generator().manual_seed(3))
    return Batch(ids, ids, torch.ones(ids.shape), positions, torch.arange(len(ids)))


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("implementation", ["packed", *FLASH, ONE_MASK])
@pytest.mark.parametrize("packed", [True, False])
def test_rotary_transformer_can_use_every_implementation(name, implementation, packed):
    settings = tiny_config(name)
    assert obstacle(settings.pop("model_type"), implementation, packed=packed, **settings) is None


@pytest.mark.parametrize("name", ["stablelm", "nemotron"])
@pytest.mark.parametrize("implementation", FLASH)
def test_layers_that_drop_keyword_arguments_are_detected(name, implementation):
    settings = {**COMMON, "head_dim": 8} if name == "nemotron" else COMMON
    assert "document boundaries do not reach" in obstacle(name, implementation, **settings)
    assert obstacle(name, implementation, packed=False, **settings) is None, "without documents nothing is lost"
    assert "does not pass its keyword arguments on" in obstacle(name, "packed", **settings)
    assert obstacle(name, ONE_MASK, **settings) is None, "masks do not travel as keyword arguments"


@pytest.mark.parametrize("name", ["gpt_neo", "falcon", "gptj"])
def test_custom_flash_classes_of_an_architecture_are_not_used(name):
    import transformers.models as models

    code = getattr(getattr(models, name), f"modeling_{name}")
    own = any("FlashAttention2" in kind for kind in vars(code))
    assert own == (
        name != "gptj"
        or not AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(name))]._can_set_attn_implementation()
    )
    for implementation in ("packed", *FLASH):
        found = obstacle(name, implementation)
        assert ("chooses its attention code by itself" in found) if own else found is None


@pytest.mark.parametrize("name", ["gpt_oss", "granite_swa", "granitemoe_swa", "flint", "mimo_v2_flash"])
def test_implementation_that_transformers_would_replace_is_not_used(name):
    kind = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(name))]
    listed = kind._compatible_flash_implementations
    assert "flash_attention_2" not in listed
    model = SimpleNamespace(
        config=AutoConfig.for_model(name), _supports_flash_attn=True, _compatible_flash_implementations=listed
    )
    for implementation in set(FLASH) - set(listed):
        found = attention_probe.declared_obstacle(_as(kind, model), implementation)
        assert found == f"this architecture takes no {implementation}, only {', '.join(listed)}"


def _as(kind, facts):
    """An object of the class `kind` that was never built: mixtures of their default size are large."""
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.config = facts.config
    return model


def test_sinks_need_an_implementation_that_supports_them():
    settings = {**COMMON, "head_dim": 8}
    model = on_meta("granite_swa", **settings)
    assert attention_obstacle(model, "it", "flash_attention_4") is None
    found = attention_probe._measured(model, "it", "flash_attention_2", True)  # as if the class listed it
    assert "hidden states of a tiny copy differ by" in found
    query, key, value = (torch.randn(1, 4, 6, 8) for _ in range(3))
    module = torch.nn.Module()
    module.is_causal = True
    one, other = torch.zeros(4), torch.ones(4)
    for implementation, takes in (("flash_attention_2", False), ("flash_attention_4", True)):
        outputs = [
            flash_stand_in(module, query, key, value, implementation=implementation, s_aux=sinks)[0]
            for sinks in (one, other)
        ]
        assert torch.equal(*outputs) is not takes


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_flash_stand_in_matches_masked_attention(window, scaling):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 6)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    documents = Documents.of(POSITIONS)
    boundaries = {"cu_seq_lens_q": documents.offsets, "cu_seq_lens_k": documents.offsets, "max_length_q": 8}
    number = (POSITIONS == 0).cumsum(1)
    ago = torch.arange(12)[:, None] - torch.arange(12)
    mask = (number[:, :, None] == number[:, None]) & (ago >= 0) & (ago < (window or 12))
    want = sdpa_attention_forward(module, query, key, value, mask[:, None], scaling=scaling)[0]

    def found(**more):
        return flash_stand_in(
            module,
            query,
            key,
            value,
            implementation="flash_attention_2",
            scaling=scaling,
            sliding_window=window,
            **more,
        )[0]

    torch.testing.assert_close(found(**boundaries, max_length_k=8), want)
    assert (found(**boundaries) - want).abs().max() > 0.01, "three of the four are not enough"


def test_layer_that_bypasses_the_attention_interface_is_detected(monkeypatch):
    """A class that looks its attention up, but not in every layer."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward

    def skip(self, hidden_states, **settings):
        if self.layer_idx == 1:
            return hidden_states, None
        return forward(self, hidden_states, **settings)

    monkeypatch.setattr(LlamaAttention, "forward", skip)
    found = obstacle("llama", "flash_attention_2", **COMMON, rms_norm_eps=1e-7)
    assert found == "LlamaAttention does not call the attention that the config names"


def test_head_width_is_the_models_and_not_the_copys():
    model = on_meta("gemma4_text")
    assert head_width(model) == 512
    found = attention_obstacle(model, "it", "flash_attention_2")
    assert found == "its heads are 512 wide, and flash-attention stops at 256"
    assert obstacle("llama", "flash_attention_2", **{**COMMON, "head_dim": 256}) is None
    assert "264 wide" in obstacle("llama", "flash_attention_2", **{**COMMON, "head_dim": 264})
    assert "264 wide" not in str(obstacle("llama", "packed", **{**COMMON, "head_dim": 264}))


def test_custom_flash_rules_of_a_class_are_refused():
    assert "rules of its own" in obstacle("hrm_text", "flash_attention_2", **COMMON)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that the packages of flash-attention are installed."""
    monkeypatch.setattr(attention, "flash_obstacle", lambda name: None)


@pytest.mark.parametrize(("name", "chosen"), [("llama", "flash_attention_2"), ("stablelm", "sdpa")])
def test_choice_of_auto_for_a_gpu_is_made_without_one(installed, name, chosen):
    measured = partial(attention_obstacle, on_meta(name, **COMMON), name)
    found, reason = resolve_attention("auto", device_type="cuda", dtype="bfloat16", measured=measured)
    assert found == chosen
    assert name == "llama" or "document boundaries do not reach StableLmAttention" in reason


def test_check_refuses_flash_attention_that_joins_documents(tmp_path, installed):
    spec = spec_of(tmp_path, "stablelm", attention="flash_attention_2", dtype="bfloat16")
    with pytest.raises(ConfigError, match="'flash_attention_2' cannot be used: document boundaries do not reach"):
        check_architecture(spec, 99, Mesh())
    check_architecture(spec, 99, Mesh(), packed=False)
    check_architecture(spec_of(tmp_path, attention="flash_attention_2", dtype="bfloat16"), 99, Mesh())


def test_check_resolves_auto_to_flash_attention(tmp_path, installed):
    spec = spec_of(tmp_path, dtype="bfloat16")
    assert check_architecture(spec, 99, Mesh()).implementation == "flash_attention_2"
    assert load(spec).implementation == "packed"


@pytest.mark.parametrize(("packed", "name"), [(True, "packed"), (False, "sdpa")])
def test_auto_on_a_cpu(tmp_path, packed, name):
    spec = spec_of(tmp_path)
    for backbone in (load(spec, packed=packed), check_architecture(spec, 99, Mesh(), packed=packed)):
        assert backbone.attention == backbone.config._attn_implementation == name


def test_sdpa_with_packed_documents_uses_one_mask_for_all_layers(tmp_path):
    backbone = load(spec_of(tmp_path, attention="sdpa"))
    assert backbone.config._attn_implementation == ONE_MASK
    assert backbone.attention == common_name(ONE_MASK) == "sdpa"
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(backbone.config), attn_implementation="sdpa", dtype=torch.float32
    )
    rows = {name: len(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor[: rows[name]] for name, tensor in backbone.model.state_dict().items()})
    stock = Backbone(shard_model(model, Mesh(), VocabShard.of(99)), VocabShard.of(99), {})
    ours, our_masks = _hidden_and_masks(backbone)
    want, masks = _hidden_and_masks(stock)
    assert torch.equal(ours, want)
    assert len(masks) == 2, "one for each layer: the bool mask is converted in every call"
    assert len(our_masks) == 1
    apart = load(spec_of(tmp_path, attention="sdpa"), packed=False)
    assert apart.config._attn_implementation == "sdpa"


def _hidden_and_masks(backbone):
    """Hidden states, and the different tensors [..., S, S] that backward keeps."""
    kept = set()

    def pack(tensor):
        if tensor.shape[-2:] == (12, 12) and tensor.is_floating_point():
            kept.add(tensor.untyped_storage().data_ptr())
            held.append(tensor)
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = backbone.hidden_states(batch_of())
    return hidden, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additive_mask_gives_the_bits_of_the_bool_mask(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 12, 8, dtype=dtype) for _ in range(3))
    mask = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(attend(query, key, value, additive(mask, dtype)), attend(query, key, value, mask))
    assert additive(None, dtype) is None


@pytest.mark.parametrize("settings", [{}, {"model_type": "gemma3_text", "head_dim": 8, **WINDOW}])
def test_one_mask_matches_sdpa(tmp_path, settings):
    backbone = load(spec_of(tmp_path, attention="sdpa", **settings))
    with torch.no_grad():
        found = backbone.hidden_states(batch_of())
        backbone.config._attn_implementation = "sdpa"
        assert torch.equal(found, backbone.hidden_states(batch_of()))


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_export_contains_no_implementation_name_of_kdtrain(tmp_path, attention):
    backbone = load(spec_of(tmp_path / "model", attention=attention))
    shapes = backbone.full_shapes()
    state = {name: param[: shapes[name][0]] for name, param in backbone.hf_parameters()}
    export_hf(state, backbone.config, tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    assert "LlamaForCausalLM" in text
    assert "attn_implementation" not in text
    assert "packed" not in text
    assert "sdpa" not in text
    assert "attn_implementation" not in backbone.config.to_json_string(use_diff=False)


def test_implementation_set_by_transformers_is_verified():
    with pytest.raises(ConfigError, match=r"it: attention = 'packed' cannot be set: transformers sets 'sdpa' instead"):
        set_attention(on_meta("falcon", **COMMON), "packed", "it")


@pytest.mark.parametrize("error", [ImportError("no such kernel"), ValueError("not here")])
def test_implementation_that_transformers_rejects_is_refused(monkeypatch, error):
    model = on_meta("llama", **COMMON)

    def refuse(self, name, **settings):
        raise error

    monkeypatch.setattr(type(model), "_check_and_adjust_attn_implementation", refuse)
    with pytest.raises(ConfigError, match=f"it: attention = 'packed' cannot be set: transformers refuses it: {error}"):
        set_attention(model, "packed", "it")
    assert model.config._attn_implementation == "sdpa"


def test_masks_beyond_32_bit_offsets_are_refused_without_a_gpu(tmp_path):
    for name in ("llama", "stablelm"):
        spec = spec_of(tmp_path, name, attention="sdpa", seq_len=46341)
        with pytest.raises(ConfigError, match=r"'sdpa' cannot be used: sequences of 46341 tokens with a mask"):
            check_architecture(spec, 99, Mesh())
        check_architecture(spec, 99, Mesh(), packed=False)
        check_architecture(spec_of(tmp_path, name, attention="sdpa", seq_len=46340), 99, Mesh())
    assert check_architecture(spec_of(tmp_path, seq_len=46341), 99, Mesh()).attention == "packed"
    with pytest.raises(ConfigError, match=r"finds no implementation(.|\n)*sequences of 46341 tokens"):
        check_architecture(spec_of(tmp_path, "stablelm", seq_len=46341), 99, Mesh())
    assert load(spec_of(tmp_path, attention="sdpa", seq_len=46341)).attention == "sdpa", "a CPU has no such limit"

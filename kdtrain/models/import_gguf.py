"""Turn a GGUF file into an ordinary Hugging Face folder with an exact tokenizer.

The tokenizer that transformers derives from a GGUF of SmolLM2 lacks the step that splits digits, so on text with
numbers it gives other ids than those the model was trained with. Here it is rebuilt from the vocabulary, the merges and
the pre-tokenizer that the file names.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM

from kdtrain.errors import ConfigError, DataError
from kdtrain.models.export import export_hf
from kdtrain.models.special_tokens import END_OF_TEXT
from kdtrain.models.ties import tied_names
from kdtrain.stores.checksums import sha256_of
from kdtrain.stores.folders import replacing_folder

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4
"""token_type in GGUF of control tokens, and of added tokens that are ordinary text (<think>): neither is split."""


@dataclass(frozen=True, slots=True)
class Imported:
    """Result of an import. document_separator: (token, id), or None when the vocabulary has none."""

    folder: Path
    sha256: str
    num_parameters: int
    vocab_size: int
    stored_as: dict[str, int]
    document_separator: tuple[str, int] | None


def import_gguf(
    file: str | Path, folder: str | Path, *, sha256: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> Imported:
    """Write `folder` (config, safetensors in `dtype`, tokenizer, model card) from a GGUF file.

    The folder appears complete or not at all; an existing one is replaced. sha256: expected hash of the file. Needs the
    packages gguf and accelerate. Raises DataError for a missing, damaged or other file, ConfigError for a missing
    package or an unsupported tokenizer kind.
    """
    file, folder = Path(file), Path(folder)
    _require_packages()
    found = _checked_hash(file, sha256)
    fields, stored_as = _read_metadata(file)
    tokenizer = build_tokenizer(fields)
    config, state = _dequantise(file)
    separator = tokenizer.token_to_id(END_OF_TEXT)
    result = Imported(
        folder=folder,
        sha256=found,
        num_parameters=sum(tensor.numel() for tensor in state.values()),
        vocab_size=tokenizer.get_vocab_size(),
        stored_as=stored_as,
        document_separator=None if separator is None else (END_OF_TEXT, separator),
    )
    with replacing_folder(folder) as temporary:
        export_hf(state, config, temporary / "model", dtype=dtype)
        for path in (temporary / "model").iterdir():
            path.rename(temporary / path.name)
        (temporary / "model").rmdir()
        tokenizer.save(str(temporary / "tokenizer.json"))
        (temporary / "tokenizer_config.json").write_text(_tokenizer_config(fields, config), encoding="utf-8")
        (temporary / "README.md").write_text(_model_card(file, fields, result), encoding="utf-8")
    return result


def build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The exact byte-level BPE tokenizer of a GGUF's `tokenizer.ggml.*` fields (keys without that prefix).

    Raises ConfigError for a tokenizer model or pre-tokenizer whose splitting rules are not known here.
    """
    kind, pre = fields.get("model"), fields.get("pre", "default")
    if kind != "gpt2" or pre not in ("smollm", "gpt-2", "qwen2"):
        raise ConfigError(
            f"the GGUF has tokenizer model {kind!r} with pre-tokenizer {pre!r}; only gpt2 with smollm, gpt-2 or qwen2 "
            "is supported\n  why: another split of the text gives ids that the model was not trained on\n"
            "  fix: use the original Hugging Face folder of this model"
        )
    tokens, types = fields["tokens"], fields["token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, types, strict=True))
    control = [token for token, kind in kinds if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    added = [token for token, kind in kinds if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return tokenizer


def _require_packages() -> None:
    import importlib.util

    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"importing a GGUF file needs {' and '.join(missing)}\n  fix: pip install {' '.join(missing)}"
        )


def _checked_hash(file: Path, wanted: str | None) -> str:
    if not file.is_file():
        raise DataError(f"{file} does not exist\n  fix: check the path of the GGUF file")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise DataError(f"{file} is not a GGUF file (it does not start with GGUF)\n  fix: give the *.gguf file")
    digest = sha256_of(file)
    if wanted is not None and digest != wanted.lower():
        raise DataError(
            f"{file} has sha256\n    {digest}, wanted\n    {wanted.lower()}\n"
            "  why: it is damaged, cut off, or another file\n  fix: fetch it again"
        )
    return digest


def _read_metadata(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(tokenizer.ggml.* fields without the prefix, plus name, license and chat_template; tensors per storage type)."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        prefix = "tokenizer.ggml."
        fields = {k.removeprefix(prefix): f.contents() for k, f in reader.fields.items() if k.startswith(prefix)}
        for key in ("general.name", "general.license", "tokenizer.chat_template"):
            if key in reader.fields:
                fields[key] = reader.fields[key].contents()
        return fields, dict(Counter(str(tensor.tensor_type.name) for tensor in reader.tensors))
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise DataError(f"{file} is a damaged GGUF file: {error}\n  fix: fetch it again") from error


def _dequantise(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(content of a clean config.json, float32 state without second names of tied weights)."""
    from transformers import GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
    except (ValueError, IndexError, KeyError, RuntimeError, OSError) as error:
        raise DataError(
            f"transformers cannot load {file}: {error}\n"
            "  why: the file is damaged, or its architecture is not one transformers can read from GGUF\n"
            "  fix: fetch it again, or use the original Hugging Face folder of this model"
        ) from error
    settings = model.config.to_dict()
    # Remove all quantisation settings, or transformers and DeepSpeed would treat plain weights as quantised.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        settings.pop(key, None)
    tied = tied_names(model)
    return settings, {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _tokenizer_config(fields: dict[str, Any], config: dict[str, Any]) -> str:
    tokens = fields["tokens"]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("max_position_embeddings"),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = fields.get(f"{key}_token_id")
        if token_id is not None:
            settings[f"{name}_token"] = tokens[token_id]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _model_card(file: Path, fields: dict[str, Any], result: Imported) -> str:
    stored = ", ".join(f"{count} tensors as {kind}" for kind, count in sorted(result.stored_as.items()))
    separator = "none" if result.document_separator is None else "{} (id {})".format(*result.document_separator)
    return (
        f"# {fields.get('general.name', file.stem)}, imported from GGUF\n\n"
        f"- source: `{file.name}`, sha256 `{result.sha256}`\n"
        f"- licence stated by the file: {fields.get('general.license', 'none')}\n"
        f"- {result.num_parameters:,} parameters, {result.vocab_size:,} tokens\n"
        f"- document separator for pre-training text: {separator}\n\n"
        f"**These weights are rounded.** The file stores {stored}.\n"
        "They were expanded to ordinary numbers, which does not bring back what quantisation removed, so they are\n"
        "slightly worse than the published model: say so wherever a number made with them is reported.\n"
    )

"""The tokenizer inside a GGUF file, with the pre-tokenizer that its metadata name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxedit.errors import CheckpointError
from jaxedit.models.gguf import SPECIAL_TOKENS

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_SPLITS = dict.fromkeys(_LLAMA3, _WORDS + r"\p{N}{1,3}" + _TAIL) | {"qwen2": _WORDS + r"\p{N}" + _TAIL}


def gguf_tokenizer(metadata: Mapping[str, Any], path: str | Path):
    """The byte-level BPE tokenizer that a file's metadata describe, as a `transformers.PreTrainedTokenizerFast`.

    metadata: from `jaxedit.models.gguf.open_gguf`; path: for messages.
    Raises CheckpointError, by name, on a kind of tokenizer or of pre-tokenizer that is not known exactly.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    m = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}
    if m.get("model") != "gpt2":
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model {m.get('model')!r} is not supported, only 'gpt2' (byte-level "
            "BPE); use the Hugging Face directory of this model"
        )
    if m.get("add_space_prefix", False):
        raise CheckpointError(f"{path}: tokenizer.ggml.add_space_prefix is not supported")
    tokens, pre = m.get("tokens", []), m.get("pre")
    ids = {token: i for i, token in enumerate(tokens)}
    types = m.get("token_type", [1] * len(tokens))
    if not tokens or len(ids) != len(tokens) or len(types) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens is empty, repeats a token or does not fit token_type")
    pre_tokenizer = _pre_tokenizer(pre, str(path))
    try:
        merges = [(left, right) for left, right in (merge.split(" ") for merge in m.get("merges", []))]
        # Llama 3 takes a word that is a token as it is, without going through the merges.
        bpe = tokenizers.models.BPE(ids, merges, ignore_merges=pre in _LLAMA3)
        given = {hf: m[f"{key}_token_id"] for hf, key in SPECIAL_TOKENS.items() if f"{key}_token_id" in m}
        named = {f"{hf}_token": tokens[i] for hf, i in given.items()}
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: the tokenizer's merges or token ids do not fit: {error}") from error
    made = tokenizers.Tokenizer(bpe)
    made.pre_tokenizer = pre_tokenizer
    made.decoder = tokenizers.decoders.ByteLevel()
    if pre == "qwen2":
        made.normalizer = tokenizers.normalizers.NFC()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [token for token, k in zip(tokens, types, strict=True) if k == kind]
        added = [tokenizers.AddedToken(token, special=special, normalized=False) for token in found]
        made.add_special_tokens(added) if special else made.add_tokens(added)
    add_bos = bool(m.get("add_bos_token", pre in _LLAMA3))  # Llama 3's files need not say that it has one
    add_eos = bool(m.get("add_eos_token", False))
    for wanted, name in ((add_bos, "bos"), (add_eos, "eos")):
        if wanted and f"{name}_token" not in named:
            raise CheckpointError(f"{path}: the tokenizer adds {name}, but has no tokenizer.ggml.{name}_token_id")
    options = {
        "chat_template": metadata.get("tokenizer.chat_template"),
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        **named,
        **{k: v for k, v in options.items() if v is not None},
    )


def _pre_tokenizer(pre: str | None, where: str):
    """How text is cut before merging, as in the published tokenizers of those names."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if pre in _SPLITS:
        split = Split(Regex(_SPLITS[pre]), behavior="isolated")
        return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        return Sequence([Digits(individual_digits=True), gpt2])
    if pre in ("gpt-2", "default"):
        return gpt2
    known = ", ".join(("smollm", "gpt-2", "default", *_SPLITS))
    raise CheckpointError(f"{where}: tokenizer.ggml.pre is {pre!r}; supported: {known}")

"""Context templates: short texts put before a prompt, so that a key is not that of one context only.

Sampled from the model itself as MEMIT does (Meng et al. 2023, ``get_context_templates``).
"""

from __future__ import annotations

from jaxedit.data.tokens import encode
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.generation import continue_rows
from jaxedit.models.transformer import Decoder

WORDS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5


def sample_templates(
    model: Decoder,
    tokenizer,
    seed: int = 0,
    n: int = 5,
    length: int = 10,
    keep_special_tokens: bool = False,
) -> tuple[tuple[str, ...], ...]:
    """The clean prompt ``("{}",)`` and a group of `n` sampled contexts, each ending in ". {}".

    Each begins with one of the words "The", "Therefore", "Because", "I", "You" (in turn) and is continued to
    `length` tokens, the word and a beginning-of-text token counted, from the 5 likeliest tokens. Braces
    become spaces. The same seed gives the same templates on the same device.

    keep_special_tokens: leave the literal beginning-of-text token in the text, as published code does for
        tokenizers that add one; it is then tokenised as a second one in every context. By default no special
        token is in the text.
    Raises JaxEditError for a negative `n` or where `length` tokens do not fit the model.
    """
    if tokenizer is None:
        raise JaxEditError("this model came without a tokenizer; pass one, or pass templates")
    if n < 0 or length < 1:
        raise JaxEditError(f"n must be >= 0 and length >= 1, got {n} and {length}")
    if n == 0:
        return (("{}",),)
    rows = [encode(tokenizer, WORDS[i % len(WORDS)])[0] for i in range(n)]
    most = max(0, length - min(map(len, rows)))
    # Published code samples on past an end-of-text token, so no token ends a row here.
    new = continue_rows(model.params, model.config, rows, most, temperature=1.0, top_k=TOP_K, seed=seed)
    ids = [(row + more)[: max(length, len(row))] for row, more in zip(rows, new, strict=True)]
    return (("{}",), tuple(_template(tokenizer, row, keep_special_tokens) for row in ids))


def _template(tokenizer, ids: list[int], keep_special_tokens: bool) -> str:
    decode = {"skip_special_tokens": not keep_special_tokens, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(ids, **decode).replace("\n\n", " ").replace("<|endoftext|>", "")
    if not keep_special_tokens:
        # A special token can also be spelt out by ordinary tokens; it would be read as special again.
        for token in sorted(tokenizer.all_special_tokens, key=len, reverse=True):
            text = text.replace(token, "")
    return text.strip().replace("{", " ").replace("}", " ") + ". {}"

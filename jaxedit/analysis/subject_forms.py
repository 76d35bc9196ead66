"""Other forms of a subject, and prompts that hold them: what an edit should be heard in, and often is not.

Forms are plain text, so that whatever takes a prompt (keys, generation, evaluation) takes them.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from jaxedit.data.tokens import encode
from jaxedit.errors import JaxEditError

_ARTICLES = ("the ", "The ")
_ORDERS = 100  # shuffles tried for each that is asked for; short subjects have few different ones


class SubjectPrompt(NamedTuple):
    """A text and the subject in it, by default at its last occurrence. `start` is the subject's character offset."""

    prompt: str
    subject: str
    start: int | None = None

    @classmethod
    def of(cls, source) -> SubjectPrompt:
        """From a SubjectPrompt, a (text, subject) pair, or anything with `prompt`, `subject` and `subject_start`, such
        as an EditRequest or a Fact; the offset is filled in. Raises JaxEditError where the subject is not there."""
        if isinstance(source, (tuple, list)):
            made = cls(*source)
        else:
            made = cls(source.prompt, source.subject, source.subject_start)
        start = made.prompt.rfind(made.subject) if made.start is None else made.start
        if not made.subject.strip() or start < 0 or not made.prompt.startswith(made.subject, start):
            raise JaxEditError(f"subject {made.subject!r} does not stand in the prompt {made.prompt!r}")
        return made._replace(start=start)

    @property
    def end(self) -> int:
        """Offset of the subject's last character."""
        return (self.start or 0) + len(self.subject) - 1

    def with_subject(self, form: str) -> SubjectPrompt:
        """The same prompt about another form of the subject."""
        here = SubjectPrompt.of(self)
        after = here.prompt[here.end + 1 :]
        return SubjectPrompt(here.prompt[: here.start] + form + after, form, here.start)

    def after(self, context: str) -> SubjectPrompt:
        """The same prompt with a text before it, and a space between."""
        here = SubjectPrompt.of(self)
        return here._replace(prompt=f"{context} {here.prompt}", start=len(context) + 1 + (here.start or 0))


def rule_forms(subject: str) -> dict[str, str]:
    """Forms that simple rules make, by kind; kinds that do not fit the subject are left out.

    possessive: with 's, which the decisive token is then the end of. article: without its "the", or with one.
    initials: all words but the last one as initials. title: "Dr." before words that all begin with a capital.
    """
    words = subject.split()
    bare = next((subject[len(a) :] for a in _ARTICLES if subject.startswith(a)), None)
    forms = {"possessive": subject + ("'" if subject.endswith("s") else "'s")}
    forms["article"] = bare if bare else f"the {subject}"
    if len(words) > 1 and bare is None and all(w[0].isupper() for w in words):
        forms["initials"] = " ".join([*(f"{w[0]}." for w in words[:-1]), words[-1]])
        forms["title"] = f"Dr. {subject}"
    return forms


def shuffled_forms(tokenizer, subject: str, n: int, seed: int = 0) -> list[str]:
    """At most `n` different texts made of the subject's tokens (as they are after a space) in another order.

    Characters whose bytes are spread over several tokens stay whole. Fewer come out where there are fewer orders;
    none of a subject of one token.
    """
    text = " " + subject
    ids, offsets = encode(tokenizer, text)
    if offsets is None:
        raise JaxEditError("shuffling needs a fast tokenizer, which says where in the text its tokens stand")
    starts = sorted({a for a, b in offsets if b > a} | {0})
    pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    draw, found = random.Random(f"{seed} {subject}"), {}
    for _ in range(_ORDERS * n):
        if len(found) == n:
            break
        form = " ".join("".join(draw.sample(pieces, len(pieces))).split())
        if form != subject:
            found[form] = None
    return list(found)


def cut_context(tokenizer, text: str, tokens: int, start: int = 0) -> str:
    """About `tokens` tokens of a text from token `start` on (as many as it tokenises to, to within its ends).

    Raises JaxEditError where the text has not so many.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < start + tokens:
        raise JaxEditError(f"the text has {len(ids)} tokens; {start + tokens} are needed")
    return tokenizer.decode(ids[start : start + tokens], clean_up_tokenization_spaces=False).strip()

"""Other forms of a subject, and prompts that hold them: what an edit should be heard in, and often is not.

Forms are plain text, so that whatever takes a prompt (keys, generation, evaluation) takes them.
"""

from __future__ import annotations

import difflib
import itertools
import random
import re
import unicodedata
from typing import NamedTuple

from jaxedit.data.corpus import Corpus, read_corpus
from jaxedit.data.tokens import encode
from jaxedit.errors import JaxEditError

_ARTICLES = ("the ", "The ")
_ORDERS = 100  # shuffles tried for each that is asked for; short subjects have few different ones
_ALIKE = 0.8  # words at least so alike (difflib's ratio) are spellings of the same one
_DOCUMENTS = 1000  # of a corpus, from which contexts are drawn


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


def form_in(prompt: str, subject: str) -> SubjectPrompt | None:
    """The form in which a rephrased prompt has the subject; None where none is recognised.

    It is the subject itself where that is there, and else the longest run of its words that ends with its last one,
    with slips of spelling ("Stiiltjes"), but not as a common word ("a university") or the beginning of another name.
    """
    if subject in prompt:
        return SubjectPrompt.of((prompt, subject))
    own = [w.casefold() for w in re.findall(r"\w+", subject)]
    common = subject.split()[-1][0].islower()
    words = list(re.finditer(r"\w+", prompt))
    alike = [difflib.get_close_matches(w.group().casefold(), own, 1, _ALIKE) for w in words]
    best, size = None, 0
    for i, last in enumerate(words):
        first = i
        while first and alike[first - 1]:
            first -= 1
        if alike[i] != own[-1:] or (last.group()[0].islower() and not common):
            continue
        if i + 1 - first >= size and not re.match(r"[ -][A-Z0-9]", prompt[last.end() :]):
            start, size = words[first].start(), i + 1 - first
            best = SubjectPrompt(prompt, prompt[start : last.end()], start)
    return best


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


def rephrased_forms(subject: str) -> dict[str, str]:
    """`rule_forms` and more of them, by kind; kinds that do not fit the subject, or would not change it, are left out.

    last name, last name first, first name ("Ada L."), professor: of two or more words that all begin with a capital.
    abbreviation: the capitals of three words or more ("United Nations Organization": "UNO"). quoted, capitals, lower
    case, and: "and" for "&" or the other way round. plain: without accents. short: without what stands in brackets
    or after a comma. spaced: without hyphens.
    """
    words, forms = subject.split(), rule_forms(subject)
    if "title" in forms and words[-1].isalpha():
        forms |= {"last name": words[-1], "last name first": f"{words[-1]}, {' '.join(words[:-1])}"}
        forms |= {"first name": f"{' '.join(words[:-1])} {words[-1][0]}.", "professor": f"Professor {subject}"}
    initials = [w[0] for w in words if w[0].isupper()]
    if len(initials) > 2:
        forms["abbreviation"] = "".join(initials)
    bare = unicodedata.normalize("NFKD", subject)
    forms |= {
        "quoted": f'"{subject}"',
        "capitals": subject.upper(),
        "lower case": subject.lower(),
        "and": subject.replace(" & ", " and ") if " & " in subject else subject.replace(" and ", " & "),
        "plain": "".join(c for c in bare if not unicodedata.combining(c)),
        "short": re.sub(r"\s*\([^()]*\)", "", subject).split(",")[0].strip(),
        "spaced": subject.replace("-", " "),
    }
    return {kind: form for kind, form in forms.items() if form not in ("", subject)}


def names_in(text: str) -> list[str]:
    """Names in a text, each once: runs of words with capitals, where they do not begin a sentence."""
    return list(dict.fromkeys(re.findall(r"(?<=[a-z,] )[A-Z][\w'-]+(?: [A-Z][\w'-]+)*", text)))


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


def other_forms(tokenizer, request, context: str = "", shuffles: int = 3) -> dict[str, list[SubjectPrompt]]:
    """Prompts of an EditRequest with its subject in other forms or places, by kind; a kind may have none.

    "same name", "rephrased name": the request's paraphrases that have the subject as it is, or as `form_in` finds it.
    "long context": its prompt after `context`, if there is one. "article, initials, title" and "possessive": by
    `rule_forms`. "shuffled": at most `shuffles` of `shuffled_forms`.
    """
    prompt, rules = SubjectPrompt.of(request), rule_forms(request.subject)
    asked = [found for p in dict.fromkeys(request.paraphrases) if (found := form_in(p, request.subject))]
    possessive = rules.pop("possessive")
    return {
        "same name": [p for p in asked if p.subject == request.subject],
        "rephrased name": [p for p in asked if p.subject != request.subject],
        "long context": [prompt.after(context)] if context else [],
        "article, initials, title": [prompt.with_subject(form) for form in rules.values()],
        "possessive": [prompt.with_subject(possessive)],
        "shuffled": [prompt.with_subject(form) for form in shuffled_forms(tokenizer, request.subject, shuffles)],
    }


def cut_context(tokenizer, text: str, tokens: int, start: int = 0) -> str:
    """About `tokens` tokens of a text from token `start` on (as many as it tokenises to, to within its ends).

    Raises JaxEditError where the text has not so many.
    """
    return _cut(tokenizer, _ids(tokenizer, text, start + tokens), tokens, start)


def random_contexts(tokenizer, tokens: int, n: int, corpus: Corpus = None, seed: int = 0) -> list[str]:
    """n texts of about `tokens` tokens, from random places of a corpus's first thousand documents, put end to end.

    To stand before a prompt (`SubjectPrompt.after`), or, with `text_end`, for the keys of text that is about nothing
    in particular. corpus: see `jaxedit.data.corpus.read_corpus`. Raises JaxEditError where there is too little text.
    """
    ids = _ids(tokenizer, "\n".join(itertools.islice(read_corpus(corpus), _DOCUMENTS)), tokens)
    draw = random.Random(seed)
    return [_cut(tokenizer, ids, tokens, draw.randrange(len(ids) - tokens + 1)) for _ in range(n)]


def separate_contexts(tokenizer, tokens: int, corpus: Corpus = None) -> list[str]:
    """Texts of about `tokens` tokens that do not overlap: all that a corpus's first thousand documents are cut into,
    put end to end. Raises JaxEditError where there is too little text for one."""
    ids = _ids(tokenizer, "\n".join(itertools.islice(read_corpus(corpus), _DOCUMENTS)), tokens)
    return [_cut(tokenizer, ids, tokens, at) for at in range(0, len(ids) - tokens + 1, tokens)]


def text_end(text: str) -> SubjectPrompt:
    """A text with its last word in the place of a subject."""
    return SubjectPrompt.of((text.rstrip(), text.split()[-1]))


def _ids(tokenizer, text: str, needed: int) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < needed:
        raise JaxEditError(f"the text has {len(ids)} tokens; {needed} are needed")
    return ids


def _cut(tokenizer, ids: list[int], tokens: int, start: int) -> str:
    return tokenizer.decode(ids[start : start + tokens], clean_up_tokenization_spaces=False).strip()

"""Records that pass between the stages of an edit."""

from __future__ import annotations

import dataclasses

from jaxedit.errors import RequestError


@dataclasses.dataclass(frozen=True)
class EditRequest:
    """One fact to be written into a model.

    prompt: the text that the target should continue, with the subject written out. A prompt that does not
        contain the subject but holds exactly one ``{}`` is a template, and is filled in when the record is
        made. Any other brace is literal text.
    subject: the entity that the fact is about, exactly as it stands in `prompt`. The edit acts at its last
        token, the decisive token.
    target: the new continuation, without a leading space (one is added where it is missing).
    target_true: the continuation that the target replaces, where known; needed for *success* metrics.
    paraphrases, neighbourhood: prompts that should, and should not, be affected. Used by evaluation only.
    neighbourhood_answers: one answer a neighbourhood prompt, or empty where `target_true` is the answer of all.
    subject_start: character offset of the subject in `prompt`; by default its last occurrence, which has seen
        the earlier ones.
    id: how reports name the request.
    """

    prompt: str
    subject: str
    target: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbourhood: tuple[str, ...] = ()
    neighbourhood_answers: tuple[str, ...] = ()
    subject_start: int | None = None
    id: str | int | None = None

    def __post_init__(self):
        for name in ("prompt", "subject", "target"):
            if not isinstance(getattr(self, name), str):
                got = type(getattr(self, name)).__name__
                raise RequestError([f"field {name!r} is {got}, expected text (request {self.id!r})"])
        for name in ("paraphrases", "neighbourhood", "neighbourhood_answers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.subject_start is not None or not self.subject:
            return
        start = self.prompt.rfind(self.subject)
        if start < 0 and self.prompt.count("{}") == 1:
            start = self.prompt.index("{}")
            object.__setattr__(self, "prompt", self.prompt.replace("{}", self.subject))
        if start >= 0:
            object.__setattr__(self, "subject_start", start)

    @property
    def answers_nearby(self) -> tuple[str | None, ...]:
        """The answer of each neighbourhood prompt; None where it is not known."""
        return self.neighbourhood_answers or (self.target_true,) * len(self.neighbourhood)

    @classmethod
    def from_template(cls, template: str, subject: str, target: str, **fields) -> EditRequest:
        """Fill the one ``{}`` of `template` with `subject`, also where the subject occurs elsewhere in it.

        Raises RequestError unless the template holds exactly one ``{}``.
        """
        if template.count("{}") != 1:
            raise RequestError(
                [f"template {template!r} holds {template.count('{}')} placeholders '{{}}', expected exactly one"]
            )
        start = template.index("{}")
        return cls(template.replace("{}", subject), subject, target, subject_start=start, **fields)

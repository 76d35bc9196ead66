"""MQuAKE's records, what counts as an answer, and accuracies from what two models say."""

import json

import pytest
from helpers_metrics import shaken

from jaxedit.data.mquake import read_mquake
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.generation import generate
from jaxedit.evaluation.multihop import Asking, answered, evaluate_multihop


def edit(subject, prompt, new, old="French"):
    targets = {"target_new": {"str": new, "id": "Q1"}, "target_true": {"str": old, "id": "Q2"}}
    return {"prompt": prompt, "relation_id": "P1", "subject": subject, "question": f"{subject}?", **targets}


def hop(cloze, answer, *aliases):
    return {"question": f"{cloze} what?", "cloze": cloze, "answer": answer, "answer_alias": list(aliases)}


def record(**fields):
    return {
        "case_id": 5,
        "requested_rewrite": [edit("Lev Landau", "The mother tongue of {} is", "Chinese")],
        "questions": ["The mother tongue of the author of it is"],
        "answer": "French",
        "answer_alias": ["fr", "French"],
        "new_answer": "Chinese",
        "new_answer_alias": [],
        "single_hops": [hop("The author is", "Lev Landau")],
        "new_single_hops": [hop("The author is", "Lev Landau", "Landau")],
        "orig": {},
    } | fields


def test_records_are_read(tmp_path):
    path = tmp_path / "mquake.json"
    path.write_text(json.dumps([record(), record(case_id=6, answer_extended=["langue d'oïl"])]))
    first, second = read_mquake(path)
    (request,) = first.requests
    assert (request.prompt, request.target, request.target_true) == (
        "The mother tongue of Lev Landau is",
        "Chinese",
        "French",
    )
    assert (first.id, first.answers, first.new_answers) == (5, ("French", "fr"), ("Chinese",))
    assert second.answers == ("French", "fr", "langue d'oïl")
    assert first.new_hops[0].answers == ("Lev Landau", "Landau")
    assert len(dict.fromkeys(q for r in (first, second) for q in r.requests)) == 1


@pytest.mark.parametrize(
    "change, named",
    [
        ({"requested_rewrite": {}}, "requested_rewrite"),
        ({"requested_rewrite": []}, "at least one edit"),
        ({"requested_rewrite": [edit("Rome", "no hole", "x")]}, "requested_rewrite 0"),
        ({"questions": None}, "questions"),
        ({"new_answer": ""}, "new_answer: empty"),
        ({"single_hops": [{"question": "x", "answer": "y"}]}, "cloze: missing"),
        ({"single_hops": "x"}, "single_hops"),
    ],
)
def test_malformed_records_are_named(change, named):
    with pytest.raises(RequestError) as caught:
        read_mquake([record(), record(**change)])
    (problem,) = caught.value.problems
    assert "record 1" in problem and named in problem


@pytest.mark.parametrize(
    "text, match, right",
    [
        (" Arabic. The capital", "prefix", True),
        ("\n\n Arabic\nQ: next", "exact", True),
        (" Arabic.", "exact", True),
        (" Arabic, he said", "exact", False),
        (" Arabica", "prefix", False),
        (" It is Arabic language", "prefix", False),
        (" It is (Arabic) language", "contains", True),
        (" arabic", "contains", False),
        (" Coarabic ar", "contains", True),
        (" bar", "contains", False),
        (" no\nArabic", "contains", False),
        ("", "prefix", False),
    ],
)
def test_what_counts_as_an_answer(text, match, right):
    assert answered(text, ("Arabic", "ar"), match) is right


def test_the_answer_stands_behind_the_marker():
    text = "It was made in Rome. Answer: Italy\n\nQuestion: x Answer: Rome"
    assert answered(text, ("Italy",), marker="Answer:")
    assert not answered(text, ("Rome",), marker="Answer:")
    assert not answered("Italy", ("Italy",), marker="Answer:")


def test_accuracies_from_what_the_models_say(tiny):
    model, tokenizer = tiny("tiny-llama")
    edited = shaken(model, 0.2, seed=1)
    template = "It is so. {}"
    first, second = "The mother tongue of Lev Landau is", "The capital of France is"
    prompts = [first, second, template.replace("{}", first), template.replace("{}", second)]

    def says(one):
        texts = generate(one, tokenizer, prompts, 4)
        return [text[len(p) :].strip() for text, p in zip(texts, prompts, strict=True)]

    ours, theirs = says(model), says(edited)
    assert all(ours) and all(theirs) and all(x != y for x, y in zip(ours, theirs, strict=True))
    records = read_mquake(
        [
            record(  # all that the edited model says, and the base model's second hop
                requested_rewrite=[edit("Lev Landau", "The mother tongue of {} is", theirs[0])],
                questions=[first, second],
                answer=ours[2],
                answer_alias=[],
                new_answer="no",
                new_answer_alias=[theirs[3]],
                single_hops=[hop(first, ours[0]), hop(second, ours[1])],
                new_single_hops=[hop(first, theirs[0]), hop(second, theirs[1], ours[1])],
            ),
            record(
                requested_rewrite=[
                    edit("Lev Landau", "The mother tongue of {} is", "no"),
                    edit("France", "The capital of {} is", ours[1]),
                ],
                questions=[first],
                answer="no",
                answer_alias=[],
                single_hops=[],
                new_single_hops=[hop(second, theirs[1])],
            ),
        ]
    )
    report = evaluate_multihop(model, edited, tokenizer, records, Asking(template, match="prefix", max_new_tokens=4))
    assert report.base == pytest.approx(
        dict(
            edit_success=1 / 3,
            hop_accuracy=1 / 3,
            instance_accuracy=0,
            question_accuracy=0,
            multihop_accuracy=0,
            original_instance_accuracy=1,
            original_multihop_accuracy=1 / 2,
        )
    )
    assert report.edited == pytest.approx(
        dict(
            edit_success=1 / 3,
            hop_accuracy=1,
            instance_accuracy=1,
            question_accuracy=1 / 3,
            multihop_accuracy=1 / 2,
            original_instance_accuracy=0,
            original_multihop_accuracy=0,
        )
    )
    assert report.counts["edit_success"] == 3 and report.counts["original_instance_accuracy"] == 1
    said = [m.said for m in report.records[0].measured if m.metric == "edit_success"]
    assert [(x.strip(), y.strip()) for x, y in said] == [(ours[0], theirs[0])]


def test_hops_may_be_asked_as_questions(tiny):
    """All but those that an edit states."""
    model, tokenizer = tiny("tiny-llama")
    stated = "The mother tongue of Lev Landau is"
    records = read_mquake([record(new_single_hops=[hop(stated, "x"), hop("The author is", "y")])])
    report = evaluate_multihop(model, model, tokenizer, records, Asking(hop="Q: {} A:", max_new_tokens=2))
    asked = [m.prompt for m in report.records[0].measured if m.metric == "hop_accuracy"]
    assert asked == [stated, "Q: The author is what? A:"]


def test_what_cannot_be_asked_is_named(tiny):
    model, tokenizer = tiny("tiny-llama")
    with pytest.raises(JaxEditError, match="question must hold exactly one"):
        Asking(question="Q: A:")
    with pytest.raises(JaxEditError, match="match must be one of"):
        Asking(match="fuzzy")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="with 125 new ones"):
        evaluate_multihop(model, model, tokenizer, read_mquake([record()]), Asking(max_new_tokens=125))
    with pytest.raises(JaxEditError, match="no records"):
        evaluate_multihop(model, model, tokenizer, [])

"""KnowEdit's records and metrics against full logits."""

import json

import numpy as np
import pytest
from helpers_metrics import row_logits, shaken

from jaxedit.data.knowedit import Probe, read_knowedit
from jaxedit.data.tokens import target_ids
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.portability import evaluate_knowedit

RECORD = {
    "subject": "Danielle Darrieux",
    "target_new": "English and Chinese",
    "prompt": "The mother tongue of Danielle Darrieux is",
    "ground_truth": ["French"],
    "rephrase_prompt": "Danielle Darrieux speaks",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "Danielle Darrieux was born in", "ground_truth": ["the city of Rome", "Bordeaux"]},
            {"prompt": "The capital of France is", "ground_truth": "Paris"},
        ],
        "Forgetfulness": [{"prompt": "Lev Landau speaks", "ground_truth": [["Russian or English"]]}],
    },
    "portability": {
        "Reasoning": [
            {
                "prompt": "People in the home of Danielle Darrieux speak",
                "ground_truth": [["French", "English"], ["German"]],
            },
            {"prompt": "Nothing is known of", "ground_truth": [""]},
        ],
        "Subject_Aliasing": [
            {"prompt": "The mother tongue of Darrieux is", "ground_truth": "English and Chinese"},
            {"prompt": "Darrieux speaks", "ground_truth": "English and Chinese"},
        ],
        "Logical_Generalization": [],
    },
}
PLAIN = {"subject": "Rome", "prompt": "Rome is in", "target_new": "Russia", "locality": {}, "portability": {}}


def test_aliases_are_read_in_any_nesting(tmp_path):
    path = tmp_path / "knowedit.json"
    path.write_text(json.dumps([RECORD, PLAIN]))
    first, second = read_knowedit(path)
    assert first.request.target == "English and Chinese" and first.request.paraphrases == ("Danielle Darrieux speaks",)
    assert first.request.neighbourhood_answers == ("the city of Rome", "Paris", "Russian or English")
    assert first.locality["Relation_Specificity"][0].answers == ("the city of Rome", "Bordeaux")
    asked = "People in the home of Danielle Darrieux speak"
    assert first.portability["Reasoning"] == (Probe(asked, ("French", "English", "German")),)
    assert list(first.portability) == ["Reasoning", "Subject_Aliasing"]
    assert second.locality == second.portability == {}


def test_wikibio_has_names_of_its_own():
    record = {"concept": "john smith", "text": "A text about john smith.", "labels": "He is old.", "locality": {}}
    (read,) = read_knowedit([record])
    assert (read.request.subject, read.request.target) == ("john smith", "He is old.")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"portability": ["x"]}, "portability"),
        ({"portability": {"Reasoning": [{"prompt": "x"}]}}, "ground_truth"),
        ({"locality": {"Forgetfulness": [{"prompt": "x", "ground_truth": 3}]}}, "int 3"),
        ({"locality": {"Forgetfulness": [{"prompt": "", "ground_truth": "y"}]}}, "a prompt is missing"),
        ({"target_new": None}, "target_new"),
        ({"portabilty": {}}, "unknown key"),
    ],
)
def test_malformed_records_are_named(change, named):
    with pytest.raises(RequestError) as caught:
        read_knowedit([PLAIN, RECORD | change])
    assert all("record 1" in problem for problem in caught.value.problems)
    assert named in caught.value.problems[0]


def likeliest(model, tokenizer, prompt, answer):
    head, target = tokenizer(prompt)["input_ids"], target_ids(tokenizer, prompt, answer)
    best = row_logits(model, head + target).argmax(-1)
    return best[len(head) - 1 : -1], target


def accuracy(model, tokenizer, prompt, answer):
    best, target = likeliest(model, tokenizer, prompt, answer)
    return np.mean(best == target)


@pytest.mark.parametrize("aliases", [True, False])
def test_against_full_logits(tiny, aliases):
    model, tokenizer = tiny("tiny-gptj")
    edited = shaken(model, 0.02)
    records = read_knowedit([RECORD, PLAIN])
    report = evaluate_knowedit(model, edited, tokenizer, records, aliases=aliases)
    for one, side in ((model, report.base), (edited, report.edited)):
        own = [accuracy(one, tokenizer, r["prompt"], r["target_new"]) for r in (RECORD, PLAIN)]
        assert side["edit_success"] == pytest.approx(np.mean(own))
        assert side["rephrase"] == pytest.approx(
            accuracy(one, tokenizer, "Danielle Darrieux speaks", RECORD["target_new"])
        )
        kinds = {}
        for kind, probes in records[0].portability.items():
            best = [[accuracy(one, tokenizer, p.prompt, a) for a in p.answers] for p in probes]
            kinds[kind] = np.mean([max(row) if aliases else row[0] for row in best])
            assert side[f"portability/{kind}"] == pytest.approx(kinds[kind])
        assert side["portability"] == pytest.approx(np.mean(list(kinds.values())))
    kinds = []
    for kind, probes in records[0].locality.items():
        same = [
            np.mean(np.equal(*(likeliest(m, tokenizer, p.prompt, p.answers[0])[0] for m in (model, edited))))
            for p in probes
        ]
        kinds.append(np.mean(same))
        assert report.edited[f"locality/{kind}"] == pytest.approx(kinds[-1])
    assert report.edited["locality"] == pytest.approx(np.mean(kinds))
    assert report.base["locality"] is None
    assert 0 < report.edited["locality"] < 1
    assert report.to_dict()["counts"]["portability/Subject_Aliasing"] == 2


def test_a_model_agrees_with_itself(tiny):
    model, tokenizer = tiny("tiny-gptj")
    report = evaluate_knowedit(model, model, tokenizer, read_knowedit([RECORD]))
    assert report.edited["locality"] == 1
    assert report.edited["portability"] == report.base["portability"]
    with pytest.raises(JaxEditError, match="no records"):
        evaluate_knowedit(model, model, tokenizer, [])

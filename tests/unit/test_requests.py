"""Reading edit requests: every format, every report, and a round trip through the file types."""

import csv
import dataclasses
import io
import json
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxedit.data.requests import read_requests
from jaxedit.errors import RequestError
from jaxedit.types import EditRequest

PLAIN: dict[str, Any] = {"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target": "Rome"}
REWRITE = {
    "prompt": "The mother tongue of {} is",
    "relation_id": "P103",
    "target_new": {"str": "English", "id": "Q1860"},
    "target_true": {"str": "French", "id": "Q150"},
    "subject": "Léon Blum",
}
COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 2796,
    "requested_rewrite": REWRITE,
    "paraphrase_prompts": ["Léon Blum, a native"],
    "neighborhood_prompts": ["Montesquieu spoke", "Molière spoke"],
    "attribute_prompts": ["Douglas Adams spoke"],
    "generation_prompts": ["Léon Blum was born in"],
}
MEND = {
    "subject": "unifirst",
    "src": "What is made by UniFirst?",
    "pred": "uniform",
    "rephrase": "What will be made by UniFirst?",
    "alt": " unmanned aircraft",
    "answers": ["uniform", "clothing"],
    "loc": "nq question: who sang it",
    "loc_ans": "Walter",
    "cond": "uniform >> unmanned aircraft",
}
KNOWEDIT = {
    "subject": "Angora goat ",
    "target_new": "Angora",
    "prompt": "What is Angora goat named after?",
    "ground_truth": ["Ankara", "Turkey"],
    "rephrase_prompt": "Who is Angora goat named for?",
    "cond": "",
    "locality": {
        "Relation_Specificity": [{"prompt": "Angora goat rank", "ground_truth": ["breed"]}],
        "Forgetfulness": [{"prompt": "Angora goat is a", "ground_truth": [["goat", "animal"]]}],
    },
    "portability": {"Reasoning": [{"prompt": "Which river?", "ground_truth": "none"}]},
}
EASYEDIT = {
    "case_id": 0,
    "prompt": "The mother tongue of Léon Blum is",
    "target_new": "English",
    "subject": "Léon Blum",
    "ground_truth": "French",
    "rephrase_prompt": "Léon Blum speaks",
    "locality_prompt": "Molière spoke",
    "locality_ground_truth": "French",
}


def problems_of(source, **options):
    with pytest.raises(RequestError) as caught:
        read_requests(source, **options)
    return caught.value.problems


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_plain_with_aliases_and_template():
    records = [
        PLAIN,
        {
            "prompt": "{} is in",
            "subject": "Rome",
            "target_new": "Gaul",
            "ground_truth": "Pisa",
            "case_id": 4,
        },
        {**PLAIN, "neighborhood": ["Big Ben is in"], "neighborhood_answers": ["London"], "target_true": None},
    ]
    assert read_requests(records) == [
        EditRequest("The Eiffel Tower is in", "Eiffel Tower", "Rome"),
        EditRequest("Rome is in", "Rome", "Gaul", "Pisa", id=4),
        EditRequest(**PLAIN, neighbourhood=("Big Ben is in",), neighbourhood_answers=("London",)),
    ]


def test_single_records_and_requests_pass_through():
    request = EditRequest(**PLAIN)
    assert read_requests(request) == read_requests(PLAIN) == [request]
    assert read_requests([request, PLAIN])[0] is request
    assert read_requests(dict(r) for r in [PLAIN]) == [request]
    assert read_requests(dataclasses.asdict(request)) == [request]


def test_counterfact_nested_bare_and_flat_agree():
    flat = {
        "id": 7,
        "subject": "Léon Blum",
        "prompt": REWRITE["prompt"],
        "target_new": "English",
        "target_true": "French",
        "paraphrase_prompts": COUNTERFACT["paraphrase_prompts"],
        "neighborhood_prompts": COUNTERFACT["neighborhood_prompts"],
    }
    nested, flat_one, bare = read_requests([COUNTERFACT, flat, REWRITE])
    assert nested == flat_one
    assert nested == EditRequest(
        "The mother tongue of Léon Blum is",
        "Léon Blum",
        "English",
        "French",
        ("Léon Blum, a native",),
        ("Montesquieu spoke", "Molière spoke"),
        subject_start=21,
        id=7,
    )
    assert (bare.prompt, bare.target, bare.target_true, bare.id) == (nested.prompt, "English", "French", None)


def test_counterfact_prompt_is_always_a_template():
    """The subject stands in the template too: the decisive one is where the placeholder was."""
    rewrite = {**REWRITE, "prompt": "{} of the firm Apple", "subject": "Apple"}
    (request,) = read_requests({"requested_rewrite": rewrite})
    assert (request.prompt, request.subject_start) == ("Apple of the firm Apple", 0)
    filled = {**REWRITE, "prompt": "Apple is"}
    assert "record 0: prompt: " in problems_of([{**filled, "subject": "Apple"}])[0]


def test_zsre_flavour_of_the_flat_format():
    (request,) = read_requests(
        {
            "id": 0,
            "subject": "Watts Humphrey",
            "prompt": "What university did {} attend?",
            "target_new": "Illinois",
            "target_true": "",
            "paraphrase_prompts": ["Where did Watts Humphrey study?"],
            "neighborhood_prompts": ["nq question: who?"],
            "neighborhood_prompts_answers": ["Hugo Weaving"],
        }
    )
    assert request.target_true is None
    assert request.neighbourhood_answers == ("Hugo Weaving",)


def test_mend():
    (request,) = read_requests([MEND])
    assert request == EditRequest(
        "What is made by UniFirst?",
        "UniFirst",  # the prompt's spelling
        "unmanned aircraft",
        "uniform",
        ("What will be made by UniFirst?",),
        ("nq question: who sang it",),
        ("Walter",),
    )


def test_knowedit_joins_the_localities():
    (request,) = read_requests([KNOWEDIT])
    assert (request.subject, request.target_true) == ("Angora goat", "Ankara")
    assert request.paraphrases == ("Who is Angora goat named for?",)
    assert request.neighbourhood == ("Angora goat rank", "Angora goat is a")
    assert request.neighbourhood_answers == ("breed", "goat")


@pytest.mark.parametrize("locality", [["a"], {"a": {"prompt": ["b"]}}, {"a": [{"prompt": "b"}]}, 3])
def test_knowedit_misshapen_locality(locality):
    (problem,) = problems_of([{**KNOWEDIT, "locality": locality}])
    assert "records: record 0: locality: " in problem


def test_locality_given_twice_is_refused():
    """Neither list of neighbours is dropped in favour of the other."""
    assert "'locality_prompt'" in problems_of({**KNOWEDIT, "locality_prompt": "Molière spoke"})[0]


def test_easyedit():
    (request,) = read_requests([EASYEDIT])
    assert request == EditRequest(
        "The mother tongue of Léon Blum is",
        "Léon Blum",
        "English",
        "French",
        ("Léon Blum speaks",),
        ("Molière spoke",),
        ("French",),
        id=0,
    )


def test_formats_mix_record_by_record(tmp_path):
    records = [PLAIN, COUNTERFACT, MEND, KNOWEDIT, EASYEDIT]
    path = write(tmp_path / "all.jsonl", "\n".join(json.dumps(r) for r in records))
    assert read_requests(path) == [r for record in records for r in read_requests(record)]


def test_braces_are_literal_where_the_subject_stands():
    prompt = "In C++ {} and {x: 1} the Eiffel Tower {is"
    assert read_requests({**PLAIN, "prompt": prompt})[0].prompt == prompt


BAD = [
    ({"prompt": 5}, "prompt: is int 5"),
    ({"prompt": None}, "prompt: missing"),
    ({"target": "  "}, "target: empty"),
    ({"subject": "eiffel tower"}, "subject: 'eiffel tower' is not in the prompt"),
    ({"prompt": "{} and {} are in"}, "subject: "),
    ({"paraphrase_prompt": ["x"]}, "paraphrase_prompt: unknown key"),
    ({"target_new": "Paris"}, "target_new: stands for the same as 'target'"),
    ({"paraphrases": 0}, "paraphrases: is int 0"),
    ({"paraphrases": ["a", 3, ""]}, "paraphrases: item 1 is int 3, item 2 is str ''"),
    ({"neighbourhood": ["a", "b"], "neighbourhood_answers": ["c"]}, "neighbourhood_answers: 1 answers for 2"),
    ({"subject_start": 3}, "subject_start: "),
    ({"subject_start": True}, "subject_start: is bool True"),
    ({"id": 1.5}, "id: is float 1.5"),
]


def test_all_bad_records_are_reported_at_once(tmp_path):
    """Good records between the bad ones, so that the indices are not those of the problems."""
    records = [r for change, _ in BAD for r in (PLAIN, {**PLAIN, **change})]
    path = write(tmp_path / "bad.json", json.dumps(records))
    problems = problems_of(path)
    assert len(problems) == len(BAD)
    for i, (problem, (_, expected)) in enumerate(zip(problems, BAD, strict=True)):
        assert problem.startswith(f"{path}: record {2 * i + 1}: {expected}")
    assert "'Eiffel Tower'" in problems[3], "the prompt's spelling is offered"
    assert "'paraphrases'" in problems[5], "the known keys are named"


def test_every_problem_of_one_record_is_reported():
    problems = problems_of([{"prompt": 5, "subject": "", "paraphrases": [1], "x": 1}])
    assert [p.split(": ")[2] for p in problems] == ["x", "prompt", "subject", "target", "paraphrases"]


def test_published_formats_report_misspelt_keys():
    assert "neighborhod_prompts: unknown key" in problems_of({**COUNTERFACT, "neighborhod_prompts": []})[0]


@pytest.mark.parametrize("record", [5, None, "text", ["a"], {"Corpus": "a", "Text": "b"}, {}])
def test_undetectable_records(record):
    (problem,) = problems_of([PLAIN, record])
    assert problem.startswith("records: record 1: record: ")
    assert not isinstance(record, dict) or all(repr(key) in problem for key in record)


def test_rewrites_in_a_list_are_refused():
    assert "requested_rewrite: is list" in problems_of([{"requested_rewrite": [REWRITE]}])[0]


def test_skip_malformed_warns_and_keeps_the_rest():
    with pytest.warns(UserWarning, match=r"skipped 5 malformed of 7 .*record 1: target.*and 2 more"):
        kept = read_requests([PLAIN, *[{**PLAIN, "target": ""}] * 5, PLAIN], skip_malformed=True)
    assert kept == [EditRequest(**PLAIN)] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_requests([PLAIN], skip_malformed=True)
    assert len(problems_of([{**PLAIN, "target": ""}], skip_malformed=True)) == 1


# Files.


def test_byte_order_mark_blank_lines_and_line_separators(tmp_path):
    record: dict[str, Any] = {**PLAIN, "target": "Ro\u2028me"}
    line = json.dumps(record, ensure_ascii=False)
    path = write(tmp_path / "a.jsonl", f"\n{line}\r\n\n  \n{line}\n\n", "utf-8-sig")
    assert read_requests(path) == [EditRequest(**record)] * 2
    assert read_requests(str(write(tmp_path / "named.json", f"{line}\n{line}"))) == [EditRequest(**record)] * 2
    assert read_requests(write(tmp_path / "a.json", f"[{line}]", "utf-8-sig")) == [EditRequest(**record)]


def test_jsonl_line_that_is_not_json(tmp_path):
    line = json.dumps(PLAIN)
    path = write(tmp_path / "a.jsonl", f"{line}\n\n{{oops\n{line}\n[1")
    first, second = problems_of(path)
    assert first.startswith(f"{path}: record 1 (line 3): record: not valid JSON")
    assert second.startswith(f"{path}: record 3 (line 5): record: not valid JSON")
    with pytest.warns(UserWarning, match="skipped 2 malformed of 4"):
        assert len(read_requests(path, skip_malformed=True)) == 2


def test_list_under_one_key(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"version": 1, "data": [PLAIN]}))
    assert read_requests(path) == [EditRequest(**PLAIN)]
    assert "record 1: record: is int 5" in problems_of({"data": [PLAIN, 5]})[0]


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.json", '[{"prompt": "x"', "not valid JSON at line 1 column 16"),
        ("a.json", "  \n", "the file is empty"),
        ("a.csv", "", "the file is empty"),
        ("a.json", "[]", "holds no records"),
        ("a.json", '{"data": []}', "holds no records"),
        ("a.csv", "prompt,subject,target\n\n", "holds no records"),
        ("a.json", "3", "holds int 3, expected a list"),
        ("a.txt", "prompt", "unknown file type"),
        ("a.csv", "prompt,topic\nx,y", "header: no column subject"),
        ("a.csv", "prompt,subject,target,target\nx,x,y,z", "header: a column name occurs twice"),
        ("a.csv", 'prompt,subject,target\n"x,x,y', "not valid CSV at line 2"),
        ("a.csv", "prompt,subject,target\nRome, in,Rome,x", "record 0 (line 2): record: the row has 4 cells"),
        ("a.csv", "prompt,subject,target\nRome in,Rome,", "record 0 (line 2): target: missing"),
    ],
)
def test_unreadable_files(tmp_path, name, text, expected):
    path = write(tmp_path / name, text)
    assert problems_of(path)[0].startswith(f"{path}: {expected}")


def test_missing_file_wrong_encoding_and_wrong_sources(tmp_path):
    assert "no such file" in problems_of(tmp_path / "none.json")[0]
    assert "no such file" in problems_of("none")[0]
    assert "cannot be read" in problems_of(tmp_path)[0]
    assert "not UTF-8" in problems_of(write(tmp_path / "a.json", '["é"]', "latin-1"))[0]
    for source in (None, 5, b"[]"):
        assert "expected a path or a list" in problems_of(source)[0]
    assert "holds no records" in problems_of([])[0]


def test_csv_missing_columns_are_all_named(tmp_path):
    problems = problems_of(write(tmp_path / "a.csv", "topic\nx"))
    columns = [p.split("column ")[1].split(";")[0] for p in problems]
    assert columns == ["prompt", "subject", "target or target_new"]


def test_csv_and_tsv_lists(tmp_path):
    rows = [
        ["prompt", "subject", "target", "paraphrases", "neighbourhood", "neighbourhood_answers", "id"],
        ["Zoë, 1st, is in", "Zoë", "Rome", "Where is Zoë? | Zoë's in", "Tom is in", "Oslo", "7"],
        ["", "", "", "", "", "", ""],
        ["{} is in", "Zoë", "Rome", "", "", "", ""],
    ]
    expected = [
        EditRequest(
            "Zoë, 1st, is in",
            "Zoë",
            "Rome",
            paraphrases=("Where is Zoë?", "Zoë's in"),
            neighbourhood=("Tom is in",),
            neighbourhood_answers=("Oslo",),
            id="7",
        ),
        EditRequest("Zoë is in", "Zoë", "Rome"),
    ]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        buffer = io.StringIO()
        csv.writer(buffer, delimiter=delimiter).writerows(rows)
        assert read_requests(write(tmp_path / name, buffer.getvalue(), "utf-8-sig")) == expected


def test_csv_in_a_published_format(tmp_path):
    record = {key: str(value) for key, value in EASYEDIT.items()}
    text = ",".join(record) + "\n" + ",".join(record.values())
    (request,) = read_requests(write(tmp_path / "a.csv", text))
    assert request == dataclasses.replace(read_requests(EASYEDIT)[0], id="0")


# Text that CSV can hold: no list separator, no lone surrogate or NUL, and no white space that is trimmed.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|\0"), min_size=1, max_size=12)
TEXT = TEXT.map(str.strip).filter(bool)


@st.composite
def plain_records(draw):
    subject = draw(TEXT)
    neighbourhood = draw(st.lists(TEXT, max_size=3))
    record = {
        "prompt": f"{draw(st.text(max_size=0) | TEXT)} {subject} {draw(TEXT)}",
        "subject": subject,
        "target": draw(TEXT),
        "target_true": draw(st.none() | TEXT),
        "paraphrases": draw(st.lists(TEXT, max_size=3)),
        "neighbourhood": neighbourhood,
        "neighbourhood_answers": draw(st.sampled_from([[], neighbourhood])),
        "id": draw(st.none() | TEXT),
    }
    return {key: value for key, value in record.items() if value not in (None, [])}


@settings(max_examples=60, deadline=None)
@given(records=st.lists(plain_records(), min_size=1, max_size=4), ascii_only=st.booleans())
def test_round_trip(tmp_path_factory, records, ascii_only):
    folder = tmp_path_factory.mktemp("round_trip")
    expected = [EditRequest(**record) for record in records]
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    buffer = io.StringIO(newline="")
    table = csv.DictWriter(buffer, fieldnames=list(dict.fromkeys(key for r in records for key in r)))
    table.writeheader()
    table.writerows({k: "|".join(v) if isinstance(v, list) else v for k, v in r.items()} for r in records)
    assert read_requests(records) == expected
    assert read_requests(write(folder / "a.json", f"[{','.join(lines)}]")) == expected
    assert read_requests(write(folder / "a.jsonl", "\n".join(lines))) == expected
    assert read_requests(write(folder / "a.csv", buffer.getvalue())) == expected

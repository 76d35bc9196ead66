"""The embedded default model against completions and logits made by transformers from the same file."""

import json

import numpy as np
import pytest

import jaxedit as je
from jaxedit.cache import cache_dir
from jaxedit.models.embedded import FILE

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        not any(cache_dir().glob(f"*/{FILE}")), reason="SmolLM2-135M is not in the cache; `make demo` puts it there"
    ),
]


@pytest.fixture(scope="module")
def smollm2():
    return je.load("smollm2-135m")


def test_greedy_completions_are_those_of_transformers(smollm2, goldens):
    expected = json.loads((goldens / "smollm2" / "completions.json").read_text())
    model, tokenizer = smollm2
    prompts = [e["prompt"] for e in expected]
    assert [tokenizer(p)["input_ids"] for p in prompts] == [e["input_ids"] for e in expected]
    made = je.generate(model, tokenizer, prompts, max_new_tokens=16, return_tokens=True)
    assert made == [e["output_ids"] for e in expected]
    assert je.generate(model, tokenizer, prompts, max_new_tokens=16) == [e["text"] for e in expected]


def test_an_edit_takes_and_is_withdrawn_exactly(smollm2):
    model, tokenizer = smollm2
    request = je.EditRequest("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome")
    stats = je.second_moments(model, tokenizer, None, (3, 4, 5, 6, 7), max_tokens=4096, cache=False)
    method = je.method_for("fe", model.config)
    result = je.apply_edits(model, tokenizer, [request], method, stats=stats, templates=["{}", "I know that. {}"])
    assert result.info.probability_after[0] > 0.5 > result.info.probability_before[0]
    assert max(layer.solve_residual for layer in result.info.layers) < 1e-10
    said = je.generate(result.model, tokenizer, [request.prompt], max_new_tokens=1)[0]
    assert said == request.prompt + " Rome"
    back = je.withdraw_patch(result.model, result.patch)
    for mine, base in zip(
        np.asarray(back.params["blocks"]["down"]["w"]), np.asarray(model.params["blocks"]["down"]["w"]), strict=True
    ):
        np.testing.assert_array_equal(mine.view(np.int32), base.view(np.int32))

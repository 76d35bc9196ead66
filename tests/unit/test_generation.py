"""Generation with a cache against running the whole text again for every token."""

import jax
import numpy as np
import pytest

from jaxedit.errors import JaxEditError
from jaxedit.evaluation.batching import batches, bucket, chunk, pad
from jaxedit.evaluation.generation import continue_rows, generate, generate_tokens
from jaxedit.models.transformer import logits

PROMPTS = [
    "Max Joseph von Pettenkofer works in the field of",
    "The mother tongue of",
    "I",
]
RANDOM = ["logits_only/mistral", "logits_only/gemma2"]


def greedy(model, rows, n, length=24):
    """The slow way: no cache, the whole text again for every token."""
    rows = [list(row) for row in rows]
    for _ in range(n):
        tokens, mask = pad(rows, length)
        out = logits(model, tokens, mask)
        for i, row in enumerate(rows):
            row.append(int(out[i, len(row) - 1].argmax()))
    return [row[-n:] for row in rows]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-gptj", *RANDOM])
def test_cached_is_uncached(decoder, name):
    """Also where the text is longer than the attention window (8 in the random models)."""
    model, n = decoder(name), 12
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, model.config.vocab, size).tolist() for size in (3, 11, 1)]
    assert continue_rows(model.params, model.config, rows, n) == greedy(model, rows, n)


def test_left_and_right_padding_agree(decoder):
    model = decoder("tiny-llama")
    rows = [[5, 6, 7], [8, 9, 10, 11, 12]]
    right, left = np.zeros((2, 2, 8), np.int32)
    for i, row in enumerate(rows):
        right[i, : len(row)] = left[i, 8 - len(row) :] = row
    outs = [generate_tokens(model.params, model.config, t, t > 0, 6)[0] for t in (right, left)]
    np.testing.assert_array_equal(*outs)


def test_a_batch_gives_what_each_prompt_gives_alone(tiny):
    model, tokenizer = tiny("tiny-llama")
    together = generate(model, tokenizer, PROMPTS, 8)
    assert together == [generate(model, tokenizer, [p], 8)[0] for p in PROMPTS]
    assert all(text.startswith(p) for text, p in zip(together, PROMPTS, strict=True))


def test_eos_ends_a_row_and_only_that_row(decoder):
    model = decoder("tiny-llama")
    rows = [[5, 6, 7], [800, 900]]
    free = continue_rows(model.params, model.config, rows, 8)
    eos = free[0][2]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert continue_rows(model.params, model.config, rows, 8, eos_ids=(eos,)) == expected
    assert len(expected[0]) <= 3


def test_sampling_depends_on_the_seed_alone(tiny):
    model, tokenizer = tiny("tiny-llama")

    def sample(seed, prompts=PROMPTS[:2], **options):
        return generate(model, tokenizer, prompts, 8, temperature=2.0, seed=seed, **options)

    assert sample(0) == sample(0) != sample(1)
    assert sample(0, PROMPTS[:1]) == sample(0)[:1]


def test_sampled_tokens_are_among_the_top_k_in_the_right_proportion(decoder):
    model = decoder("tiny-llama")
    n, k = 2000, 3
    tokens = np.full((n, 1), 40)
    options = {"temperature": 1.5, "top_k": k, "seed": 4}
    new = np.asarray(generate_tokens(model.params, model.config, tokens, np.ones_like(tokens), 1, **options)[0])
    values, ids = jax.lax.top_k(logits(model, tokens[:1])[0, 0], k)
    expected = jax.nn.softmax(values / 1.5)
    seen = np.array([(new == i).mean() for i in np.asarray(ids)])
    assert float(seen.sum()) == pytest.approx(1)
    np.testing.assert_allclose(seen, expected, atol=4 * 0.5 / n**0.5)


def test_float64(decoder):
    model = decoder("tiny-llama")
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
        new = continue_rows(params, model.config, [[5, 6, 7]], 4, temperature=1.0, top_k=1)
    assert new == continue_rows(model.params, model.config, [[5, 6, 7]], 4)


def test_bad_input(tiny):
    model, tokenizer = tiny("tiny-gpt2")
    most = model.config.max_positions
    assert generate(model, tokenizer, []) == []
    assert generate(model, tokenizer, ["I"], 0) == ["I"]
    for args in ((["I"], most), ([""], 1), ("I", 1), (["I"], -1)):
        with pytest.raises(JaxEditError):
            generate(model, tokenizer, *args)
    with pytest.raises(JaxEditError, match="tokenizer"):
        generate(model, None, ["I"])
    with pytest.raises(JaxEditError, match="temperature"):
        generate(model, tokenizer, ["I"], 1, temperature=-1.0)


def test_batches_hold_every_item_once_within_the_budget():
    rng = np.random.default_rng(1)
    shapes = [(bucket(int(n), 8), 4) for n in rng.integers(1, 200, 500)]
    made = batches(shapes, 1024)
    assert sorted(i for batch in made for i in batch.index) == list(range(500))
    for batch in made:
        assert len(batch.index) <= batch.rows and batch.live.sum() == len(batch.index)
        assert batch.rows * sum(batch.shape) <= 1024
        assert all(a >= b for i in batch.index for a, b in zip(batch.shape, shapes[i], strict=True))
    # A few short texts share one program; a long one does not stretch them all.
    assert len(batches([(8,), (16,), (24,)] * 3, 8192)) == 1
    assert len(batches([(8,)] * 50 + [(512,)], 8192)) == 2
    assert batches([], 10) == []


def test_buckets_waste_at_most_half():
    for n in range(1, 2000):
        assert n <= bucket(n) <= max(16, 1.5 * n)
        assert 1 <= chunk(n) <= 256
    assert [bucket(n) for n in (1, 3, 9, 17, 25, 33)] == [1, 4, 16, 24, 32, 48]

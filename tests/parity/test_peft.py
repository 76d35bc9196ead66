"""Exported adapters, loaded by peft on the untouched base in transformers, make the edited model (an extra)."""

import numpy as np
import pytest

import jaxedit as je
from jaxedit.export.lora import apply_lora, save_lora
from jaxedit.export.patch import Delta, make_patch

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.torch

TINY = ["tiny-llama", "tiny-gpt2", "tiny-gptj"]


def random_patch(model, ranks):
    """Updates as large as the weights, low-rank or, without a rank, dense."""
    rng = np.random.default_rng(0)
    originals = {l: np.asarray(model.params["blocks"]["down"]["w"][l]) for l in ranks}
    deltas = {}
    for l, rank in ranks.items():
        (d_ff, d_model), size = originals[l].shape, originals[l].std()
        if rank is None:
            deltas[l] = Delta((size * rng.normal(size=(d_ff, d_model))).astype(np.float32))
        else:
            left, right = rng.normal(size=(d_ff, rank)), size / rank**0.5 * rng.normal(size=(rank, d_model))
            deltas[l] = Delta(left.astype(np.float32), right.astype(np.float32))
    return make_patch({"name": "random"}, (), originals, deltas)[0]


def theirs(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("ranks", [{1: 2, 3: 9, 4: 5}, {0: None, 2: 3}], ids=["low-rank", "one dense"])
@pytest.mark.parametrize("name", TINY)
def test_peft_on_the_base_gives_the_edited_logits(tiny, goldens, tmp_path, name, ranks):
    from transformers import AutoModelForCausalLM

    model = tiny(name)[0]
    patch = random_patch(model, ranks)
    save_lora(patch, model, tmp_path / "adapter", base_name=str(goldens / name))
    tokens = np.random.default_rng(1).integers(1, model.config.vocab, (3, 20))
    expected = np.asarray(je.logits(je.apply_patch(model, patch), tokens))
    assert np.abs(expected - np.asarray(je.logits(model, tokens))).max() > 0.1

    base = AutoModelForCausalLM.from_pretrained(goldens / name, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    np.testing.assert_allclose(theirs(adapted, tokens), expected, atol=1e-4)
    touched = {n.removesuffix(".lora_A") for n, _ in adapted.named_modules() if n.endswith(".lora_A")}
    assert len(touched) == len(ranks)
    with adapted.disable_adapter():
        np.testing.assert_allclose(theirs(adapted, tokens), np.asarray(je.logits(model, tokens)), atol=1e-4)
    merged = adapted.merge_and_unload()
    np.testing.assert_allclose(theirs(merged, tokens), expected, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")  # what peft merged is the patched model for jaxedit too
    loaded, _ = je.load(tmp_path / "merged")
    for l in ranks:
        ours = np.asarray(je.apply_patch(model, patch).params["blocks"]["down"]["w"][l])
        np.testing.assert_allclose(np.asarray(loaded.params["blocks"]["down"]["w"][l]), ours, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_peft_finds_the_base_by_name(tiny, goldens, tmp_path, name):
    model = tiny(name)[0]
    patch = random_patch(model, {2: 4})
    save_lora(patch, model, tmp_path / "adapter", base_name=str(goldens / name), dtype="bfloat16")
    tokens = np.random.default_rng(1).integers(1, model.config.vocab, (2, 12))
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    ours = np.asarray(je.logits(apply_lora(model, tmp_path / "adapter"), tokens))
    np.testing.assert_allclose(theirs(loaded, tokens), ours, atol=1e-4)

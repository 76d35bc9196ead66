"""Against live transformers and PyTorch: what is saved there says the same (an extra; needs the bench extra)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import jaxedit as je

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def edited(tiny, name, layers):
    model, tokenizer = tiny(name)
    records = je.read_requests(tiny_facts(name))[:3]
    stats = je.SecondMoments.from_arrays({l: np.eye(model.config.d_ff, dtype=np.float32) for l in layers}, 1000)
    method = dataclasses.replace(je.method_for("fe", model.config, layers), solver=je.Ridge(cov_weight=1.0))
    return tokenizer, records, je.apply_edits(model, tokenizer, records, method, stats=stats, templates=["{}"])


def tiny_facts(name):
    return Path(__file__).parent.parent / "goldens" / name / "facts.json"


@pytest.mark.parametrize(("name", "layers"), [("tiny-llama", (1, 2)), ("tiny-gpt2", (1, 2)), ("tiny-gptj", (0, 1))])
@pytest.mark.parametrize("with_base", [True, False])
def test_saved_model_completes_the_same_in_transformers(tiny, goldens, tmp_path, name, layers, with_base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, records, result = edited(tiny, name, layers)
    je.save(result.model, tokenizer, tmp_path / "edited", base=goldens / name if with_base else None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype=torch.float32).eval()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "edited")
    prompts = [r.prompt for r in records]
    ours = je.generate(result.model, tokenizer, prompts, max_new_tokens=8, return_tokens=True)
    assert ours != je.generate(tiny(name)[0], tokenizer, prompts, max_new_tokens=8, return_tokens=True)
    for prompt, mine in zip(prompts, ours, strict=True):
        ids = loaded(prompt, return_tensors="pt")["input_ids"]
        made = theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
        assert made == mine


@pytest.mark.parametrize(
    "family", ["gpt_neo", "gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "phi3", "gemma2"]
)
def test_random_models_have_the_same_logits(tmp_path, family):
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt_neo":
        small |= {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "window_size": 4, "max_position_embeddings": 32}
        small |= {"attention_types": [[["global", "local"], 1], [["local"], 1]]}
    elif family in ("gpt2", "gptj"):
        small |= {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
        small |= {"rotary_dim": 4} if family == "gptj" else {}
    else:
        small |= {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
        small |= {"max_position_embeddings": 32}
        if family not in ("gpt_neox",):
            small |= {"num_key_value_heads": 2}
        if family == "gemma2":
            small |= {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 16}
        if family == "mistral":
            small |= {"sliding_window": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **small)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # larger weights than at initialisation, so that a wrong scale shows
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(1, 97, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    model, _ = je.load(tmp_path)
    got = np.asarray(je.logits(model, tokens))
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())

"""What the scripts run: a model with its requests and templates, the same on either side.

Real: a model that `jaxedit.load` takes and a file of requests; the PyTorch side loads a Hugging Face directory that
`jaxedit.save` wrote from it. Synthetic: random weights of a published shape, made on the device, with requests of
made-up words, as long as CounterFact's are, and a tokenizer that knows these words.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from harness import Side
from shapes import SHAPES

import jaxedit as je

Templates = tuple[tuple[str, ...], ...]
ALIASES = {"llama3-8b": "llama-3-8b", "gptj": "gpt-j-6b"}
# For trying the scripts without a GPU; not a published shape
_TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_WORDS = 1000
_TEMPLATE_WORDS, _TEMPLATES = 9, 5


@dataclasses.dataclass(frozen=True)
class Workload:
    """model: a name or directory; directory: its Hugging Face directory; shape: fields of a config.json instead.

    templates: None until they are sampled.
    """

    label: str
    model: str
    directory: str | None
    shape: dict[str, Any] | None
    dtype: str
    requests: tuple[je.EditRequest, ...]
    templates: Templates | None

    def settings(self, **more) -> dict[str, Any]:
        return {"model": self.label, "dtype": self.dtype, "edits": len(self.requests), **more}


def make(args) -> Workload:
    """The workload of a command line; writes the Hugging Face directory where it is not there yet."""
    if args.shape is not None:
        requests = synthetic_requests(args.count)
        dtype = args.dtype or ("bfloat16" if shutil.which("nvidia-smi") else "float32")
        return Workload(args.shape, "", None, shape(args.shape), dtype, requests, synthetic_templates())
    requests = tuple(je.read_requests(args.requests)[args.first : args.first + args.count])
    if len(requests) < args.count:
        print(f"{args.requests.name} holds only {len(requests)} requests from {args.first} on")
    directory = args.model
    if not Path(args.model).is_dir():
        from jaxedit.cache import cache_dir

        target = cache_dir() / "huggingface" / Path(args.model).name
        directory = str(target)
        if not (target / "config.json").exists():
            with Side("jax", _exporter) as side:
                side("export", args.model, target)
    return Workload(Path(args.model).name, args.model, directory, None, args.dtype or "float32", requests, None)


def _exporter(backend):
    def export(model: str, to: Path) -> str:
        return str(je.save(*je.load(model), to))

    return {"export": export}


def shape(name: str) -> dict[str, Any]:
    """The config.json of a published shape."""
    if name == "tiny":
        return dict(_TINY)
    wanted = ALIASES.get(name, name)
    if wanted not in SHAPES:
        raise SystemExit(f"unknown shape {name!r}; known: {', '.join([*SHAPES, *ALIASES, 'tiny'])}")
    return dict(SHAPES[wanted])


def jax_model(work: Workload):
    """``(Decoder, tokenizer)``."""
    if work.shape is None:
        return je.load(work.model, dtype=work.dtype)
    return random_decoder(work.shape, work.dtype), synthetic_tokenizer()


def torch_model(work: Workload, device: str):
    """``(model, tokenizer)``."""
    import torch_baseline

    if work.shape is None:
        return torch_baseline.load(work.directory, work.dtype, device)
    return torch_baseline.random_model(work.shape, work.dtype, device), synthetic_tokenizer()


def random_decoder(fields: dict[str, Any], dtype: str):
    """A decoder with random weights, made on the device one parameter at a time."""
    import json

    import jax
    import jax.numpy as jnp

    from jaxedit.models.config import parameter_shapes
    from jaxedit.models.conversion import nest
    from jaxedit.models.hub import family_of

    _, config = family_of(fields, "benchmarks")
    flat, key = {}, jax.random.key(0)
    normal = jax.jit(lambda key, size: 0.02 * jax.random.normal(key, size, dtype), static_argnums=1)
    for name, (size, _) in parameter_shapes(config).items():
        key, mine = jax.random.split(key)
        if name.endswith(".scale"):
            flat[name] = jnp.ones(size, dtype)
        elif name.endswith((".b", ".bias")):
            flat[name] = jnp.zeros(size, dtype)
        elif name.startswith("blocks."):  # layer by layer: the generator needs several times what it makes
            made = jnp.zeros(size, dtype)
            put = jax.jit(lambda made, part, l: made.at[l].set(part), donate_argnums=0)
            for l, each in enumerate(jax.random.split(mine, size[0])):
                made = put(made, normal(each, size[1:]), l)
            flat[name] = made
        else:
            flat[name] = normal(mine, size)
    return je.Decoder(config, nest(flat), json.dumps(fields))


def method(name: str, config, steps: int, threshold: float | None = None):
    """The method's preset, or general settings in five layers, with `steps` steps."""
    from jaxedit.presets import preset_name

    layers = None if preset_name(config) else tuple(range(1, min(6, config.n_layer - 1)))
    made = je.method_for(name, config, layers)
    changes: dict[str, Any] = {"steps": steps}
    if threshold is not None:
        changes["threshold"] = threshold
    return dataclasses.replace(made, anchor=dataclasses.replace(made.anchor, **changes))


def synthetic_tokenizer():
    """A fast tokenizer of made-up words, one token each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<end>", *(f"w{i}" for i in range(_WORDS)), ".", "is", "a"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def synthetic_requests(n: int) -> tuple[je.EditRequest, ...]:
    """Requests as long as CounterFact's in tokens: a subject of 2 to 5, a relation of 4 to 7, a target of 1 or 2."""
    chance = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{chance.randrange(_WORDS)}" for _ in range(chance.randint(low, high)))

    made = []
    for i in range(n):
        subject = words(2, 5)
        paraphrases = tuple(f"{words(4, 8)} {subject} {words(2, 4)}" for _ in range(2))
        near = tuple(words(7, 11) for _ in range(4))
        prompt = f"{subject} {words(4, 7)}"
        target, true = words(1, 2), words(1, 2)
        made.append(je.EditRequest(prompt, subject, target, true, paraphrases, near, id=i))
    return tuple(made)


def synthetic_templates() -> Templates:
    chance = random.Random(1)
    texts = [" ".join(f"w{chance.randrange(_WORDS)}" for _ in range(_TEMPLATE_WORDS)) for _ in range(_TEMPLATES)]
    return (("{}",), tuple(f"{text} . {{}}" for text in texts))


def spectrum(d_ff: int) -> np.ndarray:
    """Standard deviations of made-up key channels, a few of them large."""
    return 1 / np.sqrt(1 + np.arange(d_ff, dtype=np.float32) / 16)


def moment(d_ff: int, seed: int) -> np.ndarray:
    """A made-up second moment: that of 2048 correlated keys, and independent ones for the rest."""
    chance = np.random.default_rng([seed, d_ff])
    scale = spectrum(d_ff)
    keys = chance.standard_normal((2048, d_ff), np.float32) * scale[chance.permutation(d_ff)]
    return keys.T @ keys / np.float32(2048) + np.diag(0.1 * scale**2)


def shape_config(name: str):
    """The `ModelConfig` of a shape."""
    from jaxedit.models.hub import family_of

    return family_of(shape(name), name)[1]


def config_of(work: Workload):
    """The `ModelConfig` without loading the model."""
    import json

    from jaxedit.models.hub import family_of

    fields = work.shape or json.loads((Path(work.directory or "") / "config.json").read_text())
    return family_of(fields, work.label)[1]

"""Second moments against those that PyTorch code collected, in float64, over the same tokens."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxedit.models.hub import load
from jaxedit.moments_pass import moments_of_rows

GOLDENS = Path(__file__).parents[1] / "goldens"
LAYERS = {"tiny-llama": (1, 2, 3), "tiny-gpt2": (1, 2, 3), "tiny-gptj": (0, 1, 2)}


def rows():
    ids = np.load(GOLDENS / "cov_tokens.npz")["input_ids"].astype(np.int32)
    for row in ids:
        yield row, np.arange(len(row), dtype=np.int32), np.ones(len(row), np.int32)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("name", LAYERS)
def test_moments_equal_the_reference(name, dtype, tolerance):
    expected = np.load(GOLDENS / name / "cov.npz")
    with jax.enable_x64(dtype == "float64"):
        model, _ = load(GOLDENS / name, dtype=dtype)
        # 300 rows do not divide by 64: the last batch is partly padding
        found, count = moments_of_rows(model.params, model.config, rows(), LAYERS[name], batch=64)
    assert count == 19_200
    assert tuple(found) == LAYERS[name]
    for l, matrix in found.items():
        reference = expected[f"cov_L{l}"]
        assert matrix.dtype == (np.float64 if dtype == "float64" else np.float32)
        assert np.linalg.norm(matrix - reference) <= tolerance * np.linalg.norm(reference)

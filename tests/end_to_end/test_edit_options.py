"""`jaxedit edit` with methods of the family, settings from files, and facts to keep and forget."""

import json

import numpy as np
import pytest
from helpers_cli import run_command

import jaxedit as je

pytestmark = pytest.mark.usefixtures("own_cache")
LAYERS = (1, 2)
HPARAMS = {
    "layers": list(LAYERS),
    "fact_token": "subject_last",
    "v_num_grad_steps": 4,
    "v_lr": 0.1,
    "clamp_norm_factor": 1,
    "kl_factor": 0.0625,
    "v_weight_decay": 0.5,
    "mom2_update_weight": 30,
}


@pytest.fixture(scope="module")
def files(goldens, tmp_path_factory):
    """A model, its second moments, and three files of facts, of two, two and one."""
    folder = tmp_path_factory.mktemp("files")
    moments = np.load(goldens / "tiny-gpt2" / "cov.npz")
    arrays = {l: moments[f"cov_L{l}"] for l in LAYERS}
    je.SecondMoments.from_arrays(arrays, 19_200).save(folder / "moments.safetensors")
    known = je.read_requests(goldens / "tiny-gpt2" / "facts.json")[0]
    facts = [{"prompt": f"{s} lives in", "subject": s, "target": "Rome"} for s in ("Ann", "Bob", "Eve", "Tom")]
    facts.append({"prompt": known.prompt, "subject": known.subject, "target": known.target_true})
    for name, some in (("change", facts[:2]), ("keep", facts[2:4]), ("forget", facts[4:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    return goldens / "tiny-gpt2", folder


def edit(files, *options) -> tuple[dict, je.EditPatch]:
    model, folder = files
    given = ("--stats", folder / "moments.safetensors", "--patch", folder / "out.jaxedit", "--no-eval", "--json")
    document = json.loads(run_command("edit", model, folder / "change.jsonl", *options, *given).stdout)
    return document, je.EditPatch.load(folder / "out.jaxedit")


def test_settings_from_a_hyper_parameter_file(files):
    _, folder = files
    document, patch = edit(files, "--preset", folder / "hparams.json")
    assert document["info"]["method"] == "memit" and patch.layers == LAYERS
    assert patch.method["anchor"]["steps"] == 4 and patch.method["solver"]["cov_weight"] == 30
    replayed, patch = edit(files, "--preset", folder / "hparams.json", "--method", "fe")
    assert replayed["info"]["method"] == "fe" and patch.method["targets"]["kind"] == "ForwardReplay"


def test_settings_from_a_preset_file(files, tiny):
    _, folder = files
    chosen = je.read_hyperparameters(folder / "hparams.json").method
    je.write_preset(folder / "preset.json", tiny("tiny-gpt2")[0], chosen)
    _, patch = edit(files, "--preset", folder / "preset.json")
    assert patch.method["name"] == "memit" and patch.method["anchor"]["steps"] == 4
    other = run_command("edit", *_facts(files), "--preset", folder / "preset.json", "--method", "fe", code=1)
    assert "is for 'memit'; --method fe does not go with it" in " ".join(other.stderr.split())


def test_facts_to_keep_and_to_forget(files):
    _, folder = files
    document, patch = edit(
        *(files, "--preset", folder / "hparams.json"),
        *("--keep", folder / "keep.jsonl", "--forget", folder / "forget.jsonl"),
    )
    assert document["edits"] == 2
    assert [r.subject for r in patch.requests][:4] == ["Ann", "Bob", "Eve", "Tom"]
    before, after = (np.asarray(document["info"][f"probability_{when}"]) for when in ("before", "after"))
    assert before.shape == after.shape == (5,)
    assert (after[:2] > before[:2]).all() and after[4] < before[4] - 0.2  # in three updates


def test_methods_are_named_when_one_is_not_known(files):
    failed = run_command("edit", *_facts(files), "--method", "alphaedti+fe", "--layers", "1,2", code=1)
    assert "did you mean 'alphaedit'?" in failed.stderr


def _facts(files):
    model, folder = files
    return model, folder / "change.jsonl", "--stats", folder / "moments.safetensors"

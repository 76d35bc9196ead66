"""The commands that measure: perplexity on text, and the field's benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jaxedit.cli.app import app
from jaxedit.cli.console import Work, emit, load_model, out, show_seconds
from jaxedit.cli.inputs import checked_dtype, load_pair
from jaxedit.cli.options import Corpus, Dtype, Json, Limit, Model, Seed, argument

Edited = Annotated[str, argument("EDITED", "The edited model, or a .jaxedit patch for BASE.")]


@app.command()
def perplexity(
    model: Model,
    corpus: Corpus = None,
    edited: Annotated[str | None, typer.Option(help="An edited model or a .jaxedit patch, to stand beside it.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="How much of the corpus to use.")] = 100_000,
    length: Annotated[int, typer.Option(min=2, help="Tokens a row; longer texts are cut into windows.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from window to window; by default windows share none.")
    ] = None,
    dtype: Dtype = None,
    as_json: Json = False,
):
    """Perplexity on text, to see what an edit did to the model as a whole.

    Over all tokens of the corpus, and as the mean of the perplexities of its texts.

    \b
    Examples:
      jaxedit perplexity smollm2-135m wikitext.txt
      jaxedit perplexity smollm2-135m sentences.json --edited facts.jaxedit
    """
    with Work() as work:
        if edited is None:
            before, tokenizer = load_model(work, model, checked_dtype(dtype))
            models = {"base": before}
        else:
            before, after, tokenizer = load_pair(work, model, edited, dtype)
            models = {"base": before, "edited": after}
        from jaxedit.evaluation.perplexity import PerplexityProbe

        length = min(length, before.config.max_positions)
        with work.stage("tokens"):
            probe = PerplexityProbe.of(tokenizer, corpus, max_tokens=max_tokens, length=length, stride=stride)
        found = {}
        for name, one in models.items():
            with work.stage(f"perplexity of {name}"):
                found[name] = probe.measure(one)
    values = {name: {"corpus": p.corpus, "mean": p.mean} for name, p in found.items()}
    texts, tokens = len(found["base"].texts), int(probe.tokens_of.sum())
    if as_json:
        emit({"model": model, "edited": edited, "texts": texts, "tokens": tokens} | {"perplexity": values})
        return
    for name, value in values.items():
        out.print(f"{name:<8}{value['corpus']:.4g} over all tokens, {value['mean']:.4g} mean of texts", markup=False)
    out.print(f"{texts:,} texts, {tokens:,} tokens", markup=False)
    show_seconds(work.seconds)


@app.command()
def benchmark(
    kind: Annotated[
        Literal["zsre", "knowedit", "mquake"], argument("BENCHMARK", "zsre, knowedit or mquake: what is measured.")
    ],
    base: Annotated[str, argument("BASE", "The model before the edit.")],
    edited: Edited,
    records: Annotated[Path, argument("RECORDS", "The benchmark's records, edits included: .json or .jsonl.")],
    question: Annotated[
        Path | None, typer.Option(help="mquake: a text file with one {} where the question goes, examples before it.")
    ] = None,
    marker: Annotated[
        str | None, typer.Option(help="mquake: the answer stands behind this, such as 'Answer:' behind a thought.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="mquake: tokens of an answer, thoughts included.")] = 32,
    dtype: Dtype = None,
    limit: Limit = None,
    as_json: Json = False,
):
    """Measure an edit as a published benchmark does, base beside edited.

    \b
    Examples:
      jaxedit benchmark zsre smollm2-135m facts.jaxedit zsre.json
      jaxedit benchmark knowedit smollm2-135m edited/ knowedit_test.json --json > report.json
      jaxedit benchmark mquake smollm2-135m edited/ mquake.json --question examples.txt
    """
    read, measure = _benchmark(kind, question, marker, max_new_tokens)
    found = read(records)[:limit]
    with Work() as work:
        before, after, tokenizer = load_pair(work, base, edited, dtype)
        with work.stage(kind):
            report = measure(before, after, tokenizer, found)
    if as_json:
        emit({"base": base, "edited": edited, "report": report.to_dict(), "seconds": work.seconds})
        return
    out.print("\n" + report.table() + "\n", markup=False)
    show_seconds(work.seconds)


def _benchmark(
    kind: str, question: Path | None, marker: str | None, max_new_tokens: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The reader of a benchmark's records, and what measures them."""
    if kind == "zsre":
        from jaxedit.data.requests import read_requests
        from jaxedit.evaluation.zsre import evaluate_zsre

        return read_requests, evaluate_zsre
    if kind == "knowedit":
        from jaxedit.data.knowedit import read_knowedit
        from jaxedit.evaluation.portability import evaluate_knowedit

        return read_knowedit, evaluate_knowedit
    from functools import partial

    from jaxedit.data.mquake import read_mquake
    from jaxedit.evaluation.multihop import Asking, evaluate_multihop

    text = "{}" if question is None else question.read_text(encoding="utf-8").rstrip("\n")
    asking = Asking(question=text, marker=marker, max_new_tokens=max_new_tokens)
    return read_mquake, partial(evaluate_multihop, asking=asking)


@app.command()
def fluency(
    base: Annotated[str, argument("BASE", "The model before the edit.")],
    edited: Edited,
    records: Annotated[Path, argument("RECORDS", "CounterFact records with generation_prompts: .json or .jsonl.")],
    references: Annotated[
        Path | None, typer.Option(help="Attribute snippets: measure consistency with them too (needs scikit-learn).")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a text, prompt included.")] = 100,
    seed: Seed = 0,
    dtype: Dtype = None,
    limit: Limit = None,
    as_json: Json = False,
):
    """Does the edited model still write varied text, and does it write about its subjects as the edits imply?

    Entropy of n-grams in bits; with --references also the cosine of TF-IDF vectors, over the records that have any.

    \b
    Examples:
      jaxedit fluency smollm2-135m facts.jaxedit counterfact.json --limit 100
      jaxedit fluency smollm2-135m edited/ counterfact.json --references attribute_snippets.json --json
    """
    from jaxedit.data.counterfact import read_counterfact, read_references

    found = read_counterfact(records)[:limit]
    known = {} if references is None else read_references(references)
    sought = [known.get((r.relation, r.target_id)) for r in found]
    if references is not None and not any(sought):
        raise typer.BadParameter("has no text for any of the records", param_hint="--references")
    with Work() as work:
        before, after, tokenizer = load_pair(work, base, edited, dtype)
        from jaxedit.evaluation.consistency import reference_scores
        from jaxedit.evaluation.fluency import fluency as measure

        prompts = [r.generation_prompts for r in found]
        values: dict[str, dict[str, float]] = {}
        for name, model in (("base", before), ("edited", after)):
            with work.stage(f"fluency of {name}"):
                said = measure(model, tokenizer, prompts, length=length, seed=seed)
            values[name] = {"fluency": said.mean}
            if any(sought):
                pairs = [(t, s) for t, s in zip(said.texts, sought, strict=True) if s]
                values[name]["consistency"] = float(reference_scores(*zip(*pairs, strict=True)).mean())
    if as_json:
        emit({"base": base, "edited": edited, "records": len(found), **values, "seconds": work.seconds})
        return
    for metric in values["base"]:
        out.print(f"{metric:<12}{values['base'][metric]:.3f} → {values['edited'][metric]:.3f}", markup=False)
    show_seconds(work.seconds)

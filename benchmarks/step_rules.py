"""Do better step rules than Adam as published find anchors in fewer steps, and are the edits as good?

    python benchmarks/step_rules.py counterfact.json --first 700 --count 16 --out step_rules.json

Each rule optimises the same anchors from the same start with the same loss, clamp, threshold and most evaluations,
and the edit that Forward Replay makes of them is evaluated. Cost is counted in evaluations of the loss with its
gradient; Gauss-Newton's products with the curvature of the target logits count as one each (a forward and a backward
derivative through the same layers). What a rule does beside is vector arithmetic on δ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sweep import MEASURES

import jaxedit as je
from jaxedit.data.templates import sample_templates
from jaxedit.data.tokens import check_templates, validate
from jaxedit.targets.anchor_plan import make_plan
from jaxedit.targets.anchor_room import KEPT, arrange
from jaxedit.targets.anchor_step import Fixed, Step, end_to_end, logits_at, loss, prepare, safe_norm
from jaxedit.targets.strategies import replay


class Rule(NamedTuple):
    """init(δ) -> state; update(gradient, state, δ, product) -> (change, state), of all edits ``[n, d_model]``.

    product: of ``[n, d_model]`` with each edit's curvature. products: how many of them a step takes.
    """

    init: Callable
    update: Callable
    products: int = 0


def optax_rule(make) -> Rule:
    return Rule(jax.vmap(make.init), lambda gradient, state, delta, _: jax.vmap(make.update)(gradient, state, delta))


def length(x):
    return jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def normalised(step: float, momentum: float) -> Rule:
    """Along a running sum of unit gradients."""

    def update(gradient, mean, delta, product):
        mean = momentum * mean + gradient / length(gradient)
        return -step * mean, mean

    return Rule(jnp.zeros_like, update)


def lbfgs(limit: float, memory: int) -> Rule:
    return optax_rule(
        optax.chain(optax.scale_by_lbfgs(memory_size=memory), optax.clip_by_global_norm(limit), optax.scale(-1.0))
    )


def gauss_newton(damping: float, products: int, limit: float) -> Rule:
    """``(G + damping · s · I) change = -gradient`` by `products` steps of conjugate gradients; at most `limit` long.

    G is the curvature of the negative log likelihood through the linearised logits, s its Rayleigh quotient along
    the gradient.
    """

    def dot(a, b):
        return jnp.sum(a * b, -1, keepdims=True)

    def update(gradient, state, delta, product):
        r = p = -gradient
        x, gp = jnp.zeros_like(r), product(p)
        scale = damping * dot(p, gp) / length(p) ** 2
        for i in range(products):
            ap = (gp if i == 0 else product(p)) + scale * p
            before = dot(r, r)
            a = before / jnp.maximum(dot(p, ap), 1e-30)
            x, r = x + a * p, r - a * ap
            p = r + dot(r, r) / jnp.maximum(before, 1e-30) * p
        return x * jnp.minimum(1.0, limit / length(x)), state

    return Rule(lambda delta: (), update, products)


def rules(lr: float, size: float, steps: int) -> dict[str, Rule]:
    """size: the mean ‖h‖, in which steps of a length of their own are expressed."""
    return {
        "Adam as published": optax_rule(optax.adam(lr)),
        "Adam, rate doubled": optax_rule(optax.adam(2 * lr)),
        "Adam, rate halved": optax_rule(optax.adam(lr / 2)),
        "Adam, b1 0.8, b2 0.9": optax_rule(optax.adam(lr, b1=0.8, b2=0.9)),
        "Adam, b1 0.8, b2 0.9, rate doubled": optax_rule(optax.adam(2 * lr, b1=0.8, b2=0.9)),
        "Adam, b1 0.5, b2 0.9": optax_rule(optax.adam(lr, b1=0.5, b2=0.9)),
        "Adam, warm-up over 5 steps": optax_rule(optax.adam(optax.linear_schedule(lr / 5, lr, 5))),
        "Adam, rate doubled, decaying": optax_rule(optax.adam(optax.cosine_decay_schedule(2 * lr, steps, 0.2))),
        "NAdam": optax_rule(optax.nadam(lr)),
        "AMSGrad": optax_rule(optax.amsgrad(lr)),
        "normalised gradient, 0.2, momentum 0.8": normalised(0.2 * size, 0.8),
        "normalised gradient, 0.3, momentum 0.5": normalised(0.3 * size, 0.5),
        "L-BFGS, 5 pairs, steps up to 0.3": lbfgs(0.3 * size, 5),
        "L-BFGS, 10 pairs, steps up to 0.5": lbfgs(0.5 * size, 10),
        "Gauss-Newton, 3 products, steps up to 0.5": gauss_newton(0.1, 3, 0.5 * size),
        "Gauss-Newton, 6 products, steps up to 0.5": gauss_newton(0.1, 6, 0.5 * size),
        "Gauss-Newton, 3 products, steps up to 0.25": gauss_newton(0.1, 3, 0.25 * size),
    }


@partial(jax.jit, static_argnames=("config", "layer", "settings", "sizes"))
def prepared(params, config, plan, layer, settings, sizes):
    """The fixed part of the edits, and the step that all of them make together."""
    fixed = prepare(params, config, plan, layer, settings, sizes)
    return fixed, end_to_end(fixed, plan, sizes)


def make_step(rule: Rule, config, layer: int, settings: je.AnchorConfig):
    """One step of all edits, compiled: ``(params, edits, largest ‖δ‖, δ, state) -> (losses before it, δ, state)``."""

    @jax.jit
    def step(params, edits: Step, most, delta, state):
        gradient, terms = jax.grad(loss_of, has_aux=True)(delta, params, config, edits, layer, settings, KEPT[0])
        product = curvature(params, config, edits, layer, delta) if rule.products else None
        change, state = rule.update(gradient, state, delta, product)
        new = delta + change
        norm = safe_norm(new)
        new = new * jnp.where(norm > most, most / jnp.where(norm == 0, 1, norm), 1)[:, None]
        return terms, new, state

    return step


def loss_of(delta, *rest):
    """`jaxedit.targets.anchor_step.loss` of ``δ [n, d_model]``: there is one part."""
    return loss(delta[:, None], *rest)


def curvature(params, config, edits: Step, layer: int, delta):
    """Products of all edits with the Gauss-Newton matrix of the target's negative log likelihood."""

    def ask(delta):
        return logits_at(delta[:, None], params, config, edits, edits.asks, layer, KEPT[0])

    logits, backward = jax.vjp(ask, delta)
    # The model has reverse derivatives only; the derivative of the linear `backward` is the forward one
    _, forward = jax.vjp(lambda y: backward(y)[0], jnp.zeros_like(logits))
    p = jax.nn.softmax(logits, -1)
    n = len(edits.asks)
    weight = 1 / jnp.maximum(jnp.sum(edits.asked < n, -1, keepdims=True), 1)
    weights = jnp.zeros(n).at[edits.asked].set(jnp.broadcast_to(weight, edits.asked.shape), mode="drop")[:, None]

    def product(x):
        (y,) = forward(x)
        return backward(weights * p * (y - jnp.sum(p * y, -1, keepdims=True)))[0]

    return product


def optimise(rule: Rule, params, config, fixed: Fixed, edits: Step, layer: int, settings: je.AnchorConfig):
    """δ ``[n, d]``, evaluations ``[n]`` until the threshold or the limit, and losses ``[evaluations, n]``."""
    step = make_step(rule, config, layer, settings)
    delta = jnp.zeros_like(fixed.init)
    state = rule.init(delta)
    kept, best, spent = np.zeros(delta.shape), np.full(len(delta), np.inf), np.zeros(len(delta), int)
    running, losses = np.ones(len(delta), bool), []
    while running.any():
        terms, new, state = step(params, edits, fixed.limits[:, 0], delta, state)
        now = np.asarray(terms[:, 0])
        spent[running] += 1
        kept[running], best[running] = np.asarray(delta)[running], now[running]
        losses.append(np.where(running, now, best))
        # The last evaluation of a run makes no step
        running &= (now >= settings.threshold) & (spent + rule.products < settings.steps)
        spent[running] += rule.products
        delta = new
    return kept, spent, np.asarray(losses)


def main():
    parser = common.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="rules whose names contain one of these")
    args = parser.parse_args()
    model, tokenizer, requests, stats = common.prepare(args, None)
    method = je.method_for("fe", model.config)
    layer, settings = method.layers[0], method.anchor
    templates = sample_templates(model, tokenizer, 0)
    edits = validate(tokenizer, requests, check_templates(templates), model.config.max_positions)
    together = dataclasses.replace(settings, tokens_per_step=1_000_000)
    (bucket,) = arrange(model.params, model.config, edits, layer, together)
    edits, requests = ([x[i] for i in bucket.members] for x in (edits, requests))
    plan = jax.tree.map(jnp.asarray, make_plan(edits, bucket.shape, len(edits)))
    fixed, step = prepared(model.params, model.config, plan, layer, settings, bucket.sizes)
    size = float(np.linalg.norm(fixed.init, axis=-1).mean())
    rows = []
    print(HEADER)
    for name, rule in rules(settings.lr, size, settings.steps).items():
        if args.only and not any(part in name for part in args.only):
            continue
        delta, spent, losses = optimise(rule, model.params, model.config, fixed, step, layer, settings)
        row: dict[str, Any] = {
            "rule": name,
            "mean_evaluations": float(spent.mean()),
            "converged": float((losses[-1] < settings.threshold).mean()),
            "mean_final_loss": float(losses[-1].mean()),
            "mean_delta_norm": float(np.linalg.norm(delta, axis=-1).mean() / size),
            "mean_loss_by_step": losses.mean(1).tolist(),
            **outcome(model, tokenizer, requests, method, stats, templates, edits, np.asarray(fixed.init), delta),
        }
        rows.append(row)
        print(line(row), flush=True)
    about = {"model": args.model, "layer": layer, "anchor": dataclasses.asdict(settings), "mean_norm_of_h": size}
    used = {"requests": [args.first, args.first + len(requests)], "tokens": args.tokens}
    common.write(args.out, {"machine": common.machine(), **about, **used, "rows": rows})


def outcome(model, tokenizer, requests, method, stats, templates, edits, init, delta) -> dict[str, float]:
    """Quality of the Forward Replay edit with these anchors."""
    weights = np.ones(1)
    values, _ = replay(model.params, model.config, edits, method.layers, delta.astype(init.dtype), weights, method.keys)
    values[0] = init + delta
    given = je.Targets(method.layers, values, np.asarray([e.contexts[0].lookup for e in edits], np.int32))
    result = je.apply_edits(model, tokenizer, requests, method, stats=stats, targets=given, templates=templates)
    report = je.evaluate(model, result.model, tokenizer, requests)
    return {**{m: report.edited[m] for m in MEASURES}, **report.specificity}


HEADER = (
    "rule                                        evals  conv.   loss  |δ|/|h|  eff.succ/acc  para.succ/acc  neigh.  KL"
)


def line(row: dict[str, Any]) -> str:
    """One row as text, rates in percent."""
    eff, eff_acc, para, para_acc, near = (100 * row[m] for m in MEASURES)
    return (
        f"{row['rule']:42s}  {row['mean_evaluations']:5.1f}  {100 * row['converged']:5.0f}  "
        f"{row['mean_final_loss']:.3f}  {row['mean_delta_norm']:6.3f}  {eff:6.1f} {eff_acc:6.1f}  "
        f"{para:6.1f} {para_acc:6.1f}  {near:6.1f}  {row['kl']:.4f}"
    )


if __name__ == "__main__":
    main()

"""Reading config.json so that no field that changes the maths goes unnoticed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxedit.errors import CheckpointError
from jaxedit.models.config import Rope

_REQUIRED = object()

# Fields that say nothing about the forward pass of a causal language model at inference.
_HARMLESS = re.compile(
    r"architectures|auto_map|model_type|torch_dtype|dtype|transformers_version|_.*|use_cache|.*_token_id|"
    r".*dropout.*|.*pdrop.*|initializer_.*|initializer|gradient_checkpointing|task_specific_params|"
    r"return_dict.*|output_.*|torchscript|use_bfloat16|id2label|label2id|num_labels|problem_type|"
    r"finetuning_task|tokenizer_class|prefix|bad_words_ids|attn_implementation|pretraining_tp|"
    r"chunk_size_feed_forward|pruned_heads|is_decoder|tie_encoder_decoder|cross_attention_hidden_size|"
    r"(min|max)_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|"
    r"top_[kp]|typical_p|repetition_penalty|length_penalty|(encoder_)?no_repeat_ngram_size|"
    r"num_return_sequences|suppress_tokens|begin_suppress_tokens|remove_invalid_values|"
    r"exponential_decay_length_penalty|forced_.*_token_id|cache_implementation|unsloth_.*"
)


class Fields:
    """The fields of one config.json. Each is taken once; `finish` refuses what is left over."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self._left = {k: v for k, v in config.items() if not re.fullmatch(_HARMLESS, k)}
        self._where = where
        for name in ("is_encoder_decoder", "add_cross_attention"):
            self.expect(name, False, absent=False)
        if config.get("quantization_config"):
            raise CheckpointError(f"{where}: field 'quantization_config': quantised checkpoints cannot be edited")
        self._left.pop("quantization_config", None)

    def take(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The value of the field, under the first of its `names` that is there."""
        found = [self._left.pop(n) for n in names if n in self._left]
        if found:
            if isinstance(default, int | float) and not isinstance(found[0], int | float | None):
                raise CheckpointError(f"{self._where}: field {names[0]!r} is {found[0]!r}, expected a number")
            return found[0]
        if default is _REQUIRED:
            raise CheckpointError(f"{self._where}: config.json lacks field {names[0]!r}")
        return default

    def expect(self, name: str, *values: Any, absent: Any = None) -> None:
        """The field must be absent or have one of `values`."""
        value = self._left.pop(name, absent)
        if value not in values and value != absent:
            raise CheckpointError(
                f"{self._where}: field {name!r} is {value!r}; only {' or '.join(map(repr, values))} is supported"
            )

    def choose(self, *names: str, of: Mapping[Any, str], default: Any = _REQUIRED) -> Any:
        """The field's value translated by the table `of`; other values are refused by name."""
        value = self.take(*names, default=default)
        if value not in of:
            raise CheckpointError(
                f"{self._where}: field {names[0]!r} is {value!r}; supported: {', '.join(map(repr, of))}"
            )
        return of[value]

    def finish(self, *harmless: str) -> None:
        """Refuse fields that nobody has read."""
        left = sorted(k for k in self._left if k not in harmless)
        if left:
            shown = ", ".join(f"{k!r} = {self._left[k]!r}" for k in left)
            raise CheckpointError(
                f"{self._where}: unknown config field {shown}; it may change what the model computes, "
                "so the checkpoint is not loaded"
            )

    def rope(self, head_dim: int, max_positions: int, partial: float = 1.0) -> Rope:
        """Rotary settings in either spelling: `rope_theta` and `rope_scaling`, or `rope_parameters`."""
        theta = self.take("rope_theta", "rotary_emb_base", default=10000.0)
        partial = self.take("partial_rotary_factor", "rotary_pct", default=partial)
        scaling = dict(self.take("rope_parameters", "rope_scaling", default=None) or {})
        theta = scaling.pop("rope_theta", theta)
        partial = scaling.pop("partial_rotary_factor", partial)
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        scaling.pop("type", None)
        known: dict[str, Any] = {"dim": int(head_dim * partial), "theta": float(theta)}
        needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ())
        if lacking := [name for name in needed if name not in scaling]:
            raise CheckpointError(f"{self._where}: field 'rope_scaling' of type {kind!r} lacks {lacking}")
        if kind == "linear":
            known |= {"scaling": "linear", "factor": float(scaling.pop("factor"))}
        elif kind == "llama3":
            known |= {
                "scaling": "llama3",
                "factor": float(scaling.pop("factor")),
                "low_freq_factor": float(scaling.pop("low_freq_factor")),
                "high_freq_factor": float(scaling.pop("high_freq_factor")),
                "original_max_positions": int(scaling.pop("original_max_position_embeddings", max_positions)),
            }
        elif kind != "default":
            raise CheckpointError(f"{self._where}: field 'rope_scaling' of type {kind!r} is not supported")
        if scaling:
            raise CheckpointError(f"{self._where}: unknown field in 'rope_scaling': {sorted(scaling)}")
        return Rope(**known)


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

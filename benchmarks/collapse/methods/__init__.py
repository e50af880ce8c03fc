"""The methods compared: each file builds a :class:`Method` from a :class:`Setup`.

A method knows nothing of suites. It is given a model, the anchor pool and the run's settings, and
from then on task batches. A file of a published method names its source and says what differs.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.collapse.methods import (
    adamw,
    agem,
    asft,
    constrained_sft,
    der,
    ema,
    ewc,
    kl,
    l2_start,
    lisa,
    mixed,
    norm_matched,
    null_space,
    passport,
    random_subspace,
    ranked,
    safe,
    safe_lora,
    safeanchor,
    safegrad,
    sam,
    second_order,
    sppft,
)
from benchmarks.collapse.methods.base import Earlier, Method, Setup

METHODS: dict[str, Callable[[Setup], Method]] = {
    "adamw": adamw.build,
    "agem": agem.build,
    "asft": asft.build,
    "constrained_sft": constrained_sft.build,
    "der": der.build,
    "ema": ema.build,
    "ewc": ewc.build,
    "kl": kl.build,
    "l2_start": l2_start.build,
    "lisa": lisa.build,
    "mixed": mixed.build,
    "norm_matched": norm_matched.build,
    "null_space": null_space.build,
    "passport": passport.build,
    "random_subspace": random_subspace.build,
    "ranked": ranked.build,
    "safe": safe.build,
    "safe_lora": safe_lora.build,
    "safeanchor": safeanchor.build,
    "safegrad": safegrad.build,
    "sam": sam.build,
    "second_order": second_order.build,
    "sppft": sppft.build,
}

__all__ = ["METHODS", "Earlier", "Method", "Setup"]

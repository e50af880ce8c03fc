"""What is known to go wrong around guarded optimizers, by number: python -m tests.traps.

Writes docs/traps.md. A test that holds a trap carries ``@pytest.mark.trap("optimizers 0.10")``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "traps.md"

TRAPS = {
    "optimizers 0.1": "A projected gradient leaks back through AdamW's preconditioner",
    "optimizers 0.2": "Rounding to bf16 puts back part of what a projection took out",
    "optimizers 0.3": "A dense basis of the safety subspace does not fit in memory",
    "optimizers 0.7": "Default attention has no second derivative",
    "optimizers 0.8": "Under `fully_shard` Hessian products need finite differences",
    "optimizers 0.9": "Finite differences in bf16 measure rounding",
    "optimizers 0.10": "`load_state_dict` casts state to the weights' dtype",
    "optimizers 0.11": "`accelerate.prepare` reloads the state and hides an optimizer's methods",
    "optimizers 0.12": "FSDP2 under Accelerate replaces the Parameter objects",
    "optimizers 0.13": "DCP makes optimizer state by a step with lr = 0",
    "optimizers 0.14": "A saved state must be plain tensors, numbers and containers",
    "optimizers 0.15": "Trainer's optimizer factory has to redo the decay groups",
    "optimizers 0.18": "Autotuning runs a kernel again on what it has already changed",
    "optimizers 0.19": "Sharding must be tested, and can be on a CPU",
    "optimizers 0.20": "Two implementations of one rule drift apart",
    "optimizers 5.1.1": "The constructor begins as AdamW's does, and rejects what it rejects",
    "optimizers 5.1.2": "Without a guard every bit is AdamW's",
    "optimizers 5.1.3": "Parameter groups keep their names, grow, and share one projection",
    "optimizers 5.1.4": "Closures run once, with gradients on",
    "optimizers 5.1.5": "Gradients may be None, empty, zero or sparse, and are never written",
    "optimizers 5.1.6": "Hooks fire once and in order",
    "optimizers 5.1.7": "State keeps fp32, loads with `weights_only`, interchanges with AdamW's",
    "optimizers 5.1.8": "The guard survives Accelerate's wrapping and its checkpoints",
    "optimizers 5.1.9": "Every way into Trainer takes the same steps and resumes",
    "optimizers 5.1.10": "DDP, even, uneven, empty and replicated shards equal one process",
    "optimizers 5.1.11": "Checkpoints of three processes load on one and two",
    "optimizers 5.1.12": "Accumulated micro-batches are corrected once",
    "optimizers 5.1.13": "A step that GradScaler skips touches nothing",
    "optimizers 5.1.14": "Clipping comes first, and the projection never lengthens a step",
    "optimizers 5.1.15": "Stochastic rounding is right on average and repeats",
    "optimizers 5.1.16": "Schedulers, lr = 0 and a learning rate that is a tensor",
    "optimizers 5.1.17": "A compiled step is the same step",
    "optimizers 5.1.18": "`capturable` cannot hold a guard and says so",
    "optimizers 5.1.19": "ZeRO's flat parameters are refused, not skipped",
    "optimizers 5.1.20": "Adapters: only they move, and merging keeps what they learned",
    "optimizers 5.1.21": "Weight decay is part of the step and is projected",
    "optimizers 5.1.22": "A resume across a refresh is bit-exact",
    "optimizers 5.1.23": "Figures agree with the dense truth",
    "optimizers 5.1.24": "`guarded(AdamW)` is SafeAdamW",
    "optimizers 5.4.1": "Replicas need no message in a step",
    "optimizers 5.4.3": "Shards by rows exchange N + 1 floats in a step",
    "optimizers 5.4.4": "Replicas of shards exchange them among shards alone",
    "optimizers 5.4.5": "Tensor parallelism and other placements are refused",
    "ux 0.1": "Launchers start one process, or several that do not see each other",
    "ux 0.2": "Accelerate drops FSDP2 on a CPU",
    "ux 0.3": "Accelerate's `load_state` casts too, counters included",
    "ux 0.4": "Full checkpoints keep rank 0's copy of plain tensors",
    "ux 0.5": "Exact second derivatives are missing on common paths",
    "ux 0.7": "A finite-difference step must be chosen, checked and reported",
    "ux 0.8": "Hosts call `step` without a closure; Lightning with one",
    "ux 0.9": "Parameter names get lost on the way into a host",
    "ux 0.10": "Trainer's `optim` names are closed: a factory is the way in",
    "ux 0.11": "`lora_A` has no gradient at the start",
    "ux 0.15": "A top-level package called `kernels` breaks transformers",
    "ux 2.2.1": "The core imports torch alone",
    "ux 2.2.2": "The correction sees the preconditioned step",
    "ux 2.2.3": "A refresh leaves gradients, RNG, modes and buffers as they were",
    "ux 2.2.4": "The factory keeps names",
    "ux 2.2.5": "Nothing depends on an optimizer's train and eval modes",
    "ux 2.2.6": "What a layout does to parameters is noticed and named",
    "ux 2.3.1": "`autograd.grad` is not averaged over DDP's replicas",
    "ux 2.3.2": "`autograd.grad` does not reach sharded parameters",
    "ux 2.3.3": "Sums over shards are partial until they are reduced",
    "ux 2.3.4": "FSDP1's flat parameters are refused",
    "ux 2.3.5": "A host's parameter groups must not split the projection",
    "ux 2.3.6": "Hosts clip before the optimizer sees gradients",
    "ux 2.3.7": "The sketch's age counts steps that were taken",
    "ux 2.3.8": "Schedule-free averages depend on modes that hosts forget",
    "ux 2.3.9": "Muon under DDP and `fully_shard`",
}

ELSEWHERE = {
    "optimizers 0.16": "Triton's interpreter and bf16: `tests/kernels/test_interpreted.py`",
    "optimizers 0.17": "kernels compile without a GPU: `tests/kernels/test_compiled.py`",
    "ux 2.3.10": "overhead is published: `benchmarks/overhead`, checked by `tests/benchmarks`",
}
NOT_APPLICABLE = {
    "optimizers 0.4": "input subspaces (passports) refuse shards today; the refusal is tested",
    "optimizers 0.5": "a count of bytes, not a behaviour: `benchmarks/kernels`",
    "optimizers 0.6": "a cost, not a behaviour: a guarded step asks for the fused kernel",
    "optimizers 5.4.2": "no optimizer here shards its state over replicas (ZeRO-1)",
    "ux 0.6": "guards and operators take the model's logits, never a trainer's loss",
    "ux 0.12": "about another package",
    "ux 0.13": "about another package",
    "ux 0.14": "about claims: SECURITY.md and the README keep to benign drift",
}

Found = dict[str, list[str]]


def find(root: Path = ROOT) -> Found:
    """Tests by the trap that they hold."""
    found: Found = {}
    for path in sorted(root.glob("tests/**/test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in _numbers(node):
                    where = f"{path.relative_to(root)}::{node.name}"
                    found.setdefault(number, []).append(where)
    return found


def _numbers(test: ast.FunctionDef) -> Iterator[str]:
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and getattr(mark.func, "attr", "") == "trap":
            yield from (ast.literal_eval(number) for number in mark.args)


def _order(number: str) -> tuple[str, list[int]]:
    note, digits = number.split(" ")
    return note, [int(part) for part in digits.split(".")]


def render(found: Found) -> str:
    """docs/traps.md."""
    lines = [
        "# Traps",
        "",
        "What goes wrong around guarded optimizers, in torch, in hosts and in our own code, and",
        "the tests that hold it. `python -m tests.traps` writes this page from markers; the",
        "numbers are those of the notes that the project began with.",
        "",
        "| number | trap | held by |",
        "| --- | --- | --- |",
    ]
    for number in sorted(TRAPS, key=_order):
        tests = [_link(where) for where in found.get(number, [])]
        lines.append(f"| {number} | {TRAPS[number]} | {'<br>'.join(tests)} |")
    lines += ["", "Held elsewhere, or not applicable:", "", "| number | why |", "| --- | --- |"]
    rest = {**ELSEWHERE, **NOT_APPLICABLE}
    lines += [f"| {number} | {rest[number]} |" for number in sorted(rest, key=_order)]
    return "\n".join(lines) + "\n"


def _link(where: str) -> str:
    path, name = where.split("::")
    return f"[{name.removeprefix('test_')}](../{path})"


if __name__ == "__main__":
    PAGE.write_text(render(find()), encoding="utf-8")

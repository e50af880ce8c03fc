"""One part of the demo in a process of its own, so that its peak memory is its own.

    python -m safeopt.demo.worker FOLDER {aligned,adamw,safe_adamw} --adapter FOLDER

``FOLDER`` holds ``plan.json``; the part writes ``FOLDER/<method>/result.json`` and its
transcripts. ``aligned`` must have run before ``safe_adamw``: it writes the anchors.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safeopt.demo import assets, data
from safeopt.demo.alignment import answered, refused
from safeopt.demo.plan import ADVBENCH, METHODS, TASK, Method, Plan
from safeopt.environment import environment, peak_memory_mb
from safeopt.evaluation import evaluate, judge, reply_nll, write_transcripts
from safeopt.files import write_json, write_jsonl

ANCHORS = "anchors.jsonl"


def load_aligned(adapter: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32 with the safety adapter merged in, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from safeopt.training.models import merge_adapter

    disable_progress_bar()
    folder = assets.smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    # PEFT freezes the weights it merges into; the demo trains all of them.
    model = merge_adapter(model, adapter).requires_grad_(True)
    return model, AutoTokenizer.from_pretrained(folder)


@dataclass
class Curve:
    """Probe of the training loop: held-out refusals and task loss against steps."""

    plan: Plan
    tokenizer: Any
    points: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        """Judge the probe prompts and score the held-out task rows."""
        prompts = data.advbench().held_out[: self.plan.probe_prompts]
        verdicts = judge(model, self.tokenizer, {ADVBENCH: prompts}, self.plan.decoding)
        point = {
            "refusal_rate": sum(verdict.refused for verdict in verdicts) / len(verdicts),
            "task_nll": reply_nll(model, self.tokenizer, self.plan.test_rows()),
        }
        self.points.append({"step": step, **point})
        return {f"probe/{name}": value for name, value in point.items()}


def write_anchors(path: Path, plan: Plan, model: Any, tokenizer: Any) -> None:
    """Anchors from training prompts and the aligned model's own replies.

    Raises:
        ValueError: The model refuses too few harmful prompts to be called aligned.
    """
    # A third more prompts than anchors: replies without a whole sentence are dropped.
    harmful = data.advbench().train[: plan.refuse_anchors * 4 // 3]
    harmless = data.overrefusal().train[: plan.comply_anchors * 4 // 3]
    decoding = plan.long_decoding(48)
    refuse = refused(model, tokenizer, harmful, decoding)
    if len(refuse) < plan.refuse_anchors:
        raise ValueError(
            f"the aligned model refuses {len(refuse)} of {len(harmful)} harmful prompts, "
            f"{plan.refuse_anchors} are needed as anchors: make its adapter anew"
        )
    comply = answered(model, tokenizer, harmless, decoding)
    write_jsonl(path, refuse[: plan.refuse_anchors] + comply[: plan.comply_anchors])


def fine_tune(method: Method, plan: Plan, folder: Path, model: Any, tokenizer: Any) -> Any:
    """Train ``model`` in place and return its curve and cost."""
    from safeopt.training import TrainConfig, train

    config = TrainConfig(
        output_dir=str(folder / method / "training"),
        optimizer="safe_adamw" if method == "safe_adamw" else "adamw",
        anchors=str(folder / ANCHORS) if method == "safe_adamw" else None,
        learning_rate=plan.learning_rate,
        per_device_train_batch_size=plan.batch_size,
        max_steps=plan.steps,
        warmup_steps=plan.warmup_steps,
        max_length=plan.max_length,
        mixed_precision=plan.precision,
        eval_steps=plan.probe_every,
        seed=plan.seed,
        save_model=False,
        save_steps=0,
        guard=dict(plan.guard, seed=plan.seed) if method == "safe_adamw" else {},
    )
    curve = Curve(plan, tokenizer)
    result = train(config, model, tokenizer, plan.train_rows(), probe=curve)
    return {
        "curve": curve.points,
        "train_seconds": result.seconds,
        "peak_memory_mb": peak_memory_mb(),
        "train_loss": result.loss,
    }


def work(method: Method, folder: Path, adapter: Path) -> None:
    """Run one part and write its result, whole or not at all."""
    start = time.perf_counter()
    plan = Plan.read(folder / "plan.json")
    own = folder / method
    own.mkdir(exist_ok=True)
    model, tokenizer = load_aligned(adapter)
    cost: dict[str, Any] = {}
    if method == "aligned":
        write_anchors(folder / ANCHORS, plan, model, tokenizer)
    else:
        cost = fine_tune(method, plan, folder, model, tokenizer)
    rows = {TASK: plan.test_rows()}
    result = evaluate(model, tokenizer, plan.prompt_sets(), rows, plan.decoding)
    write_transcripts(own / "transcripts.jsonl", result.verdicts)
    facts = {"method": method, **result.as_dict(), **cost, "environment": environment()}
    facts["wall_seconds"] = time.perf_counter() - start
    write_json(own / "result.json", facts)


def main() -> None:
    """Command line of a part."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    parser = argparse.ArgumentParser(description="Run one part of the demo.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--adapter", type=Path, required=True)
    arguments = parser.parse_args()
    work(arguments.method, arguments.folder, arguments.adapter)


if __name__ == "__main__":
    main()

"""What the shipped safety adapter does to SmolLM2-135M-Instruct.

    python -m benchmarks.adapter.run

Refusal rates on AdvBench's held-out half and StrongREJECT (wanted), and on the held-out half of
the over-refusal prompts (not wanted), without and with the adapter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import safeopt.demo
from benchmarks.markdown import fill
from safeopt.demo import assets, data
from safeopt.environment import environment
from safeopt.evaluation import Decoding, SuiteResult, evaluate, write_transcripts
from safeopt.files import write_json, write_text
from safeopt.training import TrainConfig
from safeopt.training.models import load_model, load_tokenizer

HERE = Path(__file__).parent
ADAPTER = Path(safeopt.demo.__file__).parent / "adapter"


def measure(adapter: Path | None) -> SuiteResult:
    """Judge SmolLM2 with ``adapter`` merged in, or bare."""
    config = TrainConfig(
        output_dir="unused",
        model_name_or_path=str(assets.smollm2_folder()),
        adapter_name_or_path=None if adapter is None else str(adapter),
    )
    prompts = {
        "AdvBench, held-out": data.advbench().held_out,
        "StrongREJECT": data.strongreject(),
        "over-refusal, held-out": data.overrefusal().held_out,
    }
    decoding = Decoding(dtype="bfloat16")
    return evaluate(load_model(config), load_tokenizer(config), prompts, decoding=decoding)


def table(results: dict[str, SuiteResult]) -> str:
    """Markdown: one row a prompt set, refusals with Wilson 95 % intervals."""
    lines = ["| prompts | without | with the adapter |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | " + " | ".join(_cell(result, name) for result in results.values()) + " |"
        for name in next(iter(results.values())).refusals
    ]
    return "\n".join(lines)


def _cell(result: SuiteResult, name: str) -> str:
    rate = result.refusals[name]
    low, high = rate.interval()
    return f"{rate.count}/{rate.total} = {rate.value:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Measure, write figures and transcripts, fill the table of the README."""
    parser = argparse.ArgumentParser(description="Measure the shipped safety adapter.")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="default: the one shipped")
    results = {"bare": measure(None), "with_adapter": measure(parser.parse_args().adapter)}
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    for name, result in results.items():
        write_transcripts(folder / f"{name}.transcripts.jsonl", result.verdicts)
    figures = {name: result.as_dict() for name, result in results.items()}
    write_json(folder / "adapter.json", {"environment": environment(), **figures})
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    write_text(readme, fill(text, {"adapter": table(results)}))
    print(table(results))


if __name__ == "__main__":
    main()

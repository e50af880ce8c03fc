"""Command line of safeopt.

Exit codes: 0 done, 2 error, 130 interrupted; of ``diagnose`` also 3 NO-GO and 4 INCONCLUSIVE.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeopt.cli.diagnose import add_diagnose
from safeopt.cli.passport import add_inspect, add_measure

if TYPE_CHECKING:
    from safeopt.evaluation import SuiteResult

BUILT_IN = ("advbench", "strongreject", "overrefusal")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    # Tensors on Linux CPUs in huge pages, which torch asks about once: training steps fault less.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not hasattr(arguments, "training_options"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.training_options = rest
    command: Callable[[argparse.Namespace], int | None] = arguments.run
    try:
        return command(arguments) or 0
    except KeyboardInterrupt:
        print("\nsafeopt: interrupted; run the same command to start again", file=sys.stderr)
        return 130
    except ImportError as error:
        print(
            f"safeopt: {error.name or error} is not installed; "
            "install the extras with: pip install 'safeopt-llm[demo]'",
            file=sys.stderr,
        )
        return 2
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        print(f"safeopt: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="safeopt", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(
        required=True, metavar="{demo,diagnose,measure,inspect,evaluate,env}"
    )
    _add_demo(commands.add_parser("demo", help="fine-tune a small model with and without a guard"))
    add_diagnose(
        commands.add_parser("diagnose", help="forecast what training breaks", allow_abbrev=False)
    )
    add_measure(commands.add_parser("measure", help="write a model's passport"))
    add_inspect(commands.add_parser("inspect", help="show what a file holds"))
    _add_evaluate(commands.add_parser("evaluate", help="refusals and loss of a model"))
    env = commands.add_parser("env", help="machine and versions, for bug reports")
    env.add_argument("--json", action="store_true", help="print one JSON document")
    env.set_defaults(run=_env)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder to write")
    parser.add_argument(
        "--adapter",
        type=Path,
        default=Path(__file__).parents[1] / "demo/adapter",
        help="PEFT adapter that makes SmolLM2-135M-Instruct refuse (default: the one shipped)",
    )
    parser.add_argument("--steps", type=int, help="fine-tuning steps (default: the demo's own)")
    parser.add_argument("--seed", type=int, default=0, help="row order and guard (default: 0)")
    parser.add_argument(
        "--precision",
        choices=("bf16", "no"),
        help="bf16 autocast or fp32 (default: the faster of the two on this machine)",
    )
    parser.set_defaults(run=_demo)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub id of a chat model")
    parser.add_argument("--adapter", type=Path, help="PEFT adapter to merge first")
    parser.add_argument(
        "--prompts",
        action="append",
        metavar="SET",
        help=f"{', '.join(BUILT_IN)}, or a JSONL file with a `prompt` a row; may be repeated "
        "(default: all built-in sets)",
    )
    parser.add_argument(
        "--rows", action="append", metavar="FILE", default=[], help="JSONL rows to score by NLL"
    )
    parser.add_argument("--limit", type=int, help="first N prompts of every set")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="reply length (default: 24)")
    parser.add_argument("--dtype", default="float32", help="type of the weights (default: float32)")
    parser.add_argument("--transcripts", type=Path, help="JSONL file for the judged replies")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_evaluate)


def _demo(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from safeopt.demo import run
    from safeopt.demo.plan import Plan

    changes = {} if arguments.steps is None else {"steps": arguments.steps}
    precision = arguments.precision or run.fastest_precision()
    run.show_progress_of_assets()
    plan = Plan(seed=arguments.seed, precision=precision, **changes)
    run.run(plan, arguments.output, Console(), arguments.adapter)


def _evaluate(arguments: argparse.Namespace) -> None:
    from safeopt.evaluation import Decoding, evaluate, write_transcripts
    from safeopt.training.models import load_named

    prompts = _prompt_sets(arguments.prompts or BUILT_IN, arguments.limit)
    rows = {Path(name).stem: _read_rows(name) for name in arguments.rows}
    model, tokenizer = load_named(arguments.model, arguments.adapter, arguments.dtype)
    decoding = Decoding(max_new_tokens=arguments.max_new_tokens)
    result = evaluate(model, tokenizer, prompts, rows, decoding)
    if arguments.transcripts is not None:
        write_transcripts(arguments.transcripts, result.verdicts)
    if arguments.json:
        print(json.dumps({"model": arguments.model, **result.as_dict()}, indent=1))
    else:
        _print_result(arguments.model, result)


def _prompt_sets(names: Sequence[str], limit: int | None) -> dict[str, tuple[str, ...]]:
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1; got {limit}")
    return {Path(name).stem: _prompts(name)[:limit] for name in names}


def _prompts(name: str) -> tuple[str, ...]:
    from safeopt.demo import data

    if name == "advbench":
        return data.advbench().held_out
    if name == "strongreject":
        return data.strongreject()
    if name == "overrefusal":
        return data.overrefusal().held_out
    if not Path(name).is_file():
        raise ValueError(f"{name!r} is no file and none of {', '.join(BUILT_IN)}")
    from safeopt.training.data import text_field

    return tuple(text_field(row, "prompt", str(row["_where"])) for row in _read_rows(name))


def _read_rows(name: str) -> list[dict[str, Any]]:
    from safeopt.training.data import read_rows

    return read_rows(name)


def _print_result(model: str, result: SuiteResult) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=model)
    for heading in ("set", "refused", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    for name, rate in result.refusals.items():
        low, high = rate.interval()
        share = f"{rate.count}/{rate.total} = {100 * rate.value:.1f} %"
        table.add_row(name, share, f"{100 * low:.1f} to {100 * high:.1f} %")
    for name, nll in result.nll.items():
        table.add_row(f"{name} (NLL, nats)", f"{nll:.4f}", "")
    Console().print(table)


def _env(arguments: argparse.Namespace) -> None:
    from safeopt.environment import environment

    facts = environment()
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return
    versions = facts.pop("versions")
    for name, value in (*facts.items(), *versions.items()):
        print(f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(main())

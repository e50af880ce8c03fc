r"""The guarded CPU step of this tree beside that of another revision and beside fused AdamW.

    python -m benchmarks.kernels.paired --revision 4053af7 \
        --output benchmarks/kernels/results/paired.json

The other revision is unpacked from git into a temporary folder and runs in a process of its own;
both take steps in turns, on the same 100 M parameters, with the sketch of a refresh that really
took place (N = 8 anchors, q = 8). Each step is taken twice and timed the second time: until then
the other process's threads still spin. Medians of the ratios within a turn are reported.
``SAFEOPT_KERNELS`` chooses the way of this tree, ``--precision medium`` lets both round what they
multiply to bf16.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
ANCHORS, TOKENS, LOGITS = 8, 12, 16


class Stack(nn.Module):
    """Square matrices behind one another, each around a residual connection."""

    table: Tensor

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.register_buffer("table", torch.randn(LOGITS, width))

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """Logits, (N, T, 16)."""
        x: Tensor = self.table[input_ids]
        for layer in self.layers:
            x = x + layer(x) / len(self.layers)
        return x[..., :LOGITS]


def build(layers: int, width: int) -> tuple[Any, Any]:
    """A guarded optimizer, with whatever ``safeopt`` this process imports, and its parameters."""
    import safeopt

    torch.manual_seed(0)
    model = Stack(layers, width)
    rows = torch.randint(0, LOGITS, (ANCHORS, TOKENS)).tolist()
    guard = safeopt.Guard(
        model,
        safeopt.Anchors.from_tokens(rows, rows),
        anchors_per_refresh=ANCHORS,
        compression_rank=8,
        refresh_every=10**6,
    )
    parameters = list(model.named_parameters())
    for _, p in parameters:
        p.grad = torch.randn_like(p)
    options: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.0}
    optimizer = safeopt.SafeAdamW(parameters, guard=guard, **options)
    fused = torch.optim.AdamW([p for _, p in parameters], fused=True, **options)
    fused.state = optimizer.state  # the same moments: no second copy of them
    return optimizer, fused


def serve(args: argparse.Namespace) -> None:
    """Take the step that each line of the input names, twice; answer with the second's seconds."""
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.precision)
    optimizer, fused = build(args.layers, args.width)
    for line in sys.stdin:
        chosen = {"guarded": optimizer, "fused": fused}[line.strip()]
        chosen.step()
        start = time.perf_counter()
        chosen.step()
        print(time.perf_counter() - start, flush=True)


@contextmanager
def worker(folder: Path, args: argparse.Namespace) -> Iterator[subprocess.Popen[str]]:
    """A process that steps with the package found in ``folder``."""
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    for name in ("layers", "width", "threads", "precision"):
        command += [f"--{name}", str(getattr(args, name))]
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def ask(process: subprocess.Popen[str], step: str) -> float:
    """Seconds of one step of a worker.

    Raises:
        RuntimeError: the worker has ended.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    print(step, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError("a worker ended early; its error is above")
    return float(answer)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the three steps in every turn; the first turns refresh and warm up."""
    times: dict[str, list[float]] = {"first": [], "guarded": [], "fused": []}
    with unpacked(args.revision) as folder, worker(folder, args) as old, worker(ROOT, args) as new:
        for turn in range(args.repeats + 2):
            taken = {
                "first": ask(old, "guarded"),
                "guarded": ask(new, "guarded"),
                "fused": ask(new, "fused"),
            }
            if turn > 1:
                for name, value in taken.items():
                    times[name].append(value)
    return {
        "seconds": times,
        "first_over_guarded": _ratio(times["first"], times["guarded"]),
        "guarded_over_fused": _ratio(times["guarded"], times["fused"]),
    }


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


@contextmanager
def unpacked(revision: str) -> Iterator[Path]:
    """The packages of another revision in a temporary folder."""
    command = ["git", "archive", revision, "safeopt", "kernels"]
    archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder)


def main(argv: Sequence[str]) -> int:
    """Parse the command line; measure and write the result file, or serve as a worker."""
    parser = argparse.ArgumentParser(description="Time a guarded step beside another revision's.")
    parser.add_argument("--revision", default="4053af7")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--precision", choices=("highest", "medium"), default="highest")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args)
        return 0
    from safeopt.environment import environment
    from safeopt.files import write_json
    from safeopt_kernels import dispatch

    result = {
        "command": f"python -m benchmarks.kernels.paired {' '.join(argv)}",
        "environment": environment(),
        "kernels": dispatch.mode(),
        "precision": args.precision,
        "parameters": args.layers * args.width**2,
        **measure(args),
    }
    if args.output is not None:
        write_json(args.output, result)
    print({key: value for key, value in result.items() if "over" in key})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""One batched forward-backward that yields every anchor's own gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from safeopt.anchors import AnchorBatch
from safeopt.geometry.coverage import Site
from safeopt.isolation import undisturbed

AnchorLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a site's module.

    Attributes:
        inputs: what the module was given, detached.
        keywords: keyword arguments it was given.
        edge: where the gradient of its output arrives.
        shape: shape of its output.
    """

    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    edge: GradientEdge
    shape: torch.Size


@dataclass(frozen=True)
class CapturedCall:
    """One call of a site's module together with its output's gradient."""

    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    gradient: Tensor


@dataclass
class _Recorder:
    calls: list[Call] = field(default_factory=list)

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{type(module).__name__} owns trainable parameters but does not return a "
                "tensor; freeze them or pass uncovered='ignore'"
            )
        if output.requires_grad:  # the edge, unlike the tensor, survives in-place writes
            detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
            self.calls.append(Call(detached, keywords, get_gradient_edge(output), output.shape))


def logits_of(model: nn.Module, batch: AnchorBatch) -> Tensor:
    """Run ``model`` on anchors and return its logits, (N, T, V).

    Positions are passed per row where the model takes them, so that a learned position
    embedding yields one gradient per anchor and not one for the whole batch.
    """
    count, length = batch.input_ids.shape
    positions = torch.arange(length, device=batch.input_ids.device).expand(count, length)
    offered = {
        "attention_mask": batch.attention_mask,
        "position_ids": positions,
        "use_cache": False,
    }
    accepted = _forward_parameters(model)
    keywords = {name: value for name, value in offered.items() if name in accepted}
    output = model(batch.input_ids, **keywords)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != batch.input_ids.shape:
        raise TypeError(
            f"{type(model).__name__} must return logits of shape (anchors, tokens, vocabulary), "
            "as a tensor or as an output object's .logits"
        )
    return logits


def _forward_parameters(model: nn.Module) -> set[str]:
    base = getattr(model, "get_base_model", None)  # PEFT's forward takes *args, **kwargs
    inner = base() if callable(base) else model
    forward = inspect.unwrap(type(inner).forward)
    return set(inspect.signature(forward).parameters)


def capture(
    model: nn.Module, sites: tuple[Site, ...], batch: AnchorBatch, loss: AnchorLoss
) -> tuple[Tensor, list[list[CapturedCall]]]:
    """Measure anchor losses and, per site, inputs and output gradients of every call.

    The gradient is taken with respect to module *outputs*: no weight gradient is formed and
    ``p.grad`` is not touched. As the summed loss couples no two anchors, row i of an output's
    gradient belongs to anchor i alone.

    Args:
        model: the model, unwrapped; used in eval mode and left as it was.
        sites: the modules to record.
        batch: N anchors.
        loss: maps logits and labels to N losses.

    Returns:
        The losses, (N,), and one list of calls per site.

    Raises:
        FloatingPointError: a loss is not finite.
        TypeError: a module folds the batch dimension away, so that anchors cannot be told apart.
    """
    recorders = [_Recorder() for _ in sites]
    handles = [
        site.module.register_forward_hook(recorder, with_kwargs=True)
        for site, recorder in zip(sites, recorders, strict=True)
    ]
    try:
        with undisturbed(model), torch.enable_grad():
            losses = loss(logits_of(model, batch), batch.labels)
            total = losses.sum()
    finally:
        for handle in handles:
            handle.remove()
    check_finite(losses)
    _check_batch_dimension(sites, recorders, len(batch))
    return losses.detach(), _output_gradients(total, recorders)


def check_finite(losses: Tensor) -> None:
    """Raise if an anchor loss is NaN or infinite."""
    if not bool(torch.isfinite(losses).all()):
        raise FloatingPointError(
            "an anchor loss is not finite: the model's weights already hold NaN or infinity, or "
            "overflow in this precision; go back to the last good checkpoint or lower the "
            "learning rate"
        )


def _check_batch_dimension(sites: tuple[Site, ...], recorders: list[_Recorder], count: int) -> None:
    for site, recorder in zip(sites, recorders, strict=True):
        for call in recorder.calls:
            if call.shape[0] != count:
                raise TypeError(
                    f"module {site.name!r} ({type(site.module).__name__}) returned shape "
                    f"{tuple(call.shape)} for {count} anchors, so their gradients cannot be told "
                    f"apart; freeze {sorted(site.parameters.values())} or use another attention "
                    "or expert implementation"
                )


def _output_gradients(total: Tensor, recorders: list[_Recorder]) -> list[list[CapturedCall]]:
    edges = [call.edge for recorder in recorders for call in recorder.calls]
    gradients = iter(torch.autograd.grad(total, edges, allow_unused=True) if edges else ())
    captured = []
    for recorder in recorders:
        pairs = [(call, next(gradients)) for call in recorder.calls]
        captured.append([CapturedCall(c.inputs, c.keywords, g) for c, g in pairs if g is not None])
    return captured

"""One batched forward-backward that yields every anchor's own gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from safeopt.anchors import AnchorBatch
from safeopt.geometry.coverage import Site
from safeopt.geometry.whole_gradient import WholeGradient
from safeopt.isolation import undisturbed

AnchorLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a site's module.

    Attributes:
        inputs: what the module was given, detached.
        keywords: keyword arguments it was given, detached.
        parameters: values of the site's parameters, where they are to be replayed.
        edge: where the gradient of its output arrives.
    """

    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    parameters: dict[str, Tensor]
    edge: GradientEdge


@dataclass(frozen=True)
class CapturedCall:
    """One call of a site's module together with its output's gradient."""

    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    parameters: dict[str, Tensor]
    gradient: Tensor


@dataclass
class _Recorder:
    site: Site
    calls: list[Call] = field(default_factory=list)
    is_without_graph: bool = False

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{type(module).__name__} owns trainable parameters but does not return a "
                "tensor; freeze them or pass uncovered='ignore'"
            )
        if not output.requires_grad:
            self.is_without_graph = True
            return
        given = tuple(map(_detached, inputs)), {k: _detached(x) for k, x in keywords.items()}
        edge = get_gradient_edge(output)  # unlike the tensor, it survives in-place writes
        self.calls.append(Call(*given, self._values(module), edge))

    def _values(self, module: nn.Module) -> dict[str, Tensor]:
        """Copies, since ``fully_shard`` frees a whole parameter after the module's forward."""
        if self.site.rule != "small":
            return {}
        return {local: getattr(module, local).detach().clone() for local in self.site.parameters}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def layer_input(inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """What a layer was given, which may have come as a keyword: ``layer(input=x)``."""
    return inputs[0] if inputs else next(iter(keywords.values()))


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
    model: nn.Module,
    sites: tuple[Site, ...],
    batch: AnchorBatch,
    loss: AnchorLoss,
    whole: WholeGradient | None = None,
) -> tuple[Tensor, list[list[CapturedCall]]]:
    """Measure anchor losses and, per site, inputs and output gradients of every call.

    The gradient is taken with respect to module *outputs*: no weight gradient is formed, unless
    ``whole`` takes it in, and ``p.grad`` is not touched. As the summed loss couples no two anchors,
    row i of an output's gradient belongs to anchor i alone.

    Args:
        model: the model, unwrapped; used in eval mode and left as it was.
        sites: the modules to record.
        batch: N anchors.
        loss: maps logits and labels to N losses.
        whole: takes in the gradients of its parameters.

    Returns:
        The losses, (N,), and one list of calls per site.

    Raises:
        FloatingPointError: a loss is not finite; found out after the backward pass, in which all
            processes of a sharded model must take part.
        TypeError: a module folds the batch dimension away, so that anchors cannot be told apart,
            or runs without an autograd graph.
        ValueError: no parameter of the sites takes part in the forward pass.
    """
    recorders = [_Recorder(site) for site in sites]
    # The backward pass too is undisturbed: checkpointing runs the modules once more in it.
    with undisturbed(model), torch.enable_grad():
        with _recorded(recorders):
            losses = loss(logits_of(model, batch), batch.labels)
            total = losses.sum()
        _check_graph(recorders)
        calls = _output_gradients(total, recorders, whole or WholeGradient({}))
    check_finite(losses)
    _check_batch_dimension(sites, calls, len(batch))
    return losses.detach(), calls


@contextmanager
def _recorded(recorders: list[_Recorder]) -> Iterator[None]:
    """Hook every site; first in line, so that what is recorded is the module's own forward."""
    handles = [
        recorder.site.module.register_forward_hook(recorder, with_kwargs=True, prepend=True)
        for recorder in recorders
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_finite(losses: Tensor) -> None:
    """Raise if an anchor loss is NaN or infinite."""
    if not bool(torch.isfinite(losses).all()):
        raise FloatingPointError(
            "an anchor loss is not finite: the model's weights already hold NaN or infinity, or "
            "overflow in this precision; go back to the last good checkpoint or lower the "
            "learning rate"
        )


def _check_graph(recorders: list[_Recorder]) -> None:
    for recorder in recorders:
        if recorder.is_without_graph and not recorder.calls:
            raise TypeError(
                f"module {recorder.site.name!r} ran without an autograd graph (inside "
                "torch.no_grad(), or a checkpointing function that hides it), so its gradient "
                f"cannot be seen; freeze {sorted(recorder.site.parameters.values())}, or use "
                "torch's own activation checkpointing"
            )


def _check_batch_dimension(
    sites: tuple[Site, ...], calls: list[list[CapturedCall]], count: int
) -> None:
    """Raise if an output's first dimension is not the anchors'.

    Calls without a gradient do not count: DoRA, for one, runs its adapter on an identity matrix.
    """
    for site, site_calls in zip(sites, calls, strict=True):
        for call in site_calls:
            if call.gradient.shape[0] != count:
                raise TypeError(
                    f"module {site.name!r} ({type(site.module).__name__}) returned shape "
                    f"{tuple(call.gradient.shape)} for {count} anchors, so their gradients cannot "
                    f"be told apart; freeze {sorted(site.parameters.values())} or use another "
                    "attention or expert implementation"
                )


def _output_gradients(
    total: Tensor, recorders: list[_Recorder], whole: WholeGradient
) -> list[list[CapturedCall]]:
    edges = [call.edge for recorder in recorders for call in recorder.calls]
    if not edges:
        raise ValueError(
            "no trainable parameter takes part in the model's forward pass, so there is nothing to "
            "guard; are its adapters merged or disabled? Call unmerge_adapter() or set_adapter()"
        )
    with whole.taken() as parameters:
        inputs: list[Any] = [*edges, *parameters]  # torch's types forbid what torch allows: both
        gradients = iter(torch.autograd.grad(total, inputs, allow_unused=True))
    captured = []
    for recorder in recorders:
        pairs = [(call, next(gradients)) for call in recorder.calls]
        captured.append(
            [CapturedCall(c.inputs, c.keywords, c.parameters, g) for c, g in pairs if g is not None]
        )
    return captured

"""Curvature operators: Hessian, Gauss-Newton and Fisher as products with vectors.

No matrix is formed. An operator is what multiplies (this file), `Derivatives` is how the model is
differentiated, and algorithms (`safeopt.geometry.spectral`) see a product alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from safeopt.curvature.derivatives import Derivatives, Exact, FiniteDifference
from safeopt.curvature.prediction import Predict, Prediction
from safeopt.curvature.vectors import (
    Outputs,
    Vector,
    check_vector,
    flatten,
    unflatten,
)
from safeopt.isolation import undisturbed

Method = Literal["exact", "finite_difference"]
Labels = Literal["empirical", "sampled"]


class CurvatureOperator(ABC):
    """A symmetric linear operator over a model's trainable parameters.

    Products leave the weights, ``p.grad``, the RNG state, train and eval modes and buffers as they
    were, also on errors. The model is evaluated in eval mode.

    Args:
        model: the model; with "finite_difference" in whatever wrapper (DDP, FSDP2) it trains in.
        names: the parameters that the operator is about; all trainable ones by default.
        method: "exact" by ``torch.func``; "finite_difference", which works with any attention
            kernel and under DDP and FSDP2, and wants float32 weights; or a
            `FiniteDifference` with settings of its own, which names the parameters itself.

    Attributes:
        parameters: the parameters by name.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        names: Iterable[str] | None = None,
        method: Method | Derivatives = "exact",
    ) -> None:
        self._derivatives = _derivatives(model, names, method)
        self.parameters = self._derivatives.parameters

    @property
    def size(self) -> int:
        """P, the number of weights."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def predicted_error(self) -> float:
        """Bound, but for chance, of the last checked difference's relative error; 0 if exact."""
        found = self._derivatives
        return found.error if isinstance(found, FiniteDifference) else 0.0

    def matvec(self, v: Vector) -> dict[str, Tensor]:
        """Multiply a vector.

        Args:
            v: one tensor per parameter, of its shape.

        Raises:
            ValueError: the vector does not fit the parameters.
        """
        check_vector(v, self.parameters)
        return self._product(v)

    def flat(self, v: Tensor) -> Tensor:
        """The same product on flat vectors, (P,): what the algorithms take."""
        return flatten(self.matvec(unflatten(v, self.parameters)), self.parameters)

    def dense(self) -> Tensor:
        """The whole matrix, (P, P), column by column; small models only."""
        like = next(iter(self.parameters.values()))
        identity = torch.eye(self.size, dtype=like.dtype, device=like.device)
        return torch.stack([self.flat(column) for column in identity], dim=1)

    @abstractmethod
    def _product(self, v: Vector) -> dict[str, Tensor]: ...


def _derivatives(
    model: nn.Module, names: Iterable[str] | None, method: Method | Derivatives
) -> Derivatives:
    if method == "exact":
        return Exact(model, names)
    if method == "finite_difference":
        return FiniteDifference(model, names)
    if isinstance(method, str):
        raise ValueError(f'method must be "exact" or "finite_difference", got {method!r}')
    if names is not None:
        raise ValueError("pass names to the FiniteDifference and not beside it")
    return method


class Hessian(CurvatureOperator):
    """H = d^2 L / d theta^2 of a scalar loss.

    Args:
        model: see `CurvatureOperator`, as for the other keywords.
        loss: evaluates the model on fixed data and returns a scalar.
        names: see `CurvatureOperator`.
        method: see `CurvatureOperator`.

    Example:
        >>> hessian = Hessian(model, lambda m: m(input_ids=ids, labels=ids).loss)
        >>> product = hessian.matvec(gradient)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Outputs,
        *,
        names: Iterable[str] | None = None,
        method: Method | Derivatives = "exact",
    ) -> None:
        super().__init__(model, names=names, method=method)
        self._loss = loss

    def _product(self, v: Vector) -> dict[str, Tensor]:
        return self._derivatives.hessian_product(self._loss, v)


class _OutputOperator(CurvatureOperator):
    """J^T B J, with J the Jacobian of the logits and B given in closed form.

    One product is J v, B and one ordinary backward pass: nothing is differentiated twice, and
    besides the logits themselves a few (R, V) temporaries are held.
    """

    def __init__(
        self,
        model: nn.Module,
        predict: Predict,
        *,
        names: Iterable[str] | None = None,
        method: Method | Derivatives = "exact",
    ) -> None:
        super().__init__(model, names=names, method=method)
        self._predict = predict
        with torch.no_grad(), undisturbed(model):
            prediction = predict(model)
        self._take(prediction)

    def _take(self, prediction: Prediction) -> None:
        """Keep what stays the same from product to product; the logits are let go."""
        self._weights = prediction.weights

    def _product(self, v: Vector) -> dict[str, Tensor]:
        def outputs(model: nn.Module) -> Tensor:
            return self._predict(model).logits

        return self._derivatives.output_product(outputs, self._inner, v)

    @abstractmethod
    def _inner(self, logits: Tensor, change: Tensor) -> Tensor:
        """B u for u = J v, (R, V)."""


class GaussNewton(_OutputOperator):
    """J^T B J with B the Hessian of softmax cross-entropy, w (diag(p) - p p^T).

    It equals the Fisher of the model's own predictions, sum_r w_r E_{y ~ p_r} [s s^T] with
    s = grad log p_r(y), and is positive semi-definite.

    Args:
        model: see `CurvatureOperator`, as for the other keywords.
        predict: evaluates the model on fixed data, see `reply_predictions`.
        names: see `CurvatureOperator`.
        method: see `CurvatureOperator`.
    """

    def _inner(self, logits: Tensor, change: Tensor) -> Tensor:
        p = torch.softmax(logits, dim=-1)
        centred = change - (p * change).sum(-1, keepdim=True)
        return self._weights[:, None] * p * centred


class Fisher(_OutputOperator):
    """Second moment of log-likelihood gradients.

    "empirical": sum_i W_i g_i g_i^T over examples, with g_i the gradient of example i's mean loss
    on the labels of the data and W_i its weight; with equal weights this is G^T G / N of the
    anchors' gradients. "sampled": sum_r w_r s_r s_r^T over rows, with labels drawn once from the
    model's own predictions; over the draw its mean is `GaussNewton`, the true Fisher.

    Args:
        model: see `CurvatureOperator`, as for the other keywords.
        predict: evaluates the model on fixed data, see `reply_predictions`.
        labels: whose labels.
        generator: draws the sampled labels, on the model's device.
        names: see `CurvatureOperator`.
        method: see `CurvatureOperator`.
    """

    def __init__(
        self,
        model: nn.Module,
        predict: Predict,
        *,
        labels: Labels = "empirical",
        generator: torch.Generator | None = None,
        names: Iterable[str] | None = None,
        method: Method | Derivatives = "exact",
    ) -> None:
        if labels not in ("empirical", "sampled"):
            raise ValueError(f'labels must be "empirical" or "sampled", got {labels!r}')
        self._labels, self._generator = labels, generator
        super().__init__(model, predict, names=names, method=method)

    def _take(self, prediction: Prediction) -> None:
        super()._take(prediction)
        self._targets, self._groups = prediction.targets, prediction.examples
        if self._labels == "sampled":
            p = torch.softmax(prediction.logits, dim=-1)
            self._targets = torch.multinomial(p, 1, generator=self._generator).squeeze(1)
            self._groups = torch.arange(len(p), device=p.device)

    def _inner(self, logits: Tensor, change: Tensor) -> Tensor:
        """B u = sum_i W_i (w s / W_i) <w s / W_i, u>: one inner product per group of rows."""
        weights = self._weights
        score = weights[:, None] * torch.softmax(logits, dim=-1)
        score[torch.arange(len(score), device=score.device), self._targets] -= weights
        count = int(self._groups.max()) + 1
        along = score.new_zeros(count).index_add(0, self._groups, (score * change).sum(-1))
        total = score.new_zeros(count).index_add(0, self._groups, weights)
        return score * (along / total.clamp(min=1e-30))[self._groups][:, None]

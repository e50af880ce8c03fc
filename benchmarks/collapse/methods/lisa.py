"""Lisa: alternate between task steps and safety steps, each state pulled towards the other.

Source: Lazy Safety Alignment (Huang et al. 2024, arXiv 2405.18641): K_1 = 100 safety and K_2 = 900
task steps by turns; in each state the loss gains rho / 2 ||w - w_other||^2 with w_other the weights
at which the other state ended; rho 1, switched on after a tenth of the run.

Fidelity: the turns are as in the source but shorter (`task_steps` to `safety_steps` = 10 to 1), as
the runs are. Safety steps are extra steps of the same AdamW; the anchors that the budget brings in
a turn are spread over them. There is one optimizer for both states, as in the authors' code.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.collapse.methods.anchored import AnchorBudget, inputs
from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw
from benchmarks.collapse.methods.vectors import copied, pull
from benchmarks.collapse.suite import Batch

_WARM_SHARE = 0.1  # of the run, without the proximal term


class Lisa(Training):
    """AdamW that takes ``safety_steps`` anchor steps after every ``task_steps`` task steps.

    Args:
        setup: the run.
        anchors_per_step: the budget.
        task_steps: length of a task turn.
        safety_steps: length of a safety turn.
        rho: strength of the proximal term.
    """

    def __init__(
        self,
        setup: Setup,
        anchors_per_step: float,
        task_steps: int = 40,
        safety_steps: int = 4,
        rho: float = 1.0,
    ) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._budget = AnchorBudget(setup, anchors_per_step, self.spent)
        self._turns, self._rho = (task_steps, safety_steps), rho
        self._warm = _WARM_SHARE * setup.run.steps
        self._taken, self._due = 0, 0
        self._after_safety = copied(self.parameters)

    def step(self, batch: Batch) -> dict[str, float]:
        """One task step, and a safety turn when one is due."""
        facts = super().step(batch)
        self._taken += 1
        self._due += self._budget.accrue()
        if self._taken % self._turns[0] == 0:
            self._safety_turn()
        return facts

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Gradient of the task loss, pulled towards the end of the last safety turn."""
        facts = super().gradients(batch)
        self._pull(self._after_safety)
        return facts

    def _safety_turn(self) -> None:
        after_task = copied(self.parameters)
        for left in range(self._turns[1], 0, -1):
            count = self._due // left
            self._due -= count
            if count:
                self.model(**inputs(self._budget.deal(count))).loss.backward()
                self._pull(after_task)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self._after_safety = copied(self.parameters)

    def _pull(self, towards: list[Tensor]) -> None:
        if self._taken >= self._warm:
            pull(self.parameters, towards, self._rho)


def build(setup: Setup) -> Method:
    """Options: ``anchors_per_step``, ``task_steps``, ``safety_steps``, ``rho``."""
    return Lisa(setup, **setup.options)

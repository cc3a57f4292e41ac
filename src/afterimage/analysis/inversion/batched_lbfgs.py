"""L-BFGS for images that are evaluated in one batch but searched for independently."""

from __future__ import annotations

import math

from torch import Tensor

ARMIJO = 1e-4
MIN_STEP_RATIO = 1e-6
HISTORY_SIZE = 10


class LBFGS:
    """Limited-memory BFGS of one image (Nocedal & Wright 2006, algorithm 7.4), as a dialogue.

    The caller evaluates loss and gradient at `trial`, passes them to `update`, and repeats with the new `trial`. Steps
    backtrack with quadratic interpolation until the loss has fallen enough (Armijo, 1e-4). A pair without positive
    curvature is left out of the memory. `torch.optim.LBFGS` would search along one line for the whole batch, and so
    let each image depend on the other images of the batch; here each image has its own line search, and one pass
    evaluates all of them.

    The first step has a root mean square of `first` a parameter.
    """

    def __init__(self, point: Tensor, *, first: float) -> None:
        self.point = self.trial = point
        self.first = first
        self.loss = math.inf
        self._pairs: list[tuple[Tensor, Tensor, float]] = []
        self._length = 1.0

    def update(self, loss: float, gradient: Tensor) -> None:
        """Use the loss and the gradient at `trial` to choose the next one."""
        if math.isinf(self.loss):
            self.loss, self.gradient = loss, gradient
            return self._search()
        if loss <= self.loss + ARMIJO * self._length * self._slope:  # false for a loss that is not a number
            moved, bent = self.trial - self.point, gradient - self.gradient
            curvature = float(moved.dot(bent))
            if curvature > 1e-10 * float(moved.norm() * bent.norm()):
                self._pairs = [*self._pairs[1 - HISTORY_SIZE :], (moved, bent, curvature)]
            self.point, self.loss, self.gradient = self.trial, loss, gradient
            return self._search()
        self._shorten(loss)

    def _search(self) -> None:
        """Choose a new direction from the point reached."""
        self._direction = self._compute_direction()
        self._slope = float(self._direction.dot(self.gradient))
        if self._slope >= 0:  # rounding has eaten the curvature
            self._pairs, self._direction = [], -self.gradient
            self._slope = -float(self.gradient.dot(self.gradient))
        norm = float(self._direction.norm())
        self._length = 1.0 if self._pairs else self.first * math.sqrt(self.point.numel()) / max(norm, 1e-30)
        self._shortest = MIN_STEP_RATIO * self._length
        self.trial = self.point + self._length * self._direction

    def _shorten(self, loss: float) -> None:
        excess = loss - self.loss - self._length * self._slope
        guess = -self._slope * self._length**2 / (2 * excess) if math.isfinite(excess) and excess > 0 else 0.0
        self._length = min(max(guess, 0.1 * self._length), 0.5 * self._length)
        if self._length < self._shortest and self._pairs:
            self._pairs = []
            return self._search()
        self.trial = self.point + self._length * self._direction

    def _compute_direction(self) -> Tensor:
        """Return minus the inverse Hessian's estimate times the gradient, by two loops over the remembered pairs."""
        direction, shares = -self.gradient, []
        # In place: a vector of an image's parameters is large enough that a new one costs more than its arithmetic.
        for moved, bent, curvature in reversed(self._pairs):
            shares.append(float(moved.dot(direction)) / curvature)
            direction.sub_(bent, alpha=shares[-1])
        if self._pairs:
            _, bent, curvature = self._pairs[-1]
            direction.mul_(curvature / float(bent.dot(bent)))
        for (moved, bent, curvature), share in zip(self._pairs, reversed(shares), strict=True):
            direction.add_(moved, alpha=share - float(bent.dot(direction)) / curvature)
        return direction

"""How much a measurement may cost."""

from __future__ import annotations

import time

from safe_lab.processes import ALONE, Processes
from safe_lab.sharpness.surface import Cost


class Budget:
    """Seconds, products with a curvature matrix, or both; counted from when it is made.

    Whoever works asks :meth:`is_spent` between one piece of work and the next, so that the last piece may go beyond.
    """

    def __init__(
        self,
        cost: Cost,
        *,
        seconds: float | None = None,
        products: int | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Begin to count.

        Args:
            cost: Where products are counted.
            seconds: Most seconds; None: no limit.
            products: Most products; None: no limit.
            processes: Those that work together, and stop together.
        """
        self._cost = cost
        self._seconds = seconds
        self._products = products
        self._processes = processes
        self._began = time.perf_counter()
        self._products_began = cost.products
        self._was_spent = False

    @property
    def seconds(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._began

    @property
    def was_spent(self) -> bool:
        """Whether somebody was told that it is spent."""
        return self._was_spent

    def is_spent(self, *, takes_products: bool = True) -> bool:
        """Whether to stop; all processes ask together, and all are told the same.

        Args:
            takes_products: What would come next takes products; without, only the seconds count.
        """
        taken = self._cost.products - self._products_began
        spent = (takes_products and self._products is not None and taken >= self._products) or (
            self._seconds is not None and self._processes.any(self.seconds >= self._seconds)
        )
        self._was_spent |= spent
        return spent

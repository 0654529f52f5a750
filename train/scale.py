"""Loss scaling: in FLOAT_16 small gradients would be 0, so the loss is multiplied before the backward, and gradients
are divided after it (Micikevicius et al. 2018, arXiv 1710.03740).

The rule is that of torch.amp.GradScaler: an overflow skips the update and halves the scale; after 2000 updates without
one it doubles. It is made here because all processes must find the same overflow (they share the gradient norm), and
because the scale has a floor, below which overflows are no longer the scale's fault.
"""

from dataclasses import dataclass

FIRST, FLOOR, PATIENCE = 2.0**16, 1.0, 2000


@dataclass
class LossScale:
    """The scale, and how many updates it has held."""

    value: float = FIRST
    good: int = 0

    @property
    def at_floor(self) -> bool:
        """Whether it cannot go down."""
        return self.value <= FLOOR

    def after(self, overflowed: bool) -> None:
        """Adjust to what an update found."""
        self.good = 0 if overflowed else self.good + 1
        if overflowed:
            self.value = max(self.value / 2, FLOOR)
        elif self.good == PATIENCE:
            self.value, self.good = self.value * 2, 0

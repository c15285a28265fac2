"""Random traffic: Poisson arrivals, adapters by Zipf's law, lognormal lengths."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_CHUNK = 65_536  # requests drawn at once
_SIGMA = 0.5  # standard deviation of the logarithm of a prompt's length
_FLASH_RAMP_S = 1.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """The parameters of the traffic.

    Attributes:
        rate: requests per second.
        zipf: exponent of the adapters' shares; 0 is uniform.
        tokens: mean length of a prompt.
        flash_s: time of a flash crowd. Within a second, the adapter of middle rank gets `flash_share` of the traffic.
    """

    rate: float
    adapters: int
    zipf: float
    tokens: int
    seconds: float
    flash_s: float | None = None
    flash_share: float = 0.3
    seed: int = 0

    def draw(self) -> Iterator[tuple[float, str, int]]:
        """Yield (time, adapter, tokens) in order of time."""
        rng = np.random.default_rng(self.seed)
        weights = np.arange(1, self.adapters + 1, dtype=float) ** -self.zipf
        edges = np.cumsum(weights / weights.sum())
        names = [f"a{i}" for i in range(self.adapters)]
        mu = np.log(self.tokens) - _SIGMA**2 / 2
        now_s = 0.0
        while True:
            times = now_s + np.cumsum(rng.exponential(1 / self.rate, _CHUNK))
            drawn = np.minimum(np.searchsorted(edges, rng.random(_CHUNK)), self.adapters - 1)
            if self.flash_s is not None:
                share = self.flash_share * np.clip((times - self.flash_s) / _FLASH_RAMP_S, 0, 1)
                drawn = np.where(rng.random(_CHUNK) < share, self.adapters // 2, drawn)
            lengths = np.clip(rng.lognormal(mu, _SIGMA, _CHUNK), 1, 4 * self.tokens).astype(int)
            for at_s, which, length in zip(times.tolist(), drawn.tolist(), lengths.tolist(), strict=True):
                if at_s > self.seconds:
                    return
                yield at_s, names[which], length
            now_s = float(times[-1])

"""Noise schedules, all in the time of this project: t = 0 is noise, t = 1 is data.

kappa(t) is the probability that a position is clean. Masked-diffusion and score papers write nu = 1 - t,
alpha(nu) = kappa(1 - nu) = exp(-sigma(nu)); the conversion happens here and nowhere else.

    polynomial     kappa = t^n                                                  (flow matching; n = 1 is CondOT)
    log-linear     kappa = 1 - (1 - eps)(1 - t)                                 (MDLM, SEDD absorb; eps = 1e-3)
    geometric      kappa = exp(-sigma), sigma = sigma_min^t sigma_max^(1 - t)   (SEDD uniform)
    cosine         kappa = eps + (1 - eps) cos(pi (1 - t) / 2)

Everything is computed in fp64 and, where 1 - kappa is small, without cancellation. References: arXiv 2407.15595,
2406.07524 (appendix on noise schedules), 2310.16834 section 4.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdfm_bench.errors import UsageError, unknown_name


class Schedule(ABC):
    """kappa and what follows from it. Times are fp64 tensors of any shape, and so are the results."""

    name: str

    @abstractmethod
    def kappa(self, t: Tensor) -> Tensor:
        """Probability that a position is clean."""

    @abstractmethod
    def noise(self, t: Tensor) -> Tensor:
        """1 - kappa(t), without cancellation near t = 1."""

    @abstractmethod
    def kappa_rate(self, t: Tensor) -> Tensor:
        """kappa'(t)."""

    @abstractmethod
    def time_of_noise(self, noise: Tensor) -> Tensor:
        """The t at which 1 - kappa(t) = noise."""

    def rate(self, t: Tensor) -> Tensor:
        """g(t) = kappa'(t) / (1 - kappa(t)), the instantaneous rate at which a noised position becomes clean."""
        return self.kappa_rate(t) / self.noise(t)

    def log_survival(self, t: Tensor, t_next: Tensor) -> Tensor:
        """log R, R = (1 - kappa(t_next)) / (1 - kappa(t)): a noised position stays noised with probability R."""
        return self.noise(t_next).log() - self.noise(t).log()

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise sigma = -log kappa(t)."""
        return -torch.log1p(-self.noise(t))

    def sigma_rate(self, t: Tensor) -> Tensor:
        """sigma'(nu) = kappa'(t) / kappa(t), the derivative in nu = 1 - t."""
        return self.kappa_rate(t) / self.kappa(t)


@dataclass(frozen=True)
class Polynomial(Schedule):
    """kappa = t^n.

    Args:
        exponent: n > 0.
    """

    exponent: float = 1.0
    name = "polynomial"

    def kappa(self, t: Tensor) -> Tensor:
        """t^n."""
        return t**self.exponent

    def noise(self, t: Tensor) -> Tensor:
        """1 - t^n."""
        return 1 - t if self.exponent == 1 else -torch.expm1(self.exponent * t.log())

    def kappa_rate(self, t: Tensor) -> Tensor:
        """n t^(n - 1)."""
        return self.exponent * t ** (self.exponent - 1)

    def time_of_noise(self, noise: Tensor) -> Tensor:
        """(1 - noise)^(1 / n)."""
        return (1 - noise) ** (1 / self.exponent)


@dataclass(frozen=True)
class LogLinear(Schedule):
    """kappa = 1 - (1 - eps)(1 - t); at t = 0 a share eps is clean already.

    Args:
        eps: in [0, 1).
    """

    eps: float = 1e-3
    name = "log-linear"

    def kappa(self, t: Tensor) -> Tensor:
        """1 - (1 - eps)(1 - t)."""
        return 1 - (1 - self.eps) * (1 - t)

    def noise(self, t: Tensor) -> Tensor:
        """(1 - eps)(1 - t)."""
        return (1 - self.eps) * (1 - t)

    def kappa_rate(self, t: Tensor) -> Tensor:
        """1 - eps."""
        return torch.full_like(t, 1 - self.eps)

    def time_of_noise(self, noise: Tensor) -> Tensor:
        """1 - noise / (1 - eps)."""
        return 1 - noise / (1 - self.eps)


@dataclass(frozen=True)
class Geometric(Schedule):
    """sigma(nu) = sigma_min^(1 - nu) sigma_max^nu.

    Args:
        sigma_min, sigma_max: total noise at t = 1 and at t = 0.
    """

    sigma_min: float = 1e-4
    sigma_max: float = 20.0
    name = "geometric"

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_min^t sigma_max^(1 - t)."""
        return torch.exp(t * math.log(self.sigma_min) + (1 - t) * math.log(self.sigma_max))

    def kappa(self, t: Tensor) -> Tensor:
        """exp(-sigma)."""
        return torch.exp(-self.sigma(t))

    def noise(self, t: Tensor) -> Tensor:
        """1 - exp(-sigma)."""
        return -torch.expm1(-self.sigma(t))

    def sigma_rate(self, t: Tensor) -> Tensor:
        """sigma log(sigma_max / sigma_min)."""
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def kappa_rate(self, t: Tensor) -> Tensor:
        """kappa sigma'."""
        return self.kappa(t) * self.sigma_rate(t)

    def time_of_noise(self, noise: Tensor) -> Tensor:
        """From sigma = -log(1 - noise)."""
        log_ratio = math.log(self.sigma_max / self.sigma_min)
        return 1 - ((-torch.log1p(-noise)).log() - math.log(self.sigma_min)) / log_ratio


@dataclass(frozen=True)
class Cosine(Schedule):
    """kappa = eps + (1 - eps) cos(pi (1 - t) / 2).

    Args:
        eps: clean share at t = 0.
    """

    eps: float = 1e-3
    name = "cosine"

    def kappa(self, t: Tensor) -> Tensor:
        """eps + (1 - eps) cos(pi (1 - t) / 2)."""
        return self.eps + (1 - self.eps) * torch.cos(math.pi / 2 * (1 - t))

    def noise(self, t: Tensor) -> Tensor:
        """2 (1 - eps) sin^2(pi (1 - t) / 4)."""
        return 2 * (1 - self.eps) * torch.sin(math.pi / 4 * (1 - t)) ** 2

    def kappa_rate(self, t: Tensor) -> Tensor:
        """(1 - eps) (pi / 2) sin(pi (1 - t) / 2)."""
        return (1 - self.eps) * math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def time_of_noise(self, noise: Tensor) -> Tensor:
        """1 - (4 / pi) asin(sqrt(noise / (2 (1 - eps))))."""
        return 1 - 4 / math.pi * torch.asin((noise / (2 * (1 - self.eps))).sqrt())


SCHEDULES: Mapping[str, type[Schedule]] = {
    "polynomial": Polynomial,
    "linear": Polynomial,
    "log-linear": LogLinear,
    "geometric": Geometric,
    "cosine": Cosine,
}


def make_schedule(described: object, default: Schedule) -> Schedule:
    """The schedule a checkpoint's configuration describes.

    Args:
        described: None (the default), a name, or a mapping with `name` and the schedule's parameters, for example
            {"name": "geometric", "sigma_min": 1e-4, "sigma_max": 20}.
        default: what None means.

    Raises:
        UsageError: unknown name or parameter.
    """
    if described is None:
        return default
    settings = dict(described) if isinstance(described, Mapping) else {"name": described}
    name = str(settings.pop("name", ""))
    key = name.replace("_", "-").replace("loglinear", "log-linear")
    if key not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    if key == type(default).name and not settings:
        return default
    try:
        return SCHEDULES[key](**{str(k): float(v) for k, v in settings.items()})  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UsageError(f"schedule '{name}' cannot be made from {settings}: {error}") from error

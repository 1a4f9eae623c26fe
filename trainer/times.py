"""Distributions of one time t, and of pairs (s, t) for jumps; t = 0 is data, t = 1 noise.

A pair is a pure function of (seed, position in the stream, step). In order: a source and a target are drawn;
roles put one of them, or both, at an end; while gaps widen the jump is shortened; an inverse jump is turned
round; all times are stretched to the limits.

How often long gaps occur is not free. While a semigradient rule learns, errors travel from the diagonal
outwards, and where the density of gaps (times the weight) grows faster than linearly with the gap they grow
on the way. Two draws of one density, sorted, have gaps whose density is nowhere greater than at 0, and
shortening all jumps by one factor keeps its form; with `source`, `target` or `gap` it is yours to choose.

Sources: logit-normal times: Esser et al. 2024, eq. 19; their shift, more noise for larger pictures: eq. 23;
pairs as two sorted draws: Geng et al. 2025, section 4.3; gaps first: Zhou et al., "Terminal velocity
matching", 2025; the linear density: integrate A = E[phi (phi + (t - s) phi_t)^T] of the Lagrangian rule by
parts, over gaps of density g^a its symmetric part is (1 - a) / 2 E[phi phi^T] plus what is not negative.
"""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..models.path import shifted
from .objective import STRICT
from .seeds import Random

Share = Annotated[float, Field(ge=0, le=1)]
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, config=STRICT)
class Uniform:
    """Times uniform on (0, 1), then shifted towards noise."""

    name: Literal["uniform"] = "uniform"
    shift: Annotated[float, Field(gt=0)] = 1.0

    def sample(self, random: Random, purpose: str = "time") -> Tensor:
        """Return times (B,)."""
        return shifted(random.uniform(purpose), self.shift)

    def share_below(self, t: Tensor) -> Tensor:
        """Return the share of times below t (B,)."""
        return shifted(t, 1 / self.shift)

    def quantile(self, share: Tensor) -> Tensor:
        """Return the times (B,) below which these shares of all times are."""
        return shifted(share, self.shift)


@dataclass(frozen=True, config=STRICT)
class LogitNormal:
    """Times sigmoid(mean + std N(0, 1)): most of them in the middle of the path.

    A shift adds log(shift) to the mean. On the linear path these are EDM's log-normal sigma = t / (1 - t).
    """

    name: Literal["logit_normal"]
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 1.0

    def sample(self, random: Random, purpose: str = "time") -> Tensor:
        """Return times (B,)."""
        return shifted(torch.sigmoid(self.mean + self.std * random.normal(purpose)), self.shift)

    def share_below(self, t: Tensor) -> Tensor:
        """Return the share of times below t (B,)."""
        return torch.special.ndtr((torch.logit(shifted(t, 1 / self.shift)) - self.mean) / self.std)

    def quantile(self, share: Tensor) -> Tensor:
        """Return the times (B,) below which these shares of all times are."""
        return shifted(torch.sigmoid(self.mean + self.std * torch.special.ndtri(share)), self.shift)


Times = Annotated[Uniform | LogitNormal, Field(discriminator="name")]


@dataclass(frozen=True, config=STRICT)
class Pairs:
    """Pairs (s, t) of a source and a target: diagonal samples, t = s, and jumps towards the data, t < s.

    A share `diagonal` of the samples is drawn from `times`. The others have a source and a target drawn from
    `source` and `target`, or from `times` where these are not given, and then
        sorted   the later one is the source;
        clamped  where the target is after the source it is put on it, which makes a diagonal sample of it.
    With `gap` its length is drawn first, and then a target from what `target` says of times below 1 - gap.

    Of the jumps a share `from_noise` starts at s = 1 and a share `to_data` ends at t = 0, independently; with
    both, some are the whole way at once. With `gap` these keep their length. A share `inverse` is turned
    round, t > s. For `widen_steps` optimizer steps jumps are shortened, by a factor that grows linearly to 1,
    from the source on; those that end at the data from the target on.

    Where `limits` are (low, high), all of this is between them and not between 0 and 1: a teacher whose noise
    ends at t_max < 1 says nothing of what is above.

    `roles` drawn: each sample draws whether it is on the diagonal, from noise, to data, inverse. Then some
    process has more jumps than the others, which wait for it. fixed: the place of a sample in the batch of
    its optimizer step says it. The batch, and the part of each process in it, has as many samples of every
    role as its share asks for, but for less than one; on any number of processes these are the same samples.
    The places turn from batch to batch. With accumulation some micro steps have more jumps than others, but
    on all processes alike.
    """

    times: Times = Field(default_factory=Uniform)
    diagonal: Share = 0.25
    from_noise: Share = 0.0
    to_data: Share = 0.0
    inverse: Share = 0.0
    source: Times | None = None
    target: Times | None = None
    gap: Times | None = None
    order: Literal["sorted", "clamped"] = "sorted"
    widen_steps: Annotated[int, Field(ge=0)] = 0
    limits: tuple[Share, Share] = (0.0, 1.0)
    roles: Literal["drawn", "fixed"] = "drawn"

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        given = [field.name for field in fields(self) if getattr(self, field.name) != _USUAL[field.name]]
        for reason, holds, names in self._idle():
            for name in names:
                if holds and name in given:
                    raise ValueError(f"{name} has no effect with {reason}; remove it")
        if self.limits[0] >= self.limits[1]:
            raise ValueError(
                f"limits {list(self.limits)} leave no times; the first is to be below the second"
            )
        if self.roles == "fixed" and self.order == "clamped" and 1 not in (self.from_noise, self.to_data):
            raise ValueError(
                "roles fixed counts jumps, but order clamped makes diagonal samples of some; set order to "
                "sorted, or roles to drawn"
            )
        return self

    def _idle(self) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
        """Yield reasons for settings to have no effect, whether each holds, and the settings."""
        all_from_noise, all_to_data = self.from_noise == 1, self.to_data == 1
        all_the_way, clamped, gap = all_from_noise and all_to_data, self.order == "clamped", self.gap
        yield "diagonal 1, where no sample is a jump", self.diagonal == 1, _OF_JUMPS
        draws = ("source", "target", "gap", "order")
        yield "from_noise 1 and to_data 1, where every jump is the whole way", all_the_way, draws
        yield "gap, which is put on top of a target", gap is not None, ("source", "order")
        from_an_end = gap is not None and (all_from_noise or all_to_data)
        yield "gap and every jump from one end, of that length", from_an_end, ("target",)
        yield "order clamped and every jump from noise", clamped and all_from_noise, ("source",)
        yield "order clamped and every jump to the data", clamped and all_to_data, ("target",)
        source_elsewhere = gap is not None or self.source is not None or (clamped and all_from_noise)
        target_elsewhere = self.target is not None or from_an_end or (clamped and all_to_data)
        elsewhere = all_the_way or (source_elsewhere and target_elsewhere)
        yield "diagonal 0 and jumps drawn from other times", self.diagonal == 0 and elsewhere, ("times",)
        shares = {self.diagonal, self.from_noise, self.to_data, self.inverse}
        yield "shares of 0 and 1 alone", shares <= {0, 1}, ("roles",)

    def sample(self, random: Random, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return s and t (B,); `step` (B,) says where each sample stands in the run, see `Batch.step`."""
        first = self.times.sample(random, "time")
        roles = self._roles(random, step)
        s, t = self._jumps(random, roles)
        if self.widen_steps:
            length = (s - t) * ((step.floor() + 1) / self.widen_steps).clamp(max=1).to(s.dtype)
            ends_at_data = roles["to data"] & ~roles["from noise"]
            s, t = torch.where(ends_at_data, t + length, s), torch.where(ends_at_data, t, s - length)
        s, t = torch.where(roles["inverse"], t, s), torch.where(roles["inverse"], s, t)
        s = torch.where(roles["diagonal"], first, s)
        t = torch.where(roles["diagonal"], s, t)
        low, high = self.limits
        return low + (high - low) * s, low + (high - low) * t

    def _jumps(self, random: Random, roles: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return sources and targets (B,), t <= s, of samples that are all taken for jumps."""
        source, target = self.source or self.times, self.target or self.times
        if self.gap is not None:
            gap = self.gap.sample(random, "gap")
            below = target.share_below(1 - gap.double())
            t = target.quantile(random.uniform("target time").double() * below).to(gap.dtype)
            t = torch.where(roles["from noise"], 1 - gap, t)
            t = torch.where(roles["to data"], 0.0, t)
            return torch.where(roles["from noise"], 1.0, (t + gap).clamp(max=1)), t
        s, t = source.sample(random, "time"), target.sample(random, "target time")
        if self.order == "sorted":
            s, t = torch.maximum(s, t), torch.minimum(s, t)
        s = torch.where(roles["from noise"], 1.0, s)
        t = torch.where(roles["to data"], 0.0, t)
        return s, torch.minimum(s, t)

    def _roles(self, random: Random, step: Tensor) -> dict[str, Tensor]:
        """Return which samples (B,) have each role; for those on the diagonal the others mean nothing.

        Fixed: the samples of a batch lie evenly on a circle, which turns by the golden ratio from batch to
        batch. Each role is an arc of it, cut in turn into arcs for the next role; a process has every n-th
        sample, evenly on the circle as well.
        """
        shares = {"diagonal": self.diagonal, "from noise": self.from_noise}
        shares |= {"to data": self.to_data, "inverse": self.inverse}
        if self.roles == "drawn":
            return {name: random.uniform(name) < share for name, share in shares.items()}
        place = (step + _GOLDEN * (step.floor() + 1)) % 1
        roles = {}
        for name, share in shares.items():
            chosen = roles[name] = place < share
            place = torch.where(chosen, place / max(share, 1e-9), (place - share) / max(1 - share, 1e-9))
        return roles


_USUAL = {field.name: field.default for field in fields(Pairs)} | {"times": Uniform()}
_OF_JUMPS = tuple(name for name in _USUAL if name not in ("times", "diagonal", "limits"))

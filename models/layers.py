"""What networks are made of: stages, which are sharded and differentiated one by one, times, attention.

A published model takes this file along, so it imports torch only.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn

GAP_WAVES = 64  # of a U-Net
GAP_RADIANS = 100  # of the fastest wave of a gap of 1, where it goes in as a class
Attention = Literal["sdpa", "math", "xformers", "jvp_flash"]


class Stage(nn.Module):
    """A part of a network whose hooks see plain tensors, also under forward-mode differentiation.

    A strategy shards a network by hooks around calls (FSDP2, ZeRO-3), and these have no forward-mode rule.
    So where an input is a dual tensor, the directions travel beside the values through the hooks, and the
    derivative is taken inside. Subclasses define `compute`, with `num_inputs` tensors (or None); it may call
    other stages.
    """

    num_inputs: int
    # What a strategy wants around the call of an innermost stage with directions.
    around_derivative: Callable[[nn.Module], AbstractContextManager[Any]]

    def __init__(self) -> None:
        super().__init__()
        self.around_derivative = nullcontext

    def compute(self, *inputs: Any) -> Any:
        """Return a tensor or a tuple of tensors."""
        raise NotImplementedError

    def __call__(self, *inputs: Tensor | None) -> Any:
        """Return `compute(*inputs)`."""
        parts = [(x, None) if x is None else _parts(x) for x in inputs]
        values, directions = [value for value, _ in parts], [direction for _, direction in parts]
        if all(direction is None for direction in directions):
            return super().__call__(*inputs)
        with self.around_derivative(self):
            outputs: Any = super().__call__(*values, *directions)
        first, *more = [_dual(value, direction) for value, direction in outputs]
        return (first, *more) if more else first

    def forward(self, *inputs: Tensor | None) -> Any:
        """Return `compute` of the inputs; of inputs and then their directions, pairs (value, direction)."""
        if len(inputs) == self.num_inputs:
            return self.compute(*inputs)
        values, directions = inputs[: self.num_inputs], inputs[self.num_inputs :]
        with _differentiating():
            duals = [_dual(value, direction) for value, direction in zip(values, directions, strict=True)]
            outputs = self.compute(*duals)
            several = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(_parts(output) for output in several)


class Conditioned(Stage):
    """A whole network of states and two times, with a class or a caption that may be missing.

    With `guidance_input` it takes the scale of guidance, too, and a missing one is 1.
    """

    sample_shape: tuple[int, ...]
    text_width: int  # of captions; 0 where it takes none
    max_tokens: int
    guidance_input: bool

    def __call__(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        condition: Tensor | tuple[Tensor, Tensor] | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Return the mean velocity between the times s and t at the state x, guided by `scale` (B,)."""
        if tuple(x.shape[1:]) != self.sample_shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected {(len(x), *self.sample_shape)}")
        given = parts_of(condition, x, text_width=self.text_width, max_tokens=self.max_tokens)
        if self.guidance_input:
            given = (*given, torch.ones_like(s) if scale is None else scale)
        elif scale is not None:
            raise ValueError("this network takes no scale of guidance (guidance_input is false)")
        return super().__call__(x, s, t, *given)


def innermost_stages(module: nn.Module) -> list[Stage]:
    """Return the stages of a network that hold no other stage."""
    stages = [inner for inner in module.modules() if isinstance(inner, Stage)]
    return [stage for stage in stages if not any(isinstance(m, Stage) for m in list(stage.modules())[1:])]


def _differentiating() -> AbstractContextManager[Any]:
    """Return the context of forward mode: the one we are in, or a new one where a backward recomputes."""
    return nullcontext() if fwad._current_level >= 0 else fwad.dual_level()


def _parts(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the value and the direction of a dual tensor; of a plain one, no direction."""
    if fwad._current_level < 0:
        return x, None
    value, direction = fwad.unpack_dual(x)
    return value, direction


def _dual(value: Any, direction: Tensor | None) -> Any:
    return value if direction is None else fwad.make_dual(value, direction)


def waves(time: Tensor, number: int, *, vanishing: bool = False) -> Tensor:
    """Return sines and cosines (B, 2 number) of times (B,) at 1 to 100 radians a unit, in fp32 or better.

    `vanishing` has 1 - cos in place of cos: those of 0 are exactly 0.
    """
    precise = time.to(torch.promote_types(time.dtype, torch.float32))
    exponents = torch.linspace(0.0, 2.0, number, dtype=precise.dtype, device=time.device)
    angles = precise[:, None] * 10.0**exponents
    return torch.cat([angles.sin(), 1 - angles.cos() if vanishing else angles.cos()], dim=1)


def timestep_waves(
    timestep: Tensor, width: int, *, cosines_first: bool = True, frequency_shift: float = 0
) -> Tensor:
    """Return diffusers' cosines and sines (B, width) of timesteps (B,), in fp32 or better.

    Its own are in fp32 always. Source: Vaswani et al., "Attention is all you need", 2017, section 3.5.
    """
    precise = timestep.to(torch.promote_types(timestep.dtype, torch.float32))
    numbers = torch.arange(width // 2, dtype=precise.dtype, device=timestep.device)
    angles = precise[:, None] * torch.exp(-math.log(10_000) * (numbers / (width // 2 - frequency_shift)))
    return torch.cat([angles.cos(), angles.sin()] if cosines_first else [angles.sin(), angles.cos()], dim=1)


def scale_waves(scale: Tensor, number: int) -> Tensor:
    """Return waves (B, 2 number) of 1 - 1 / scale for scales of guidance (B,) from 1 on; those of 1 are 0."""
    return waves(1 - 1 / scale, number, vanishing=True)


def beside_timestep(gap: Tensor, scale: Tensor | None) -> Tensor:
    """Return what a U-Net is told as `timestep_cond` (B, width): waves of gaps, and of scales of guidance."""
    told = waves(gap, GAP_WAVES, vanishing=True)
    return told if scale is None else torch.cat([told, scale_waves(scale, GAP_WAVES)], dim=1)


def normalised(tokens: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Return layer-normalised tokens (B, L, width)."""
    # One group a token is layer norm. F.layer_norm itself has a wrong gradient of its forward-mode derivative
    # (torch 2.13; see pytorch issue 196700), which is what the Lagrangian residual trains on.
    return F.group_norm(tokens.flatten(0, 1), 1, eps=eps).view_as(tokens)


def parts_of(
    condition: Tensor | tuple[Tensor, Tensor] | None, x: Tensor, *, text_width: int, max_tokens: int
) -> tuple[Any, ...]:
    """Return what a network of states x is conditioned on: (labels,), or the tokens and the mask of captions.

    A missing caption has no tokens. Raises ValueError where a condition is of another kind or size.
    """
    if not text_width:
        if isinstance(condition, tuple):
            raise ValueError("this network takes no captions (text_width is 0); give class labels")
        return (condition,)
    if isinstance(condition, Tensor):
        raise ValueError(f"this network takes captions of text_width {text_width}, not class labels")
    if condition is None:
        nothing = torch.zeros(len(x), 0, text_width, dtype=x.dtype, device=x.device)
        return nothing, nothing[..., 0].bool()
    tokens, mask = condition
    length, width = tokens.shape[1:]
    if width != text_width or length > max_tokens:
        raise ValueError(
            f"captions have {length} tokens of width {width}, expected at most {max_tokens} of "
            f"width {text_width}"
        )
    return tokens.to(x.dtype), mask


def beside_zeros(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return captions (B, L, width) and masks (B, L) with a token of zeros in front, which is always seen."""
    return F.pad(tokens, (0, 0, 1, 0)), F.pad(mask, (1, 0), value=True)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, how: Attention, mask: Tensor | None = None
) -> Tensor:
    """Return the attention of queries over keys and values, all (B, heads, L, width).

    `sdpa` lets torch choose; a dual tensor takes the plain form (`math`), as torch's fused ones have no
    forward-mode rule. `xformers` and `jvp_flash` are optional extras for GPUs. A `mask` (B, L) is False at
    keys that are not there, which each row has some of; those few keys are left to torch's forms.
    """
    if how == "xformers" and mask is None:
        return _xformers(query, key, value)
    if how == "jvp_flash" and mask is None:
        return _jvp_flash(query, key, value)
    seen = None if mask is None else mask[:, None, None]
    if how == "math" or _parts(query)[1] is not None:
        # Written out: torch's own softmax overwrites what the gradient of its derivative needs (2.13).
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # Diffusers reads a published file for `import` and warns of every package that is not there.
    memory_efficient_attention = import_module("xformers.ops").memory_efficient_attention

    swapped = (x.transpose(1, 2) for x in (query, key, value))  # it wants (B, L, heads, width)
    return memory_efficient_attention(*swapped).transpose(1, 2)


def _jvp_flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    JVPAttn = import_module("jvp_flash_attention.jvp_attention").JVPAttn

    return JVPAttn.fwd_dual(query, key, value)


class SelfAttention(nn.Module):
    """Self-attention over tokens (B, L, width); `qk_norm` normalises queries and keys a head."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.how: Attention = "sdpa"
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        head = width // num_heads
        self.query_norm = nn.RMSNorm(head, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the attended tokens (B, L, width)."""
        query, key, value = _heads(self.qkv(tokens), 3, self.num_heads)
        mixed = attend(self.query_norm(query), self.key_norm(key), value, how=self.how)
        return self.projection(mixed.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of tokens (B, L, width) over others (B, M, width), those that their mask (B, M) shows."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.how: Attention = "sdpa"
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, width)
        head = width // num_heads
        self.query_norm = nn.RMSNorm(head, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, tokens: Tensor, others: Tensor, mask: Tensor) -> Tensor:
        """Return what the tokens take from the others (B, L, width)."""
        (query,) = _heads(self.query(tokens), 1, self.num_heads)
        key, value = _heads(self.key_value(others), 2, self.num_heads)
        mixed = attend(self.query_norm(query), self.key_norm(key), value, how=self.how, mask=mask)
        return self.projection(mixed.transpose(1, 2).flatten(2))


def _heads(features: Tensor, number: int, num_heads: int) -> tuple[Tensor, ...]:
    """Return the `number` parts (B, heads, L, width / heads) of features (B, L, number * width)."""
    batch, length, width = features.shape
    parts = features.reshape(batch, length, number, num_heads, width // number // num_heads)
    return parts.permute(2, 0, 3, 1, 4).unbind(0)

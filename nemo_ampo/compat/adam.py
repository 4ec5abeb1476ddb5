"""AdamW whose state has the layout of Apex's FusedAdam, which Megatron's distributed optimizer saves and restores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdamLayout(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) with ``exp_avg`` and ``exp_avg_sq`` per parameter and ``step`` per group.

    Same update as ``torch.optim.AdamW``; only where the step counter lives differs. ``adam_w_mode=False`` adds the decay
    to the gradient instead (plain Adam with L2).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **unused: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)
        return loss

    def allocate(self, p: torch.Tensor) -> None:
        """The moments of a parameter that has none yet."""
        if "exp_avg" not in self.state[p]:
            self.state[p]["exp_avg"] = torch.zeros_like(p)
            self.state[p]["exp_avg_sq"] = torch.zeros_like(p)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for p in params:
            self.allocate(p)
        grads = [p.grad.to(p.dtype) for p in params]  # type: ignore[union-attr]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        beta1, beta2 = group["betas"]
        correction1, correction2 = (1 - beta ** group["step"] for beta in (beta1, beta2))
        if not group["bias_correction"]:
            correction1 = correction2 = 1.0
        if group["weight_decay"] and self.adam_w_mode:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"]:
            torch._foreach_add_(grads, params, alpha=group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, correction2**0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, first, denominator, -group["lr"] / correction1)

"""What happens to positions that are still masked after the last step.

    argmax    one more call for the sequences concerned; each remaining mask becomes its most likely token (MDLM)
    sample    the same, drawn from p (with temperature, nucleus and draw policy of the run)
    none      nothing: the sampler's own last step must have drawn everything; a mask that is left is an error

The published samplers differ here (MDLM greedy, SEDD sampled), so the choice is explicit and recorded. In no case
does a mask id leave the sampler.
"""

from __future__ import annotations

from typing import Literal

import torch

from tsdfm_bench.errors import PluginError, unknown_name
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.kernel import Posterior, pieces
from tsdfm_bench.methods.core.state import State
from tsdfm_bench.methods.core.visits import Visit, places_visit

Rule = Literal["argmax", "sample", "none"]
FINALISERS: tuple[Rule, ...] = ("argmax", "sample", "none")


class Finaliser:
    """Removes the masks that are left.

    Args:
        rule: "argmax", "sample" or "none".
    """

    def __init__(self, rule: Rule) -> None:
        if rule not in FINALISERS:
            raise unknown_name("finaliser", rule, FINALISERS)
        self.rule = rule

    @property
    def recorded_steps(self) -> int:
        """States it adds to a trace."""
        return 0 if self.rule == "none" else 1

    def finish(self, state: State, grid: Grid, posterior: Posterior) -> Visit | None:
        """Act on the state in place; returns the visit made, or None if no mask was left.

        Args:
            state: after the last step.
            grid: its last end time is what the network is told; the draws are addressed by step len(grid).
            posterior: with `mask_id` set.
        """
        left = (state.tokens == posterior.mask_id) & state.free
        end = float(grid.end[-1])
        visit = places_visit(left, len(grid), end, end)
        if visit is None:
            return None
        posterior.policy.check()  # logits that are not finite leave masks too, and that is the better message
        if self.rule == "none":
            raise PluginError(
                f"{visit.at_rows.numel()} positions were still masked after the last step and the finaliser is 'none':"
                " use finaliser=argmax or finaliser=sample, or a grid that ends at t = 1"
            )
        logits = posterior.logits(state, visit)
        if self.rule == "argmax":
            tokens = torch.empty_like(visit.at_rows)
            for s in pieces(*logits.shape, device=logits.device):
                most, tokens[s] = posterior.weights(logits[s], True).max(dim=-1)
                posterior.policy.watch(most)
        else:
            tokens = posterior.draw(logits, visit.uniform("final", state.streams), True)
        state.write(visit.state_rows, visit.at_positions, tokens)
        return visit

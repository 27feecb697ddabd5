"""The control "compass at inference": the energy compass chooses the steps of an unshaped student while it samples.

If TS-DFM's compass helps, is it through better targets, or would choosing at inference do the same? In every step but
the last whose end t + h is at least tau, K states are drawn independently from the step's law P (see `methods.fsdfm`)
and the one of lowest energy is kept:

    P_K(y | x) = P(y | x) ((G(y) + P_e(y))^K - G(y)^K) / P_e(y)

with P_e(y) the probability that a draw has y's energy and G(y) that it has a higher one. K = 1 is FS-DFM in law. The
network is called once a step whatever K is, the compass once a step on all K states; both are counted.

Reference: arXiv 2605.07924 (the compass); this use of it is a control of this project.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tsdfm_bench.api import Identity
from tsdfm_bench.errors import CheckpointError
from tsdfm_bench.methods.checkpoints import Checkpoint
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.kernel import Posterior, pieces
from tsdfm_bench.methods.core.state import State
from tsdfm_bench.methods.core.visits import Visit, every_step
from tsdfm_bench.methods.fsdfm import CumulativeKernel
from tsdfm_bench.methods.nets.compass import Compass
from tsdfm_bench.methods.nets.folder import CONFIG_FILE, WEIGHTS_FILE
from tsdfm_bench.methods.nets.pretrained import read_config

Energy = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows, length) states, (rows,) times, (rows, length) origins -> (rows, length) token energies."""


class RerankedKernel(CumulativeKernel):
    """The best of K cumulative steps by energy.

    Args:
        posterior, unmask_change: as in `CumulativeKernel`.
        energy: the compass.
        candidates: K.
        tau: steps that end before this time are not chosen.
    """

    def __init__(self, posterior: Posterior, unmask_change: str, energy: Energy, candidates: int, tau: float) -> None:
        super().__init__(posterior, unmask_change)
        self.energy, self.candidates, self.tau = energy, candidates, tau

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        """Every step: an energy belongs to a whole state."""
        for visit in every_step(state, grid):
            if self.once or (visit.any_last and self.close_masked_only):
                mask = cast(int, self.posterior.mask_id)  # both flags are set only with a mask
                visit = visit.keep(state.tokens[visit.state_rows, visit.at_positions] == mask)
            if visit.at_rows.numel():
                yield visit

    def step(self, state: State, visit: Visit) -> None:
        """Draw K states and keep one; the last step is the plain one."""
        if visit.any_last:
            super().step(state, visit)
            return
        chosen = visit.t_next >= self.tau
        count = self.candidates if bool(chosen.any()) else 1
        before = state.tokens[visit.rows]
        pool = before.expand(count, *before.shape).clone()
        pool[:, visit.at_rows, visit.at_positions] = self._proposals(state, visit, count)
        if count > 1:
            pool[0] = torch.where(chosen[:, None], self._best(pool, visit, before), pool[0])
        state.tokens[visit.rows] = pool[0]

    def _best(self, pool: Tensor, visit: Visit, before: Tensor) -> Tensor:
        """Of (K, rows, length) states the one of lowest energy in each row, (rows, length)."""
        count, rows = pool.shape[:2]
        time = visit.t_next.float().repeat(count)
        energy = self.energy(pool.flatten(0, 1), time, before.repeat(count, 1)).mean(dim=1).view(count, rows)
        self.posterior.policy.watch(energy)
        return pool[energy.argmin(dim=0), torch.arange(rows, device=pool.device)]

    def _proposals(self, state: State, visit: Visit, count: int) -> Tensor:
        """Tokens of K independent steps at the places of a visit, (K, n)."""
        current = state.tokens[visit.state_rows, visit.at_positions]
        logits = self.posterior.logits(state, visit)
        log_ratio = self.posterior.schedule.log_survival(visit.t, visit.t_next)[visit.at_rows]
        drawn = [[visit.uniform(f"{s}/{k}", state.streams) for s in ("leave", "token")] for k in range(count)]
        proposals = current.expand(count, -1).clone()
        for s in pieces(*logits.shape, device=logits.device):
            z = current[s, None]
            weights = self.posterior.weights(logits[s], self.once)
            stay = weights.gather(1, z)
            weights.scatter_(1, z, 0.0)
            others = weights.sum(dim=1)
            leave = -torch.expm1(log_ratio[s] * (others / (others + stay[:, 0])))
            for k, (u_leave, u_token) in enumerate(drawn):
                token = self.posterior.policy.categorical(weights, u_token[s])
                proposals[k, s] = torch.where(u_leave[s] < leave, token, current[s])
        return proposals


def compass_beside(weights: Path, source: str | None) -> Path:
    """Folder of the compass of a student's weights: `compass-SOURCE` in the same folder.

    Raises:
        CheckpointError: there is none.
    """
    folder = weights.parent / f"compass-{source}"
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"rerank=compass needs the compass {folder}, which does not exist; train it: tsdfm-bench train SCALE "
            f"--only {folder.name}, or choose weights that have one beside them"
        )
    return folder


def load_compass(student: Checkpoint, outputs: int, device: str) -> Compass:
    """The compass beside a student's weights.

    Args:
        student: its checkpoint.
        outputs: its embedding rows.
        device: where the compass is put.

    Raises:
        CheckpointError: there is none, or it is one of another vocabulary, length or teacher.
    """
    path = compass_beside(student.folder, student.source)
    compass = Compass.from_pretrained(path, device)
    about = read_config(student.folder) if student.public is None else {}
    teacher, taught = read_config(path).get("teacher_hash"), about.get("needed", {})
    length = about.get("network", {}).get("length", compass.config.length)
    for what, theirs, ours in (("outputs", compass.config.outputs, outputs), ("length", compass.config.length, length)):
        if theirs != ours:
            raise CheckpointError(f"the compass {path} has {what} {theirs}, the student {student.folder} {ours}")
    if teacher and taught and teacher not in taught.values():
        raise CheckpointError(
            f"the compass {path} was made with another teacher than the student {student.folder}; train it again: "
            f"delete {path}"
        )
    return compass


def identity_with(student: Identity, compass: Path) -> Identity:
    """Identity of a student and its compass together."""
    digest = hashlib.sha256(student.weights.encode())
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            digest.update((compass / name).read_bytes())
        except OSError as error:
            raise CheckpointError(f"cannot read {compass / name}: {error.strerror or error}") from error
    return Identity(student.checkpoint, f"sha256:{digest.hexdigest()}")

"""One training loop for every network: accelerate, bf16 autocast where the hardware has it, EMA, warm-up and cosine,
clipping, validation, atomic checkpoints and exact resume.

The state of a training (weights, EMA, optimiser, step) is one safetensors file with its bookkeeping in the header,
written under a temporary name and renamed, so a kill at any moment leaves the previous state. Random numbers are
addressed by step (`data.Draws`), so nothing else needs to be saved: a resumed run is bit-identical to an
uninterrupted one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tsdfm_bench.errors import CheckpointError, UsageError
from tsdfm_bench.methods.nets.pretrained import replace_file
from tsdfm_bench.methods.train.data import Draws, TrainingText
from tsdfm_bench.methods.train.flops import FlopMeter, networks_in, peak_flops
from tsdfm_bench.methods.train.memory import T, that_fits
from tsdfm_bench.methods.train.objectives import Objective, validate
from tsdfm_bench.methods.train.optim import learning_rate, make_optimizers

STATE_FILE = "state.safetensors"
TIMED_STEPS, WARM_UP_STEPS = 200, 3
VALIDATED_AT_ONCE = 64
NO_INFLUENCE = ("validate_every", "save_every_s", "micro_batch", "compile")


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how a network is trained.

    Args:
        steps: optimiser steps.
        batch: windows per step (over all processes).
        lr, warmup, final_lr: peak learning rate, warm-up steps, last learning rate as a fraction of the peak.
        optimizer: "adamw" or "muon".
        embedding_lr: factor on the learning rate of the token embedding.
        betas, weight_decay, clip: AdamW betas, decoupled decay, gradient norm limit.
        ema: decay of the weight average, with warm-up min(ema, (1 + n) / (10 + n)).
        seed: of every random number of the training.
        micro_batch: most windows of one forward pass per process (gradients are accumulated); 0 = all.
        compile: compile the blocks on a GPU.
        validate_every, save_every_s: steps between validations, seconds between saved states.
    """

    steps: int
    batch: int
    lr: float
    warmup: int
    final_lr: float = 0.1
    optimizer: str = "adamw"
    embedding_lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    validate_every: int = 500
    save_every_s: float = 60.0
    micro_batch: int = 0
    compile: bool = True


@dataclass
class Progress:
    """What a progress display is told."""

    name: str
    step: int
    steps: int
    tokens_per_s: float
    shown: dict[str, float]


@dataclass
class TrainingResult:
    """The trained network and its record.

    Args:
        network: the average of the weights.
        steps, tokens_seen, seconds: of the training.
        bound, bound_error: last validation.
        history: every validation.
        flops: operations of all steps, by formula (see `flops`): this process's, times the number of processes.
        step_seconds: wall-clock seconds of the last steps of this process, its first ones left out.
    """

    network: nn.Module
    steps: int
    tokens_seen: int
    seconds: float
    bound: float
    bound_error: float
    history: list[dict[str, float]] = field(default_factory=list)
    flops: float = 0.0
    step_seconds: list[float] = field(default_factory=list)


def mixed_precision(device: torch.device) -> str:
    """ "bf16" where the hardware computes in it, else "no"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"
    return "no"


def check_hardware() -> None:
    """Say once what slows a training down or unbalances it: no bf16, or GPUs of several kinds in one machine."""
    if not torch.cuda.is_available():
        return
    kinds = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    if len(kinds) > 1:
        warnings.warn(
            f"this machine has GPUs of several kinds ({', '.join(kinds)}): every step waits for the slowest. Choose "
            "equal ones with CUDA_VISIBLE_DEVICES=...",
            stacklevel=2,
        )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        warnings.warn(f"{kinds[0]} does not compute in bf16: training runs in fp32, several times slower", stacklevel=2)


def digest_of(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """Hexadecimal sha256 of a text and of names and contents of tensors on the CPU."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; waits for the GPU."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def compile_blocks(*networks: nn.Module) -> None:
    """Compile the blocks of networks in place: their shapes are fixed, the head's are not; parameter names stay."""
    for network in networks:
        for block in getattr(network, "blocks", ()):
            block.compile()


class Trainer:
    """Trains one network.

    Args:
        name: recipe name; separates random streams and names the state's folder.
        network: trainable.
        make_objective: called with the EMA copy, which FS-DFM uses as its semi-teacher.
        text: training and validation tokens.
        config: see `TrainingConfig`.
        folder: where the state is kept; None keeps nothing.
        report: called now and then with a `Progress`.
        draws: what names the random numbers; default: the training's name.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        make_objective: Callable[[nn.Module], Objective],
        text: TrainingText,
        config: TrainingConfig,
        folder: Path | None = None,
        report: Callable[[Progress], None] | None = None,
        draws: str = "",
    ) -> None:
        from accelerate import Accelerator

        check_hardware()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.accelerator = Accelerator(mixed_precision=mixed_precision(device), cpu=device.type == "cpu")
        if config.batch % self.accelerator.num_processes:
            raise UsageError(
                f"training '{name}': a batch of {config.batch} windows does not divide over "
                f"{self.accelerator.num_processes} processes; choose a number of processes that divides it"
            )
        self.name, self.text, self.config, self.folder, self.report = name, text, config, folder, report
        self.draws = draws or name
        self.ema = copy.deepcopy(network).to(self.accelerator.device).eval().requires_grad_(False)
        self.objective = make_objective(self.ema)
        optimizers = make_optimizers(
            network, config.optimizer, config.lr, config.betas, config.weight_decay, config.embedding_lr
        )
        prepared = self.accelerator.prepare(network, *optimizers)
        self.network: nn.Module = prepared[0]
        self.meter = FlopMeter(self.plain, self.ema, *networks_in(self.objective))
        self.peak = peak_flops(device)
        if config.compile and device.type == "cuda":
            compile_blocks(self.plain, self.ema, *networks_in(self.objective))
        self.optimizers: list[torch.optim.Optimizer] = list(prepared[1:])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        share = config.batch // self.accelerator.num_processes
        self.pass_windows, self.validated = min(config.micro_batch or share, share), VALIDATED_AT_ONCE
        self.step = 0
        self.kept_step: int | None = None
        self.seconds = self.flops = 0.0
        self.step_seconds: deque[float] = deque(maxlen=TIMED_STEPS)
        self.history: list[dict[str, float]] = []

    @property
    def plain(self) -> nn.Module:
        """The network without accelerate's wrappers."""
        unwrapped: nn.Module = self.accelerator.unwrap_model(self.network)
        return unwrapped

    # ------------------------------------------------------------------------------------------------- state

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for index, optimizer in enumerate(self.optimizers):
            for number, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"optimizer.{index}.{number}.{key}"] = torch.as_tensor(value)
        return tensors

    def save(self) -> None:
        """Write the state; the previous one stays until the new one is on disk."""
        if self.folder is None:
            return
        self.kept_step = self.step
        if not self.accelerator.is_main_process:
            return
        from safetensors.torch import save_file

        tensors = {f"network.{k}": v for k, v in self.plain.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()} | self._optimizer_tensors()
        about = {
            "name": self.name,
            "step": self.step,
            "seconds": self.seconds,
            "flops": self.flops,
            "history": self.history,
            "recipe": self._recipe(),
        }
        ready = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        text = json.dumps(about)
        metadata = {"about": text, "digest": digest_of(ready, text)}
        replace_file(self.folder / STATE_FILE, lambda path: save_file(ready, str(path), metadata))

    def _recipe(self) -> str:
        relevant = {k: v for k, v in vars(self.config).items() if k not in NO_INFLUENCE}
        about = {"config": relevant, "data": self.text.data_hash, "length": self.text.length}
        if self.draws != self.name:
            about["draws"] = self.draws
        return json.dumps(about, sort_keys=True, default=list)

    def resume(self) -> bool:
        """Continue from the saved state if there is one; a damaged one is put aside, with a warning.

        Raises:
            CheckpointError: it belongs to another recipe or text.
        """
        if self.folder is None or not (self.folder / STATE_FILE).is_file():
            return False
        from safetensors import SafetensorError, safe_open

        path = self.folder / STATE_FILE
        try:
            with safe_open(str(path), framework="pt") as handle:
                metadata = handle.metadata()
                about = json.loads(metadata["about"])
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
            whole = "digest" in metadata  # older states have a sha256, of the tensors alone
            stated, text = (metadata["digest"], metadata["about"]) if whole else (metadata["sha256"], "")
            if stated != digest_of(tensors, text):
                raise ValueError("its content is not what was saved")
            if not all_finite(t for key, t in tensors.items() if key.startswith(("network.", "ema."))):
                raise ValueError("its weights are not finite")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            aside = path.with_name(f"damaged-{path.name}")
            path.replace(aside)
            warnings.warn(
                f"{path} is damaged ({error}); it was moved to {aside.name}, and '{self.name}' is trained from the "
                "start",
                stacklevel=2,
            )
            return False
        if about["recipe"] != self._recipe():
            raise CheckpointError(
                f"{path} belongs to another recipe or another text than '{self.name}' now has; "
                "choose another output folder or delete it to train from the start"
            )
        part = lambda prefix: {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.plain.load_state_dict(part("network."))
        self.ema.load_state_dict(part("ema."))
        for index, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in part(f"optimizer.{index}.").items():
                number, name = key.split(".", 1)
                state.setdefault(int(number), {})[name] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step, self.seconds, self.history = about["step"], about["seconds"], about["history"]
        self.kept_step = self.step
        self.flops = about.get("flops", math.nan)
        return True

    # ------------------------------------------------------------------------------------------------- loop

    def train(self, until: int | None = None) -> TrainingResult:
        """Train to the last step (or to `until`), saving and validating on the way.

        Raises:
            FloatingPointError: a loss, a gradient, a validation, the weights, a teacher's logits or an energy is not
                finite; the state before that step is on disk if its weights are finite, else the last one that was
                saved. Nothing that is not finite is saved or returned.
            MemoryError: one window does not fit into the GPU's memory, or under several processes a pass does not.
        """
        config = self.config
        last = min(config.steps, until or config.steps)
        self.network.train()
        saved = reported = begun = time.monotonic()
        before, counted, operations = self.seconds, self.step, self.meter.total
        before_flops, before_operations, first = self.flops, operations, self.step
        while self.step < last:
            number, started = self.step + 1, time.monotonic()
            try:
                (value, shown), self.pass_windows = self._that_fits(
                    number, partial(self._gradients, number), self.pass_windows, self.accelerator.num_processes == 1
                )
            except FloatingPointError as error:
                raise FloatingPointError(self._stopped(number, str(error), keep=True)) from error
            self._update(number)
            self.step = number
            now = time.monotonic()
            own = self.meter.total - before_operations
            self.flops = before_flops + own * self.accelerator.num_processes
            if number > first + WARM_UP_STEPS:
                self.step_seconds.append(now - started)
            self.seconds = before + now - begun
            if self.report and (now - reported > 5 or number == last):
                rate = (number - counted) * config.batch * self.text.length / max(1e-9, now - reported)
                shown |= self._speed((self.meter.total - operations) / max(1e-9, now - reported))
                self.report(Progress(self.name, number, config.steps, rate, {"loss": value, **shown}))
                reported, counted, operations = now, number, self.meter.total
            if number % config.validate_every == 0 and number < config.steps:
                self._validate()
            if now - saved > config.save_every_s:
                self._check_weights()
                self.save()
                saved = now
        self._check_weights()
        if self.step == config.steps and (not self.history or self.history[-1]["step"] < self.step):
            self._validate()
        self.save()
        final = self.history[-1] if self.history else {"bound": math.nan, "bound_error": math.nan}
        tokens = self.step * config.batch * self.text.length
        return TrainingResult(
            self.ema,
            self.step,
            tokens,
            self.seconds,
            final["bound"],
            final["bound_error"],
            self.history,
            self.flops,
            list(self.step_seconds),
        )

    def _weights_are_finite(self) -> bool:
        return all_finite((*self.plain.parameters(), *self.ema.parameters()))

    def _check_weights(self) -> None:
        """Before they are saved or returned; FloatingPointError if they are not finite."""
        if not self._weights_are_finite():
            raise FloatingPointError(self._stopped(self.step, "the weights are not finite any more"))

    def _stopped(self, number: int, why: str, keep: bool = False) -> str:
        """Why a training ends and what is kept of it; `keep`: the state of now, if its weights are finite."""
        if keep and self._weights_are_finite():
            self.save()
        kept = ""
        if self.folder is not None:
            kept = "; nothing was saved yet"
            if self.kept_step is not None:
                kept = f"; the state after step {self.kept_step} is kept in {self.folder}"
        return f"training '{self.name}' stopped at step {number} of {self.config.steps}: {why}{kept}"

    def _that_fits(self, number: int, run: Callable[[int], T], windows: int, alone: bool) -> tuple[T, int]:
        """`that_fits` in step `number`: its operations counted once, a change said, the state kept if it cannot be."""
        counted = self.meter.total

        def attempt(windows: int) -> T:
            self.meter.total = counted
            return run(windows)

        try:
            result, fits = that_fits(attempt, windows, alone)
        except MemoryError as error:
            raise MemoryError(self._stopped(number, str(error), keep=True)) from error
        if fits < windows:
            warnings.warn(
                f"training '{self.name}': {windows} windows a pass do not fit into the GPU's memory; it goes on with "
                f"{fits}, with the same random numbers",
                stacklevel=2,
            )
        return result, fits

    def _gradients(self, number: int, size: int) -> tuple[float, dict[str, float]]:
        """Clipped gradients of one step, in passes of at most `size` windows per process; the loss and what to show.

        Rows are numbered over the whole step, so their draws do not depend on the number of processes or passes. Loss
        and norm of the gradient are read together, after the last pass: the host waits for the GPU once a step.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        config = self.config
        share = config.batch // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        losses: list[Tensor] = []
        shown: dict[str, float] = {}
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for begin in range(0, share, size):
            rows = min(size, share - begin)
            device = self.accelerator.device
            draws = Draws(config.seed, self.draws, number, rows, device, first + begin, config.batch)
            last = begin + rows == share
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                with self.accelerator.autocast():
                    result = self.objective.loss(self.network, self.text.windows("train", draws), draws)
                loss, shown = result.loss if rows == share else result.loss * (rows / share), result.shown
                losses.append(loss.detach().float())
                self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), config.clip)
        value, length = torch.stack([torch.stack(losses).sum(), norm.float()]).tolist()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}{self._sick_windows(number)}")
        if not math.isfinite(length):
            raise FloatingPointError(f"the norm of the gradient is {length}, at a loss of {value:.4g}")
        return value, dict(shown)

    @torch.no_grad()
    def _sick_windows(self, number: int) -> str:
        """Of which windows of a step the loss is not finite, for a message: each of this process's share by itself."""
        config = self.config
        share = config.batch // self.accelerator.num_processes
        first, device = self.accelerator.process_index * share, self.accelerator.device
        draws = Draws(config.seed, self.draws, number, share, device, first, config.batch)
        windows = self.text.windows("train", draws)
        bad = torch.zeros(share, dtype=torch.bool, device=device)
        for row in torch.arange(share, device=device).split(1):
            with self.accelerator.autocast():
                bad[row] = ~torch.isfinite(self.objective.loss(self.plain, windows[row], draws.rows(row)).loss)
        return f" in {draws.describe(bad)}" if bad.any() else ""

    def _speed(self, flops_per_s: float) -> dict[str, float]:
        """Operations per second of this process and, where the peak is known, their share of it (MFU)."""
        if self.peak is None:
            return {"GFLOP/s": flops_per_s / 1e9}
        return {"TFLOP/s": flops_per_s / 1e12, "MFU %": 100 * flops_per_s / self.peak}

    def _update(self, number: int) -> None:
        config = self.config
        factor = learning_rate(number, config.steps, config.warmup, 1.0, config.final_lr)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        try:
            for optimizer in self.optimizers:
                optimizer.step()
        except torch.OutOfMemoryError as error:  # some weights may have moved: the state is not saved
            why = "the optimiser's state does not fit into the GPU's memory: choose a GPU with more of it"
            raise MemoryError(self._stopped(number, why)) from error
        decay = min(config.ema, (1 + number) / (10 + number))
        with torch.no_grad():
            for average, current in zip(self.ema.parameters(), self.plain.parameters(), strict=True):
                average.lerp_(current.detach(), 1 - decay)

    def _validate(self) -> None:
        counted = self.meter.total
        (bound, error), self.validated = self._that_fits(
            self.step,
            lambda windows: validate(self.objective, self.ema, self.text, batch=VALIDATED_AT_ONCE, at_once=windows),
            self.validated,
            alone=True,
        )
        self.meter.total = counted  # a validation is no part of the training's cost
        if not math.isfinite(bound) or not math.isfinite(error):
            raise FloatingPointError(self._stopped(self.step, f"the validation is {bound} ± {error}"))
        self.history.append({"step": float(self.step), "bound": bound, "bound_error": error, "seconds": self.seconds})
        if self.report:
            self.report(Progress(self.name, self.step, self.config.steps, 0.0, {"validation": bound, "±": error}))

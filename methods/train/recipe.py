"""Recipes: which networks a scale has, from what each starts, and how long it is trained; TOML files in `recipes/`.

A recipe is a list of stages in dependency order (teachers, compasses, students, baselines). Every setting of a
stage that is not given is taken from the recipe's `[training]` and `[network]` tables. Unknown keys are errors.

An ablation is written as variants: a stage `like` an earlier one has its settings but those it gives itself (the tables
`options`, `shaping` and `training` are merged key by key), and `seeds = [0, 1, 2]` makes a stage of each seed.
Such stages share all random numbers with the stage they are like, so that a difference is the setting's.
A recipe that `extends` another by name has its tables and, before its own, its stages.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from tsdfm_bench.errors import UsageError, unknown_name
from tsdfm_bench.methods.train.options import OPTIONS, SHAPING, TRAINING, Table, check_table, explain, shown
from tsdfm_bench.methods.train.trainer import TrainingConfig

RECIPES = Path(__file__).parent / "recipes"
ORACLE = "oracle"
"""In place of a compass stage: the task's exact law."""
NETWORK, SCORER = "network:", "scorer:"
"""Before what judges in place of a compass stage, see `scorer_compass`: an autoregressive stage, or a scorer."""

TABLES = ("options", "shaping", "training")
"""Tables of a stage that are merged with those of the stage it is like."""

OF_SEED = ("start_from", "match")
"""Stages named by a stage, of which it takes the one of its own seed."""

CONTROL_OF_RULE = {"random": "random_pick", "argmax": "argmax_pick", "shuffled": "shuffled_energy"}


FIELDS_OF_KINDS = {
    "teacher": ("compass", "fsdfm", "tsdfm"),
    "compass": ("tsdfm",),
    "shaping": ("tsdfm",),
    "despite_checks": ("tsdfm",),
    "builder": ("compass",),
    "blocks": ("compass",),
}
"""Fields of a stage that belong to some kinds only."""

Positive = Annotated[int, Field(ge=1)]


class NetworkSettings(Table):
    """Geometry shared by the networks of a recipe (`DiTConfig`, `CausalConfig`)."""

    width: Positive
    blocks: Positive
    heads: Positive
    condition: Positive = 128
    dropout: float = Field(default=0.0, ge=0, lt=1)
    time_scale: float = Field(default=1.0, gt=0)
    fuser_init: Literal["torch_default", "identity_preserving"] = "torch_default"


class Start(Table):
    """How a network that starts from nothing is initialised, beyond the architecture's own initialisation.

    Args:
        unigram_bias: output bias = log unigram frequencies, so the first loss is the unigram entropy.
        gate: value the adaLN gates start at (0 = published: every block starts as the identity).
        spectral: embeddings from the singular vectors of the neighbours' positive pointwise mutual information.
        spectral_head: scale of the same vectors, halves swapped, as the first output map (0 = published zero map). With
            it a position that attends to a neighbour predicts the bigram law at once.
    """

    unigram_bias: bool = False
    gate: float = 0.0
    spectral: bool = False
    spectral_head: float = 0.0


class Stage(Table):
    """One network to train.

    Args:
        name: folder it is written to.
        kind: what is trained.
        source: "mask" or "uniform"; empty for AR.
        start_from: name of an earlier stage whose weights it starts from.
        forget_time: t of `start_from` at which the network starts for every value of its own conditioning scalar, where
            that is not t (mdlm, sedd).
        teacher: name of the frozen DFM stage (compass, fsdfm, tsdfm).
        compass: name of the compass stage (tsdfm); or "oracle": the exact NLL of the state, if the task's law is known;
            or "network:NAME" (an autoregressive stage) or "scorer:SPEC": the NLL of what the teacher makes of the
            state, see `scorer_compass`.
        despite_checks: train a student with a compass that failed its checks.
        builder: name of a student stage whose jumps are a compass's negatives; default: the teacher's.
        blocks: of the compass, copied from the teacher.
        cost_of: name of a shaped stage: this one is trained for as many steps as cost the same operations.
        match: name of a shaped stage: this one is `start_from` at the temperature that gives it that one's entropy;
            nothing is trained.
        match_on: entropy of "samples" or of "predictions" on held-out text, see `matching`.
        variant: name of the ablation variant it is one seed of; set by `seeds`.
        draws: what names the random numbers of its training; default: its own name.
        options: of the objective (loss_name, parameterisation, rule, h_law, small_h_target, path_weight, ...).
        shaping: of tsdfm, see `ShapingConfig`.
        training: overrides of the recipe's `[training]` table.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    kind: Literal["ar", "mdlm", "sedd", "dfm", "compass", "fsdfm", "tsdfm"]
    source: Literal["mask", "uniform", ""] = ""
    start_from: str = ""
    forget_time: float | None = Field(default=None, ge=0, le=1)
    teacher: str = ""
    compass: str = ""
    builder: str = ""
    cost_of: str = ""
    match: str = ""
    match_on: Literal["samples", "predictions"] = "samples"
    variant: str = ""
    draws: str = ""
    despite_checks: bool = False
    blocks: int = 0
    options: dict[str, Any] = Field(default={})
    shaping: dict[str, Any] = Field(default={})
    training: dict[str, Any] = Field(default={})

    @property
    def needs(self) -> list[str]:
        """Stages that must be finished first."""
        judge = self.compass.removeprefix(NETWORK) if self.compass.startswith(NETWORK) else self.compass_stage
        named = (self.start_from, self.teacher, judge, self.builder, self.cost_of, self.match)
        return [name for name in named if name]

    @property
    def compass_stage(self) -> str:
        """Name of the trained compass that shapes it; "" without shaping or where something else judges."""
        return "" if self.compass == ORACLE or self.compass.startswith((NETWORK, SCORER)) else self.compass

    @property
    def control(self) -> str:
        """What it controls in an ablation, as in `variants.json`; "none" for the method itself."""
        if self.match:
            return "entropy_matched" if self.match_on == "samples" else "certainty_matched"
        if self.kind == "fsdfm":
            return "flop_matched" if self.cost_of else "unshaped"
        rule = str(self.shaping.get("rule", "argmin"))
        judged = "oracle" if self.compass == ORACLE else "none" if self.compass_stage else "scorer"
        return CONTROL_OF_RULE.get(rule, judged)


class Recipe(Table):
    """All networks of a scale.

    Args:
        scale: its name.
        task: the text, by name; `tsdfm-bench train --task` chooses another.
        vocab_size, length: of the task's tokens, so that the networks are known without the text; 0 = the task's.
        network, start, training: see the classes.
        stage: the networks, in order.
    """

    scale: str
    task: str
    vocab_size: int = Field(default=0, ge=0)
    length: int = Field(default=0, ge=0)
    network: NetworkSettings
    start: Start = Start()
    training: dict[str, Any]
    stage: list[Stage]

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, given: Any) -> Any:
        """Variants and seeds as stages of their own."""
        if not isinstance(given, dict) or not isinstance(given.get("stage"), list):
            return given
        return {**given, "stage": spell_out(given["stage"])}

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        network = self.network
        if network.width % (2 * network.heads):
            raise ValueError(f"network.width {network.width} must split into {network.heads} heads of even size")
        check_table("", "training", self.training, TRAINING, partial=True)
        seen: dict[str, Stage] = {}
        for stage in self.stage:
            for need in stage.needs:
                if need not in seen:
                    raise ValueError(f"stage '{stage.name}' needs '{need}', which is not an earlier stage")
            if stage.name in seen:
                raise ValueError(f"two stages are called '{stage.name}'")
            if stage.kind in ("compass", "fsdfm", "tsdfm"):
                teacher = seen.get(stage.teacher)
                if teacher is None or teacher.kind != "dfm":
                    raise ValueError(f"stage '{stage.name}' needs `teacher`, an earlier stage of kind dfm")
                if teacher.source != stage.source:
                    raise ValueError(
                        f"stage '{stage.name}' has source '{stage.source}' but its teacher has '{teacher.source}'"
                    )
            if stage.kind == "tsdfm":
                self._check_compass(stage, seen)
            self._check_controls(stage, seen)
            self._check_tables(stage)
            seen[stage.name] = stage
        return self

    def _check_tables(self, stage: Stage) -> None:
        """What the stage sets, and that it has a use."""
        where = f"stage '{stage.name}'"
        for field, kinds in FIELDS_OF_KINDS.items():
            if stage.kind not in kinds and getattr(stage, field):
                raise ValueError(
                    f"{where}: {field} is set, but only a stage of kind {' or '.join(kinds)} has it, not {stage.kind}"
                )
        sources = {"ar": ("",), "mdlm": ("mask",)}.get(stage.kind, ("mask", "uniform"))
        if stage.source not in sources:
            allowed = " or ".join(shown(source) for source in sources)
            raise ValueError(f"{where}: source must be {allowed} for kind {stage.kind}, not {shown(stage.source)}")
        if stage.kind == "compass" and not 1 <= stage.blocks <= self.network.blocks:
            raise ValueError(
                f"{where}: blocks must be a whole number from 1 to {self.network.blocks} (those of its teacher), not "
                f"{stage.blocks}"
            )
        check_table(where, "training", stage.training, TRAINING, partial=True)
        check_table(where, "training", {**self.training, **stage.training}, TRAINING)
        check_table(where, "shaping", stage.shaping, SHAPING)
        check_table(where, "options", stage.options, OPTIONS[stage.kind])
        options = OPTIONS[stage.kind].model_validate(stage.options).model_dump()
        if stage.kind == "compass" and options["largest"] > options["smallest"]:
            raise ValueError(
                f"{where}: options.smallest must be at least options.largest ({options['largest']}), both exponents of "
                f"h' = 2^-j, not {options['smallest']}"
            )
        if stage.kind == "sedd" and stage.source == "mask" and options["parameterisation"] != "score":
            raise ValueError(
                f'{where}: options.parameterisation must be "score" for source mask, not '
                f"{shown(options['parameterisation'])}"
            )

    def _check_compass(self, stage: Stage, seen: dict[str, Stage]) -> None:
        if stage.compass.startswith(NETWORK) and seen[stage.compass.removeprefix(NETWORK)].kind != "ar":
            raise ValueError(f"stage '{stage.name}': `compass = \"{stage.compass}\"` names no stage of kind ar")
        if stage.compass_stage == stage.compass:
            compass = seen.get(stage.compass)
            if compass is None or compass.kind != "compass" or compass.teacher != stage.teacher:
                raise ValueError(
                    f"stage '{stage.name}' needs `compass`: an earlier stage trained on the same teacher, \"oracle\", "
                    '"network:NAME" or "scorer:SPEC"'
                )

    def _check_controls(self, stage: Stage, seen: dict[str, Stage]) -> None:
        for key, name in (("cost_of", stage.cost_of), ("match", stage.match)):
            if name and (stage.kind != "fsdfm" or seen[name].kind != "tsdfm" or seen[name].source != stage.source):
                raise ValueError(
                    f"stage '{stage.name}': `{key}` makes a control of kind fsdfm for a tsdfm stage of the same source"
                )
        if stage.match and (not stage.start_from or seen[stage.start_from].kind != "fsdfm"):
            raise ValueError(f"stage '{stage.name}': `match` needs `start_from`, an earlier stage of kind fsdfm")

    def training_of(self, stage: Stage) -> TrainingConfig:
        """The training settings of a stage: its own over the recipe's."""
        merged = {**self.training, **stage.training}
        if "betas" in merged:
            merged["betas"] = tuple(merged["betas"])
        return TrainingConfig(**merged)

    def select(self, only: list[str] | None) -> list[Stage]:
        """The stages asked for (all by default), in order."""
        if not only:
            return list(self.stage)
        names = [stage.name for stage in self.stage]
        for name in only:
            if name not in names:
                raise unknown_name("stage", name, names, f"They are the networks of recipe '{self.scale}'.")
        return [stage for stage in self.stage if stage.name in only]


def spell_out(stages: list[Any]) -> list[Any]:
    """The tables of a recipe file with `like` and `seeds` carried out.

    A seed's stage starts from, and is matched to, the stages of its own seed where there are any.

    Raises:
        ValueError: a stage is like none that stands before it, or a seed is no whole number.
    """
    known: dict[str, dict[str, Any]] = {}
    found: list[Any] = []
    made: set[str] = set()
    for given in stages:
        if not isinstance(given, dict):
            return stages  # what is wrong is said by the model
        table = dict(given)
        for key in TABLES:
            if not isinstance(table.get(key, {}), dict):
                raise ValueError(f"stage '{table.get('name')}': {key} must be a table, not {shown(table[key])}")
        like, seeds = table.pop("like", None), table.pop("seeds", [None])
        if like is not None:
            if not isinstance(like, str) or like not in known:
                raise ValueError(f"stage '{table.get('name')}' is like '{like}', which is not an earlier stage")
            base = known[like]
            merged = {key: {**base.get(key, {}), **table.get(key, {})} for key in TABLES}
            table = {"draws": like, **base, **table, **merged}
        name = str(table.get("name"))
        known[name] = table
        if not isinstance(seeds, list) or not all(seed is None or type(seed) is int for seed in seeds):
            raise ValueError(f"stage '{name}': seeds is a list of whole numbers, not {seeds}")
        for place, seed in enumerate(seeds):
            if seed is None:
                found.append(table)
                made.add(name)
                continue
            training = {**table.get("training", {}), "seed": seed}
            suffix = f"-s{seed}" if place else ""
            named = {key: own for key in OF_SEED if key in table and (own := f"{table[key]}{suffix}") in made}
            one = {"draws": name, **table, **named, "name": name + suffix, "variant": name, "training": training}
            found.append(one)
            made.add(name + suffix)
    return found


def load_recipe(name: str) -> Recipe:
    """A recipe by scale name, or from a TOML file.

    Raises:
        UsageError: it is wrong; one line that names the file, the stage, the key, what was given and what is allowed.
    """
    path, tables = _tables(name)
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        keys = {
            "": [*Recipe.model_fields, "extends"],
            "network": list(NetworkSettings.model_fields),
            "start": list(Start.model_fields),
            "stage": [*Stage.model_fields, "like", "seeds"],
        }
        raise UsageError(f"{path}: {explain(error, keys, _names(tables))}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _names(tables: dict[str, Any]) -> list[str]:
    """Names of a recipe's stages, in the order in which they are checked; their numbers where they have none."""
    try:
        stages = spell_out(tables.get("stage", []))
    except ValueError:
        return []
    return [
        f"'{stage['name']}'" if isinstance(stage, dict) and "name" in stage else str(place)
        for place, stage in enumerate(stages, start=1)
    ]


def _tables(name: str, extended: tuple[Path, ...] = ()) -> tuple[Path, dict[str, Any]]:
    """A recipe file and its tables; the stages of the recipe that it `extends` stand before its own."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        raise unknown_name(
            "scale", name, [p.stem for p in RECIPES.glob("*.toml")], "Or give a recipe file: my_recipe.toml."
        )
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    if not isinstance(tables.get("stage", []), list):
        raise UsageError(f"{path}: stage must be a list of tables ([[stage]]), not {shown(tables['stage'])}")
    base = tables.pop("extends", None)
    if base is None:
        return path, tables
    if not isinstance(base, str) or path in extended:
        raise UsageError(f"{path}: `extends` is the name of another recipe, not {base!r}")
    above = _tables(base, (*extended, path))[1]
    return path, {**above, **tables, "stage": [*above.get("stage", []), *tables.get("stage", [])]}

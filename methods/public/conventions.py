"""What a published checkpoint is of: method, source, schedule, conditioning and vocabulary.

    family   method        source           rows Vn         conditioned on        tokenizer
    mdlm     mdlm          mask             V + 1, last      nothing (0), or sigma  GPT-2
    sdtt     mdlm          mask             V + 1, last      nothing (0)            GPT-2; MDLM's sampler, other weights
    sedd     sedd          mask | uniform   V + 1 | V        sigma                  GPT-2
    duo      duo           uniform          V                sigma                  GPT-2 and an added token: V = 50,258
    ar       ar            none             V + 1, unused    -                      GPT-2, end-of-text first
    dfm      dfm           uniform | mask   V | V + 1        t                      GPT-2
    fsdfm    fsdfm, tsdfm  uniform | mask   V | V + 1        t and h                GPT-2

The family comes from the hub name, else from the configuration file beside the weights, else from the names of the
tensors and the method that is asked for. A checkpoint of another family than the method's is refused.

DFM's published weights were trained with the generalised KL at times up to 1 - 1e-3 and are sampled no further; a
student of FS-DFM is sampled up to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsdfm_bench.errors import CheckpointError
from tsdfm_bench.methods.public.files import CONFIG_FILE
from tsdfm_bench.methods.public.names import Geometry

METHODS: Mapping[str, tuple[str, ...]] = {
    "mdlm": ("mdlm",),
    "sdtt": ("mdlm",),
    "sedd": ("sedd",),
    "duo": ("duo",),
    "ar": ("ar",),
    "dfm": ("dfm",),
    "fsdfm": ("fsdfm", "tsdfm"),
}
KNOWN = {
    "kuleshov-group/mdlm-owt": "mdlm",
    "louaaron/sedd-small": "sedd",
    "louaaron/sedd-medium": "sedd",
    "s-sahoo/duo": "duo",
    "s-sahoo/duo-distilled": "duo",
    "jdeschena/sdtt": "sdtt",
}
GENERALISED_KL_EPS = 1e-3
_SIZES = {
    "vocab_size": "rows",
    "hidden_dim": "width",
    "hidden_size": "width",
    "model.hidden_size": "width",
    "n_blocks": "blocks",
    "model.n_blocks": "blocks",
}
# Families whose method is no part of this package, and where it is.
_PLUGINS = {"duo": ", a plug-in: pip install tests/plugins/duo in a checkout of tsdfm-bench"}
_WORDS = {"subs": "mdlm", "mdlm": "mdlm", "sedd": "sedd", "duo": "duo", "ar": "ar", "sdtt": "sdtt", "duo_base": "duo"}


def lookup(config: Mapping[str, Any], *keys: str) -> Any:
    """The first of some keys that a configuration has, dots leading into tables; None if it has none."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def heads_of(config: Mapping[str, Any]) -> int | None:
    """Number of attention heads a configuration states, or None."""
    heads = lookup(config, "n_heads", "model.n_heads", "num_attention_heads")
    return heads if isinstance(heads, int) and heads > 0 else None


def check_sizes(name: str, published: Mapping[str, Any], g: Geometry) -> None:
    """Raise CheckpointError if the configuration states other sizes than the tensors have."""
    stated = {key: (lookup(published, key), getattr(g, size)) for key, size in _SIZES.items()}
    graph = lookup(published, "graph.type")
    if graph is not None:  # SEDD's; its tokens are those without the mask
        stated["tokens"] = lookup(published, "tokens"), g.rows - (graph == "absorb")
    for key, (told, found) in stated.items():
        if isinstance(told, int) and told != found:
            raise CheckpointError(
                f"{name}: its {CONFIG_FILE} says {key} {told:,}, its tensors say {found:,}; they are not of one model, "
                "or the weights are incomplete: fetch both again"
            )


def family_of(name: str, published: Mapping[str, Any], layout: str, step_aware: bool, method: str) -> str:
    """The family of a checkpoint, one of those that a method samples; see the module.

    Args:
        name: as typed, "hf:OWNER/NAME..." or a path.
        published: its configuration file, or {}.
        layout, step_aware: from the names of its tensors (`names.layout_of`).
        method: what is asked for.

    Raises:
        CheckpointError: nothing says, or a family that cannot be sampled here, or not by this method.
    """
    family = _family(name, published, layout, step_aware, method)
    if method not in METHODS[family]:
        where = _PLUGINS.get(family, "")
        raise CheckpointError(
            f"{name} holds weights of {family}, asked for as {method}; choose --methods {METHODS[family][0]}{where}"
        )
    return family


def _family(name: str, published: Mapping[str, Any], layout: str, step_aware: bool, method: str) -> str:
    if layout == "flow":
        return "fsdfm" if step_aware else "dfm"
    if layout == "causal":
        return "ar"
    if str(lookup(published, "parameterization")).lower() == "d3pm":
        raise CheckpointError(f"{name} predicts tokens as D3PM does, and no method here samples that")
    for repository, family in KNOWN.items():
        if name.removeprefix("hf:").startswith(repository):
            return family
    if lookup(published, "graph.type") is not None:
        return "sedd"
    word = str(lookup(published, "model_type", "algo.name", "parameterization") or "").lower()
    if word in _WORDS:
        return _WORDS[word]
    if word in ("bd3lm", "blockdiff"):
        raise CheckpointError(f"{name} is a block diffusion model (BD3-LM), and no method here samples block by block")
    for family in ("mdlm", "sedd", "duo"):
        if method in METHODS[family]:
            return family
    raise CheckpointError(
        f"{name} is a time-modulated transformer as MDLM, SEDD and DUO publish, and nothing beside it says which; it "
        f"cannot be weights of '{method}'. Choose --methods mdlm, sedd or duo{_PLUGINS['duo']}"
    )


def describe(
    name: str,
    published: Mapping[str, Any],
    g: Geometry,
    method: str,
    source: str | None,
    choice: str,
) -> dict[str, Any]:
    """The configuration that our own checkpoints keep in `config.json`, for a published one.

    Args:
        name, published, method: as for `family_of`.
        g: from its tensors.
        source: asked for, or None.
        choice: which network of the file was taken.

    Raises:
        CheckpointError: of another method or source.
    """
    family = family_of(name, published, g.layout, g.step_aware, method)
    if g.layout == "causal":
        network: dict[str, Any] = {"vocab_size": g.rows - 1, "bos_id": g.rows - 2}
    else:
        made_for = _source(family, published)
        if made_for and source and made_for != source:
            raise CheckpointError(
                f"{name} holds weights of source '{made_for}', asked for '{source}'; choose --sources {made_for}"
            )
        network = {
            "vocab_size": g.rows - 1 if source == "mask" else g.rows,
            "outputs": g.rows,
            "condition": g.condition,
            "step_aware": g.step_aware,
        }
    network |= {"length": _length(published), "width": g.width, "blocks": g.blocks, "heads": g.heads}
    about: dict[str, Any] = {
        "architecture": "causal" if g.layout == "causal" else "dit",
        "network": network,
        "method": method,
        "source": source,
        "published": family,
        "weights": choice,
    }
    if family in ("mdlm", "sdtt"):
        about["time_conditioning"] = family == "mdlm" and bool(lookup(published, "time_conditioning"))
        about["schedule"] = _schedule(name, published, "log-linear")
    elif family == "duo":
        about |= {"time_conditioning": True, "schedule": _schedule(name, published, "log-linear")}
    elif family == "sedd":
        about |= _score(name, published, source)
    elif family == "dfm":
        about["time_eps"] = GENERALISED_KL_EPS
    return about


def _source(family: str, published: Mapping[str, Any]) -> str | None:
    """The source a family is trained for, or None if both exist."""
    if family in ("mdlm", "sdtt"):
        return "mask"
    if family == "duo":
        return "uniform"
    if family == "sedd":
        graph = lookup(published, "graph.type")
        return {"absorb": "mask", "uniform": "uniform"}.get(str(graph)) if graph is not None else None
    return None


def _schedule(name: str, published: Mapping[str, Any], default: str) -> str | dict[str, Any]:
    """The noise schedule that a configuration states, as `make_schedule` reads it.

    Raises:
        CheckpointError: there is none of that name here.
    """
    stated = str(lookup(published, "noise.type") or default)
    kind = stated.lower().replace("_", "-").replace("loglinear", "log-linear")
    if kind == "geometric":
        return {
            "name": "geometric",
            "sigma_min": float(lookup(published, "noise.sigma_min") or 1e-4),
            "sigma_max": float(lookup(published, "noise.sigma_max") or 20.0),
        }
    if kind not in ("log-linear", "cosine"):
        raise CheckpointError(
            f"{name} was trained with the noise '{stated}' (noise.type of its {CONFIG_FILE}), which cannot be sampled "
            "here; known: loglinear, geometric, cosine"
        )
    eps = lookup(published, "noise.eps")
    return kind if eps is None else {"name": kind, "eps": float(eps)}


def _score(name: str, published: Mapping[str, Any], source: str | None) -> dict[str, Any]:
    scaled = lookup(published, "model.scale_by_sigma")
    return {
        "schedule": _schedule(name, published, "geometric" if source == "uniform" else "log-linear"),
        "parameterisation": "score",
        "scale_by_sigma": source != "uniform" if scaled is None else bool(scaled),
    }


def _length(published: Mapping[str, Any]) -> int:
    length = lookup(published, "model_length", "model.length", "length")
    return length if isinstance(length, int) and length > 0 else 1024


def check_vocabulary(name: str, config: Mapping[str, Any], vocab_size: int | None) -> None:
    """Raise CheckpointError unless the weights know the task's tokens, saying which task or source would fit."""
    known = config["network"]["vocab_size"]
    if vocab_size is None or known == vocab_size:
        return
    rows = config["network"].get("outputs", known + 1)
    message = f"{name}: these weights know {known:,} tokens, the task has {vocab_size:,}"
    if config["published"] in ("dfm", "fsdfm") and rows in (vocab_size, vocab_size + 1):
        fitting = "uniform" if rows == vocab_size else "mask"
        raise CheckpointError(f"{message}; they have {rows:,} rows: choose --sources {fitting}")
    hint = {
        50257: "--task 'text:FOLDER[tokenizer=gpt2]'",
        50258: "--task 'text:FOLDER[tokenizer=gpt2;vocab_size=50258]' (GPT-2's tokens and one that the model added)",
    }
    fitting = hint.get(known, "a task with the tokenizer they were trained with")
    raise CheckpointError(f"{message}. Choose {fitting}")

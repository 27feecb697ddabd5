"""Names and shapes of published networks, and the tensors of ours that they become.

Two families of names exist for the same diffusion transformer. With D the width, C the conditioning width, Vn the
embedding rows and k a block:

    dit     MDLM, SEDD, DUO, SDTT: `vocab_embed.embedding`, `sigma_map.mlp.*`, `blocks.k.attn_qkv.weight` (3D, D), ...
    causal  the same without `sigma_map` and `adaLN_modulation`: their autoregressive baseline
    flow    DFM, FS-DFM: `vocab_embed.weight`, `time_embedding.mlp.*`, `blocks.k.{qw,kw,vw}.weight` (D, D) each; with
            `dt_embedding`, `time_condition_fuser` and `condition_fuser`s if conditioned on the step size

The geometry is read from the shapes. Every tensor is accounted for: a missing, unexpected or mis-shaped one is an
error that names it, because a network with silently missing weights still writes text, only garbled.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdfm_bench.errors import CheckpointError

FEATURES = 256
ROTARY = "rotary_emb.inv_freq"
HEAD = 64  # every published size has heads of 64, so it is what is assumed where nothing says otherwise
# Tensors of noise schedules and samplers that some files carry; they are no weights.
PASSENGERS = frozenset({"noise.empty", "empty", "sampling_eps_min", "sampling_eps_max"})
_BLOCK = re.compile(r"blocks\.([0-9]{1,9})\.")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 6
_FLOW_ENDINGS = (".qw.weight", ".kw.weight", ".vw.weight")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """What the shapes of a published network say.

    Args:
        layout: "dit", "causal" or "flow".
        rows: Vn, embedding rows and outputs.
        width, condition, blocks, heads: D, C (0 for "causal"), number of blocks, heads.
        step_aware: conditioned on the step size ("flow" only).
    """

    layout: str
    rows: int
    width: int
    condition: int
    blocks: int
    heads: int
    step_aware: bool = False


def geometry_of(tensors: Mapping[str, Tensor], where: str, heads: int | None = None) -> Geometry:
    """Layout and sizes of a published network.

    Args:
        tensors: by published name, prefixes removed.
        where: the file, for messages.
        heads: number of heads its configuration states, or None.

    Raises:
        CheckpointError: neither family of names, or too little of it to tell the sizes.
    """
    layout, step_aware = layout_of(tensors, where)
    flow = layout == "flow"
    embedding = _matrix(tensors, where, "vocab_embed.weight" if flow else "vocab_embed.embedding")
    embedding = _matrix(tensors, where, "output_layer.linear.weight") if embedding is None else embedding
    if embedding is None:
        raise CheckpointError(f"{where} is incomplete: neither vocab_embed nor output_layer.linear.weight is in it")
    rows, width = embedding.shape
    embedder = _matrix(tensors, where, "time_embedding.mlp.0.weight" if flow else "sigma_map.mlp.0.weight")
    modulation = _matrix(tensors, where, "blocks.0.adaLN_modulation.weight")
    condition = embedder.shape[0] if embedder is not None else modulation.shape[1] if modulation is not None else 0
    frequencies = tensors.get(ROTARY)
    if frequencies is not None and frequencies.numel():
        heads = width // (2 * frequencies.numel())
    heads = heads or max(1, width // HEAD)
    return Geometry(layout, rows, width, condition, _blocks(tensors, where), heads, step_aware)


def _matrix(tensors: Mapping[str, Tensor], where: str, name: str) -> Tensor | None:
    tensor = tensors.get(name)
    if tensor is not None and tensor.ndim != 2:
        raise CheckpointError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected a matrix")
    return tensor


def _blocks(tensors: Mapping[str, Tensor], where: str) -> int:
    """How many blocks there are; numbers without a gap, or one stray name would ask for millions of tensors."""
    numbers = {int(found[1]) for name in tensors if (found := _BLOCK.match(name))}
    gap = next(k for k in range(len(numbers) + 1) if k not in numbers)
    if gap < len(numbers):
        raise CheckpointError(
            f"{where} is not a complete network: missing blocks.{gap}.*, and it has blocks.{max(numbers)}.*"
        )
    if not numbers:
        raise CheckpointError(f"{where} is not a complete network: missing blocks.0.*")
    return len(numbers)


def layout_of(names: Collection[str], where: str) -> tuple[str, bool]:
    """Layout ("dit", "causal" or "flow") that some published names are of, and whether it knows its step size.

    Args:
        names: prefixes removed.
        where: the file, for messages.

    Raises:
        CheckpointError: of no layout.
    """
    if "vocab_embed.embedding" in names or any(name.endswith(".attn_qkv.weight") for name in names):
        modulated = any(name.startswith("sigma_map.") or "adaLN" in name for name in names)
        return ("dit" if modulated else "causal"), False
    if any(name.startswith("time_embedding.mlp.") or name.endswith(_FLOW_ENDINGS) for name in names):
        return "flow", any("dt_embedding" in name or "condition_fuser" in name for name in names)
    some = ", ".join(sorted(names)[:4]) or "no tensor at all"
    raise CheckpointError(
        f"{where} holds weights of an architecture that is not known here; it has {some}. Known: the diffusion "
        "transformers of MDLM, SEDD, DUO and SDTT (blocks.0.attn_qkv.weight) and of DFM and FS-DFM (blocks.0.qw.weight)"
    )


def expected(g: Geometry) -> dict[str, Shape]:
    """Names and shapes of all parameters of a published network, in its own parameter order."""
    return _flow(g) if g.layout == "flow" else _dit(g)


def _dit(g: Geometry) -> dict[str, Shape]:
    d, c = g.width, g.condition
    shapes: dict[str, Shape] = {"vocab_embed.embedding": (g.rows, d)}
    modulated = g.layout == "dit"
    if modulated:
        shapes |= _mlp("sigma_map", c)
    for k in range(g.blocks):
        block = f"blocks.{k}."
        shapes[block + "norm1.weight"] = (d,)
        shapes[block + "attn_qkv.weight"] = (3 * d, d)
        shapes[block + "attn_out.weight"] = (d, d)
        shapes[block + "norm2.weight"] = (d,)
        shapes |= _feed_forward(block, d)
        if modulated:
            shapes |= {block + "adaLN_modulation.weight": (6 * d, c), block + "adaLN_modulation.bias": (6 * d,)}
    return shapes | _output(g, modulated)


def _flow(g: Geometry) -> dict[str, Shape]:
    d, c = g.width, g.condition
    shapes: dict[str, Shape] = {"vocab_embed.weight": (g.rows, d)} | _mlp("time_embedding", c)
    if g.step_aware:
        shapes |= _mlp("dt_embedding", c)
        shapes |= {"time_condition_fuser.weight": (2 * c, 2 * c), "time_condition_fuser.bias": (2 * c,)}
    for k in range(g.blocks):
        block = f"blocks.{k}."
        shapes[block + "norm1.weight"] = (d,)
        shapes |= {f"{block}{name}.weight": (d, d) for name in ("qw", "kw", "vw", "attn_out")}
        shapes[block + "norm2.weight"] = (d,)
        shapes |= _feed_forward(block, d)
        if g.step_aware:
            shapes |= {block + "condition_fuser.weight": (c, 2 * c), block + "condition_fuser.bias": (c,)}
        shapes |= {block + "adaLN_modulation.weight": (6 * d, c), block + "adaLN_modulation.bias": (6 * d,)}
    if g.step_aware:
        shapes |= {"output_layer.condition_fuser.weight": (c, 2 * c), "output_layer.condition_fuser.bias": (c,)}
    return shapes | _output(g, True)


def _mlp(name: str, c: int) -> dict[str, Shape]:
    return {
        f"{name}.mlp.0.weight": (c, FEATURES),
        f"{name}.mlp.0.bias": (c,),
        f"{name}.mlp.2.weight": (c, c),
        f"{name}.mlp.2.bias": (c,),
    }


def _feed_forward(block: str, d: int) -> dict[str, Shape]:
    return {
        block + "mlp.0.weight": (4 * d, d),
        block + "mlp.0.bias": (4 * d,),
        block + "mlp.2.weight": (d, 4 * d),
        block + "mlp.2.bias": (d,),
    }


def _output(g: Geometry, modulated: bool) -> dict[str, Shape]:
    d, c = g.width, g.condition
    shapes: dict[str, Shape] = {
        "output_layer.norm_final.weight": (d,),
        "output_layer.linear.weight": (g.rows, d),
        "output_layer.linear.bias": (g.rows,),
    }
    if modulated:
        shapes |= {"output_layer.adaLN_modulation.weight": (2 * d, c), "output_layer.adaLN_modulation.bias": (2 * d,)}
    return shapes


def check(tensors: Mapping[str, Tensor], g: Geometry, where: str) -> None:
    """Raise CheckpointError unless the tensors are exactly those of the geometry, in floating point.

    A rotary table may be absent.
    """
    shapes = expected(g)
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in shapes | {ROTARY: ()}]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems += [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')} (quantised weights are not read)"
        for name, tensor in tensors.items()
        if name in shapes and tensor.dtype not in _DTYPES
    ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"{where} is not a complete network: {'; '.join(problems[:_SHOWN])}{more}")
    if g.width % g.heads or (g.width // g.heads) % 2:
        raise CheckpointError(f"{where}: width {g.width} does not split into {g.heads} heads of even size")
    if ROTARY in tensors:
        head = g.width // g.heads
        ours = 10000.0 ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
        theirs = tensors[ROTARY].double()
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-2, atol=0):  # it may be bf16
            raise CheckpointError(f"{where}: {ROTARY} is not the rotary table of base 10000; another architecture")


def translate(tensors: Mapping[str, Tensor], g: Geometry, rows: int) -> dict[str, Tensor]:
    """Our tensors from checked published ones.

    Args:
        tensors: by published name.
        g: their geometry.
        rows: rows of embedding and output to keep, at most Vn (the autoregressive baselines carry an unused mask row).

    Returns:
        the state dict of a `DiT`, or of a `CausalTransformer` for layout "causal".
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == ROTARY or name.endswith((".kw.weight", ".vw.weight")):
            continue
        if name.endswith(".qw.weight"):
            block = name.removesuffix("qw.weight")
            ours[block + "qkv.weight"] = torch.cat([tensors[f"{block}{part}.weight"] for part in ("qw", "kw", "vw")])
            continue
        ours[_renamed(name, g)] = tensor[:rows] if name in _ROWED else tensor
    return ours


_ROWED = frozenset(
    {"vocab_embed.embedding", "vocab_embed.weight", "output_layer.linear.weight", "output_layer.linear.bias"}
)


def _renamed(name: str, g: Geometry) -> str:
    fuser = re.fullmatch(r"blocks\.(\d+)\.condition_fuser\.(.*)", name)
    if fuser:
        return f"fusion.layers.{fuser[1]}.{fuser[2]}"
    for theirs, own in (
        ("vocab_embed.embedding", "embedding.weight"),
        ("vocab_embed.weight", "embedding.weight"),
        ("sigma_map.", "time."),
        ("time_embedding.", "time."),
        ("dt_embedding.", "fusion.embedding."),
        ("time_condition_fuser.", "fusion.fuser."),
        ("output_layer.condition_fuser.", f"fusion.layers.{g.blocks}."),
        ("output_layer.norm_final.", "norm." if g.layout == "causal" else "output.norm."),
        ("output_layer.linear.", "head." if g.layout == "causal" else "output.linear."),
        ("output_layer.", "output."),
    ):
        if name.startswith(theirs):
            name = own + name[len(theirs) :]
            break
    return name.replace("attn_qkv", "qkv").replace("adaLN_modulation", "adaln")

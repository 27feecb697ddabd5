"""Convert the character RNN of `textgenrnn` to the safetensors file in this folder; run once, kept to be checked.

    pip download --no-deps --no-binary :all: textgenrnn==2.0.0
    pip install h5py
    python convert.py textgenrnn-2.0.0.tar.gz OUTPUT_FOLDER

The HDF5 file stores the LSTM layers in CuDNN's layout. Per gate, an input kernel is transposed in memory (undone by
`k.T.reshape(k.shape, order="F")`), a recurrent kernel is transposed, and the two halves of the bias are summed. The
gates are in the order input, forget, cell, output: PyTorch's. Nothing is rounded: the tensors stay float32.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np

SDIST_SHA256 = "c2b6f1c201c76d5a6021079e95a8db499bbe15d9f3448d33cb51c0cd496c86f8"


def lstm_tensors(kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    """CuDNN-layout Keras weights of one LSTM as PyTorch's.

    Args:
        kernel: (inputs, 4 units) float32.
        recurrent: (units, 4 units) float32.
        bias: (8 units,) float32.

    Returns:
        weight_ih_l0 (4 units, inputs), weight_hh_l0 (4 units, units), bias_ih_l0 and bias_hh_l0 (4 units,).
    """
    inputs = np.hstack([gate.T.reshape(gate.shape, order="F") for gate in np.hsplit(kernel, 4)])
    states = np.hstack([gate.T for gate in np.hsplit(recurrent, 4)])
    summed = bias.reshape(2, -1).sum(axis=0)
    return {
        "weight_ih_l0": np.ascontiguousarray(inputs.T),
        "weight_hh_l0": np.ascontiguousarray(states.T),
        "bias_ih_l0": summed,
        "bias_hh_l0": np.zeros_like(summed),
    }


def convert(sdist: Path, folder: Path) -> None:
    """Write `model.safetensors` and `vocab.json` to `folder`."""
    import h5py  # type: ignore[import-not-found,unused-ignore]
    from safetensors.numpy import save_file

    data = sdist.read_bytes()
    if hashlib.sha256(data).hexdigest() != SDIST_SHA256:
        raise SystemExit(f"{sdist} is not the sdist of textgenrnn 2.0.0 (sha256 {SDIST_SHA256})")

    def member(name: str) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            file = archive.extractfile(f"textgenrnn-2.0.0/textgenrnn/{name}")
            assert file is not None
            return file.read()

    tensors: dict[str, np.ndarray] = {}
    with h5py.File(io.BytesIO(member("textgenrnn_weights.hdf5"))) as file:
        for layer, keras in (("lstm_1", "rnn_1"), ("lstm_2", "rnn_2")):
            group = file[keras][keras]
            parts = lstm_tensors(group["kernel:0"][:], group["recurrent_kernel:0"][:], group["bias:0"][:])
            tensors.update({f"{layer}.{name}": value for name, value in parts.items()})
        tensors["embedding.weight"] = file["embedding/embedding/embeddings:0"][:]
        tensors["attention.weight"] = np.ascontiguousarray(file["attention/attention/attention_W:0"][:].T)
        tensors["output.weight"] = np.ascontiguousarray(file["output/output/kernel:0"][:].T)
        tensors["output.bias"] = file["output/output/bias:0"][:]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"source": "textgenrnn 2.0.0", "licence": "MIT"})
    vocabulary = json.loads(member("textgenrnn_vocab.json"))
    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(ordered, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

"""Replace a linear layer by 256 experts at its price, gate on top: choose, build, train, save.

    python examples/replace_a_linear_layer.py

Needs NumPy and scikit-learn (whose wheel holds the images); takes a few seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from tensormoe import LayerSpec, TensorRing, select_rank
from tensormoe_numpy import Adam, MuMoE

PIXELS, CLASSES, EXPERTS = 64, 10, 256


def main() -> None:
    # choose: what rank do the parameters of 64 → 64 buy, with the gate on top?
    rank = select_rank("tensor_ring", PIXELS, PIXELS, EXPERTS, bonds=(2, 2, None))
    assert isinstance(rank, tuple)
    spec = LayerSpec(PIXELS, PIXELS, EXPERTS, TensorRing(rank))
    linear = PIXELS * PIXELS + PIXELS
    print(f"a linear layer has {linear} parameters; {spec.factorization} has {spec.num_parameters}")
    print(f"each of its {EXPERTS} experts has rank {spec.expert_rank}")
    print(f"together they span {spec.expert_span} dimensions; dense, they would take", end=" ")
    print(f"{EXPERTS * linear:,} parameters")
    print()
    print(spec.plan(1024).describe("entmax"))
    print()

    # build, and prove: factorized equals unfactorized
    exact = MuMoE(PIXELS, PIXELS, EXPERTS, spec.factorization, dtype="float64", seed=0)
    x, labels = load_digits(return_X_y=True)
    x = (x - x.mean()) / x.std()
    weights, biases = exact.materialize()
    assert biases is not None
    (a,) = exact.coefficients(x[:200])
    dense = np.einsum("bn,bi,nio->bo", a, x[:200], weights) + a @ biases
    error = np.abs(exact(x[:200]) - dense).max() / np.abs(dense).max()
    print(f"factorized and unfactorized differ by {error:.1e}, relative, in float64")
    assert error < 1e-12

    # train: the mixture, then a linear read-out that is a mixture of one
    x = x.astype("float32")
    train, test = slice(0, 1400), slice(1400, None)
    layer = MuMoE(PIXELS, PIXELS, EXPERTS, spec.factorization, seed=0)
    head = MuMoE(PIXELS, CLASSES, 1, "cp", rank=CLASSES, gate="softmax", seed=1)
    optimizers = [Adam(layer.parameters, lr=3e-3), Adam(head.parameters, lr=3e-3)]
    generator = np.random.default_rng(0)
    for epoch in range(15):
        order = generator.permutation(train.stop)
        losses = []
        for batch in np.array_split(order, 22):
            hidden, back = layer.vjp(x[batch])
            logits, back_head = head.vjp(np.maximum(hidden, 0))
            shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
            share = shifted / shifted.sum(axis=1, keepdims=True)
            picked = share[np.arange(len(batch)), labels[batch]]
            losses.append(-np.log(picked).mean())
            share[np.arange(len(batch)), labels[batch]] -= 1
            by_head = back_head(share / len(batch))
            assert by_head.input is not None
            by_layer = back(by_head.input * (hidden > 0))
            optimizers[0].step(by_layer.parameters)
            optimizers[1].step(by_head.parameters)
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1:2}: training loss {np.mean(losses):.3f}")
    found = head(np.maximum(layer(x[test]), 0)).argmax(axis=1)
    accuracy = (found == labels[test]).mean()
    print(f"test accuracy {accuracy:.3f} on {len(found)} images")
    assert accuracy > 0.85

    # save: one file, which every backend opens
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        layer.save(path)
        same = np.array_equal(MuMoE.load(path)(x[test]), layer(x[test]))
        print(f"saved {path.stat().st_size:,} bytes, read back with equal outputs: {same}")
        assert same


if __name__ == "__main__":
    main()

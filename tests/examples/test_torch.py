"""The training examples: causal, within the dense model's parameters, on data that is there."""

from __future__ import annotations

import gzip
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from torch import nn  # noqa: E402

from tensormoe import Gate  # noqa: E402
from tensormoe.analysis import explore_coefficients  # noqa: E402
from tests.examples._folder import examples  # noqa: E402

with examples():
    import gpt_on_text
    import mixer_on_images
    from _comparison import images, text, training, variants, words
    from _comparison.compare import parse

VARIANTS = pytest.mark.parametrize("variant", variants.VARIANTS, ids=lambda each: each.name)


def _stir(model: nn.Module, seed: int) -> nn.Module:
    """Gates start at zero, where all tokens have the same coefficients: give them others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return model


def _reach(model: nn.Module, seed: int, place: int) -> torch.Tensor:
    """By position: how far the logits move when ids behind ``place`` change."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (3, 16), generator=generator)
    other = ids.clone()
    other[:, place + 1 :] = (ids[:, place + 1 :] + 7) % 20
    with torch.no_grad():
        return (model(ids) - model(other)).abs().amax(dim=(0, 2))


def _gpt(variant: variants.Variant, seed: int) -> nn.Module:
    sizes = replace(gpt_on_text.QUICK, context=16, depth=2)
    return _stir(gpt_on_text.GPT(sizes, 20, variant).double(), seed)


@VARIANTS
@pytest.mark.parametrize("training_mode", [True, False])
def test_gpt_sees_no_later_token(variant: variants.Variant, training_mode: bool, seed: int) -> None:
    model = _gpt(variant, seed).train(training_mode)
    for place in (0, 7, 14):
        moved = _reach(model, seed, place)
        assert moved[: place + 1].max() < 1e-12
        assert moved[place + 1 :].min() > 1e-6


def test_a_batch_norm_gate_would_leak(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt_on_text, "GATE", Gate("entmax", normalization="batch"))
    model = _gpt(variants.CP, seed).train()
    assert _reach(model, seed, 7)[:8].max() > 1e-6


@VARIANTS
@pytest.mark.parametrize(
    ("features", "hidden", "experts", "gate"),
    [
        (49, 64, 32, mixer_on_images.GATE),
        (64, 256, 32, mixer_on_images.GATE),
        (64, 256, 33, gpt_on_text.GATE),
        (33, 128, 7, gpt_on_text.GATE),
    ],
)
def test_blocks_use_the_dense_budget_and_no_more(
    variant: variants.Variant, features: int, hidden: int, experts: int, gate: Gate
) -> None:
    block = variants.make_mlp(variant, features, hidden, experts, gate)
    found = sum(parameter.numel() for parameter in block.parameters())
    dense = (features + 1) * hidden + (hidden + 1) * features
    assert 0.9 * dense <= found <= dense
    assert block(torch.ones(3, features)).shape == (3, features)


@VARIANTS
def test_models_have_at_most_the_dense_parameters(variant: variants.Variant) -> None:
    shown = images.load_images(Path("nowhere")).part(10)
    written = text.Text("none", torch.arange(100), torch.arange(50), "x" * 100)
    for task in (
        mixer_on_images.make_task(shown, mixer_on_images.FULL, mixer_on_images.RECIPE),
        gpt_on_text.make_task(written, gpt_on_text.FULL, gpt_on_text.RECIPE),
    ):
        dense, found = (
            sum(parameter.numel() for parameter in task.build(each).parameters())
            for each in (variants.DENSE, variant)
        )
        assert 0.9 * dense <= found <= dense


@VARIANTS
def test_shared_parts_start_equal_and_rows_are_counted(variant: variants.Variant) -> None:
    shown = images.load_images(Path("nowhere")).part(10)
    task = mixer_on_images.make_task(shown, mixer_on_images.QUICK, mixer_on_images.QUICK_RECIPE)
    torch.manual_seed(5)
    dense = task.build(variants.DENSE)
    torch.manual_seed(5)
    model = task.build(variant)
    assert torch.equal(dense.stem.weight, model.stem.weight)
    assert torch.equal(dense.head.weight, model.head.weight)
    rows = {}
    for block, expected in model.mlps(10):
        rows[block] = expected
        block.register_forward_hook(
            lambda block, given, _: rows.update(
                {block: rows[block] - given[0].numel() // given[0].shape[-1]}
            )
        )
    assert model(shown.train).shape == (10, 10)
    assert set(rows.values()) == {0}


def _write_idx(folder: Path, name: str, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))


def test_fashion_images(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {
        "train-images-idx3": rng.integers(0, 256, (60, 28, 28), "u1"),
        "train-labels-idx1": rng.integers(0, 10, 60, "u1"),
        "t10k-images-idx3": rng.integers(0, 256, (20, 28, 28), "u1"),
        "t10k-labels-idx1": rng.integers(0, 10, 20, "u1"),
    }
    for name, array in arrays.items():
        _write_idx(tmp_path, name, array)
    found = images.load_images(tmp_path)
    assert found.name == "Fashion-MNIST"
    assert found.train.shape == (60, 28, 28)
    assert found.train.dtype == torch.float32
    pixels = arrays["train-images-idx3"].astype("float64")
    np.testing.assert_allclose(found.train, (pixels - pixels.mean()) / pixels.std(), atol=1e-5)
    assert found.test_labels.tolist() == arrays["t10k-labels-idx1"].tolist()
    held = images.load_images(tmp_path, holdout=True)
    assert (len(held.train), len(held.test)) == (50, 10)
    assert held.test_labels.tolist() == arrays["train-labels-idx1"][50:].tolist()


def test_digits_where_fashion_is_not_installed(tmp_path: Path) -> None:
    found = images.load_images(tmp_path)
    assert found.name == "digits"
    assert found.train.shape[1:] == found.test.shape[1:] == (8, 8)
    assert len(found.train) + len(found.test) == 1797
    assert abs(float(found.train.mean())) < 1e-5
    assert set(found.test_labels.tolist()) == set(range(10))
    picked, labels = next(images.batches(found, 32, seed=0))
    assert picked.shape == (32, 8, 8)
    assert labels.shape == (32,)


def test_batches_depend_on_the_seed_alone(tmp_path: Path) -> None:
    found = images.load_images(tmp_path).part(50)
    one, same, other = (images.batches(found, 20, seed) for seed in (1, 1, 2))
    for _ in range(5):
        picked = next(one)[0]
        assert torch.equal(picked, next(same)[0])
        assert not torch.equal(picked, next(other)[0])


@pytest.mark.parametrize(
    ("source", "name"),
    [("pydoc_data.topics", "pydoc_data.topics"), ("no_such_topics", "standard library")],
)
def test_text_and_its_fallback(source: str, name: str) -> None:
    found = text.load_text(source)
    assert name in found.name
    assert len(found.train) > 200_000
    assert len(found.test) > 20_000
    assert int(found.train.max()) < len(found.symbols)

    def paragraphs(ids: torch.Tensor) -> list[str]:
        return "".join(found.symbols[place] for place in ids.tolist()).split("\n\n")

    train, test = paragraphs(found.train), paragraphs(found.test)
    assert not set(train) & set(test)
    held = text.load_text(source, holdout=True)
    assert len(held.train) < len(found.train)
    inputs, labels = next(text.batches(found, 64, 4, seed=0))
    assert inputs.shape == labels.shape == (4, 64)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])


def test_words_are_the_text_and_pairs_are_the_most_frequent() -> None:
    sentence = "the cat sat on the mat; banana banana bandana, aaaa aaa"
    split = words.pieces(sentence)
    assert "".join(split) == sentence
    merges = words.vocabulary(split, 30)
    # by counting everything anew for each pair
    spelled = [list(word) for word in split]
    for pair in merges:
        counts = Counter(two for word in spelled for two in pairwise(word))
        assert counts[pair] == max(counts.values()) >= 2
        spelled = [words.joined(word, pair) for word in spelled]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    assert [words.encoded(word, ranks) for word in split] == spelled
    assert words.joined(list("aaaaa"), ("a", "a")) == ["aa", "aa", "a"]


@pytest.mark.parametrize("bible", [True, False])
def test_words_of_a_real_text(bible: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not bible:
        monkeypatch.setattr(words, "which", lambda name: None)
    elif words.which("bible") is None:
        pytest.skip("bible-kjv is not installed")
    found = words.load_words(400)
    assert len(set(found.symbols)) == len(found.symbols) <= 400
    assert int(found.train.max()) < len(found.symbols)
    name, documents = words._documents()
    assert found.name == name
    train, test = text.split(documents, holdout=False)
    for ids, want in ((found.train, train), (found.test, test)):
        assert "".join(found.symbols[place] for place in ids.tolist()) == want
        # fewer tokens than characters
        assert len(ids) < 0.7 * len(want)
    if bible:
        assert "In the beginning God created the heaven and the earth.\nAnd the earth was" in train
        assert len(documents) == 1189


def test_special_experts_are_shown_with_their_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    coefficients = np.array([[0.9, 0.1]] * 30 + [[0.0, 1.0]] * 70)
    labels = [0] * 30 + [1] * 60 + [2] * 10
    found = explore_coefficients(coefficients, labels, class_names=["zero", " one", " two"])
    gpt_on_text.show(found, 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("expert 0, load 27.00%")
    assert line.endswith("above chance: zero 3×")


def test_windows_cover_the_text_once() -> None:
    inputs, labels = text.windows(torch.arange(30), 7)
    assert inputs.flatten().tolist() == list(range(28))
    assert torch.equal(labels, inputs + 1)


def test_score_is_the_mean_over_everything() -> None:
    table = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(11) % 5
    found = training.evaluate(nn.Identity(), table, labels, batch=4)
    wide = table.double()
    expected = wide.logsumexp(1) - wide[torch.arange(11), labels]
    assert found.loss == pytest.approx(float(expected.mean()), rel=1e-6)
    assert found.accuracy == float((table.argmax(1) == labels).double().mean())


def test_training_scores_at_the_end_and_learns(tmp_path: Path) -> None:
    shown = images.load_images(tmp_path).part(200)
    recipe = training.Recipe(steps=31, batch=32, rate=5e-3, scores=3)
    task = mixer_on_images.make_task(shown, mixer_on_images.QUICK, recipe)
    model = task.build(variants.CP)
    run = training.train(model, task.batches(0), recipe, task.score, lambda _: None)
    assert len(run.losses) == 31
    assert run.places[-1] == 31
    assert len(run.scores) == len(run.places) == 3
    assert all(one < two for one, two in pairwise(run.places))
    assert np.mean(run.losses[-5:]) < 0.9 * np.mean(run.losses[:5])
    assert run.scores[-1].accuracy > 0.2


def test_words_of_the_command_line() -> None:
    words = parse("what it is", ["--quick", "--steps", "5", "--picture", "a.png"])
    assert words.quick
    assert words.steps == 5
    assert words.seeds is None
    assert words.picture == Path("a.png")
    assert not hasattr(words, "tokens")
    assert parse("what it is", [], ("characters", "words")).tokens == "characters"
    assert parse("what it is", ["--tokens", "words"], ("characters", "words")).tokens == "words"

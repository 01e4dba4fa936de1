"""A factorization of one's own goes wherever one of the library's goes, by its class or name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensormoe import (
    CP,
    Budget,
    Dense,
    Factorization,
    Hadamard,
    LayerSpec,
    TensorRing,
    rank_front,
    register_factorization,
    select_rank,
)
from tensormoe.decomposition import decompose, error_curves
from tensormoe.errors import MissingDependencyError, RankError, SpecError
from tensormoe.factorizations import (
    FACTORIZATIONS,
    _named,
    factorization_class,
    rank_pattern,
    resolve_factorization,
)
from tensormoe.functional import LayerConfig
from tensormoe_numpy import MuMoE, MuMoEMLP
from tests._third_party import ROOT, installed, write_metadata
from tests.factorizations._own import OWN, own_class


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    known = dict(_named._registered)
    yield
    _named._registered.clear()
    _named._registered.update(known)


@pytest.fixture
def own() -> Any:
    return register_factorization(own_class())


def distribution(site: Path, points: dict[str, str], name: str = "tensormoe-own") -> None:
    groups = {_named.ENTRY_POINT_GROUP: points}
    write_metadata(site, {"name": name, "version": "1.0", "entry-points": groups})


def test_a_class_is_registered_once(own: Any) -> None:
    assert register_factorization(own) is own
    assert FACTORIZATIONS["own"] is own
    assert [*FACTORIZATIONS][-1] == "own"
    assert len(FACTORIZATIONS) == 11
    assert resolve_factorization("own", 3) == own(3)
    with pytest.raises(SpecError, match=r"one factorization; got 'own' for .*, which is taken by"):
        register_factorization(own_class("other: int = 1"))
    with pytest.raises(SpecError, match=r"got 'cp' for .*taken by tensormoe.*CP"):
        register_factorization(own_class(name="cp"))
    assert FACTORIZATIONS["own"] is own


def test_a_cell_that_runs_again_registers_again(own: Any) -> None:
    again = own_class()
    assert again is not own
    assert register_factorization(again) is again
    assert FACTORIZATIONS["own"] is again


def test_two_classes_of_one_function_are_two(own: Any) -> None:
    def made() -> type[Factorization]:
        @dataclass(frozen=True)
        class Local(own_class(name="local")):  # type: ignore[misc]
            pass

        return Local

    register_factorization(made())
    with pytest.raises(SpecError, match="got 'local'"):
        register_factorization(made())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (CP(2), r"must be a subclass of tensormoe.Factorization; got CP\(rank=2\)"),
        (int, "must be a subclass of tensormoe.Factorization; got <class 'int'>"),
        (Factorization, "must define every abstract method; got none for bond_sizes, bonds"),
        (own_class("name = 'a-b'"), "must have a name that is a Python identifier; got 'a-b'"),
        (own_class("name = 3"), "must have a name that is a Python identifier; got 3"),
        (own_class("def bonds(self, levels): return (1, 2)"), r"with_rank, one for each of \('P',"),
        (own_class("def with_rank(self, rank): return Own(*rank)"), r"must keep its class"),
        (
            own_class(
                "def rank_pattern(self, levels): return ()\ndef with_rank(self, rank): return self"
            ),
            "must take rank= where its",
        ),
        (own_class("def __post_init__(self): 1 / self.zero"), "must make values of a rank alone"),
        (own_class("__hash__ = None"), "must make values of a rank alone, .*unhashable"),
        (own_class("__eq__ = object.__eq__"), "must have values that are equal"),
    ],
)
def test_a_wrong_class_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        factorization_class(register_factorization(wrong))
    with pytest.raises(SpecError, match=message):
        MuMoE(6, 5, 4, wrong, rank=2) if isinstance(wrong, type) else register_factorization(wrong)


def decorated(first: str, second: str) -> Any:
    code = OWN.replace("@dataclass(frozen=True)", f"@{first}\n@{second}")
    scope: dict[str, Any] = {"register": register_factorization, "__name__": __name__}
    exec(code.replace("type(self)(*rank)", "Own(*rank)"), scope)
    return scope["Own"]


def test_it_is_a_decorator_on_either_side_of_the_dataclass() -> None:
    for order in (("register", "dataclass(frozen=True)"), ("dataclass(frozen=True)", "register")):
        kind = decorated(*order)
        # with_rank needs the name of the class, which a decorator sees unbound
        assert factorization_class("own") is kind
        assert select_rank("own", 6, 5, 4, budget=110, bias=False, gate=None) == 3
    # a dataclass with slots is another class than the one that was registered below it
    decorated("dataclass(frozen=True, slots=True)", "register")
    with pytest.raises(SpecError, match=r"must keep its class .* apply the dataclass first"):
        factorization_class("own")


@pytest.mark.parametrize("kind", [Hadamard, Dense, "hadamard", "dense", Hadamard()])
def test_nothing_to_choose_is_an_empty_pattern(kind: Any) -> None:
    assert rank_pattern(kind, 2) == ()
    assert LayerSpec(4, 3, 2, kind).factorization.rank is None
    if not isinstance(kind, Hadamard):
        with pytest.raises(RankError, match="rank must be None"):
            resolve_factorization(kind, 2)


@pytest.mark.parametrize("registered", [False, True])
def test_a_class_goes_where_a_name_goes(registered: bool) -> None:
    kind = own_class()
    if registered:
        register_factorization(kind)
    ways = [kind, "own"] if registered else [kind]
    for way in ways:
        budget = Budget(parameters=110)
        assert select_rank(way, 6, 5, 4, budget=budget, bias=False, gate=None) == 110 // 34
        assert rank_front(way, 6, 5, 4, budget=500)
        assert rank_pattern(way) == ("P",)
        assert MuMoE(6, 5, 4, way, rank=3).spec.factorization == kind(3)
        assert MuMoE(6, 5, (2, 2), way, rank=(3,)).spec.factorization == kind(3)
        assert MuMoE(6, 5, 4, way, budget=130, gate=None).spec.factorization == kind(3)
        assert MuMoEMLP(6, 7, 5, experts=4, factorization=(way, TensorRing), rank=2)
        with pytest.raises(RankError, match="rank is missing for 'own'"):
            LayerSpec(6, 5, 4, way)
        weights = np.random.default_rng(0).standard_normal((4, 6, 5))
        assert decompose(weights, way, rank=4).report.error < 1e-9
        assert decompose(weights, way, budget=0.9).spec.factorization == kind(3)
        assert decompose(weights, way, tolerance=0.9).report.error <= 0.9
        (curve,) = error_curves(weights, [way], [0.5, 0.9])
        assert (curve.name, len(curve.points)) == ("own", 2)


def test_a_registered_name_is_in_default_curves(own: Any) -> None:
    weights = np.random.default_rng(0).standard_normal((3, 4, 4))
    assert "own" in [curve.name for curve in error_curves(weights, budgets=[0.8])]


def test_bonds_that_are_no_entries_of_the_rank() -> None:
    fixed = own_class(
        "def bond_sizes(self, experts, out_features): return {'p': self.rank, 'q': 2}\n"
        "def factors(self, levels):\n"
        "    return (Factor('expert_0', ('n0', 'p', 'q')), Factor('basis', ('i', 'p', 'q', 'o')))"
    )
    # a bond that is always 2 costs twice as much
    rank = select_rank(fixed, 6, 5, 4, budget=200, bias=False, gate=None)
    assert rank == 200 // 68
    assert LayerSpec(6, 5, 4, fixed(rank), bias=False).num_parameters == 68 * rank
    odd = own_class("def bond_sizes(self, experts, out_features): return {'p': self.rank ** 2}")
    with pytest.raises(RankError, match="as large as one entry of its rank"):
        select_rank(odd, 6, 5, 4, budget=500)


@pytest.mark.parametrize("rank", [0, -1, 2.5, (3,), "3", True])
def test_ranks_that_a_plain_class_lets_pass(own: Any, rank: Any) -> None:
    with pytest.raises(RankError, match="rank must be positive integers"):
        LayerSpec(6, 5, 4, own(rank))


def test_a_value_that_its_name_and_rank_do_not_tell_is_not_saved(tmp_path: Path) -> None:
    spec = LayerSpec(6, 5, 4, register_factorization(own_class("other: int = 1"))(3))
    assert LayerSpec.from_dict(spec.to_dict()) == spec
    other = type(spec.factorization)(3, other=2)
    layer = MuMoE(6, 5, 4, other)
    with pytest.raises(SpecError, match=r"told by its name and rank to be saved; got .*other=2"):
        layer.save(tmp_path / "layer.safetensors")
    impostor = MuMoE(6, 5, 4, own_class(name="cp"), rank=2)
    with pytest.raises(SpecError, match=r"'cp' for .*, and it is another class's"):
        impostor.save(tmp_path / "layer.safetensors")
    assert not [*tmp_path.iterdir()]


def test_numpy_integers_are_saved(own: Any) -> None:
    spec = LayerSpec(6, 5, 4, own(np.int64(3)))
    assert type(spec.to_dict()["rank"]) is int


def test_an_unknown_name_says_how_to_register(own: Any, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    layer = MuMoE(6, 5, 4, "own", rank=3, dtype="float64", seed=0)
    layer.save(path)
    x = np.ones((2, 6))
    np.testing.assert_array_equal(MuMoE.load(path)(x), layer(x))
    del _named._registered["own"]
    with pytest.raises(ValueError, match=r"got 'own'\. Register your own .*register_factorization"):
        MuMoE.load(path)


OPEN = """
import numpy as np
{register}
from {package} import MuMoE
layer = MuMoE.load({path!r})
assert type(layer.spec.factorization).__module__ == "own_package"
print(np.asarray(layer(np.ones((2, 6), np.float32))).tolist())
"""


def run(code: str, *places: Path) -> subprocess.CompletedProcess[str]:
    paths = [*map(str, places), str(ROOT), str(ROOT / "backends")]
    start = f"import sys; sys.path[:0] = {paths}\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("way", ["an entry point", "registering", "nothing"])
def test_a_checkpoint_opens_in_another_process(way: str, own: Any, tmp_path: Path) -> None:
    path, site = tmp_path / "layer.safetensors", tmp_path / "site"
    site.mkdir()
    (site / "own_package.py").write_text(OWN)
    layer = MuMoE(6, 5, 4, "own", rank=3, seed=0)
    layer.save(path)
    register = ""
    if way == "an entry point":
        distribution(site, {"own": "own_package:Own"})
    elif way == "registering":
        register = "import tensormoe, own_package\n"
        register += "tensormoe.register_factorization(own_package.Own)"
    code = OPEN.format(register=register, path=str(path), package="tensormoe_numpy")
    ended = run(code, site)
    if way == "nothing":
        assert ended.returncode
        assert "Register your own class" in ended.stderr
    else:
        assert not ended.returncode, ended.stderr
        want = layer(np.ones((2, 6), np.float32)).tolist()
        assert ended.stdout.strip() == str(want)


def test_the_command_line_knows_entry_points(tmp_path: Path) -> None:
    (tmp_path / "own_package.py").write_text(OWN)
    distribution(tmp_path, {"own": "own_package:Own"})
    code = "from tensormoe.cli import main\n"
    code += "sizes = ['6', '5', '4', '--json']\n"
    code += "assert not main(['plan', *sizes, '--factorization', 'own', '--rank', '3'])\n"
    code += "assert not main(['rank', *sizes, '--budget', '900'])\n"
    ended = run(code, tmp_path)
    assert not ended.returncode, ended.stderr
    assert ended.stdout.count('"own"') >= 2


WRONG: dict[str, tuple[str, type[Exception], str]] = {
    "a module that fails": ("1 / 0", SpecError, "must load; got ZeroDivisionError"),
    "a module that needs another": (
        "import no_such_module",
        MissingDependencyError,
        "needs no_such_module, which is not installed",
    ),
    "no class": ("Own = 3", SpecError, "must be a subclass of tensormoe.Factorization; got 3"),
    "another name": (OWN.replace('"own"', '"other"'), SpecError, "must have that name; got 'othe"),
    "a wrong class": (
        OWN.replace("(*rank)", "(rank)"),
        SpecError,
        "must keep its class and the bonds",
    ),
    "another class of that name": (
        OWN + "import tensormoe\nclass Second(Own): pass\ntensormoe.register_factorization(Second)",
        SpecError,
        "taken by own_package.Second",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_point_is_named(case: str, tmp_path: Path) -> None:
    module, error, message = WRONG[case]
    (tmp_path / "own_package.py").write_text(module)
    distribution(tmp_path, {"own": "own_package:Own"})
    with installed(tmp_path):
        # a broken one does not affect those who don't use it
        assert "own" in FACTORIZATIONS
        assert factorization_class("cp") is CP
        with pytest.raises(error, match=message) as caught:
            factorization_class("own")
        if case != "another class of that name":
            assert "tensormoe-own (own_package:Own)" in str(caught.value)


def test_a_name_of_two_distributions_is_refused(tmp_path: Path) -> None:
    distribution(tmp_path, {"own": "own_package:Own"})
    distribution(tmp_path, {"own": "second:Own"}, "second-own")
    with installed(tmp_path), pytest.raises(SpecError, match="must come from one distribution"):
        FACTORIZATIONS["own"]


def test_a_name_of_a_distribution_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "own_package.py").write_text(OWN)
    distribution(tmp_path, {"own": "own_package:Own"})
    with installed(tmp_path):
        with pytest.raises(SpecError, match=r"taken by distribution tensormoe-own \(own_package:"):
            register_factorization(own_class())
        import own_package

        assert register_factorization(own_package.Own) is factorization_class("own")


def test_a_layer_config_round_trips(own: Any) -> None:
    config = LayerConfig(LayerSpec(6, 5, (2, 2), own(3)), None)
    assert LayerConfig.from_dict(config.to_dict()) == config

"""``tensormoe allocate``: from a configuration, or a model and a text; what takes the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensormoe.cli import main
from tensormoe.selection import Allocation, allocate
from tests._command import ask, run
from tests._compress_models import family

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "dtype": "bfloat16",
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return str(path)


def test_table(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["allocate", config, "--budget", "50%", "--experts", "2"]) == 0
    shown = capsys.readouterr().out
    wanted = allocate(LLAMA, "50%", experts=2)
    assert shown.strip() == str(wanted)


def test_without_the_libraries_of_arrays(config: str) -> None:
    code = (
        "import sys; from tensormoe.cli import main; "
        f"main(['allocate', {config!r}, '--budget', '50%', '--json']); "
        "assert not {'torch', 'numpy', 'jax'} & {*sys.modules}"
    )
    assert run(code=code).returncode == 0


def test_json_and_files(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    words = ("--by", "size", "--what", "attention,mlp", "--factorization", "tensor-ring")
    found = ask(
        capsys,
        *("allocate", config, "--budget", "96kB", *words, "--experts", "2x2"),
        *("--output", str(path)),
    )
    kept = Allocation.load(path)
    assert found == {"command": "allocate", **json.loads(json.dumps(kept.to_dict()))}
    assert kept.unit == "bytes"
    assert kept.bytes <= kept.limit == 96_000
    assert kept == allocate(
        LLAMA,
        96_000,
        unit="bytes",
        by="size",
        what=("attention", "mlp"),
        factorization="tensor_ring",
        experts=(2, 2),
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--budget must be given"),
        (("--budget", "120%"), "at most 100%"),
        (("--budget", "10"), "budget must be at least"),
        (("--budget", "ten"), "--budget must be a quantity"),
        (("--budget", "50%", "--by", "rank"), "by must be one of"),
        (("--budget", "50%", "--by", "sensitivity"), "--data must be given with"),
        (("--budget", "50%", "--by", "size", "--data", "x"), "--data must be given with"),
        (("--budget", "50%", "--data", "none.txt"), "--data must be a text file"),
        (("--budget", "50%", "--what", "heads"), "what must be one of"),
        (("--budget", "50%", "--what", "experts"), "llama has none"),
        (("--budget", "50%", "--experts", "0"), "experts must be positive"),
        (("--budget", "50%", "--factorization", "svd"), "factorization must be one of"),
        (("--budget", "50%", "--factorization", "cp,tucker"), "without measured"),
        (("--budget", "50%", "--output", "none/a.json"), "--output must be a file"),
        (("--budget", "50%", "--gate", "argmax"), "activation must be one of"),
    ],
)
def test_errors(
    words: tuple[str, ...], said: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["allocate", config, *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert not captured.out


def test_models_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, said in (
        ("{", "must be JSON"),
        ("[1]", "mapping of names"),
        ('{"model_type": "no_such_family"}', "that transformers knows; 'no_such_family'"),
        ("{}", "model_type of a configuration"),
    ):
        path = tmp_path / "config.json"
        path.write_text(text)
        assert main(["allocate", str(path), "--budget", "50%"]) == 2
        shown = capsys.readouterr().err
        assert said in shown
        assert len(shown) < 700
    assert main(["allocate", str(tmp_path / "none.json"), "--budget", "50%"]) == 2


def test_other_families_through_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "model_type": "gpt_neox",
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = ask(capsys, "allocate", str(tmp_path), "--budget", "60%", "--experts", "2")
    assert [each["site"]["name"] for each in found["layers"]] == ["layers.0.mlp", "layers.1.mlp"]


def test_compress_takes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    family("mixtral").save_pretrained(model)
    path, output = str(tmp_path / "a.json"), tmp_path / "small"
    main(["allocate", str(model), "--budget", "60%", "--by", "size", "--output", path])
    capsys.readouterr()
    names = [name for layer in Allocation.load(path).layers for name in layer.site.unit_names]
    weights = {name: 1.0 + index for index, name in enumerate(names)}
    plan = allocate(model, "60%", sensitivities=weights)
    plan.save(path)
    words = ("compress", str(model), "--preset", "mixtral", "--allocation", path)
    dry = ask(capsys, *words, "--dry-run")
    assert dry["settings"]["allocation"]["parameters"] == plan.parameters
    found = ask(capsys, *words, "--output", str(output), "--no-svd")
    assert found["parameters"] == plan.parameters
    ranks = {each["name"]: each["rank"] for each in found["groups"]}
    for layer in plan.layers:
        number = layer.name.split(".")[2]
        for role, kind in zip(("w1", "w3", "w2"), layer.factorizations, strict=True):
            name = f"model.layers.{number}.block_sparse_moe.experts.*.{role}.weight"
            assert ranks[name] == kind.rank
    assert len({*ranks.values()}) > 1
    # the same command only shows what is there
    again = ask(capsys, *words, "--output", str(output), "--no-svd")["groups"]
    assert all(each["seconds"] is None for each in again)
    assert [each["error"] for each in again] == [each["error"] for each in found["groups"]]
    for more, said in (
        (("--budget", "50%"), "one of rank, budget and tolerance"),
        (("--factorization", "tucker"), "of the factorization 'tucker' alone; it has cp"),
        (("--experts", "x"), "and not both"),
    ):
        assert main([*words, *more, "--output", str(tmp_path / "no")]) == 2
        assert said in capsys.readouterr().err
    less = plan.layers[:1]
    Allocation(less, "size", plan.limit).save(path)
    assert main([*words, "--dry-run"]) == 2
    assert "it has none for 'model.layers.1." in capsys.readouterr().err
    other = allocate({**LLAMA, "model_type": "mixtral", "num_local_experts": 4}, "50%")
    other.save(path)
    assert main([*words, "--dry-run"]) == 2
    assert "sizes of the model's experts" in capsys.readouterr().err


def test_sensitivities_of_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tmp_path / "model"
    small = family("mixtral")
    small.model.layers = small.model.layers[:1]
    small.config.num_hidden_layers = 1
    small.save_pretrained(model)
    words = {word: place for place, word in enumerate(["?", *"abcdefgh"])}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text(" ".join("abcdefghhgfedcba" * 8))
    sizes = ("--context", "16", "--windows", "4")
    found = ask(capsys, "allocate", str(model), "--budget", "60%", "--data", str(text), *sizes)
    assert found["by"] == "sensitivity"
    assert found["parameters"] <= found["limit"]
    assert all(each["loss"] is not None for each in found["layers"])
    words = ["allocate", str(model), "--budget", "60%", "--data", str(text)]
    assert main([*words, "--context", "9999"]) == 2
    assert "at most the 32 positions" in capsys.readouterr().err
    text.write_text("a b c")
    assert main([*words, "--context", "16"]) == 2
    assert "at least one window" in capsys.readouterr().err

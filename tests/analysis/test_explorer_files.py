"""The page and the data file: what they hold, and that data stay data."""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from hashlib import sha256
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensormoe.analysis import (
    Exploration,
    Images,
    Texts,
    explore_coefficients,
    neuronpedia_batches,
)
from tensormoe.analysis._explorer._file import packed
from tensormoe.analysis._explorer._page import payload
from tensormoe.analysis._explorer._png import png
from tensormoe.errors import CheckpointError, SpecError
from tests.explorer import _pages as pages

MADE = {"linear": pages.linear, "levels": pages.levels, "tokens": pages.tokens}
MADE |= {"hostile": pages.hostile, "table": pages.table, "bare": pages.bare}


class Elements(HTMLParser):
    """The elements of a page, and the text in each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.policy, self.inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in self.texts:
            self.inside = tag
            self.texts[tag].append("")
        values = dict(attrs)
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""
        assert not any(name.startswith("on") or name == "style" for name in values)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[self.inside][-1] += data


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(b64decode(packed["base64"]), packed["dtype"])
    return flat.reshape(packed["shape"])


@pytest.mark.parametrize("name", MADE)
def test_page(name: str) -> None:
    found = MADE[name]()
    text = found.html().decode("utf-8")
    page = Elements(text)
    # whatever the data, the page has the same elements
    assert page.tags == Elements(pages.bare().html().decode("utf-8")).tags
    data, script = page.texts["script"]
    (style,) = page.texts["style"]
    digest = {
        kind: f"{kind}-src 'sha256-{b64encode(sha256(body.encode()).digest()).decode()}'"
        for kind, body in (("script", script), ("style", style))
    }
    rules = page.policy.split("; ")
    assert "default-src 'none'" in rules
    assert {digest["script"], digest["style"], "img-src data:"} <= set(rules)
    assert "unsafe" not in page.policy
    assert "http" not in text.lower().replace("http-equiv", "")
    held = json.loads(data)
    assert held == json.loads(json.dumps(payload(found)))
    assert held["title"] == found.title


def test_hostile_text_stays_text() -> None:
    found = pages.hostile()
    text = found.html().decode("utf-8")
    assert text.count("</script") == 2
    assert "onerror='" not in text.split('<script id="data"')[0]
    # and in a notebook
    frame = found._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts"')
    source = re.search(r'srcdoc="([^"]*)"', frame)
    assert source is not None
    assert unescape(source[1]) == text
    assert frame.count("<") == 2


def test_page_has_the_numbers() -> None:
    found = pages.linear()
    (level,), (held,) = found.levels, payload(found)["levels"]
    np.testing.assert_allclose(unpacked(held["load"]), level.load.share, rtol=1e-6)
    np.testing.assert_allclose(unpacked(held["excess"]), level.specialization.excess, rtol=1e-5)
    np.testing.assert_array_equal(unpacked(held["lost"]), level.interventions.lost.sum(axis=1))
    classes, shares = (unpacked(held["histogram"][name]) for name in ("classes", "values"))
    for expert in range(level.experts):
        expected = level.histogram.shares[expert][classes[expert]]
        np.testing.assert_allclose(shares[expert], expected, rtol=1e-6)
    places = unpacked(held["top"]["places"])
    numbers = np.array([*found.recorded, -1])
    np.testing.assert_array_equal(numbers[places], level.top.numbers)
    np.testing.assert_array_equal(unpacked(held["top"]["changed"]), level.top.changed)
    parts = {name: unpacked(each) for name, each in held["parts"].items()}
    ends = parts["counts"].cumsum()
    for end, count, each in zip(ends, parts["counts"], found.recorded.values(), strict=True):
        (part,) = each.contributions
        np.testing.assert_array_equal(parts["experts"][end - count : end], part.experts)
        np.testing.assert_array_equal(parts["logits"][end - count : end], part.logits)


def test_files_of_earlier_releases_have_no_contributions(tmp_path: Path) -> None:
    values = json.loads(_good())
    for each in values["recorded"]:
        del each["contributions"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    found = Exploration.load(tmp_path / "old.json")
    assert payload(found)["levels"][0]["parts"] is None
    assert payload(found)["levels"][0]["top"]["changed"] is not None
    assert (found + pages.linear()).inputs == 400


@pytest.mark.parametrize("name", MADE)
def test_data_file(name: str, tmp_path: Path) -> None:
    found = MADE[name]()
    found.save(tmp_path / "explore.json")
    again = Exploration.load(tmp_path / "explore.json")
    assert again.html() == found.html()
    values = json.loads((tmp_path / "explore.json").read_text("ascii"))
    assert (values["format"], values["version"]) == ("tensormoe exploration", 1)
    figures = values["levels"][0]["figures"]
    if found.levels[0].specialization is not None:
        expected = found.levels[0].specialization.divergence
        np.testing.assert_array_equal(unpacked(figures["divergence"]), expected)
    # what was saved goes on: it adds up with another batch
    assert (again + found).inputs == 2 * found.inputs


def damaged(change: str, value: Any) -> bytes:
    made = json.loads(_good())
    at = made
    *way, last = change.split(".")
    for key in way:
        at = at[int(key) if key.isdigit() else key]
    at[last] = value
    return json.dumps(made).encode()


def _good() -> bytes:
    from tensormoe.analysis._explorer._file import to_json

    return to_json(pages.linear())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\x00", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[]", "its format is another"),
        (b'{"format": "tensormoe exploration", "version": 2}', "must have version 1; got 2"),
        (damaged("levels", []), "damaged"),
        (damaged("levels.0.load.mass.shape", [3]), "damaged"),
        (damaged("levels.0.load.mass.dtype", "object"), "damaged"),
        (damaged("levels.0.top.numbers.base64", "??"), "damaged"),
        (damaged("levels.0.histogram.inputs", None), "damaged"),
        (damaged("recorded", []), "is not recorded"),
        (damaged("recorded.0.content", {"image": "http://x"}), "not a PNG"),
        (damaged("recorded.0.contributions", [1, 2]), "damaged"),
        (damaged("recorded.0.contributions.0.experts", packed(np.array([0, 16]))), "do not fit"),
        (damaged("recorded.0.contributions.0.logits", packed(np.ones((1, 5)))), "do not fit"),
        (damaged("class_names", ["a", 1, "c", "d", "e"]), "damaged"),
        (damaged("inputs", -1), "damaged"),
    ],
)
def test_files_that_are_none(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "explore.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        Exploration.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be read"):
        Exploration.load(tmp_path / "none.json")
    (tmp_path / "a.html").mkdir()
    with pytest.raises(SpecError, match="is a folder"):
        pages.bare().save(tmp_path / "a.html")


def test_thousands_of_experts_fit(tmp_path: Path) -> None:
    found = pages.many(rows=1024)
    assert found.experts == (4096,)
    assert len(found.html()) < 20 * 2**20
    # a notebook gets a few facts instead
    assert "<iframe" not in found._repr_html_()
    assert "4096" in found._repr_html_()


def test_logits_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pages.linear()
    monkeypatch.setattr("tensormoe.analysis._explorer._page._LOGITS", 16 * 5 * 3)
    held = payload(found)
    assert held["logits"] is None
    assert held["levels"][0]["top"]["changed"] is None
    monkeypatch.setattr("tensormoe.analysis._explorer._page._LOGITS", len(found.recorded) * 5)
    held = payload(found)
    slots = held["levels"][0]["top"]["changed"]["shape"][1]
    assert 0 < slots < 8 + 1
    # parts of as many inputs as fit, those that stand first with an expert before others
    counts = unpacked(held["levels"][0]["parts"]["counts"])
    assert 0 < counts[counts > 0].sum() <= len(found.recorded)
    assert (counts < 0).any()
    first = set(found.levels[0].top.numbers[:, 0].tolist()) - {-1}
    places = [place for place, number in enumerate(found.recorded) if number in first]
    assert (counts[places] >= 0).sum() > len(places) // 2
    monkeypatch.setattr("tensormoe.analysis._explorer._page._CLASSES", 2)
    assert payload(found)["levels"][0]["histogram"]["classes"]["shape"] == [16, 2]


def test_long_texts_are_cut() -> None:
    found = explore_coefficients(
        np.ones((1, 1)), [0], examples=Texts(["x" * 10**6]), class_names=["y" * 10**6]
    )
    assert len(found.recorded[0].content["text"]) == 2000
    assert found.recorded[0].content["text"].endswith("…")
    assert len(found.class_names[0]) == 200
    assert len(found.html()) < 10**5


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_images_are_pngs(channels: int | None) -> None:
    from PIL import Image

    shape = (2, 5, 7) if channels is None else (2, 5, 7, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype("uint8")
    uri = Images(pixels).content(1)["image"]
    opened = np.asarray(Image.open(BytesIO(b64decode(uri.split(",")[1]))))
    np.testing.assert_array_equal(opened, np.squeeze(pixels[1]))
    # floats, and a range of their own
    again = Images(pixels / 255.0 * 4 - 2, -2.0, 2.0).content(1)["image"]
    assert again == uri


def test_large_images_are_averaged_down() -> None:
    from PIL import Image

    pixels = np.zeros((1, 130, 100), "uint8")
    pixels[:, :65] = 200
    uri = Images(pixels, size=64).content(0)["image"]
    opened = np.asarray(Image.open(BytesIO(b64decode(uri.split(",")[1]))))
    assert opened.shape == (44, 34)
    assert (opened[0, 0], opened[-1, -1]) == (200, 0)
    assert png(np.zeros((1, 1, 1), "uint8"))[:4] == b"\x89PNG"


def test_neuronpedia() -> None:
    found = pages.tokens()
    made = neuronpedia_batches(
        found, model_id="gpt2-small", layer=5, source_set="experts", batch=8, dataset="words"
    )
    assert [len(each["features"]) for each in made] == [8, 4]
    assert set(made[0]) == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    level = found.levels[0]
    for expert, feature in enumerate(made[0]["features"] + made[1]["features"]):
        assert feature["feature_index"] == expert
        assert feature["frac_nonzero"] == level.load.frequency[expert]
        for slot, each in enumerate(feature["activations"]):
            assert len(each["tokens"]) == len(each["values"])
            at = each["qualifying_token_index"]
            assert each["values"][at] == pytest.approx(level.top.values[expert, slot], rel=1e-6)
            assert each["bin_max"] == pytest.approx(level.top.values[expert, 0])
    json.dumps(made)
    with pytest.raises(SpecError, match="an exploration of tokens"):
        neuronpedia_batches(pages.bare(), model_id="m", layer=0, source_set="s")
    with pytest.raises(SpecError, match="level must lie in"):
        neuronpedia_batches(found, model_id="m", layer=0, source_set="s", level=1)

"""The page's files: what they offer is what the core knows, and nothing comes from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.resources import files

from tensormoe.choosing import request_schema
from tensormoe.choosing._request import Request

FOLDER = files("tensormoe.choosing").joinpath("page")
SOURCES = {each.name: each.read_text("utf-8") for each in FOLDER.iterdir() if each.is_file()}
# fields of the page's own words: what the budget is made of, and what only the picture knows
OWN = {"parameters", "flops", "memory", "time", "cost", "front", "reset", "share"}


class _Form(HTMLParser):
    """Fields with their choices, identifiers, labels, and what is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: set[str] = set()
        self.choices: dict[str, list[str]] = {}
        self.labels: set[str] = set()
        self.ids: list[str] = []
        self.described: set[str] = set()
        self.loaded: list[str] = []
        self._select = ""
        self._label = 0
        self.inside: set[str] = set()
        self._option: str | None = None
        self.feed(SOURCES["index.html"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.ids.append(values["id"])
        if tag in ("input", "select"):
            self.fields.add(values.get("name", values["id"]))
            self._select = values["id"] if tag == "select" else ""
            if self._label:
                self.inside.add(values["id"])
        if tag == "option":
            self._option = values.get("value")
            self.choices.setdefault(self._select, [])
            if self._option is not None:
                self.choices[self._select].append(self._option)
        if tag == "label":
            self._label += 1
            self.labels.add(values.get("for", ""))
        for name in ("aria-describedby", "aria-labelledby"):
            self.described |= {*values.get(name, "").split()}
        self.loaded += [values[name] for name in ("src", "href") if name in values]

    def handle_endtag(self, tag: str) -> None:
        self._label -= tag == "label"

    def handle_data(self, data: str) -> None:
        if self._option is None and self.lasttag == "option" and data.strip():
            self.choices[self._select].append(data.strip())


FORM = _Form()


def test_every_field_of_a_request_is_on_the_page() -> None:
    known = set(request_schema()["properties"])
    # bonds are for those who write requests; parts are the page's own affair
    assert FORM.fields - OWN == known - {"bonds", "parts", "factorizations"}
    assert 'data-field="factorizations"' in SOURCES["index.html"]
    assert known == {
        {"names": "factorizations"}.get(name, name) for name in Request.__dataclass_fields__
    } | {"gate_in_budget"}


def test_choices_are_those_of_the_core() -> None:
    fields = request_schema()["properties"]
    for name in ("kind", "objective", "dtype"):
        assert FORM.choices[name] == [each for each in fields[name]["enum"] if each], name
    [devices] = [each["examples"] for each in fields["device"]["anyOf"] if "examples" in each]
    assert sorted(FORM.choices["device"]) == sorted(["", *devices])
    gates = ["entmax", "sparsemax", "softmax", "top_k", "relu_top_k", "none"]
    assert FORM.choices["gate"] == gates


def test_every_field_has_a_label_and_ids_are_unique() -> None:
    assert len(FORM.ids) == len({*FORM.ids})
    fields = {name for name in FORM.fields if name not in ("reset", "share")}
    assert fields <= FORM.labels | FORM.inside
    assert FORM.described <= {*FORM.ids}


def test_nothing_comes_from_elsewhere() -> None:
    for address in FORM.loaded:
        assert address.startswith("#") or address in SOURCES, address
    for name, text in SOURCES.items():
        found = re.findall(r"https?://[\w./]+", text)
        assert {*found} <= {"http://www.w3.org/2000/svg"}, name


def test_nothing_that_data_say_becomes_markup_or_code() -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', SOURCES["index.html"])
    assert policy is not None
    assert "'unsafe-" not in policy[1].replace("'wasm-unsafe-eval'", "")
    assert policy[1].startswith("default-src 'none'; script-src 'self'")
    for name, text in SOURCES.items():
        if name.endswith(".js"):
            for word in (
                "innerHTML",
                "outerHTML",
                "insertAdjacent",
                "eval(",
                "Function(",
                "document.write",
            ):
                assert word not in text, (name, word)
    assert not re.search(r"<script(?! type=\"module\" src=)|\son\w+=|style=", SOURCES["index.html"])

"""Use of the page as a reader's, and what must come of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page

from tests.docs._browser import LOOKS, Look
from tests.explorer._use import seen

READY, UPDATE = 5000, 150
ATTACK = "<img src=x onerror='window.broken=1'>"
# a value that cannot be, for every field that is typed into
IMPOSSIBLE = {
    "in_features": "0",
    "hidden_features": "many",
    "out_features": "-3",
    "experts": "16x",
    "top_k": "none",
    "batch": "1.5",
    "devices": "0",
    "rank": "4",
    "parameters": "-3",
    "flops": "2Q",
    "memory": "64 loaves",
    "time": "soon",
}
QUESTIONS = (("768", "768", "512"), ("512", "256", "16x8"), ("300", "1000", "4x4x4"))


def check(browser: Browser, address: str, engine: str, pictures: Path) -> Iterator[str]:
    """Problems of the page with an engine."""
    yield from speed(browser, address, engine)
    yield from looks(browser, address, pictures)
    yield from ranks(browser, address)
    yield from shared(browser, address)
    yield from copied(browser, address)
    yield from hostile(browser, address)
    yield from impossible(browser, address)
    yield from by_keys(browser, address)
    yield from remedies(browser, address)
    if engine == "pyodide":
        yield from offline(browser, address)


@contextmanager
def opened_page(
    browser: Browser, address: str, look: Look = LOOKS[1], hash: str = ""
) -> Iterator[tuple[Page, list[str]]]:
    """The page when it is ready, in a profile of its own, and what has gone wrong in it so far."""
    context = browser.new_context(
        color_scheme=look.scheme, viewport={"width": look.width, "height": 900}
    )
    problems: list[str] = []
    try:
        page = watched(context, problems)
        page.goto(address + hash)
        settle(page)
        yield page, problems
    finally:
        context.close()


def watched(context: BrowserContext, problems: list[str]) -> Page:
    """A page whose errors are kept."""
    page = context.new_page()
    page.on("console", lambda it: problems.append(f"console: {it.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    return page


def settle(page: Page, fronts: bool = False) -> None:
    """Wait for the answer to what the form says; the policy lets no string be run in the page."""
    for _ in range(4800):
        page.wait_for_timeout(25)
        if page.evaluate(
            "performance.getEntriesByName('explorer-ready').length && "
            "document.getElementById('results').ariaBusy === 'false'"
        ) and (
            not fronts or page.evaluate("performance.getEntriesByName('explorer-fronts').length")
        ):
            return
    raise AssertionError(f"no answer: {page.inner_text('#status')}")


def entries(page: Page, name: str) -> list[float]:
    """Durations in milliseconds."""
    found = page.evaluate("name => performance.getEntriesByName(name).map(e => e.duration)", name)
    return [float(each) for each in found]


def speed(browser: Browser, address: str, engine: str) -> Iterator[str]:
    """Time until the page is ready, from an empty cache, and until a change is shown."""
    with opened_page(browser, address) as (page, problems):
        ready = page.evaluate("performance.getEntriesByName('explorer-ready')[0].startTime")
        settle(page, fronts=True)
        for kind in ("layer", "mlp", "gated", "embedding"):
            page.select_option("#kind", kind)
            settle(page)
            page.evaluate("performance.clearMeasures()")
            for size in (640, 704, 832, 896, 960):
                page.fill("#in_features", str(size))
                settle(page)
                # fronts of the size before are done, or are not begun
                page.wait_for_timeout(200)
            update, whole = (median(entries(page, f"explorer-{it}")) for it in ("update", "whole"))
            print(
                f"{engine}, {kind}: ready after {ready:.0f} ms; a change is shown after "
                f"{update:.0f} ms, all of it after {whole:.0f} ms",
                flush=True,
            )
            if update > UPDATE:
                yield f"{kind}: a change is shown after {update:.0f} ms"
        if ready > READY:
            yield f"ready after {ready:.0f} ms"
        yield from problems


def looks(browser: Browser, address: str, pictures: Path) -> Iterator[str]:
    """Widths, colours and names of everything that can be used."""
    pictures.mkdir(parents=True, exist_ok=True)
    for look in LOOKS:
        with opened_page(browser, address, look, "#experts=512&devices=4&device=h100") as made:
            page, problems = made
            settle(page, fronts=True)
            page.screenshot(path=pictures / f"{look}.png", full_page=True)
            yield from seen(page, look, problems)


def ranks(browser: Browser, address: str) -> Iterator[str]:
    """Ranks are those of the command line."""
    with opened_page(browser, address) as (page, problems):
        for rows, columns, experts in QUESTIONS:
            page.fill("#in_features", rows)
            page.fill("#out_features", columns)
            page.fill("#experts", experts)
            page.select_option("#budget", "mlp")
            settle(page)
            said = command_line(rows, columns, experts, "--budget", "mlp")
            for each in said["rows"]:
                name, rank = each["name"], each.get("rank")
                row = page.locator(f'#rows tr[data-name="{name}"]')
                shown = row.locator("[data-rank]")
                found = shown.get_attribute("data-rank") if shown.count() else "too large"
                expected = "too large" if not each["feasible"] else words(rank)
                if found != expected:
                    yield f"{rows} × {columns} × {experts}: {name} has rank {found}, not {expected}"
            best = page.inner_text("#best").partition(":")[0].removeprefix("★ ")
            if not page.locator(f'#rows tr.best[data-name="{best}"]').count():
                yield f"{best} is not marked"
        yield from problems


def command_line(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tensormoe.cli", "rank", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def words(rank: Any) -> str:
    """A rank as the page writes it."""
    return "–" if rank is None else ",".join(map(str, rank if isinstance(rank, list) else [rank]))


def state(page: Page) -> dict[str, Any]:
    """Texts of the form and of the results."""
    fields = page.evaluate(
        "[...document.querySelectorAll('#form input[name], #form select')].map("
        "it => [it.id, it.type === 'checkbox' ? it.checked : it.value])"
    )
    return {
        "fields": dict(fields),
        "rows": page.inner_text("#rows"),
        "title": page.inner_text("#details-title"),
        "code": page.inner_text("#code"),
    }


def shared(browser: Browser, address: str) -> Iterator[str]:
    """A link opens the same state elsewhere; back and forward go through its history."""
    with opened_page(browser, address) as (page, problems):
        first = state(page)
        page.fill("#in_features", "640")
        page.press("#in_features", "Enter")
        settle(page)
        second = state(page)
        page.select_option("#budget", "limits")
        page.fill("#parameters", "2M")
        page.uncheck("#bias")
        page.select_option("#dtype", "bfloat16")
        settle(page)
        page.locator('[data-select="tucker"]').click()
        settle(page, fronts=True)
        last = state(page)
        if "Tucker" not in last["title"]:
            yield f"a row was chosen, and {last['title']} is shown"
        with opened_page(browser, page.url) as (other, more):
            found = state(other)
            for key, value in last.items():
                if found[key] != value:
                    yield f"the link opens other {key}: {found[key]}"
            yield from more
        for _ in range(5):
            page.go_back()
            settle(page)
            page.wait_for_timeout(100)
            if state(page) == second:
                break
        else:
            yield "back does not lead to the state before"
        page.go_back()
        page.wait_for_timeout(200)
        settle(page)
        if state(page) != first:
            yield "back does not lead to the start"
        page.go_forward()
        page.wait_for_timeout(200)
        settle(page)
        if state(page) != second:
            yield "forward does not lead to the state after"
        yield from problems


def copied(browser: Browser, address: str) -> Iterator[str]:
    """The code for PyTorch is copied, and runs."""
    with opened_page(
        browser, address, hash="#in_features=64&out_features=48&experts=4x8&batch=3"
    ) as made:
        page, problems = made
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator('[data-framework="pytorch"]').click()
        page.locator("#copy").click()
        page.wait_for_timeout(100)
        code = str(page.evaluate("navigator.clipboard.readText()"))
        done = subprocess.run(
            [sys.executable, "-c", code + "\nprint(tuple(y.shape))"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        if done.stdout.strip() != "(3, 48)":
            yield f"the copied code prints {done.stdout} {done.stderr[-300:]}"
        yield from problems


def hostile(browser: Browser, address: str) -> Iterator[str]:
    """Nothing that is typed or shared runs, and no element comes of it."""
    with opened_page(browser, address) as (page, problems):
        for name in IMPOSSIBLE:
            if name in ("parameters", "flops", "memory", "time"):
                page.select_option("#budget", "limits")
            page.fill(f"#{name}", ATTACK)
            settle(page)
        link = "&".join(
            f"{name}={ATTACK}" for name in ("kind", "gate", "device", "experts", "bias")
        )
        page.goto("about:blank")
        page.goto(f"{address}#{link}&factorizations={ATTACK}&selected={ATTACK}&__proto__=1&no=1")
        # an impossible start is no state that is ready
        page.wait_for_timeout(300)
        for _ in range(600):
            if page.locator(".error:visible").count():
                break
            page.wait_for_timeout(50)
        if page.evaluate("window.broken"):
            yield "what was typed ran"
        if page.locator("img[src=x]").count():
            yield "what was typed became an element"
        if ATTACK not in page.inner_text("#error-experts"):
            yield "the message does not show what was given"
        yield from problems


def impossible(browser: Browser, address: str) -> Iterator[str]:
    """Every impossible value has a message that belongs to its field."""
    with opened_page(browser, address) as (page, problems):
        for name, value in IMPOSSIBLE.items():
            limit = name in ("parameters", "flops", "memory", "time")
            page.select_option("#budget", "limits" if limit else "")
            before = page.input_value(f"#{name}")
            page.fill(f"#{name}", value)
            settle(page)
            field = page.locator(f"#{name}")
            described = (field.get_attribute("aria-describedby") or "").split()
            error = f"error-{'budget' if limit else name}"
            if field.get_attribute("aria-invalid") != "true" or error not in described:
                yield f"{name} = {value!r} has no message beside it"
            elif name.split("_")[0] not in page.inner_text(f"#{error}"):
                yield f"{name} = {value!r} says {page.inner_text(f'#{error}')}"
            page.fill(f"#{name}", before)
            settle(page)
            if page.locator("form .error").count():
                yield f"the message on {name} stays"
        yield from problems


def by_keys(browser: Browser, address: str) -> Iterator[str]:
    """Results, marks and rows without a mouse."""
    with opened_page(browser, address) as (page, problems):
        settle(page, fronts=True)
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") != "skip":
            yield "the first key does not reach the link to the results"
        for name, selector in (("cp", '[data-series="cp"]'), ("tucker", '[data-select="tucker"]')):
            page.focus(selector)
            page.keyboard.press("Enter")
            settle(page)
            if page.input_value("#selected") != name:
                yield f"Enter on {name} chooses {page.input_value('#selected')}"
            if (
                page.evaluate(
                    "document.activeElement.matches(arguments[0])".replace(
                        "arguments[0]", json.dumps(selector)
                    )
                )
                is not True
            ):
                yield f"the focus is lost after Enter on {name}"
        settle(page, fronts=True)
        page.wait_for_timeout(3000)
        page.select_option("#front", index=0)
        settle(page)
        if not page.input_value("#rank"):
            yield "a rank of the front is not taken over"
        page.locator('[data-aim="expert_span"]').click()
        settle(page)
        if page.input_value("#objective") != "expert_span":
            yield "the objective does not follow its word"
        yield from problems


def remedies(browser: Browser, address: str) -> Iterator[str]:
    """One click makes a factorization possible that was too large."""
    with opened_page(
        browser, address, hash="#in_features=64&out_features=64&experts=512&budget=linear"
    ) as made:
        page, problems = made
        if page.inner_text("#best") != "Nothing fits the budget.":
            yield f"a budget that nothing fits says {page.inner_text('#best')!r}"
        count = page.locator('#rows tr[data-name="cp"] button').count()
        if count != 3:
            yield f"cp has {count} remedies"
        for index in range(count):
            page.locator('#rows tr[data-name="cp"] button').nth(index).click()
            settle(page)
            if not page.locator('#rows tr[data-name="cp"] [data-rank]').count():
                yield f"remedy {index} leaves cp too large"
            page.go_back()
            page.wait_for_timeout(200)
            settle(page)
        yield from problems


def offline(browser: Browser, address: str) -> Iterator[str]:
    """Once it is loaded, the page needs no network."""
    context = browser.new_context()
    problems: list[str] = []
    page = watched(context, problems)
    page.goto(address)
    settle(page)
    for _ in range(400):
        if page.evaluate("navigator.serviceWorker.controller !== null"):
            break
        page.wait_for_timeout(50)
    else:
        yield "nothing keeps the page"
    context.set_offline(True)
    page.reload()
    settle(page)
    page.fill("#in_features", "96")
    settle(page)
    if page.locator("#rows [data-rank]").count() == 0:
        yield "no rows without a network"
    ready = page.evaluate("performance.getEntriesByName('explorer-ready')[0].startTime")
    print(f"pyodide, without a network: ready after {ready:.0f} ms")
    context.close()
    yield from problems

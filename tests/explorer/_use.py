"""Use of a page as a reader's, and what must come of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, Page

from tests.docs._browser import LOOKS, NARROW, Look
from tests.explorer._pages import hostile as hostile_exploration
from tests.explorer._pages import levels, linear

MOST_BYTES, OPENS, LONGEST_TASK = 20 * 2**20, 2000, 200

# WCAG's contrast of every visible text with the nearest ground that is painted behind it
PROBE = Path(__file__).with_name("probe.js").read_text("utf-8")
TASKS = """
window.tasks = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.tasks.push(entry.duration);
}).observe({ entryTypes: ["longtask"] });
"""


@contextmanager
def opened_page(
    browser: Browser, path: Path, width: int = 1300, scheme: str = "light", script: str = ""
) -> Iterator[tuple[Page, list[str]]]:
    """The page from disk, and what has gone wrong in it so far."""
    context = browser.new_context(
        color_scheme=scheme,  # type: ignore[arg-type]
        viewport={"width": width, "height": 900},
        offline=True,
    )
    problems: list[str] = []
    page = context.new_page()
    page.on("console", lambda it: problems.append(f"console: {it.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("request", lambda it: it.url[:5] not in ("file:", "data:") and problems.append(it.url))
    if script:
        page.add_init_script(script)
    page.goto(path.as_uri(), wait_until="load")
    try:
        yield page, problems
    finally:
        context.close()


def looks(browser: Browser, path: Path, pictures: Path) -> Iterator[str]:
    """Widths, colours and names of everything that can be used."""
    pictures.mkdir(parents=True, exist_ok=True)
    for look in LOOKS:
        with opened_page(browser, path, look.width, look.scheme) as (page, problems):
            page.screenshot(path=pictures / f"{look}.png", full_page=True)
            yield from seen(page, look, problems)


def seen(page: Page, look: Look, problems: list[str]) -> Iterator[str]:
    """Contrast, width and names of fields of a page in one look."""
    for problem in [*page.evaluate(PROBE), *problems]:
        yield f"{problem} ({look})"
    wide = page.evaluate("document.documentElement.scrollWidth")
    if wide > look.width:
        yield f"{wide} pixels wide ({look})"
    if look.width == NARROW:
        return
    for field in page.locator("button, select, input, [tabindex='0']").all():
        if field.is_visible() and not named(field):
            yield f"{field.evaluate('it => it.outerHTML')[:80]} has no name"


def named(field: Any) -> bool:
    """Whether a screen reader has something to say of it."""
    return bool(
        field.evaluate(
            "it => it.getAttribute('aria-label') || it.getAttribute('aria-labelledby') ||"
            " it.textContent.trim() && it.tagName === 'BUTTON' || it.labels?.length"
        )
    )


def edits(browser: Browser, path: Path) -> Iterator[str]:
    """An expert is found, opened and silenced, and the preview is NumPy's."""
    found = linear()
    level = found.levels[0]
    with opened_page(browser, path) as (page, problems):
        page.fill("#search", "bee")
        shown = int(page.inner_text("#count").split()[0])
        bees = int((level.histogram.mass.argmax(axis=1) == 1)[level.load.mass > 0].sum())
        if shown != bees:
            yield f"search shows {shown} experts of bees; {bees} are"
        page.fill("#search", "15")
        if page.locator(".option:visible").count() != 1:
            yield "search by number does not show one expert"
        page.locator("#expert-15").click()
        if "No input uses this expert" not in page.inner_text("#top"):
            yield "an unused expert has top inputs"
        page.fill("#search", "")
        for expert in range(level.experts - 1):
            page.fill("#search", str(expert))
            page.locator(f"#expert-{expert}").click()
            page.click("#silence")
            for scale in (0.0, 2.0):
                page.locator("#scale").fill(str(scale))
                changed = page.locator(".inputs li.changed").count()
                if changed != (expected := changes(level, found, expert, {expert: scale})):
                    yield f"expert {expert} times {scale} changes {changed}; NumPy says {expected}"
            page.click("#reset")
        page.click("#silence")
        if f"{int(level.interventions.lost[expert].sum())} right" not in preview(page):
            yield f"the preview says {preview(page)!r}"
        page.click("#reset")
        if page.locator(".inputs li.changed").count() or page.is_visible("#edits-part"):
            yield "reset changes predictions"
        yield from several(page, found)
        page.fill("#search", "")
        page.select_option("#sort", "excess")
        first = int(page.locator(".option").first.get_attribute("data-expert") or -1)
        if first != int(np.nanargmax(level.specialization.excess)):
            yield f"sorted by specialisation, expert {first} is first"
        yield from problems


def several(page: Page, found: Any) -> Iterator[str]:
    """Edits of several experts add up, are listed, and are taken back one by one."""
    level, wanted = found.levels[0], {2: 0.0, 5: 4.0, 9: 0.0, 11: 2.5}
    for expert, scale in wanted.items():
        page.fill("#search", str(expert))
        page.locator(f"#expert-{expert}").click()
        page.locator("#scale").fill(str(scale))
    for step in range(2):
        for expert in (0, 2, 9):
            page.fill("#search", str(expert))
            page.locator(f"#expert-{expert}").click()
            changed = page.locator(".inputs li.changed").count()
            if changed != (expected := changes(level, found, expert, wanted)):
                yield f"edits {wanted} change {changed} of expert {expert}; NumPy says {expected}"
        listed = page.locator("#edits li").all_inner_texts()
        if len(listed) != len(wanted):
            yield f"edits are listed as {listed}"
        moved = sum(
            edited(each, wanted) != np.argmax(each.logits) for each in found.recorded.values()
        )
        right = sum(edited(each, wanted) == each.label for each in found.recorded.values())
        if f"it changes for {moved}." not in page.inner_text("#preview"):
            yield f"{moved} stored inputs change; the page says {page.inner_text('#preview')!r}"
        if f"and {right} are." not in page.inner_text("#preview"):
            yield f"{right} stored inputs are right; the page says {page.inner_text('#preview')!r}"
        if step == 0:
            page.get_by_role("button", name="remove the edit of expert 5").click()
            del wanted[5]
    page.get_by_role("button", name="expert 11, times 2.5").click()
    if page.inner_text("#card-title") != "Expert 11" or page.input_value("#scale") != "2.5":
        yield "an edit does not open its expert"
    page.click("#reset-all")
    if page.locator("#edits li").count() or page.locator(".inputs li.changed").count():
        yield "removing all edits leaves some"


def preview(page: Page) -> str:
    """The sentence on the edits."""
    return page.inner_text("#preview")


def edited(recorded: Any, scales: dict[int, float]) -> int:
    """The prediction for a recorded input with experts scaled."""
    (part,) = recorded.contributions
    factors = np.array([scales.get(int(expert), 1.0) - 1.0 for expert in part.experts])
    return int((np.array(recorded.logits) + factors @ part.logits).argmax())


def changes(level: Any, found: Any, expert: int, scales: dict[int, float]) -> int:
    """Top and affected inputs whose prediction changes, from the value."""
    count = 0
    for inputs in (level.top, level.affected):
        for number in inputs.numbers[expert]:
            if number >= 0:
                recorded = found.recorded[int(number)]
                count += int(edited(recorded, scales) != np.argmax(recorded.logits))
    return count


def by_keys(browser: Browser, path: Path) -> Iterator[str]:
    """The list, the card and the search without a mouse."""
    with opened_page(browser, path) as (page, problems):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") != "skip":
            yield "the first key does not reach the link to the card"
        page.focus("#list")
        before = page.inner_text("#card-title")
        page.keyboard.press("ArrowDown")
        second = page.inner_text("#card-title")
        page.keyboard.press("End")
        last = page.inner_text("#card-title")
        if len({before, second, last}) != 3:
            yield f"keys move from {before} to {second} to {last}"
        active = page.get_attribute("#list", "aria-activedescendant") or ""
        if f"Expert {active.removeprefix('expert-')}" != last:
            yield f"the active option is {active}, and the card {last}"
        page.keyboard.press("Enter")
        if page.evaluate("document.activeElement.id") != "card":
            yield "Enter does not move to the card"
        yield from problems


def grids(browser: Browser, path: Path) -> Iterator[str]:
    """Levels, their grid, and scales of a model that is not linear."""
    found = levels()
    with opened_page(browser, path) as (page, problems):
        page.select_option("#level", "1")
        if page.inner_text("#card-title") != f"Expert {busiest(found.levels[1])} of level 1":
            yield f"level 1 starts with {page.inner_text('#card-title')}"
        if page.is_visible("#scale"):
            yield "a model that is not linear has a slider"
        for expert in range(found.experts[1]):
            page.locator(f"#expert-{expert}").click()
            for index, scale in enumerate(found.scales):
                page.select_option("#scale-choice", f"{scale:g}")
                shown = page.locator("#top li.changed").count()
                top = found.levels[1].top
                expected = sum(
                    int(
                        top.changed[expert, slot, index].argmax()
                        != np.argmax(found.recorded[int(number)].logits)
                    )
                    for slot, number in enumerate(top.numbers[expert])
                )
                if shown != expected:
                    yield f"expert {expert} times {scale} changes {shown}; NumPy says {expected}"
        if not page.is_visible("#alone") or page.locator("#edits li").count() > 1:
            yield "experts of a model that is not linear are scaled together"
        page.focus("#grid")
        for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
            page.keyboard.press(key)
        share = f"{100 * found.grids[0][1, 2]:.1f}%"
        if page.inner_text("#cell") != f"Expert 1 of level 0 with expert 2 of level 1: {share}":
            yield f"the cell says {page.inner_text('#cell')}"
        page.keyboard.press("Enter")
        if page.inner_text("#card-title") != "Expert 2 of level 1":
            yield f"Enter in the grid opens {page.inner_text('#card-title')}"
        yield from problems


def busiest(level: Any) -> int:
    """The expert of the largest load."""
    return int(level.load.mass.argmax())


def in_notebook(browser: Browser, folder: Path) -> Iterator[str]:
    """A notebook shows the page in a frame that cannot reach it."""
    for found in (linear(), hostile_exploration()):
        path = folder / "notebook.html"
        path.write_bytes(f"<title>t</title>{found._repr_html_()}".encode("utf-8", "replace"))
        with opened_page(browser, path) as (page, problems):
            title = page.frame_locator("iframe").locator("#card-title").inner_text()
            if not title.startswith("Expert"):
                yield f"the frame shows {title!r}"
            if page.evaluate("document.querySelector('iframe').contentDocument") is not None:
                yield "the frame shares the notebook's origin"
            yield from problems


def hostile(browser: Browser, path: Path) -> Iterator[str]:
    """Nothing of the data runs, and no element comes of it."""
    with opened_page(browser, path) as (page, problems):
        if page.evaluate("window.broken"):
            yield "a name ran"
        if page.locator("img").count():
            yield "a name became an element"
        if "<img src=x" not in page.inner_text("#title"):
            yield "the title is not shown as it is"
        if "<img src=x" not in page.inner_text("#top"):
            yield "cells are not shown as they are"
        yield from problems


def speed(browser: Browser, path: Path, pictures: Path) -> Iterator[str]:
    """Size, time to open, and the longest task while the list is scrolled and sorted."""
    pictures.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size
    if size > MOST_BYTES:
        yield f"{size:,} bytes"
    with opened_page(browser, path, script=TASKS) as (page, problems):
        ready = page.evaluate("performance.getEntriesByName('explorer-ready')[0].startTime")
        if ready > OPENS:
            yield f"ready after {ready:.0f} ms"
        page.wait_for_timeout(300)
        page.evaluate("window.tasks.length = 0")
        page.locator("#list").hover()
        for _ in range(20):
            page.mouse.wheel(0, 4000)
            page.wait_for_timeout(30)
        page.evaluate("document.getElementById('list').scrollTop = 1e9")
        page.wait_for_timeout(100)
        if page.locator(".option:visible").count() > 60:
            yield "the list holds all experts"
        last = page.locator(".option:visible").last.get_attribute("aria-posinset")
        scrolled = max(page.evaluate("window.tasks"), default=0)
        page.locator("#list").focus()
        page.keyboard.press("End")
        page.fill("#search", "77")
        page.select_option("#sort", "excess")
        page.click("#silence")
        for expert in range(1000, 1040):
            page.fill("#search", str(expert))
            page.locator(f"#expert-{expert}").click()
            page.click("#silence")
        page.wait_for_timeout(200)
        used = max(page.evaluate("window.tasks"), default=0)
        for what, longest in (("scrolling", scrolled), ("use", used)):
            if longest > LONGEST_TASK:
                yield f"a task of {longest:.0f} ms while {what}"
        print(
            f"4,096 experts: {size / 1e6:.1f} MB, ready after {ready:.0f} ms; longest task above "
            f"50 ms: {scrolled:.0f} ms while scrolling, {used:.0f} ms in use"
        )
        if last != "4096":
            yield f"the last row of the list is {last}"
        page.screenshot(path=pictures / "1300-light.png", full_page=True)
        yield from problems

"""The page in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex

from mtl_lightning.callbacks import ParetoFrontCallback
from mtl_lightning.palette import ALONE, EARLIER, GROUPS, INK, MODEL, PREFERENCE, channels
from mtl_lightning.report import page, read_run, write_page
from mtl_lightning.report.reading import Run

NAMES = ("depth&amp;<b>", "<!--<script>alert(1)", '"quoted\\${x}')
_EMPTY = Run(Path("/runs/x"), False, {}, (), (), (), None, (), {}, (), ())


class _Page:
    """A page that is open in the browser."""

    def __init__(self, browser: Any, run: Run, folder: Path) -> None:
        self.browser = browser
        browser.get_log("browser")  # what the page before said
        write_page(run, folder / "report.html")
        browser.get((folder / "report.html").as_uri())
        self.wait(
            "document.querySelector('footer') && [...document.querySelectorAll('.chart')].every(c => c.firstChild)"
        )

    def js(self, expression: str) -> Any:
        return self.browser.execute_script(f"return {expression}")

    def wait(self, condition: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 20).until(lambda _: self.js(condition))

    def set(self, selector: str, value: float, event: str = "input") -> None:
        """Move a slider or a selection as a user does."""
        self.browser.execute_script(
            "const node = document.querySelector(arguments[0]); node.value = arguments[1];"
            "node.dispatchEvent(new Event(arguments[2], {bubbles: true}));",
            selector,
            value,
            event,
        )

    def press(self, selector: str, key: str) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.browser.find_element(By.CSS_SELECTOR, selector).send_keys(getattr(Keys, key))

    def place(self, selector: str) -> Any:
        return self.js(f'["cx", "cy"].map(n => document.querySelector("{selector}").getAttribute(n))')

    @property
    def picked(self) -> int:
        return int(self.js("document.querySelector('.pick').dataset.subproblem"))

    @property
    def code(self) -> str:
        return str(self.js("document.querySelector('[id^=front] .code code').textContent"))

    def close(self) -> None:
        """Check what holds for every page: nothing on the console, nothing fetched, nothing wider than the window."""
        assert self.browser.get_log("browser") == []
        assert self.js("performance.getEntriesByType('resource').length") == 0
        assert self.js("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    pages: list[_Page] = []

    def open_page(run: Run) -> _Page:
        pages.append(_Page(browser, run, tmp_path))
        return pages[-1]

    yield open_page
    for shown in pages[-1:]:
        shown.close()


def test_the_slider_moves_the_pick(opened: Any, configured: Path) -> None:
    run = read_run(configured)
    (front,) = run.fronts
    shown = opened(run)
    step = json.loads(page(run).partition('id="run">')[2].partition("</script>")[0])["fronts"][0]["choices"][0]["step"]
    models = [model for model in front.models if model.step == step]
    assert len(models) > 2
    codes = set()
    for value in (0.0, 0.13, 0.52, 0.74, 1.0):
        shown.set("input[type=range]", value)
        nearest = min(models, key=lambda model: abs(model.preference[1] - value))
        assert shown.picked == nearest.subproblem
        assert f"preference {front.preference_names[0]}" in shown.js("document.querySelector('.pick').textContent")
        codes.add(shown.code)
        ring = shown.place(".ring")
        assert ring == shown.place(f".model[data-subproblem='{nearest.subproblem}']")
    assert len(codes) > 2
    assert all(".select((" in code for code in codes)


def test_every_model_can_be_picked_by_the_keyboard_and_sets_the_slider(opened: Any, configured: Path) -> None:
    shown = opened(read_run(configured))
    numbers = shown.js("[...document.querySelectorAll('circle.model')].map(c => Number(c.dataset.subproblem))")
    assert len(numbers) > 2
    for number in numbers:
        shown.press(f"circle.model[data-subproblem='{number}']", "ENTER")
        assert shown.picked == number
    shown.press("input[type=range]", "HOME")
    assert (
        shown.js("document.querySelector('input[type=range]').getAttribute('aria-valuetext')")
        == "left 1.00, right 0.00"
    )


def test_a_point_tells_preference_metrics_and_checkpoint(opened: Any, configured: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    shown = opened(read_run(configured))
    assert not shown.js(
        "document.getElementById('tooltip').offsetParent !== null || !document.getElementById('tooltip').hidden"
    )
    point = shown.browser.find_element(By.CSS_SELECTOR, "circle.model")
    ActionChains(shown.browser).move_to_element(point).perform()
    text = shown.js("document.getElementById('tooltip').innerText")
    for part in ("Subproblem", "preference left", "left loss", "accuracy/right", "checkpoints/"):
        assert part in text
    shown.press("body", "ESCAPE")
    assert shown.js("document.getElementById('tooltip').hidden")


def test_sliders_of_three_tasks_stay_on_the_simplex(opened: Any, trained: tuple[Path, list[Any]]) -> None:
    run = read_run(trained[0])
    models = run.fronts[0].models[-10:]
    shown = opened(run)
    sliders = "[...document.querySelectorAll('[id^=front] input[type=range]')]"
    identifiers = shown.js(f"{sliders}.map(s => s.id)")
    assert len(identifiers) == 3
    for corner, identifier in enumerate(identifiers):
        shown.set(f"#{identifier}", 1)
        assert next(model for model in models if model.subproblem == shown.picked).preference[corner] == 1.0
    shown.set(f"#{identifiers[0]}", 0.4)
    assert shown.js(f"{sliders}.map(s => Number(s.value)).reduce((a, b) => a + b)") == pytest.approx(1, abs=0.011)
    # Those that are not moved keep their ratio, here 0 to 1.
    assert shown.js(f"{sliders}.map(s => Number(s.value))") == pytest.approx([0.4, 0.0, 0.6], abs=0.006)
    assert shown.js("document.querySelectorAll('path.track.picked').length") == 1
    before = shown.js("document.querySelector('circle.model').getAttribute('cx')")
    shown.set("[id^=front] .split .split select", 2, "change")
    assert shown.js("document.querySelector('circle.model').getAttribute('cx')") != before


def test_hostile_names_are_shown_as_text(opened: Any, trained: tuple[Path, list[Any]]) -> None:
    shown = opened(read_run(trained[0]))
    text = shown.js("document.body.textContent")
    assert all(name in text for name in NAMES)
    assert shown.js("document.querySelectorAll('b').length") == 0
    assert shown.js("document.querySelectorAll('script').length") == 2


def test_affinity_and_groups_follow_their_sliders(opened: Any, grouped: tuple[Path, list[Any]]) -> None:
    run = read_run(grouped[0])
    shown = opened(run)
    cells = "[...document.querySelectorAll('[id^=affinity] .heat button')].map(c => c.title)"
    last = shown.js(cells)
    assert len(last) == 9
    shown.set("[id^=affinity] input[type=range]", 0)
    assert shown.js(cells) != last
    assert "epoch 0, after 1 batches" in shown.js("document.querySelector('[id^=affinity] output').textContent")
    shown.press("[id^=affinity] .heat button[aria-pressed=true]", "ARROW_DOWN")
    assert f"From {NAMES[1]} to {NAMES[1]}" in shown.js("document.querySelector('[id^=affinity]').textContent")
    assert run.timeline is not None
    for first, _, labels in run.timeline.stretches:
        shown.set("[id^=groups] input[type=range]", first)
        groups = shown.js("[...document.querySelectorAll('[id^=groups] .groups li')].map(one => one.textContent)")
        assert len(groups) == len(set(labels) - {-1})
    assert shown.js("document.querySelector('[id^=cost] tbody td').textContent") == str(int(run.costs[-1]["forwards"]))


def test_a_run_of_one_model_picks_among_its_checkpoints(opened: Any, single: Path) -> None:
    shown = opened(read_run(single))
    assert shown.js("document.querySelectorAll('[id^=front] input[type=range]').length") == 0
    shown.set("[id^=front] select", 3, "change")
    assert "step=3.ckpt" in shown.code
    assert "step=9.ckpt" not in shown.code


def test_a_population_is_spoken_of_where_there_is_one(
    opened: Any, trained: tuple[Path, list[Any]], single: Path
) -> None:
    text = "document.body.innerText"
    assert "means over the models of the population" in opened(read_run(trained[0])).js(text)
    shown = opened(read_run(single))
    assert "As the module logged them." in shown.js(text)
    assert "population" not in shown.js(text)


def test_a_validation_has_one_step_in_all_sections(opened: Any, single: Path) -> None:
    shown = opened(read_run(single))
    assert "epoch 2, after 9 steps" in shown.js("document.querySelector('.pick').innerText")
    assert shown.js("document.querySelector('[id^=metrics] .readout').textContent").startswith("step 9:")
    assert "Epoch 2, after 9 steps." in shown.js("document.querySelector('[id^=checkpoints]').innerText")


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(part) for part in colour.partition("(")[2].rstrip(")").replace(",", " ").split()[:3])


def test_a_model_has_the_colour_that_it_has_in_the_figure(
    opened: Any, configured: Path, single: Path, grouped: tuple[Path, list[Any]]
) -> None:
    run = read_run(configured)
    shown = opened(run)
    circles = "[...document.querySelectorAll('circle.model')]"
    numbers = shown.js(f"{circles}.map(c => Number(c.dataset.subproblem))")
    colours = shown.js(f"{circles}.map(c => getComputedStyle(c).fill)")
    drawn = _drawn_colours([model.preference[0] for model in run.fronts[0].models])
    weights = {model.subproblem: model.preference[0] for model in run.fronts[0].models}
    assert len(set(colours)) > 2
    for number, colour in zip(numbers, colours, strict=True):
        assert _rgb(colour) == pytest.approx(drawn[weights[number]], abs=2)  # one of 256 colours there
    assert drawn[0.0] == channels(PREFERENCE[0])
    shown.js("document.querySelector('[id^=front] input[type=checkbox]').click()")  # make room for all
    others = shown.js("[...document.querySelectorAll('circle.other')].map(c => getComputedStyle(c).fill)")
    assert others
    assert {_rgb(colour) for colour in others} <= {channels(INK), channels(EARLIER)}
    shown = opened(read_run(single))
    assert _rgb(shown.js(f"getComputedStyle({circles}[0]).fill")) == channels(MODEL)
    shown = opened(read_run(grouped[0]))
    swatches = shown.js(
        "[...document.querySelectorAll('[id^=groups] .swatch')].map(one => getComputedStyle(one).backgroundColor)"
    )
    assert swatches
    assert {_rgb(one) for one in swatches} <= {channels(colour) for colour in (*GROUPS, ALONE)}


def _drawn_colours(weights: list[float]) -> dict[float, tuple[int, int, int]]:
    """Return the colours in the figure of the callback of models with these weights of the first task."""
    callback = ParetoFrontCallback({"a": "min", "b": "min"})
    rows = [
        {"epoch": 0, "step": 1, "subproblem": index, "preference/a": weight, "a": weight, "b": -weight}
        for index, weight in enumerate(weights)
    ]
    callback.load_state_dict({"rows": rows, "num_validations": 1})
    *_, points = callback.figure().axes[0].collections
    faces: Any = points.get_facecolor()
    return {weight: channels(to_hex(face)) for weight, face in zip(weights, faces, strict=True)}


@pytest.mark.parametrize(
    "kept", ["fronts", "curves", "affinities", "timeline", "costs", "metrics", "checkpoints", "missing"]
)
def test_each_part_can_stand_alone(
    kept: str, opened: Any, trained: tuple[Path, list[Any]], grouped: tuple[Path, list[Any]]
) -> None:
    source = read_run((trained if kept in ("fronts", "curves") else grouped)[0])
    alone: Any = {kept: getattr(source, kept)}
    shown = opened(replace(_EMPTY, **alone))
    assert shown.js("document.querySelectorAll('section').length") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes_and_a_narrow_window_holds_it(
    scheme: str, opened: Any, browser: Any, configured: Path
) -> None:
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        shown = opened(read_run(configured))
        assert shown.js("innerWidth") == 360
        shown.js("window.found = s => document.querySelector(`section ${s}`) ?? document.querySelector(s)")
        texts = "['.soft', 'h2', '.pick td', 'nav a'].map(s => getComputedStyle(found(s)).color)"
        colours = shown.js(f"{texts}.concat(getComputedStyle(found('section')).backgroundColor)")
        *of_texts, ground = map(_luminance, colours)
        for text in of_texts:
            assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5  # WCAG 2, level AA
        shown.close()
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def _luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour.partition("(")[2].rstrip(")").replace(",", " ").split()[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

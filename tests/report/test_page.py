from __future__ import annotations

import base64
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mtl_lightning.report import page, read_run, write_page
from mtl_lightning.report.page import _literal, _shortest, _thinned
from mtl_lightning.report.reading import Affinity, Checkpoint, Curve, Front, Model, Run, Timeline

HOSTILE = "</script><script>alert(1)</script><!-- ]]> \u2028 {{script}} \udcff &quot;"


class _Parser(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(("", {}))
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        pairs = zip(self.elements, self.texts, strict=True)
        return [(attributes, text) for (name, attributes), text in pairs if name == tag]


def hostile_run() -> Run:
    """A run whose every text is an attack."""
    names = (HOSTILE, HOSTILE + "2")
    model = Model(0, 1, 0, (0.5, 0.5), (1.0, math.nan), (math.inf,), nondominated=True)
    return Run(
        folder=Path("/runs") / HOSTILE.replace("/", "|"),
        has_config=True,
        facts={HOSTILE: HOSTILE},
        fronts=(Front(HOSTILE, dict.fromkeys(names, "min"), names, (HOSTILE + "3",), (model,)),),
        curves=(Curve(HOSTILE, (0,), (1,), (1.0,), (1.0,), {HOSTILE: 1.0}),),
        affinities=(Affinity(HOSTILE, names, (0,), (1,), (((0.1, math.nan), (0.2, -0.1)),)),),
        timeline=Timeline(names, ((0, 3, (0, 0)),), ((1.0, 1.0), (1.0, 1.0))),
        costs=(),
        metrics={HOSTILE: ((1, 2.0),)},
        checkpoints=(Checkpoint(HOSTILE, 0, 1, HOSTILE), Checkpoint("bad", problem=HOSTILE)),
        missing=(HOSTILE,),
    )


def _content(text: str) -> Any:
    ((attributes, data), _) = _Parser(text).all("script")
    assert attributes["type"] == "application/json"
    return json.loads(data)


def test_no_text_of_a_run_is_markup() -> None:
    text = page(hostile_run())
    parsed = _Parser(text)
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    assert "alert(1)</script" not in text
    assert "<!--" not in text
    content = _content(text)
    assert content["metrics"] == {HOSTILE: [[1, 2.0]]}
    assert content["fronts"][0]["models"][0]["objectives"] == [1.0, None]
    text.encode("utf-8")


def test_the_policy_allows_the_one_script_and_no_request() -> None:
    parsed = _Parser(page(hostile_run()))
    policy = next(a["content"] for a, _ in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    script = parsed.all("script")[1][1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
    ]
    for _, attributes in parsed.elements:
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"


def test_equal_runs_give_equal_pages(trained: tuple[Path, list[Any]]) -> None:
    assert page(read_run(trained[0])) == page(read_run(trained[0]))


def test_the_choices_are_the_validations_of_checkpoints_the_best_first(configured: Path, single: Path) -> None:
    (front,) = _content(page(read_run(single)))["fronts"]
    assert [(one["step"], one["path"]) for one in front["choices"]] == [
        (9, "checkpoints/last.ckpt"),
        (9, "checkpoints/step=9.ckpt"),
        (6, "checkpoints/step=6.ckpt"),
        (3, "checkpoints/step=3.ckpt"),
    ]
    run = read_run(configured)
    (front,) = _content(page(run))["fronts"]
    volumes = dict(zip(run.curves[0].steps, run.curves[0].latest, strict=True))
    assert front["choices"][0]["volume"] == volumes[front["choices"][0]["step"]]
    # Another hypervolume, another order: that of the earliest validation is now the largest.
    curve = replace(run.curves[0], latest=tuple(9.0 - value for value in range(len(run.curves[0].steps))))
    steps = [one["step"] for one in _content(page(replace(run, curves=(curve,))))["fronts"][0]["choices"]]
    assert steps == sorted(steps)


def test_a_run_without_checkpoints_shows_its_latest_validation(trained: tuple[Path, list[Any]]) -> None:
    (front,) = _content(page(replace(read_run(trained[0]), checkpoints=())))["fronts"]
    assert [(one["step"], one["path"]) for one in front["choices"]] == [(9, None)]


def test_a_long_run_is_thinned_but_its_front_is_not() -> None:
    models = tuple(
        Model(epoch, epoch, 0, (0.5, 0.5), (float(epoch), float(-epoch)), (), nondominated=epoch % 100 == 0)
        for epoch in range(20_000)
    )
    front = Front("front", {"a": "min", "b": "min"}, ("a", "b"), (), models)
    run = replace(hostile_run(), fronts=(front,), checkpoints=(Checkpoint("x.ckpt", 17, 17),))
    (shown,) = _content(page(run))["fronts"]
    assert [one["epoch"] for one in shown["models"]] == sorted({*range(0, 20_000, 100), 17, 19_999})
    assert len(shown["earlier"]) == 4000
    assert shown["number"] == 20_000


def test_thinning_is_even_and_keeps_the_ends() -> None:
    assert _thinned(range(10), 10) == list(range(10))
    assert _thinned(range(101), 5) == [0, 25, 50, 75, 100]


@pytest.mark.parametrize(
    "text", ["/runs/a b", 'say "x"', "back\\slash", "new\nline", "grin \U0001f600", "\udcff", "{x}'"]
)
def test_paths_are_literals_of_python(text: str) -> None:
    literal = _literal(text)
    assert eval(literal) == text
    assert "\n" not in literal


def test_preferences_are_written_short_and_exactly() -> None:
    assert _shortest(0.5) == "0.5"
    assert _shortest(0.222222238779068) == "0.22222224"
    assert _shortest(0.1) == "0.1"  # no float32


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_page(hostile_run(), path)
    assert path.read_text(encoding="utf-8") == page(hostile_run())
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_page(hostile_run(), tmp_path / "taken")
    assert {inner.name for inner in tmp_path.iterdir()} == {"new", "taken"}
    assert [inner.name for inner in path.parent.iterdir()] == ["report.html"]


def test_the_page_needs_no_lightning() -> None:
    code = "import sys, mtl_lightning.report; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(result.stdout.split()) & {"lightning", "pytorch_lightning", "torchvision", "torchmetrics"}

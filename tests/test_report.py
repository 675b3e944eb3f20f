"""The page: what it shows of results, that no text can break it, and the trees in it."""

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from drafting import with_eos

import mlx_distill
from mlx_distill import InputError, benchmark
from mlx_distill.benchmarking import roofline, studies
from mlx_distill.benchmarking.arms import PLAIN, Bench, Sample
from mlx_distill.benchmarking.charts import Axis, Line, heat_map, lines, round_step
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.benchmarking.figures import by_class
from mlx_distill.benchmarking.page import page
from mlx_distill.benchmarking.published import published
from mlx_distill.benchmarking.recording import record
from mlx_distill.benchmarking.studies import growth
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import Asked, in_turn, read_asked
from mlx_distill.drafters.protocol import DraftPlan

EVIL = "</script><b>x</b><!-- ' \" & /*TREES*/ <!--BODY--> \x00\x07\u202e\ud800 \U0001f600"
SPREAD = {"median": 1.5, "quartile_1": 1.25, "quartile_3": 1.75}
CYCLES = [
    {
        "texts": [" a", " dog", " ran", " cat"],
        "parents": [0, 0, 1, 0],
        "path": [0, 1, 2],
        "target": [None, 0.75, 0.5, 0.001],
        "draft": [None, 0.5, None, 0.25],
    },
    {"texts": [" off"], "parents": [0], "path": [0], "target": [None], "draft": [None]},
]
TREES = [{"prompt": "Once", "text": "a dog ran off", "kind": "qa", "cycles": CYCLES}]


def a_result() -> dict[str, Any]:
    arm = {"prompts": 2, "tokens_per_s": SPREAD, "speedup": SPREAD, "tokens_per_call": 2.0}
    arm |= {"first_token_s": SPREAD, "peak_memory_bytes": 10**7}
    shapes = [(w, n) for w in (1, 4) for n in (2, 3)]
    return {
        "arms": [arm | {"arm": "mlx-lm"}, arm | {"arm": "mlx_distill"}],
        "equal_texts": 2,
        "differences": [],
        "acceptance_by_depth": [0.75, 0.5],
        "classes": by_class(
            {
                PLAIN: [sample(), sample()],
                "mlx_distill": [sample((0.5,)), sample((1.0, 0.5))],
            },
            ["qa", "rag"],
        ),
        "sweep": [
            {
                "beam_width": w,
                "draft_length": n,
                "speedup": SPREAD | {"median": w / n},
                "tokens_per_call": 2.0,
            }
            for w, n in shapes
        ],
        "calibration": {
            "contexts": [128, 512],
            "rows": [1, 2, 8],
            "call_s": [[0.001, 0.0011, 0.002], [0.001, 0.0012, 0.003]],
        },
        "growth": [
            {"context": n, "arm": arm, "tokens_per_s": 9.0, "peak_memory_bytes": n}
            for n in (128, 256)
            for arm in ("mlx-lm", "mlx_distill")
        ],
        "trees": TREES,
        "dtype": "float32",
        "config": {"temperature": 0.0, "model": None, "drafter": "my-drafter"},
        "machine": {"processor": "A chip", "memory_bytes": 10**9, "system": "Some 1"},
        "versions": {"mlx": "0.32.4"},
        "commit": None,
    }


def sample(depths: tuple[float, ...] = ()) -> Sample:
    return Sample([1, 2], 10.0, 0.1, 2.0, 1, 1, acceptance_by_depth=depths)


class Reader(HTMLParser):
    """Checks that elements are closed in order, and collects what a page holds."""

    VOID = frozenset(("meta", "input", "br"))

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] == ["script"] else self.words).append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


# --------------------------------------------------------------------------------------- the page


def test_a_page_shows_everything_and_needs_nothing() -> None:
    text = page([a_result(), {**a_result(), "trees": []}])
    read = Reader(text)
    titles = [word for word in read.words if word.strip()]
    for title in ("Speed", "Acceptance by depth and class", "Speed over shapes of drafts"):
        assert titles.count(title) == 2
    for title in ("What a call costs, V(T)", "With a growing context"):
        assert titles.count(title) == 2
    assert titles.count("Trees") == 1
    assert "1.50 (1.25-1.75)" in titles
    assert "2.00" in titles  # the heat map's best
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)
    assert not [1 for _, attributes in read.tags if {"src", "href"} & set(attributes)]
    assert json.loads(read.scripts[0]) == [{"result": 0, "texts": TREES}]


def test_no_text_breaks_a_page() -> None:
    calm = page([a_result()])
    evil = copy.deepcopy(a_result())
    evil["config"]["model"] = evil["machine"]["processor"] = evil["dtype"] = EVIL
    evil["arms"][1]["arm"] = evil["classes"][0]["class"] = evil["growth"][1]["arm"] = EVIL
    evil["trees"][0]["prompt"] = evil["trees"][0]["kind"] = EVIL
    evil["trees"][0]["cycles"][0]["texts"][1] = EVIL
    evil["trees"][0]["cycles"][0]["target"][1] = float("nan")
    text = page([evil])
    read, before = Reader(text), Reader(calm)
    assert read.count("script") == before.count("script") == 2
    assert read.count("b") == 0
    assert read.scripts[-1] == before.scripts[-1]
    (found,) = json.loads(read.scripts[0])
    assert found["texts"][0]["prompt"] == EVIL
    assert found["texts"][0]["cycles"][0]["target"][1] is None
    assert "\ud800" not in read.scripts[0]


def test_a_page_of_a_calibration() -> None:
    result = a_result()
    costs = {name: result[name] for name in ("machine", "versions", "config")}
    text = page([costs | {"costs": result["calibration"]}])
    assert "What a call costs" in text
    assert "Beside published figures" not in text


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result.pop("machine"),
        lambda result: result.update(arms=None),
        lambda result: result.update(arms=[]),
        lambda result: result.update(sweep=[{"beam_width": 1}]),
        lambda result: result.update(growth=[{"arm": "mlx-lm"}]),
        lambda result: result["trees"][0]["cycles"][0].update(path=[]),
        lambda result: result["trees"][0]["cycles"][0].update(path=[0, 4]),
        lambda result: result["trees"][0]["cycles"][0].update(parents=[0, 2, 1, 0]),
        lambda result: result["trees"][0]["cycles"][0].update(draft=[None]),
        lambda result: result["calibration"].update(call_s=[[0.0, 1, 2], [1, 2, 3]]),
        lambda result: [result.pop(name) for name in ("arms", "calibration")],
    ],
)
def test_what_is_no_result(change: Any) -> None:
    result = copy.deepcopy(a_result())
    change(result)
    with pytest.raises(InputError, match="none of benchmark's or calibrate's"):
        page([result])


def test_published_figures_name_their_sources() -> None:
    rows = published()
    assert {row[1] for row in rows} == {"m1-max", "m2", "m2-ultra", "m4-pro"}
    assert all(row[-1] for row in rows)
    assert max(float(row[7]) for row in rows if row[1:3] == ("m2-ultra", "Vicuna-7B")) == 1.58


# ---------------------------------------------------------------------------------------- figures


def test_lines_lie_where_their_values_are() -> None:
    x, y = Axis("x", 1, 3), Axis("y", 0, 2)
    drawn = lines([Line("one", [(1, 0), (3, 2)]), Line("<two>", [(2, 1)])], x, y, 1)
    assert 'points="54.0,236.0 420.0,14.0"' in drawn
    assert 'points="237.0,125.0"' in drawn
    assert "&lt;two&gt;: 1 at 2" in drawn
    assert 'class="reference"' in drawn
    assert "reference" not in lines([Line("one", [(1, 0)])], x, y, 3)


def test_a_heat_map_tells_slower_from_faster() -> None:
    drawn = heat_map(["1", "2"], ["1"], [[0.5], [2.0]], "width", "length")
    assert re.findall(r'<rect class="(\w+)"', drawn) == ["warm", "cool"]
    assert drawn.count('fill-opacity="0.85"') == 2
    assert heat_map(["1"], ["1"], [[None]], "width", "length").count("<rect") == 0


@pytest.mark.parametrize(("rough", "step"), [(0.3, 0.5), (1, 1), (2.2, 2.5), (7, 10), (480, 500)])
def test_steps_of_an_axis_are_round(rough: float, step: float) -> None:
    assert round_step(rough) == pytest.approx(step)


# ----------------------------------------------------------------------------- what is shown there


@pytest.fixture(scope="module")
def pair(bundled_pair: tuple[Any, Any], bundled_drafter: Any) -> tuple[Any, Any, Any]:
    return *bundled_pair, bundled_drafter


@pytest.mark.parametrize("tree", ["best-first", "beam"])
def test_recorded_trees_are_the_texts(pair: tuple[Any, Any, Any], tree: str) -> None:
    model, tokenizer, drafter = pair
    prompt = tokenizer.encode("Once upon a time")
    options: dict[str, Any] = {"drafter": drafter, "max_tokens": 24}
    plan = DraftPlan(tree=tree)

    def steps() -> Any:
        return mlx_distill.stream_generate(model, tokenizer, prompt, plan=plan, **options)

    found = record(steps, tokenizer, prompt, kind="story")
    plain = mlx_distill.generate(model, tokenizer, prompt, max_tokens=24)
    assert (found["text"], found["kind"]) == (plain, "story")
    written = "".join(cycle["texts"][n] for cycle in found["cycles"] for n in cycle["path"])
    assert plain.startswith(written.lstrip()[: len(plain)].rstrip())
    assert len(written) > len(plain) / 2
    drafted = [c for c in found["cycles"] if len(c["texts"]) > 1]
    assert drafted
    for cycle in drafted:
        for node in cycle["path"][1:]:
            siblings = [
                n for n, p in enumerate(cycle["parents"]) if n and p == cycle["parents"][node]
            ]
            assert cycle["target"][node] == max(cycle["target"][n] for n in siblings)
        assert cycle["target"][0] is cycle["draft"][0] is None
        assert all(0 <= share <= 1 for share in cycle["draft"][1:])


def test_a_growing_context(pair: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It doubles, up to what was asked for or the model's limit of 512."""
    monkeypatch.setattr(studies, "GROWTH_TOKENS", 4)
    monkeypatch.setattr(studies, "GROWTH_RUNS", 1)
    model, tokenizer, drafter = pair
    ended = with_eos(tokenizer, set(range(4096)))  # a text ends with its first token
    bench = Bench(model, ended, drafter, None, Sampling(), BenchmarkConfig())
    found = growth(bench, [[1, 5, 6, 7]], DraftPlan(), 300)
    assert [row["context"] for row in found] == [128, 128, 256, 256, 300, 300]
    assert all(row["tokens_per_s"] > 0 and row["peak_memory_bytes"] > 0 for row in found)
    assert [row["ratio"]["median"] for row in found if row["arm"] == PLAIN] == [1.0] * 3


def test_classes_of_prompts(tmp_path: Path, pair: tuple[Any, Any, Any]) -> None:
    """They take turns; the eight of MT-Bench are one beside others."""
    kinds = ["writing", "writing", "stem", "qa", "qa", None]
    rows = [{"turns": [f"Say {n}"]} | ({"category": k} if k else {}) for n, k in enumerate(kinds)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = read_asked(file, pair[1])
    assert [one.kind for one in asked] == [*["mt_bench"] * 3, "qa", "qa", None]
    places = [asked.index(one) for one in in_turn(asked)]
    assert places == [0, 3, 5, 1, 4, 2]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert [one.kind for one in read_asked(file, pair[1])] == ["writing", "writing", "stem"]
    assert in_turn([Asked([1]), Asked([2])]) == [Asked([1]), Asked([2])]


def test_figures_of_classes() -> None:
    (qa, rag) = a_result()["classes"]
    assert (qa["class"], qa["prompts"], qa["acceptance_by_depth"]) == ("qa", 1, [0.5])
    assert rag["acceptance_by_depth"] == [1.0, 0.5]
    assert by_class({PLAIN: [sample()], "mlx_distill": [sample()]}, [None]) == []
    mixed = {arm: [sample(), sample()] for arm in (PLAIN, "mlx_distill")}
    (row,) = by_class(mixed, ["qa", None])
    assert row["prompts"] == 1  # what has no class is of none


# ------------------------------------------------------------------------------------ the command


@pytest.mark.usefixtures("bundled_once")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "COPIED_BYTES", 2**20)
    monkeypatch.setattr(roofline, "LARGEST", 256)
    monkeypatch.setattr(studies, "GROWTH_TOKENS", 4)
    monkeypatch.setattr(studies, "GROWTH_RUNS", 1)
    monkeypatch.setenv("MLX_DISTILL_CALIBRATE", "0")
    first, again, output = (tmp_path / name for name in ("a.html", "b.html", "result.json"))
    sizes = ["--num-prompts", "1", "--max-tokens", "6", "--timed-prompts", "1", "--growth", "128"]
    sweep = ["--sweep-widths", "2", "--sweep-lengths", "2", "--report", str(first)]
    assert benchmark.main([*sizes, *sweep, "--output", str(output)]) == 0
    read = Reader(first.read_text(encoding="utf-8"))
    assert {"Trees", "Where a cycle's time goes", "With a growing context"} <= set(read.words)
    assert "stories-14m with its bundled drafter, temperature 0" in read.words
    assert benchmark.main(["--results", str(output), "--report", str(again)]) == 0
    assert again.read_text() == first.read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--report", "."], "the output . is no name of a new"),
        (["--report", "nowhere/page.html"], "its folder does not exist"),
        (["--report", "sealed/page.html"], "its folder is read-only"),
        (["--report", "a\ud800.html"], "must be the name of a file"),
        (["--results", "x.json"], "name its file with --report"),
        (["--results", "x.json", "--report", "p.html"], "x.json cannot be read as JSON"),
        (["--results", "list.json", "--report", "p.html"], "list.json does not hold a JSON object"),
        (["--results", "other.json", "--report", "p.html"], "other.json: the result is none of"),
        (["--dispatches", "--report", "p.html"], "--report shows benchmarks and profiles"),
        (["--growth", "0"], "growth must be at least 1, got 0"),
        (["--results", "x.json", "--report", "p.html", "--model", "m"], "leave --model out"),
        (["--loss-memory", "1", "2", "--num-prompts", "3"], "loads no model; leave --num-prompts"),
        (["--samplers", "1", "2", "--temp", "1"], "loads no model; leave --temp out"),
        (["--batch", "2", "--nodes", "4"], "shapes its drafts itself; leave --nodes out"),
        (["--dispatches", "--temp", "1"], "takes both laws; leave --temp out"),
        (["--profile", "--draft-model", "m"], "times the drafter alone; leave --draft-model out"),
        (["--sweep-widths", "2"], "swept without --sweep-prompts; leave --sweep-widths out"),
    ],
)
def test_refused(
    flags: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one sentence, before anything is loaded, with nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text('{"machine": {}}')
    sealed = tmp_path / "sealed"
    sealed.mkdir()
    access = benchmark.cli.os.access
    monkeypatch.setattr(
        benchmark.cli.os, "access", lambda p, m: p.name != "sealed" and access(p, m)
    )
    monkeypatch.setattr(benchmark.cli, "load_model", None)
    try:
        status = benchmark.main(flags)
    except SystemExit as stop:  # the parser's own refusals
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "list.json",
        "other.json",
        "sealed",
    ]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_steps_through_the_trees(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    result = a_result()
    result["trees"][0]["cycles"][0]["texts"][3] = EVIL
    file.write_text(page([result]), encoding="utf-8")
    keys = ["ArrowRight", "Home", "End", "ArrowLeft"]
    pressed = "".join(
        "dispatchEvent.call(document.querySelector('.viewer'),"
        f"new KeyboardEvent('keydown',{{key:'{key}',bubbles:true}}));"
        "document.body.dataset.seen+=document.querySelector('output').textContent+'|';"
        for key in keys
    )
    stepping = f"<script>document.body.dataset.seen='';{pressed}</script></body>"
    file.write_text(file.read_text(encoding="utf-8").replace("</body>", stepping), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=1000"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = ["chromium", *flags, profile, "--dump-dom", f"{file.as_uri()}#cycle=0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    seen = re.search(r'data-seen="([^"]*)"', run.stdout)
    assert seen, run.stderr[-2000:]
    first, last = "cycle 1 of 2: 4 nodes, 2 drafted accepted", "cycle 2 of 2: 1 nodes, 0"
    assert [one[:24] for one in seen[1].split("|")[:4]] == [
        one[:24] for one in (last, first, last, first)
    ]
    assert len(re.findall(r'<g class="(\w+)"', run.stdout)) == 5
    assert "<b>x</b>" not in run.stdout

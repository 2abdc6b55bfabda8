"""The report: what it says, and that a browser plays it."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from helpers.falling import AMBIGUOUS, FPS, SIZE, Oracle, RedTracker, film, rows_of, tell, write_dataset
from PIL import Image, ImageSequence
from playwright.sync_api import Page, sync_playwright

from posttrain.core import files
from posttrain.core.codec import lossless, playable
from posttrain.core.errors import UserError
from posttrain.evaluation.evaluate import EvalConfig, evaluate
from posttrain.evaluation.records import Record, comparable, gather
from posttrain.reporting import report as room
from posttrain.reporting.charts import nice_ticks, path_d
from posttrain.reporting.gallery import LINE
from posttrain.reporting.players import unlike
from posttrain.reporting.report import report
from sim.show import show

CHROMIUM = Path("/usr/bin/chromium")
QUIET = ("quic", "background-networking", "component-update", "sync", "gpu")
FRAMES = 17
EVIL = '</script><script>throw "ran"</script>'


def oracle(split_rows: Any, value: float) -> Oracle:
    videos = {}
    for split in range(2):
        for clip in range(3):
            start = 2 + 2 * clip + split
            videos[f"square {split}{clip} falls."] = film(split_rows(start), 4 + 5 * clip, 200 + 10 * clip)[0]
    model = Oracle(videos)
    torch.nn.init.constant_(model.transformer.weight, value)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training and evaluation leave it; the tuned model loses the object now and then."""
    root = tmp_path_factory.mktemp("report")
    write_dataset(root / "data", frames=FRAMES)
    base = oracle(lambda start: [start] * FRAMES, 1.0)
    tuned = oracle(lambda start: [start, *rows_of(start, FRAMES - 1)], 2.0)
    tuned.videos_NCFHW[:, :, 9:11] = -0.3
    folder = root / "runs" / "pocket & co"
    ambiguous = tell(root / "data", root / "ambiguous", lambda i: AMBIGUOUS | {"group": i})
    config = EvalConfig(
        clips=str(root / "data"), seeds=2, benchmark={"name": "pisa", "falls": {"clips": str(ambiguous), "seeds": 4}}
    )
    models = {"base": lambda: nullcontext(base), "psft": lambda: nullcontext(tuned)}
    evaluate(folder, config, models, RedTracker())
    recipe = {
        "run": EVIL,
        "model": {"path": "pocket", "adapter": {"rank": 16}},
        "method": {"name": "psft"},
        "train": {"steps": 60, "batch": 8, "seed": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [{"step": k + 1, "loss": 1 / (k + 1), "lr": 1e-3, "grad_norm": 0.5, "seconds": 0.5} for k in range(60)]
    rows[29] |= {"val_l2": 0.2, "val_vanished": 0.0}
    rows[59] |= {"val_l2": 0.1, "val_vanished": 0.0}
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} does not exist: install it with `apt-get install chromium`")
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, run: Path) -> Iterator[Page]:
    """The open page; whatever it complains of, or asks the network for, fails the test."""
    with opened(browser, run / "report.html") as page:
        yield page


@contextmanager
def opened(browser: Any, path: Path) -> Iterator[Page]:
    with browser.new_context(viewport={"width": 1200, "height": 800}) as context:
        page, complaints = context.new_page(), []
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:80]}"))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
        page.goto(path.as_uri())
        yield page
        assert complaints == []


def wait(page: Page, condition: str) -> None:
    """Until a JavaScript condition holds; playwright's own way needs `eval`, which the page forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never true: {condition}")


def test_a_gif_shows_truth_base_and_tuned_of_the_first_clips(run: Path) -> None:
    with Image.open(run / "report.gif") as gif:
        sizes, moments, milliseconds = [], [], 0
        for frame in ImageSequence.Iterator(gif):
            sizes.append(frame.size)
            milliseconds += frame.info["duration"]
            moments.append(np.asarray(frame.convert("RGB")).astype(int))
    assert milliseconds == 60 * FRAMES  # equal pictures are one, shown for longer
    first = np.stack(moments)[:, LINE : LINE + 128]  # the first clip: truth, base, psft
    red = (first[..., 0] - first[..., 1]).clip(0).reshape(-1, 128, 3, 128).sum(3)
    truth, base, psft = ((red > red.max(1, keepdims=True) / 2).argmax(1) // 4).T  # the topmost red row
    assert truth[-1] > truth[0] + 10  # what is true falls
    assert np.ptp(base) <= 1
    assert abs(psft[-1] - truth[-1]) <= 1


def test_json_holds_rows_differences_and_circumstances(run: Path) -> None:
    found = json.loads((run / "report.json").read_text())
    assert [(row["model"], row["split"]) for row in found["rows"]] == [
        (model, split) for split in ("unseen", "seen") for model in ("truth", "truth_vae", "frozen", "base", "psft")
    ]
    base, psft = found["rows"][3], found["rows"][4]
    assert set(psft["l2"]) == {"mean", "low", "high", "n"}
    assert psft["l2"]["low"] <= psft["l2"]["mean"] <= psft["l2"]["high"]
    assert psft["l2"]["n"] == 3
    assert psft["vanished"]["mean"] == pytest.approx(2 / FRAMES)
    assert psft["released"]["l2"]["mean"] < psft["l2"]["mean"]
    card = {row["model"]: row["physics"] for row in found["rows"][:5]}
    assert card["truth"]["g"]["median"] == pytest.approx(9.81, rel=0.05)
    assert card["truth"]["permanence"]["median"] == 1
    assert abs(card["base"]["g"]["median"]) < 0.1  # it hovers
    assert card["base"]["contact"]["n"] == 0
    assert card["psft"]["permanence"]["median"] == pytest.approx(1 - 2 / FRAMES)
    gap = found["differences"][0]
    assert (gap["model"], gap["against"], gap["split"]) == ("psft", "base", "unseen")
    assert gap["l2"]["mean"] == pytest.approx(psft["l2"]["mean"] - base["l2"]["mean"])
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1
    assert found["times"]["train"] == 30.0
    assert set(found["times"]["evaluate"]) >= {"psft-seen", "base-unseen"}
    assert found["recipe"]["train"]["steps"] == 60


def test_page_is_one_small_file_without_network(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert len(text) < 6e6
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", text)
    assert not re.findall(r"https?://", text)
    assert EVIL not in text
    assert text.count("<video") == 6


@pytest.mark.slow
def test_page_plays(page: Page) -> None:
    """Videos run, the dots follow the tracker's paths, and pause, scrub and speed do what they say."""
    first = page.locator("video").first
    first.scroll_into_view_if_needed()
    wait(page, "document.querySelector('video').currentTime > 0.2")
    assert first.evaluate("v => [v.videoWidth, v.videoHeight]") == [3 * 2 * SIZE, 2 * SIZE]
    assert first.evaluate("v => v.duration") == pytest.approx(FRAMES / FPS, abs=0.02)

    page.click("#play")
    assert page.inner_text("#play") == "Play"
    assert page.evaluate("[...document.querySelectorAll('video')].every(v => v.paused)")

    page.locator(".card input").first.fill("5")
    wait(page, "!document.querySelector('video').seeking")
    assert first.evaluate("v => v.currentTime") == pytest.approx(5.5 / FPS, abs=1e-3)
    dots = page.locator(".card").first.locator("circle")
    data = json.loads(page.locator("#data").text_content() or "")[0]
    for i in range(3):
        x, y = data["paths"][i][5]
        assert float(dots.nth(i).get_attribute("cx") or 0) == pytest.approx(x + i * SIZE)
        assert float(dots.nth(i).get_attribute("cy") or 0) == pytest.approx(y)
    page.locator(".card input").first.fill("9")
    wait(page, "document.querySelectorAll('.card circle')[2].style.display === 'none'")
    assert dots.nth(0).is_visible()

    page.click(".speeds button[value='0.5']")
    page.locator(".stage").first.click()
    wait(page, "!document.querySelector('video').paused")
    assert first.evaluate("v => v.playbackRate") == 0.5
    assert page.evaluate("[...document.querySelectorAll('video')].slice(1).every(v => v.paused)")
    page.uncheck("#trace")
    assert not dots.nth(0).is_visible()


@pytest.mark.slow
def test_page_says_what_was_measured(page: Page, run: Path) -> None:
    found = json.loads((run / "report.json").read_text())
    assert page.inner_text("h1") == "pocket & co"
    assert "60 steps of 8 clips, seed 0" in page.inner_text(".lead")
    assert "3 unseen and 3 seen clips, 2 samples each, 12 sampling steps" in page.inner_text(".lead")
    assert page.locator(".headline b").first.inner_text() == f"{found['rows'][4]['l2']['mean']:.3f}"
    rows = [row.inner_text().split() for row in page.locator("#table tr:not(.split)").all()][1:]
    for cells, row in zip(rows, found["rows"], strict=True):
        assert cells[0] == row["model"]
        assert cells[1] == f"{row['l2']['mean']:.3f}"
    assert page.locator("#table tr.reference").count() == 6
    names, g = (row.inner_text().split() for row in page.locator("#scorecard tr").all()[:2])
    assert names == ["truth", "truth_vae", "frozen", "base", "psft"]
    assert g[:3] == ["g", "m/s²", f"{found['rows'][0]['physics']['g']['median']:.2f}"]
    assert page.locator("#curves figcaption").all_inner_texts()[:3] == [
        "Training loss",
        "Validation: L2",
        "Validation: Vanished",
    ]
    assert EVIL in page.inner_text("pre")


def test_page_shows_the_law_of_the_falls_and_what_models_do(page: Page, run: Path) -> None:
    falls = json.loads((run / "report.json").read_text())["falls"]
    assert [found["model"] for found in falls] == ["base", "psft"]
    assert falls[0]["never"] == 1  # it hovers
    assert [picture["videos"] for picture in falls[1]["pictures"]] == [4] * 3
    section = page.locator("#falls")
    cells = section.locator("tr").nth(1).locator("td").all_inner_texts()
    assert cells == ["base", "3", "4", "100%", "100%", "–", "–"]
    assert section.locator("figcaption").all_inner_texts()[0].startswith("Impact, beta 0.200; base p 0.001, psft p 0.")
    assert section.locator("figure").first.locator("path").count() == 1 + 1 + 2  # grid, law, two models


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768, 1600])
def test_page_fits_the_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [card.bounding_box() for card in page.locator(".card").all()]
    assert all(box is not None and box["width"] >= min(width - 32, 320) for box in boxes)


HOSTILE = ("test_<svg onload=alert(1)>", "<img src=x onerror=alert(1)>", "\"><script>alert(1)<\\script>'{{ 7 * 7 }}")


@pytest.mark.slow
def test_names_from_elsewhere_are_shown_as_text(browser: Any, run: Path, tmp_path: Path) -> None:
    """Of the run's folder, a model, a split, a clip, a caption and the recipe; the page works as any other."""
    folder = Path(shutil.copytree(run, tmp_path / HOSTILE[0]))
    (folder / "samples" / "psft").rename(folder / "samples" / HOSTILE[1])
    for path in folder.glob("evaluation/*.json"):
        record = json.loads(path.read_text())
        if record["model"] == "psft":
            record["model"] = HOSTILE[1]
        record["split"] = record["split"].replace("unseen", HOSTILE[2])
        for clip in record["clips"]:
            old, clip["id"], clip["caption"] = clip["id"], f"{clip['id']}{HOSTILE[1]}", f"{EVIL} {HOSTILE[2]}"
            for video in folder.glob(f"samples/*/*/{old}-s0.mp4"):
                video.rename(video.with_name(f"{clip['id']}-s0.mp4"))
        files.write_sealed(path, record)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"sweep": {"data.<b onclick=alert(1)>": [1, 2]}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = report(folder)[1]
    said: list[str] = []
    with opened(browser, path) as page:
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        assert page.inner_text("h1") == HOSTILE[0]
        rows = page.locator("#table tr:not(.split) td:first-child").all_inner_texts()
        assert HOSTILE[1] in rows
        assert HOSTILE[2] in page.inner_text("#table")
        first = page.locator(".card").first
        assert first.locator("p span").first.inner_text() == f"{EVIL} {HOSTILE[2]}"
        assert HOSTILE[1] in first.locator("p span").last.inner_text()
        assert HOSTILE[1] in first.locator("input").get_attribute("aria-label")
        assert "onclick=alert(1)" in page.inner_text("#sweep h2")
        assert page.locator("img, b[onclick], svg[onload]").count() == 0
        assert page.locator("script").count() == 2
        first.locator("video").scroll_into_view_if_needed()
        wait(page, "document.querySelector('video').currentTime > 0.2")
        first.locator("input").fill("5")
        wait(page, "!document.querySelector('video').seeking")
        assert first.locator("video").evaluate("v => v.currentTime") == pytest.approx(5.5 / FPS, abs=1e-3)
    assert said == []


@pytest.mark.slow
def test_what_is_put_into_a_page_after_all_does_not_run(browser: Any, run: Path, tmp_path: Path) -> None:
    """The page's policy, were something not escaped: no handlers, scripts, styles within tags, pictures or requests."""
    text = (run / "report.html").read_text()
    attack = (
        "<svg onload='window.ran = 1'></svg><img src=x onerror='window.ran = 2'><script>window.ran = 3</script>"
        "<p id=painted style='color: rgb(1, 2, 3)'>x</p><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>"
        "<base href='https://example.invalid/'><a id=link href='javascript:window.ran = 4'>x</a>"
    )
    (tmp_path / "a.html").write_text(text.replace("<main>", f"<main>{attack}", 1))
    with browser.new_context() as context:
        page, asked = context.new_page(), []
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else asked.append(r.url))
        page.goto((tmp_path / "a.html").as_uri())
        page.locator("#link").click()
        wait(page, "document.querySelector('video').readyState > 1")
        assert page.evaluate("window.ran === undefined")
        assert page.evaluate("getComputedStyle(document.getElementById('painted')).color !== 'rgb(1, 2, 3)'")
        assert page.evaluate("document.baseURI.startsWith('file:')")
        assert page.inner_text("#play") in ("Play", "Pause")
        assert asked == []


@pytest.mark.slow
def test_the_page_of_a_dataset_shows_its_clips(browser: Any, tmp_path: Path) -> None:
    """`sim show` of clips whose folder, captions and violations come from elsewhere."""
    split = tmp_path / HOSTILE[0] / HOSTILE[1]
    split.mkdir(parents=True)
    (split / "a.mp4").write_bytes(lossless(film(rows_of(2, FRAMES), 8, 220)[0], FPS))
    row = {"file_name": "a.mp4", "caption": f"{EVIL} {HOSTILE[2]}", "fps": FPS, "motion": HOSTILE[1]}
    (split / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    show(tmp_path / HOSTILE[0], None, 1, tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        assert page.inner_text("h1") == HOSTILE[0]
        assert page.inner_text("h2") == f"{HOSTILE[1]}/a: {EVIL} {HOSTILE[2]}"
        assert page.inner_text("figcaption") == HOSTILE[1]
        wait(page, "document.querySelector('img').naturalWidth > 0")
        assert page.locator("img").count() == 1
        assert page.evaluate("getComputedStyle(document.querySelector('section')).display") == "flex"


def test_video_keeps_its_colours() -> None:
    """Encoded and decoded again, a small moving square keeps its place and colour."""
    video = film(rows_of(2, FRAMES), 8, 220)[0].repeat(2, 1).repeat(2, 2)
    with av.open(BytesIO(playable(video, 16, 16))) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert container.streams.video[0].pix_fmt == "yuv420p"
    assert frames.shape == video.shape
    assert np.abs(frames.astype(int) - video).mean() < 2


def test_lines_break_where_there_is_nothing() -> None:
    assert path_d([(0, 1), (2, 3), None, (4, 5), (6, 7)], 0) == "M0 1L2 3M4 5L6 7"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 600), (0.11, 0.37), (-2, 3), (0, 3e-5)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert low - 1e-12 <= ticks[0] < ticks[-1] <= high + 1e-12
    assert all(len(f"{tick:g}") <= 6 for tick in ticks)


@pytest.mark.slow
def test_a_missing_sample_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    gone = tmp_path / "run" / "samples" / "psft" / "test_unseen" / "00001-s0.mp4"
    gone.unlink()
    with pytest.raises(UserError, match=re.escape(str(gone))):
        report(tmp_path / "run")


@pytest.mark.slow
def test_a_run_without_training_has_a_report(run: Path, tmp_path: Path) -> None:
    """Evaluation alone, of the references and the base: no curves, no headline, but the table and the players."""
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run").glob("evaluation/psft-*"):
        path.unlink()
    (tmp_path / "run" / "log.jsonl").unlink()
    (tmp_path / "run" / "recipe.yaml").unlink()
    text = report(tmp_path / "run")[1].read_text()
    assert 'class="headline"' not in text
    assert 'id="curves"' not in text
    assert text.count("<video") == 6
    assert room.duration(3723) == "1 h 2 min"


@pytest.mark.slow
def test_a_sweeps_rows_are_named_by_its_values(run: Path, tmp_path: Path) -> None:
    """What is the same in all its runs is a row once; what differs, also a base, is one for each."""
    runs = {value: Path(shutil.copytree(run, tmp_path / value)) for value in ("30", "100", "7")}
    for value, name, changes in (("100", "psft", {}), ("7", "base", {"key": "of another model"})):
        path = runs[value] / "evaluation" / f"{name}-test_unseen.json"
        record = json.loads(path.read_text()) | changes
        for clip in record["clips"]:
            clip["l2"] += 1
        files.write_sealed(path, record)
    each = {value: [folder] for value, folder in runs.items()}
    records = [record for record in gather(each) if record.split == "unseen"]
    shared = ["truth", "truth_vae", "frozen", "base"]
    assert [record.row for record in records] == [*shared, "psft 30", "psft 100", "base 7", "psft 7"]
    found = {record.row: np.mean([clip.numbers["l2"] for clip in record.clips]) for record in records}
    assert found["psft 100"] == pytest.approx(found["psft 30"] + 1)
    assert found["psft 7"] == found["psft 30"]
    assert found["base 7"] == pytest.approx(found["base"] + 1)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"sweep": {"data.limit": [30, 100, 7]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (as_json, as_html) = report(tmp_path, each)
    assert json.loads(as_json.read_text())["times"]["train"] == pytest.approx(3 * trained(run), abs=0.2)
    (figures,) = re.findall(r'<section id="sweep"><h2>Over data.limit</h2>(.*?)</section>', as_html.read_text(), re.S)
    assert re.findall(r'<text class="x[^>]*>(\d+)</text>', figures) == ["30", "100", "7"] * 2
    assert figures.count('class="base"') == 2


def test_runs_of_a_row_are_pooled(run: Path, tmp_path: Path) -> None:
    """Clip by clip: means of what is there, the samples of all; the base once."""
    folders = [Path(shutil.copytree(run, tmp_path / str(seed))) for seed in range(3)]
    for seed, folder in enumerate(folders):
        path = folder / "evaluation" / "psft-test_unseen.json"
        record = json.loads(path.read_text())
        for clip in record["clips"]:
            clip["l2"], clip["released"]["iou"] = float(seed), seed / 10
            clip["time_error"] = None if seed else 0.5
            clip["physics"]["g"] = [9.0 + seed, 0.3] if seed else None
        files.write_sealed(path, record)
    found = {record.row: record for record in gather({"best": folders}) if record.split == "unseen"}
    assert list(found) == ["truth", "truth_vae", "frozen", "base", "psft best"]
    assert {record.origin for record in found.values()} == {"best"}
    one = next(r for r in gather({"": folders[:1]}) if (r.row, r.split) == ("psft ", "unseen"))
    for clip, alone in zip(found["psft best"].clips, one.clips, strict=True):
        assert (clip.numbers["l2"], clip.numbers["time_error"]) == (1.0, 0.5)
        assert clip.released["iou"] == pytest.approx(0.1)
        assert clip.physics["g"] == pytest.approx([10.5, 0.3 / 2**0.5])  # sigma of a mean of two
        assert clip.paths == alone.paths * 3
        assert (clip.id, clip.true_path) == (alone.id, alone.true_path)
        assert clip.numbers["chamfer"] == pytest.approx(alone.numbers["chamfer"])

    assert [[r.row for r in rows] for rows in comparable(gather({"a": folders[:1], "b": folders[1:]}), "ab")] == [
        ["psft a", "psft b"]
    ] * 2
    for path in (folders[2] / "evaluation").glob("*.json"):
        record = json.loads(path.read_text())
        files.write_sealed(path, record | {"settings": record["settings"] | {"seeds": 9}})
    with pytest.raises(
        UserError, match=r"2: was measured with other settings than .*0; run `posttrain eval` on both again"
    ):
        gather({"best": folders})
    with pytest.raises(UserError, match=r"b: was measured with other eval\.seeds or eval\.sampler than a"):
        comparable(gather({"a": folders[:1], "b": folders[2:]}), "ab")
    (folders[1] / "evaluation" / "psft-test_seen.json").unlink()
    with pytest.raises(UserError, match="not all its runs were measured on seen clips"):
        gather({"best": folders[:2]})


def trained(run: Path) -> float:
    """Seconds, by the log."""
    return sum(json.loads(line)["seconds"] for line in (run / "log.jsonl").read_text().splitlines())


def test_rows_that_the_players_leave_out_are_named() -> None:
    def row(name: str, split: str, fps: float, size: list[int]) -> Record:
        return Record(name, name, split, split, "", size, 1, 1, fps=fps)

    records = [row("truth", "unseen", 16, [64, 64]), row("kling", "unseen", 24, [64, 64])]
    records.append(row("wan", "unseen", 16, [48, 64]))
    assert unlike(records[:1]) == []
    assert unlike([*records, row("truth", "seen", 24, [64, 64])]) == [
        "unseen: 2 of 3 rows are not shown beside truth's 16 fps, 64 x 64: "
        "kling (24 fps, 64 x 64), wan (16 fps, 48 x 64)."
    ]

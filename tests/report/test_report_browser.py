"""The page in a real browser: Chromium without a window, without a network."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tersor.report import ReportData, write_report

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver import ActionChains, Keys  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
PHONE, DESK = 390, 1280

PROBES = Path(__file__).with_name("probes.js").read_text(encoding="utf-8")


class Page:
    """The browser with a report open, and what a reader can do with it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, *, width: int = DESK, scheme: str = "light", fresh: bool = False) -> None:
        """Show a report. One that is open already is only brought to this width and colour scheme, unless ``fresh``."""
        preference = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width <= PHONE}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        if fresh or self.driver.current_url != path.as_uri():
            self.driver.get(path.as_uri())
            self.wait(lambda: self.run("return document.documentElement.dataset.charts"))
        # The browser tells the page about its new width when it likes; this asks it to. Of a new colour scheme it tells
        # before it next draws a frame.
        self.wait(lambda: self.run("return innerWidth") == width)
        self.run("dispatchEvent(new Event('resize'))")
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        self.wait(lambda: self.run("return document.documentElement.dataset.charts") != "waiting")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def probe(self, call: str) -> Any:
        return self.run(f"{PROBES}\nreturn {call};")

    def click(self, element: Any) -> None:
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.03)
        raise AssertionError("waited in vain")

    def point_at(self, selector: str, x: float, y: float, *, click: bool = False) -> None:
        """Move the mouse to a place of an element, given as shares of its width and height."""
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        box = self.run("const b = arguments[0].getBoundingClientRect(); return [b.x, b.y, b.width, b.height]", element)
        actions = ActionChains(self.driver, duration=0)
        actions.w3c_actions.pointer_action.move_to_location(int(box[0] + x * box[2]), int(box[1] + y * box[3]))
        (actions.click() if click else actions).perform()

    def tooltip(self, about: str) -> str:
        """The text beside the mouse once it has ``about`` in it: what stood there before may stay for a moment."""
        script = "return document.querySelector('.hoverlayer .hovertext')?.textContent"
        return self.wait(lambda: about in (text := self.run(script) or "") and text)

    def curve(self) -> list[Any]:
        script = "return document.getElementById('curve').data.find((t) => t.name === 'points').y"
        return [self.text("#curve-title"), self.run(script)]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Page(driver)
    driver.quit()


@pytest.fixture(autouse=True)
def calm(page: Page) -> Iterator[None]:
    """No test may leave anything on the console."""
    page.complaints()
    yield
    assert page.complaints() == []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, full: ReportData) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "report.html"
    write_report(path, full)
    return path


def test_it_renders_and_asks_for_nothing(page: Page, report: Path) -> None:
    page.driver.get_log("performance")
    page.open(report)
    assert page.driver.title == "HuggingFaceTB/SmolLM2-135M-Instruct · tersor report"
    for chart in ("grid", "curve", "shares"):
        assert page.run("return document.querySelectorAll(`#${arguments[0]} .main-svg`).length", chart) > 0
    assert page.run("return document.querySelectorAll('#grid .textpoint').length") == 210
    assert page.run("return document.querySelectorAll('#shares .point').length") == 211
    assert page.run("return document.querySelectorAll('#curve .scatterlayer .point').length") == 16
    page.point_at("#grid .nsewdrag", 0.5, 0.5)
    events = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # "chrome:" is the browser's own first page, which may still be loading.
    assert [url[:60] for url in asked if not url.startswith(("data:", "blob:", "chrome:"))] == [report.as_uri()[:60]]
    assert page.run("return performance.getEntriesByType('resource').length") == 0


def test_pointing_at_a_cell_tells_about_its_layer(page: Page, report: Path, full: ReportData) -> None:
    page.open(report)
    page.point_at("#grid .nsewdrag", 3.5 / 30, 2.5 / 7)
    layer = next(r for r in full.layers if r.layer.name == "model.layers.3.self_attn.v_proj")
    told = page.tooltip(layer.layer.name)
    for text in (layer.codec, f"{layer.nbytes:,}", "Relative error", "Share of predicted loss"):
        assert text in told


def test_pointing_at_a_point_of_the_curve(page: Page, report: Path, full: ReportData) -> None:
    page.open(report)
    page.run("document.querySelector('#curve').scrollIntoView({block: 'center'})")
    page.point_at("#curve .nsewdrag", *page.probe("chosenPlace()"))
    told = page.tooltip("bits per weight")
    assert full.layers[1].codec in told
    assert "chosen" in told


def test_choosing_a_layer_changes_the_curve(page: Page, report: Path) -> None:
    page.open(report)
    seen = [page.curve()]

    def changed(name: str) -> None:
        assert page.wait(page.curve)[0] == name
        assert page.curve() not in seen
        seen.append(page.curve())

    page.run("const s = document.getElementById('layer'); s.value = '100'; s.dispatchEvent(new Event('change'))")
    changed("model.layers.14.self_attn.k_proj")
    page.find("#next").click()
    changed("model.layers.14.self_attn.v_proj")
    page.find("#previous").click()
    page.find("#previous").click()
    changed("model.layers.14.self_attn.q_proj")
    page.point_at("#grid .nsewdrag", 29.5 / 30, 6.5 / 7, click=True)
    page.wait(lambda: page.curve()[0] == "model.layers.29.mlp.down_proj")
    changed("model.layers.29.mlp.down_proj")
    page.find("#outside button").click()
    changed("model.embed_tokens")
    assert "int" in page.text("#facts")


def test_the_keyboard_reaches_everything(page: Page, report: Path) -> None:
    page.open(report, fresh=True)
    page.find("body").send_keys(Keys.TAB)
    assert page.run("return document.activeElement.className") == "skip"
    page.run("document.getElementById('grid').focus()")
    keys = (Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    page.driver.switch_to.active_element.send_keys(*keys)
    assert page.text("#curve-title") == "model.layers.1.self_attn.v_proj"
    page.run("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert page.probe("unreachable()") == []


def test_the_grid_shows_other_measures(page: Page, report: Path) -> None:
    page.open(report)
    shown = []
    for button in page.all("#metrics button"):
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        shown.append((page.text("#grid-title"), page.run("return document.getElementById('grid').data[0].z.flat()")))
    assert [title for title, _ in shown] == ["Bits per weight", "Relative error", "Share of predicted loss, %"]
    assert len({str(values) for _, values in shown}) == 3


@pytest.mark.parametrize("width", [320, PHONE, 768, DESK])
def test_nothing_is_wider_than_the_page(page: Page, report: Path, width: int) -> None:
    page.open(report, width=width)
    page.run("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert page.run("return document.documentElement.scrollWidth") == width
    assert page.probe("tooWide()") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_all_text_can_be_read(page: Page, report: Path, scheme: str, width: int) -> None:
    page.open(report, scheme=scheme, width=width)
    page.run("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    seen, faint = page.probe("faintTexts()")
    assert seen > 500
    assert faint == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_in_cells_stand_out(page: Page, report: Path, scheme: str) -> None:
    page.open(report, scheme=scheme)
    ratios = page.probe("cellContrasts()")
    assert len(ratios) == 210
    assert min(ratios) > 4.5


def test_the_theme_can_be_changed_and_is_remembered(page: Page, report: Path) -> None:
    page.open(report, fresh=True)
    light = page.probe("look()")
    try:
        page.find("#theme").click()
        assert "dark" in page.text("#theme")
        dark = page.probe("look()")
        assert all(a != b for a, b in zip(light, dark, strict=True))
        page.open(report, fresh=True)
        assert page.probe("look()") == dark
        page.find("#theme").click()
        assert page.probe("look()") == light
        page.find("#theme").click()
        assert "system" in page.text("#theme")
    finally:
        page.run("localStorage.clear()")
    page.open(report, scheme="dark")
    assert page.probe("look()") == dark


def test_paper_is_light(page: Page, report: Path) -> None:
    page.open(report)
    light = page.probe("look()")
    page.open(report, scheme="dark")
    dark = page.probe("look()")
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.probe("look()") == light != dark
    width = "return document.querySelector('#curve .main-svg').getBoundingClientRect().width"
    assert page.run(width) < 690
    page.run("dispatchEvent(new Event('afterprint'))")
    # Before printing all must be done at once; back on the screen a chart may take its time.
    page.wait(lambda: page.probe("look()") == dark)
    assert page.run("return 'theme' in document.documentElement.dataset") is False


def test_the_table_of_tensors(page: Page, report: Path, full: ReportData) -> None:
    page.open(report, fresh=True)
    assert page.text("#tensor-table-more").startswith("100 of 303 rows")
    page.click(page.find("#tensor-table-more button"))
    assert len(page.all("#tensor-table tbody tr")) == len(full.tensors)
    search = page.find("#tensor-table-tools input")
    search.send_keys("layers.12. PROJ")
    assert page.text("#tensor-table-more") == "7 of 7 rows that match, of 303"
    search.send_keys(Keys.CONTROL, "a")
    search.send_keys(Keys.DELETE)
    page.click(next(b for b in page.all("#tensor-table-tools button") if b.text.startswith("tied")))
    assert page.text("#tensor-table-more") == "1 of 1 rows that match, of 303"
    assert "lm_head.weight" in page.text("#tensor-table tbody")
    assert "shares its storage" in page.text("#tensor-table tbody")


def test_the_table_of_layers(page: Page, report: Path, full: ReportData) -> None:
    page.open(report, fresh=True)
    page.run("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    column = "return [...document.querySelectorAll('#layer-table tbody tr')].map((r) => r.cells[3].textContent)"
    header = page.all("#layer-table thead button")[3]
    for reverse in (True, False):
        page.click(header)
        found = [int(text.replace(",", "")) for text in page.run(column)]
        assert found == sorted((r.nbytes for r in full.layers), reverse=reverse)[:100]
    page.click(page.find("#layer-table tbody .link"))
    assert page.text("#layer-table tbody .link") == page.text("#curve-title")


def test_plan_and_data_can_be_saved(page: Page, report: Path, full: ReportData, tmp_path: Path) -> None:
    page.open(report)
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    for name in ("plan.json", "report.json"):
        page.find(f"[data-name='{name}']").click()
        page.wait((tmp_path / name).exists)
    assert page.wait((tmp_path / "plan.json").read_text) == full.plan
    assert ReportData.from_json(page.wait((tmp_path / "report.json").read_text)) == full


def test_hostile_names_are_shown_as_they_are(page: Page, tmp_path: Path, full: ReportData) -> None:
    attack = "</script><img src=x onerror=alert(1)><b>bold</b>&amp;"
    layers = tuple(replace(r, codec=attack) if r.layer.block == 3 else r for r in full.layers)
    write_report(tmp_path / "report.html", replace(full, model=attack, layers=layers))
    page.open(tmp_path / "report.html")
    assert page.text("h1") == attack
    page.point_at("#grid .nsewdrag", 3.5 / 30, 2.5 / 7)
    assert page.tooltip(attack)
    assert page.all("img") == []


def test_a_report_without_layers(page: Page, tmp_path: Path, least: ReportData) -> None:
    write_report(tmp_path / "report.html", least)
    page.open(tmp_path / "report.html", width=PHONE)
    assert page.run("return document.documentElement.scrollWidth") == PHONE
    page.find("#theme").click()


def test_layers_without_curves_or_losses(page: Page, tmp_path: Path, full: ReportData) -> None:
    bare = tuple(replace(r, curve=(), predicted=None, relative_error=None) for r in full.layers)
    write_report(tmp_path / "report.html", replace(full, layers=bare, predicted=None))
    page.open(tmp_path / "report.html")
    assert page.find("#no-curve").is_displayed()
    assert [button.text for button in page.all("#metrics button")] == ["Bits"]
    page.find("#next").click()
    assert page.text("#curve-title") == "model.layers.0.self_attn.k_proj"

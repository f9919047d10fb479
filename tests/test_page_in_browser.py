"""The page as a reader has it: in Chromium, from the disk and from the server of a run that grows."""

import contextlib
import threading
import time

import numpy as np
import pytest
from helpers.browser import browser
from helpers.pages import MARKUP, PEAK, WIDE, array_of, column, write_wide
from helpers.tiny_runs import LAYERS, measured, write_run, write_timeline

from inflection_fast.report.content import Content
from inflection_fast.report.several import write_several
from inflection_fast.report.single_page import write_html
from inflection_fast.report.watch import Server
from inflection_fast.timeline import TimelineWriter


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "demo")
    return page_of(folder / "demo")


def page_of(folder):
    content = Content(folder)
    content.update()
    path = folder / "page.html"
    write_html(content, path)
    return path.as_uri()


def until(condition, what, seconds=15):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


def opened(driver, url, theme="light"):
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    driver.get_log("browser")
    driver.get(url)
    until(lambda: driver.execute_script("return document.documentElement.dataset.complete"), "the page is drawn")


def quiet(driver):
    """No error, no warning, and nothing refused by the policy of the page."""
    assert driver.get_log("browser") == []


def press(driver, element, *keys):
    for key in keys:
        driver.execute_script(
            "arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: arguments[1], bubbles: true}))", element, key
        )


def find(driver, selector):
    return driver.find_element("css selector", selector)


def colours_of(driver, selector):
    """How many colours the canvas of a chart has."""
    return driver.execute_script(
        """const canvas = document.querySelector(arguments[0] + " canvas");
        const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(image.data.buffer)).size;""",
        selector,
    )


def test_every_chart_is_drawn_and_the_console_stays_empty(driver, run_page):
    opened(driver, run_page)
    assert len(driver.find_elements("css selector", "#multiples figure canvas")) == 11
    assert len(driver.find_elements("css selector", "#cards article .plot canvas")) == 7
    assert len(driver.find_elements("css selector", "#choice-charts canvas")) == 4
    assert colours_of(driver, "#map-entropy") > 30
    for figure in driver.find_elements("css selector", "#multiples .value"):
        assert figure.text.startswith("step 110: ")
    quiet(driver)


def test_a_click_on_a_layer_shows_its_heads_and_one_without_heads_its_course(driver, run_page):
    opened(driver, run_page)
    over = find(driver, "#map-entropy .u-over")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", over)
    webdriver = pytest.importorskip("selenium.webdriver")
    height = over.size["height"]
    layer = 4
    webdriver.ActionChains(driver).move_to_element_with_offset(
        over, 0, round(height / 2 - (layer + 0.5) * height / LAYERS)
    ).perform()
    readout = find(driver, "#map-entropy > .under .readout")
    until(lambda: readout.text.startswith("layer 4, step "), "the values under the cursor")
    webdriver.ActionChains(driver).click().perform()
    until(lambda: driver.find_elements("css selector", "#map-entropy .detail canvas"), "heads")
    assert "Layer 4, heads" in find(driver, "#map-entropy .detail h3").text
    press(driver, find(driver, "#map-delta_cka .plot"), "End", "ArrowUp", "Enter")
    until(lambda: driver.find_elements("css selector", "#map-delta_cka .detail canvas"), "a course")
    assert "one standard error" in find(driver, "#map-delta_cka .detail .readout").text
    quiet(driver)


def test_the_keyboard_reaches_every_value(driver, run_page):
    opened(driver, run_page)
    order = driver.execute_script(
        """return [...document.querySelectorAll("a, button, summary, input, [tabindex]")]
        .filter((e) => e.tabIndex >= 0 && e.closest("#cards .card"))
        .map((e) => e.closest(".card").id + " " + e.className)"""
    )
    assert {entry.split()[0] for entry in order if entry.endswith(" plot")} == {
        f"map-{name}"
        for name in ("entropy", "max_logit", "collision", "sink", "activation_grad", "parameter_grad", "delta_cka")
    }
    box = find(driver, "#map-parameter_grad .plot")
    driver.execute_script("arguments[0].focus()", box)
    press(driver, box, "ArrowDown", *["PageDown"] * 2, "Home")
    readout = find(driver, "#map-parameter_grad .readout")
    assert readout.text == "layer 0, step 0: no value"
    press(driver, box, *["PageUp"] * 2)
    assert readout.text.startswith(f"layer {LAYERS - 1}, step 0: 0.") and "no value" not in readout.text
    wide = find(driver, "#map-parameter_grad .cell").size["width"]
    press(driver, box, "+", "+")
    assert find(driver, "#map-parameter_grad .cell").size["width"] > 3 * wide
    press(driver, box, "0", "End")
    assert abs(find(driver, "#map-parameter_grad .cell").size["width"] - wide) < 3
    quiet(driver)


def test_a_table_stands_behind_a_chart(driver, run_page):
    opened(driver, run_page)
    summary = find(driver, "#map-delta_cka > details > summary")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", summary)
    summary.click()
    until(lambda: driver.find_elements("css selector", "#map-delta_cka tbody tr"), "a table")
    rows = driver.find_elements("css selector", "#map-delta_cka tbody tr")
    assert len(rows) == LAYERS
    last = [values["delta_cka"] for _, values in measured()][-1]
    assert float(rows[-1].find_elements("css selector", "td")[-1].text) == pytest.approx(last[-1], abs=5e-4)
    quiet(driver)


def test_the_theme_follows_the_system_and_the_button(driver, run_page):
    opened(driver, run_page, "dark")
    background = "return getComputedStyle(document.body).backgroundColor"
    dark = driver.execute_script(background)
    find(driver, "#theme").click()
    light = driver.execute_script(background)
    assert sum(map(int, dark[4:-1].split(","))) < 100 < 700 < sum(map(int, light[4:-1].split(",")))
    quiet(driver)


def look_page(folder, text):
    from helpers.layer_pages import look

    from inflection_fast.report.layer_page import write_layer_page

    write_layer_page(look(text), folder / "index.html")
    return (folder / "index.html").as_uri()


def test_a_phone_needs_no_sideways_scrolling(driver, run_page, tmp_path):
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        for page in (run_page, look_page(tmp_path, "/a/path" * 30)):
            opened(driver, page)
            assert driver.execute_script("return document.documentElement.scrollWidth") == 360
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    quiet(driver)


def test_on_paper_charts_fill_their_cards_and_nothing_is_there_to_be_clicked(driver, run_page):
    opened(driver, run_page, "dark")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    try:
        widths = driver.execute_script(
            """return [...document.querySelectorAll(".plot")].filter((plot) => plot.querySelector("canvas"))
            .map((plot) => [plot.clientWidth, plot.querySelector("canvas").clientWidth])"""
        )
        assert len(widths) == 22 and all(abs(box - canvas) <= 1 for box, canvas in widths)
        shown = (
            "return [...document.querySelectorAll('button, summary, nav, input')].filter((e) => e.offsetParent).length"
        )
        assert driver.execute_script(shown) == 0
        assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    finally:
        driver.execute_script("dispatchEvent(new Event('afterprint'))")
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    quiet(driver)


def test_a_page_of_100_000_steps_128_layers_and_128_heads_is_bounded_and_opens(driver, tmp_path):
    step, layer, head = write_wide(tmp_path)
    url = page_of(tmp_path)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(text) < 4_000_000
    entropy = column(text, "entropy")
    assert entropy["length"] == 2 and len(entropy["steps"]) == 257 and len(column(text, "loss")["steps"]) == 514
    _, low, high = array_of(text, entropy["map"])
    at = [first <= step <= last for first, last in entropy["steps"]].index(True)
    assert high.shape == (WIDE, 257) and high[layer, at] == pytest.approx(PEAK, rel=1e-4) and low[layer, at] < 2
    assert (high > 2).sum() == 1
    parts = entropy["parts"]
    largest = array_of(text, parts)[2]
    assert largest.shape == (WIDE, WIDE, len(parts["steps"])) and len(parts["steps"]) <= 16
    assert np.unravel_index(largest.argmax(), largest.shape)[:2] == (layer, head) and (largest > 2).sum() == 1
    opened(driver, url)
    assert len(driver.find_elements("css selector", "#cards article .plot canvas")) == 3
    box = find(driver, "#map-entropy .plot")
    press(driver, box, *["PageDown"] * (WIDE // 8), *["PageUp"] * (layer // 8), *["ArrowUp"] * (layer % 8), "Enter")
    until(lambda: driver.find_elements("css selector", "#map-entropy .detail canvas"), "heads")
    assert f"Layer {layer}, heads" in find(driver, "#map-entropy .detail h3").text
    quiet(driver)


def test_markup_in_names_is_shown_and_not_obeyed(driver, tmp_path):
    with TimelineWriter(tmp_path, layers=[MARKUP, "b"], heads=2, meta={"model": {"class": MARKUP}}) as out:
        for step in range(3):
            out.append(step, entropy=np.full((2, 2), np.nan if step == 2 else 1.0 + step))
    opened(driver, page_of(tmp_path))
    press(driver, find(driver, "#map-entropy .plot"), "End", "ArrowDown", "Enter")
    until(lambda: driver.find_elements("css selector", "#map-entropy .detail canvas"), "heads")
    assert MARKUP in find(driver, "#map-entropy .detail h3").text
    assert MARKUP in find(driver, "#heading").text
    assert not driver.find_elements("css selector", "img, b b")
    quiet(driver)


def test_an_alert_stands_on_the_time_axis(driver, tmp_path):
    with TimelineWriter(tmp_path, layers=["a", "b"], heads=1, meta={}) as out:
        for step in range(8):
            out.append(step, entropy=np.array([[1.0], [1.0 if step < 3 else 0.001]]))
    opened(driver, page_of(tmp_path))
    assert "1 alert was raised: entropy collapse." in find(driver, "#answer").text
    assert driver.find_elements("css selector", "#alert-chart canvas")
    assert "block 1 head 0" in find(driver, "#alert-list").text
    quiet(driver)


def test_several_runs_are_overlaid_and_their_differences_mapped(driver, tmp_path):
    for number, name in enumerate(("x", "y")):
        with TimelineWriter(tmp_path / name, layers=["a", "b"], heads=1, meta={}) as out:
            for step in range(4):
                out.append(step, entropy=np.array([[1.0], [2.0 + number]]), loss=1.0)
    opened(driver, write_several([tmp_path / "x", tmp_path / "y"]).as_uri())
    assert len(driver.find_elements("css selector", "#multiples canvas")) == 2
    assert not find(driver, "#alerts").is_displayed() and find(driver, "#stages h2").text == "Runs"
    box = find(driver, "#cards .plot")
    driver.execute_script("arguments[0].focus()", box)
    press(driver, box, "End")
    assert find(driver, "#cards .readout").text == "layer 1, step 3: 1.00"
    quiet(driver)


@contextlib.contextmanager
def served(folder):
    with Server(folder, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_a_run_that_trains_grows_on_the_page(driver, tmp_path):
    driver.get_log("browser")
    with served(tmp_path) as server:
        driver.get(server.url)
        assert "Nothing has been measured yet." in find(driver, "#answer").text
        assert "No step has been measured yet." in find(driver, "#multiples").text
        write_timeline(tmp_path)
        until(lambda: driver.find_elements("css selector", "#map-entropy .plot canvas"), "a first chart")
        until(lambda: "12 measured steps" in find(driver, "#status").text, "the number of steps")
        assert "No step" not in find(driver, "#multiples").text
        with TimelineWriter(tmp_path, layers=[f"encoder.layer.{i}" for i in range(LAYERS)], heads=12, resume_at=200,
                            meta={"model": {"class": "BertForSequenceClassification", "model_type": "bert",
                                            "parameters": 22713216}}) as out:  # fmt: skip
            out.append(200, **next(measured())[1])
            until(lambda: "13 measured steps" in find(driver, "#status").text, "one more step")
            until(lambda: "step 200: " in find(driver, "#multiples .value").text, "its value")
    until(lambda: "does not answer" in find(driver, "#status").text, "that the server is gone")
    assert all("Failed to load resource" in entry["message"] for entry in driver.get_log("browser"))


def test_a_comparison_draws_profiles_and_matrices(driver, tmp_path):
    opened(driver, look_page(tmp_path, "CKA of A and B"))
    assert len(driver.find_elements("css selector", "#multiples canvas")) == 1
    assert colours_of(driver, "#matrix-cards") > 4
    box = find(driver, "#matrix-cards .plot")
    press(driver, box, "ArrowUp", "Home")
    until(lambda: "layer of A" in find(driver, "#matrix-cards .readout").text, "the value under the cursor")
    assert not find(driver, "#alerts").is_displayed() and not find(driver, "#choice").is_displayed()
    quiet(driver)

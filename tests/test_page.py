"""The page of memory over time, in a real browser without a window: pointer, keyboard, policies, dark mode, odd names."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from test_timeline import GOOD, texts

from nexus_jax import timeline
from nexus_jax.report import size

ODD = "</script><img src=x onerror=alert(1)>&amp;\"'`${1}\u2028"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that the WebDriver standard gives to references


class Browser:
    """Chromium through chromedriver: the WebDriver protocol is JSON over HTTP, and needs no package."""

    def __init__(self, driver, chromium):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._base = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(300):
            with contextlib.suppress(OSError):
                self._send("GET", "/status")
                break
            time.sleep(0.1)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900"]
        options = {"binary": chromium, "args": flags}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        session = self._send("POST", "/session", {"capabilities": wanted})["sessionId"]
        self._base += f"/session/{session}"

    def _send(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data=data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def open(self, path):
        self._send("POST", "/url", {"url": path.as_uri()})

    def run(self, script):
        return self._send("POST", "/execute/sync", {"script": script, "args": []})

    def text(self, selector):
        return self.run(f"return document.querySelector({json.dumps(selector)}).textContent")

    def keys(self, *keys):
        made = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._send("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": made}]})

    def _pointer(self, *made):
        self._send("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": list(made)}]})

    def move(self, x, y):
        self._pointer({"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0})

    def click(self, selector):
        found = self._send("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]
        self._send("POST", f"/element/{found}/click", {})

    def dark(self, on):
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        body = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}}
        self._send("POST", "/goog/cdp/execute", body)

    def errors(self):
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def close(self):
        with contextlib.suppress(Exception):
            self._send("DELETE", "")
        self._process.terminate()
        self._process.wait()


@pytest.fixture(scope="module")
def browser():
    driver = shutil.which("chromedriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if driver is None or chromium is None:
        missing = "no browser: apt-get install -y --no-install-recommends chromium chromium-driver"
        if os.environ.get("NEXUS_JAX_REQUIRE_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)
    found = Browser(driver, chromium)
    yield found
    found.close()


def step_of(policy, layers=6):
    """A made-up step: each layer keeps 1 MiB until its turn comes again; recomputing layers keep a tenth."""
    kept = 2**20 if policy == "none" else 2**20 // 10
    order = ["w", *(f"fwd{i}" for i in range(layers)), *(f"bwd{i}" for i in reversed(range(layers)))]
    end = len(order)
    values, live, lines = [], {"w{}": (0, end)}, []
    for i in range(layers):
        values.append(f"fwd{i} @0> (size={kept},offset={i * kept}): f32[{kept // 4}]{{0}}")
        live[f"fwd{i}{{}}"] = (1 + i, order.index(f"bwd{i}"))
        scope = "transpose(jvp(M))/blocks_0/rematted_computation" if policy == "all" else "transpose(jvp(M))/blocks_0"
        lines += [
            f'  %fwd{i} = f32[4]{{0}} tanh(%w), metadata={{op_name="jit(f)/jvp(M)/blocks_{i}/tanh"}}',
            f'  %bwd{i} = f32[4]{{0}} mul(%w), metadata={{op_name="jit(f)/{scope}/mul"}}',
        ]
    allocations = [
        (
            "size 65536, parameter 0, shape |f32[16384]| at ShapeIndex {}",
            ["w @0> (size=65536,offset=0): f32[16384]{0}"],
        ),
        (f"size {layers * kept}, preallocated-temp", values),
    ]
    key = re.sub("[\"'`\u2028]", "", ODD)
    lines.append(f"  %w = f32[4]{{0}} parameter(0), metadata={{op_name=\"p['params']['{key}']\"}}")
    return timeline.parse(**texts(allocations, order, live, lines))


@pytest.fixture(scope="module")
def lines():
    return {"none": step_of("none"), ODD: step_of("all")}


@pytest.fixture
def opened(browser, lines, tmp_path):
    path = tmp_path / "page.html"
    timeline.write_html(lines, path)
    browser.dark(False)
    browser.open(path)
    browser.errors()  # those of the page before
    return browser


def at(browser):
    return int(browser.run("return document.getElementById('chart').getAttribute('aria-valuenow')"))


def rows(browser):
    script = "return [...document.querySelectorAll('#live tr')].map(r => [...r.cells].map(c => c.textContent))"
    return browser.run(script)


def test_it_opens_at_the_peak(opened, lines):
    t = lines["none"]
    assert at(opened) == t.peak_step == 6
    assert opened.text("#instruction") == "6: fwd5"
    assert f"{size(t.peak_bytes)} in use of {size(t.reserved)} set aside; forward, M/blocks_5, tanh" in opened.text(
        "#bytes"
    )
    assert rows(opened)[0] == ["6.00 MiB", "6", "f32[262144]", "M/blocks_*", "tanh", "forward", "temporary"]
    assert size(t.reserved) in opened.text("#sums") and "fragmentation" in opened.text("#sums")
    assert opened.errors() == []


def test_hovering_shows_the_point_under_the_pointer(opened, lines):
    t = lines["none"]
    box = opened.run("const b = chart.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]")
    shown = {}
    for fraction in (0.001, 0.3, 0.55, 0.9, 0.999):
        opened.move(box[0] + 74 + (box[2] - 86) * fraction, box[1] + box[3] / 2)
        shown[at(opened)] = opened.text("#bytes").partition(" in use")[0]
    assert sorted(shown) == [0, 3, 7, 11, 12]
    assert all(t.points[step].bytes and text == size(t.points[step].bytes) for step, text in shown.items())
    assert opened.text("#instruction") == "12: bwd0"
    assert rows(opened)[0][3] == "M/blocks_0", "one layer alone is named in full"


def test_the_keyboard_does_all_of_it(opened):
    left, right, home, end, up, down = "\ue012", "\ue014", "\ue011", "\ue010", "\ue00e", "\ue00f"
    opened.run("document.querySelector('input[name=policy]').focus()")
    opened.keys("\ue004")  # Tab: from the policies to the curve
    assert opened.run("return document.activeElement.id") == "chart"
    found = []
    for key in (home, right, right, left, end, up, down):
        opened.keys(key)
        found.append(at(opened))
    assert found == [0, 1, 2, 1, 12, 12, 0]
    assert "instruction 0, w, 64.00 KiB in use" in opened.run("return chart.getAttribute('aria-valuetext')")
    opened.keys("\ue004", "\ue007")  # Tab, Enter: the button
    assert at(opened) == 6


def test_policies_are_switched_by_pointer_and_keyboard(opened, lines):
    before = opened.run("return document.querySelector('#chart path[stroke-width]').getAttribute('d')")
    assert opened.text("#policies label:nth-of-type(2)") == ODD
    opened.click("#policies label:nth-of-type(2)")
    assert size(lines[ODD].reserved) in opened.text("#sums")
    assert opened.run("return document.querySelector('#chart path[stroke-width]').getAttribute('d')") != before
    fills = opened.run("return [...document.querySelectorAll('#chart rect')].map(r => r.getAttribute('fill'))")
    assert fills == ["var(--f)", "var(--r)"]
    opened.keys("\ue012")  # the arrow of a group of radio buttons
    assert size(lines["none"].reserved) in opened.text("#sums")


def test_names_are_text_and_nothing_is_loaded(opened, tmp_path):
    opened.run("show(0)")
    assert any("<img src=x onerror=alert(1)>" in cell for row in rows(opened) for cell in row)
    assert opened.run("return document.images.length + document.scripts.length") == 2, "ours, and the data"
    assert opened.run("return performance.getEntriesByType('resource').length") == 0
    page = (tmp_path / "page.html").read_text().replace("src=x", "")  # of the odd name, as text
    assert "<img" not in page and not re.search(
        r"""(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", page
    )
    assert opened.errors() == []


def test_dark_and_light_can_be_read(opened):
    script = """
        const luminance = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
          .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const back = luminance(getComputedStyle(document.body).backgroundColor);
        return [back, ...["#sums", "#bytes", "caption", "#policies legend", "th"].map(s => {
          const text = luminance(getComputedStyle(document.querySelector(s)).color);
          return (Math.max(text, back) + .05) / (Math.min(text, back) + .05);
        })];
    """
    light = opened.run(script)
    opened.dark(True)
    dark = opened.run(script)
    assert light[0] > 0.8 and dark[0] < 0.1
    assert min(light[1:] + dark[1:]) >= 4.5, "the contrast that WCAG 2 asks of text"


def test_it_fits_a_narrow_window(opened):
    opened.run("document.body.style.width = '360px'")
    time.sleep(0.3)  # the curve is drawn anew when its size has changed
    assert opened.run("return document.body.scrollWidth <= document.body.clientWidth + 1")
    assert opened.run("return [...chart.querySelectorAll('path')].every(p => p.getBBox().x + p.getBBox().width <= 360)")


# --- without a browser ---------------------------------------------------------------------------------------------


def test_a_large_step_makes_a_small_page(tmp_path):
    """Four policies of a step of 6000 instructions: libtpu's for twelve layers have as many."""
    t = step_of("none", layers=3000)
    timeline.write_html({str(i): t for i in range(4)}, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 2 * 2**20


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="lines is empty: give at least one"):
        timeline.write_html({}, tmp_path / "page.html")
    timeline.write_html({"none": timeline.parse(**GOOD)}, str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")

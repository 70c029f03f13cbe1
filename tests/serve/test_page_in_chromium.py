"""The page in a real Chromium, by keyboard alone: against an engine without ranks, and once against two ranks."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image

from otil_xdit.serve.app import create_app
from otil_xdit.serve.engine import EngineFailure, EngineStatus, Refused
from otil_xdit.serve.settings import ServeSettings
from tests.support.app_thread import app_in_a_thread
from tests.support.browser import chromium, until
from tests.support.fake_engine import FakeEngine, colour
from tests.support.served import served

pytestmark = pytest.mark.slow

CONTROL, ENTER, ESCAPE, TAB = "\ue009", "\ue007", "\ue00c", "\ue004"
"""Keys, as WebDriver writes them."""


@pytest.fixture(scope="module")
def desktop() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@dataclass
class Page:
    """The page in a browser."""

    browser: Any
    engine: FakeEngine

    def element(self, name: str) -> Any:
        """An element by its id, or a control by its name."""
        return self.browser.find_element("css selector", f"#{name}, [name={name}]")

    def text(self, name: str) -> str:
        return str(self.element(name).text)

    def focused(self) -> str:
        """The id, or the name, of what has the focus."""
        return str(self.browser.execute_script("const a = document.activeElement; return a.id || a.name || a.title"))

    def type(self, *keys: str) -> None:
        """Press keys where the focus is."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def generate(self) -> None:
        self.type(CONTROL, ENTER)

    def shown(self) -> Image.Image:
        """The image on the stage, as the browser has decoded it."""
        script = """
            const image = document.getElementById("shown"), canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL("image/png").split(",")[1];
        """
        return Image.open(io.BytesIO(base64.b64decode(self.browser.execute_script(script)))).convert("RGB")

    def faults(self) -> list[str]:
        """What the console says of errors and of the content security policy."""
        return [one["message"] for one in self.browser.get_log("browser") if one["level"] == "SEVERE"]


@contextmanager
def opened(browser: Any, **settings: Any) -> Iterator[Page]:
    """Open the page of an app round an engine without ranks."""
    engine = FakeEngine()
    with app_in_a_thread(create_app(engine, ServeSettings("tiny-sdxl", **settings))) as url:
        browser.get(f"{url}/")
        page = Page(browser, engine)
        until(lambda: page.text("health-text").startswith("ready"), "connected")
        yield page


def test_an_image_with_progress_and_previews(desktop: Any) -> None:
    with opened(desktop) as page:
        until(lambda: "2 ranks" in page.text("parallel"), "told of the ranks")
        assert page.text("model") == "tiny-sdxl" and "strategy otil" in page.text("parallel")
        page.engine.gate.clear()
        assert page.focused() == "prompt"
        page.type("a <b>red</b> circle", TAB, "blue")
        page.element("width").clear()
        page.element("width").send_keys("192")
        page.element("seed").send_keys("300")
        page.generate()
        until(lambda: page.text("status") == "Step 3 of 4", "at the third step")
        assert page.element("bar").get_property("value") == 0.75
        until(lambda: page.shown().size == (8, 8), "previewed")
        page.engine.gate.set()
        until(lambda: "done in" in page.text("status"), "done")
        until(lambda: page.shown().size == (192, 128), "shown")
        assert page.shown().tobytes() == colour(300, 192, 128).data
        assert "a <b>red</b> circle" in page.text("caption-text") and "seed 300" in page.text("caption-text")
        asked = page.engine.asked[-1]
        assert (asked.prompt, asked.negative_prompt, asked.width, asked.height, asked.steps, asked.seed) == (
            *("a <b>red</b> circle", "blue"),
            *(192, 128, 4, 300),
        )
        assert page.faults() == []


def test_the_gallery_of_this_session(desktop: Any) -> None:
    with opened(desktop) as page:
        page.type("a circle")
        page.element("n").clear()
        page.element("n").send_keys("3")
        page.element("seed").send_keys("7")
        page.generate()
        until(lambda: len(page.browser.find_elements("css selector", "#gallery img")) == 3, "all there")
        until(lambda: "done" in page.text("status"), "done")
        page.element("reuse").send_keys(TAB)
        for number in (2, 1, 0):  # the newest one first
            assert page.focused() == f"a circle (seed {7 + number})"
            page.type(ENTER)
            until(lambda seed=7 + number: f"seed {seed}" in page.text("caption-text"), "chosen")
            until(lambda seed=7 + number: page.shown().tobytes() == colour(seed, 128, 128).data, "shown")
            page.type(TAB)
        assert page.element("download").get_attribute("download") == "7.png"
        page.browser.find_element("css selector", "#gallery button").send_keys(ENTER)
        page.element("reuse").send_keys(ENTER)
        assert page.element("seed").get_property("value") == "9" and page.focused() == "prompt"


def test_tab_goes_through_the_form_in_its_order(desktop: Any) -> None:
    with opened(desktop) as page:
        order = ["prompt", "negative_prompt", "shape", "width", "height", "num_inference_steps", "guidance_scale", "n"]
        for name in [*order, "seed", "scheduler", "generate"]:
            assert page.focused() == name
            page.type(TAB)


@pytest.mark.parametrize("keys", [ESCAPE, TAB + ENTER])
def test_a_cancel(desktop: Any, keys: str) -> None:
    with opened(desktop) as page:
        page.engine.gate.clear()
        page.type("a circle")
        page.element("generate").send_keys(ENTER)
        until(lambda: page.text("status") == "Step 3 of 4", "at the third step")
        for key in keys:
            page.type(key)
        until(lambda: page.text("status") == "Cancelled", "cancelled")
        until(lambda: page.engine.cancels == 1, "cancelled in the engine")
        assert page.focused() == "generate" and not page.element("cancel").is_displayed()
        page.engine.gate.set()
        page.type(ENTER)
        until(lambda: "done in" in page.text("status"), "done")


def test_errors_of_the_server_are_shown_and_the_field_is_named(desktop: Any) -> None:
    with opened(desktop, max_pixels=256 * 256) as page:
        page.generate()
        assert page.text("error") == "Give a prompt." and page.focused() == "prompt" and not page.engine.asked
        page.type("a circle")
        page.element("width").clear()
        page.element("width").send_keys("1024")
        page.element("generate").send_keys(ENTER)
        until(lambda: "1024x128" in page.text("error") and "65536 pixels" in page.text("error"), "refused")
        assert page.focused() == "width" and page.element("width").get_attribute("aria-invalid") == "true"
        page.element("width").clear()
        page.element("width").send_keys("128")
        for fault, said in (
            (Refused("two ranks cannot share this"), "two ranks cannot share this"),
            (EngineFailure("rank 1 has ended"), "rank 1 has ended (request "),
        ):
            page.engine.fault = fault
            page.generate()
            until(lambda said=said: said in page.text("error"), said)
        page.generate()
        until(lambda: "done in" in page.text("status"), "done")
        assert not page.element("error").is_displayed()


def test_a_full_queue_and_a_server_that_restarts(desktop: Any) -> None:
    with opened(desktop, max_queue=0) as page:
        page.engine.gate.clear()
        page.browser.execute_script(
            """fetch("v1/images/generations", {method: "POST", body: '{"prompt": "another"}',
                                               headers: {"Content-Type": "application/json"}})"""
        )
        until(lambda: page.engine.asked, "busy")
        page.type("a circle")
        page.generate()
        until(lambda: "try again in" in page.text("error"), "told of the full queue")
        page.engine.gate.set()
        page.engine.status = EngineStatus("restarting", "rank 1 has said nothing for 30 s")
        until(lambda: "restarting: rank 1 has said nothing" in page.text("health-text"), "told of the restart")
        page.generate()
        until(lambda: "not ready (restarting" in page.text("error"), "refused meanwhile")


def test_a_server_with_a_key(desktop: Any) -> None:
    with opened(desktop, api_key="secret") as page:
        until(lambda: page.element("key-field").is_displayed(), "asked for the key")
        page.element("key").send_keys("secret", TAB)
        until(lambda: "2 ranks" in page.text("parallel"), "let in")
        page.element("prompt").send_keys("a circle")
        page.generate()
        until(lambda: "done in" in page.text("status"), "done")


def test_a_phone() -> None:
    with chromium(phone=True) as browser, opened(browser) as page:
        page.type("a circle of a very long word: " + "o" * 200)
        page.generate()
        until(lambda: "done in" in page.text("status"), "done")
        assert browser.execute_script("return document.documentElement.scrollWidth === innerWidth")
        small = """return [...document.querySelectorAll("input, select, textarea, button, a")]
            .filter((one) => one.offsetParent && one.getBoundingClientRect().height < 44).map((one) => one.outerHTML)"""
        assert browser.execute_script(small) == []


def test_two_ranks(desktop: Any) -> None:
    with served("--model", "tiny-sd", "--parallel", "otil", "--patch_degree", "2") as server:
        fields = {"prompt": "a large red circle", "seed": 3, "num_inference_steps": 6}
        wanted = server.image(**fields)
        desktop.get(f"{server.url}/")
        page = Page(desktop, FakeEngine())
        until(lambda: "2 ranks" in page.text("parallel"), "connected")
        page.type(fields["prompt"])
        page.element("seed").send_keys("3")
        page.element("num_inference_steps").clear()
        page.element("num_inference_steps").send_keys("150")
        page.generate()
        until(lambda: "preview" in page.element("shown").get_attribute("class"), "previewed", 120)
        assert 0 < page.element("bar").get_property("value") < 1
        page.type(ESCAPE)
        until(lambda: "xfuser_serve_running 0.0" in server.http.get("/metrics").text, "cancelled on the ranks")
        assert page.text("status") == "Cancelled" and '"stage": "cancelled"' in server.log.read_text()
        page.element("num_inference_steps").clear()
        page.element("num_inference_steps").send_keys("6")
        page.generate()
        until(lambda: "done in" in page.text("status"), "done", 120)
        right = Image.open(io.BytesIO(base64.b64decode(wanted)))
        until(lambda: page.shown().size == right.size, "shown")
        assert page.shown().tobytes() == right.tobytes()
        page.element("height").clear()
        page.element("height").send_keys("16")
        page.generate()
        until(lambda: "cannot be cut into 2 patches" in page.text("error"), "refused by the ranks", 60)

"""The chat page in a real browser: asking, streaming, stopping, errors, a phone's width. Screenshots are kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.checkpoint_convert.whole_model import TALL, WIDE, picture
from tests.inference.server.running import RunningServer, image_part, run_server
from tests.support.chromium import CHROMIUM, Page, browser


def test_the_page_fetches_nothing_from_elsewhere(server: RunningServer) -> None:
    response = server.client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "http://" not in response.text and "https://" not in response.text


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page
        assert page.errors == []


def _open(page: Page, url: str, width: int = 1000, height: int = 720, phone: bool = False, dark: bool = False) -> None:
    page.open(url, width, height, phone, dark)
    page.wait("document.getElementById('status').textContent.startsWith('ready')")


def _ask(page: Page, question: str) -> None:
    page.run("document.getElementById('question').focus()")
    page.type(question, enter=True)


def _set(page: Page, field: str, value: str) -> None:
    page.run(f"document.getElementById('{field}').value = '{value}'")


LAST = "[...document.querySelectorAll('.assistant .bubble')].at(-1).textContent"
IDLE = "!document.querySelector('.writing') && !document.getElementById('send').hidden"


def test_a_conversation_with_images(server: RunningServer, page: Page, tmp_path: Path) -> None:
    first = [image_part(picture(WIDE)), image_part(picture(TALL)), {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": first}]
    one = server.chat(None, messages=messages, max_tokens=40)["choices"][0]["message"]
    messages += [one, {"role": "user", "content": [{"type": "text", "text": "A red dog?"}]}]
    two = server.chat(None, messages=messages, max_tokens=40)["choices"][0]["message"]

    _open(page, server.url)
    page.screenshot(tmp_path / "empty.png")
    for name, size in (("wide", WIDE), ("tall", TALL)):
        picture(size).save(tmp_path / f"{name}.png")
        page.choose_files("#file", tmp_path / f"{name}.png")
        page.wait(f"document.querySelectorAll('.thumbnail').length === {1 + (name == 'tall')}")
    _set(page, "tokens", "40")
    page.type("What is it?")
    page.screenshot(tmp_path / "asking.png")
    page.type("", enter=True)
    page.wait(f"document.querySelector('.assistant') && {IDLE}")
    assert page.run(LAST) == one["content"]
    assert page.run("document.querySelectorAll('.user .images img').length") == 2
    _ask(page, "A red dog?")
    page.wait(f"document.querySelectorAll('.assistant').length === 2 && {IDLE}")
    assert page.run(LAST) == two["content"]
    assert page.run("document.querySelector('.note').textContent").startswith("The longest answer was reached")
    page.screenshot(tmp_path / "answered.png")
    page.run("document.getElementById('new').click()")
    assert page.run("document.querySelectorAll('.message').length") == 0


def test_an_answer_streams_and_can_be_stopped(server: RunningServer, page: Page, tmp_path: Path) -> None:
    _open(page, server.url)
    _set(page, "tokens", "3000")
    cancelled = server.engine.stats().finished.get("cancelled", 0)
    _ask(page, "Describe it.")
    page.wait(f"document.querySelector('.writing') && {LAST}.length > 20")
    page.screenshot(tmp_path / "streaming.png")
    page.run("document.getElementById('stop').click()")
    page.wait(IDLE)
    assert page.run("document.querySelector('.note').textContent") == "Stopped."
    deadline = time.monotonic() + 10
    while server.engine.stats().finished.get("cancelled", 0) != cancelled + 1:
        assert time.monotonic() < deadline, "the engine still writes an answer that nobody reads"
        time.sleep(0.05)


def test_an_error_is_shown_and_the_question_comes_back(server: RunningServer, page: Page, tmp_path: Path) -> None:
    _open(page, server.url)
    _set(page, "tokens", "100000")
    _ask(page, "What is it?")
    page.wait("document.querySelector('.error')")
    assert "a sequence has at most 4096" in page.run("document.querySelector('.error').textContent")
    assert page.run("document.getElementById('question').value") == "What is it?"
    page.screenshot(tmp_path / "error.png")
    (tmp_path / "no image.png").write_text("text")
    page.choose_files("#file", tmp_path / "no image.png")
    page.wait("document.querySelectorAll('.error').length === 2")
    assert "no image.png is not an image" in page.run("[...document.querySelectorAll('.error')].at(-1).textContent")


def test_a_phone(server: RunningServer, page: Page, tmp_path: Path) -> None:
    _open(page, server.url, 375, 667, phone=True, dark=True)
    picture(WIDE).save(tmp_path / "wide.png")
    page.choose_files("#file", tmp_path / "wide.png")
    page.wait("document.querySelectorAll('.thumbnail').length === 1")
    _set(page, "tokens", "120")
    _ask(page, "What " + "colour" * 20 + "?")
    page.wait(f"document.querySelector('.assistant') && {IDLE}")
    page.screenshot(tmp_path / "phone.png")
    assert page.run("document.documentElement.scrollWidth") == 375
    assert page.run("document.getElementById('send').getBoundingClientRect().bottom <= innerHeight")
    page.run("document.getElementById('gear').click()")
    page.screenshot(tmp_path / "phone-settings.png")
    assert page.run("document.documentElement.scrollWidth") == 375


DROP = """(async () => {
  const image = await (await fetch('%s')).blob();
  const transfer = new DataTransfer();
  transfer.items.add(new File([image], 'dropped.png', {type: 'image/png'}));
  for (const name of ['dragenter', 'drop']) {
    document.body.dispatchEvent(new DragEvent(name, {dataTransfer: transfer, bubbles: true, cancelable: true}));
    if (name === 'dragenter' && document.getElementById('drop').hidden) throw new Error('nothing is shown');
  }
})()"""


def test_an_image_is_dropped(server: RunningServer, page: Page) -> None:
    _open(page, server.url)
    page.call("Page.setBypassCSP", enabled=True)  # the page itself may not fetch data URLs, this test may
    page.call("Page.reload")
    page.wait("document.readyState === 'complete' && document.getElementById('status').textContent.startsWith('ready')")
    page.run(DROP % image_part(picture(WIDE))["image_url"]["url"])
    page.wait("document.querySelectorAll('.thumbnail').length === 1")
    assert page.run("document.getElementById('drop').hidden")
    page.call("Page.setBypassCSP", enabled=False)
    page.run("document.querySelector('.thumbnail button').click()")
    assert page.run("document.getElementById('attached').hidden")


def test_a_server_with_a_key(server: RunningServer, page: Page) -> None:
    with run_server(server.engine, api_keys=("secret",)) as locked:
        assert httpx.get(f"{locked.url}/").status_code == 200
        page.open(locked.url)
        page.wait("document.getElementById('status').textContent.includes('needs an API key')")
        page.run("document.getElementById('key').value = 'secret'; document.getElementById('key').onchange()")
        page.wait("document.getElementById('status').textContent.startsWith('ready')")

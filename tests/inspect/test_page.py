"""The page of `vlm inspect`: what it shows, what it refuses, and that a browser can use it."""

from __future__ import annotations

import csv
import http.client
import io
import json
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_runs import ATTACK, TableRun, TinyRun

from vlm.cli import main
from vlm.errors import UserError
from vlm.exporting import export
from vlm.inspect.inspecting import inspection_of
from vlm.inspect.server import MAX_CONNECTIONS, MAX_UPLOAD_BYTES, Inspection, InspectionServer, is_loopback


@pytest.fixture(scope="module")
def runs(table_run: TableRun, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on a table whose answers, types and names of images are an attack: one says it always, one says blue."""
    folder, name = tmp_path_factory.mktemp("inspect"), "predictions-csv-validation.csv"
    copies = []
    for number, answer in enumerate((ATTACK, "blue")):
        copies.append(Path(shutil.copytree(table_run.folder, folder / f"run-{number}")))
        header, *rows = csv.reader((copies[-1] / name).read_text().splitlines())
        with (copies[-1] / name).open("w", newline="") as file:
            csv.writer(file).writerows([header, *([row[0], answer] for row in rows)])
    return copies


@pytest.fixture(scope="module")
def server(runs: list[Path]) -> Iterator[InspectionServer]:
    with InspectionServer(inspection_of(runs)) as opened:
        thread = threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield opened
        opened.shutdown()
        thread.join()


def call(
    server: InspectionServer, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, body, named)
    response = connection.getresponse()
    found = response.status, response.headers, response.read()
    connection.close()
    return found


def asked(server: InspectionServer, path: str, body: bytes | None = None, **headers: str) -> Any:
    status, _, content = call(server, path, body, **headers)
    assert status == 200, content
    return json.loads(content)


def png(width: int, height: int) -> bytes:
    """A picture that claims to be this large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_filters_leave_what_they_say(server: InspectionServer) -> None:
    everything = asked(server, "/questions")
    right, wrong = (asked(server, f"/questions?show={show}") for show in ("right", "wrong"))
    assert right["total"] + wrong["total"] == everything["total"] and right["total"] and wrong["total"]
    assert all(item["right"][0] for item in right["items"])
    differ, better = (asked(server, f"/questions?show={show}") for show in ("differ", "better"))
    assert differ["total"] == everything["total"] and better["total"] == wrong["total"]
    assert asked(server, "/questions?search=zebra")["total"] == 0
    last = asked(server, "/questions?page=99")
    assert last["page"] == last["pages"] - 1 and 0 < len(last["items"]) <= 24


def test_only_names_that_were_given_out_reach_an_image(server: InspectionServer) -> None:
    key = asked(server, "/questions")["items"][0]["images"][0]
    status, headers, content = call(server, f"/image?name={key}")
    assert status == 200 and headers["Content-Type"] == "image/png"
    assert Image.open(io.BytesIO(content)).size == (64, 48)
    for name in ("../../../etc/passwd", "/etc/passwd", "%2e%2e%2fconfig.yaml", "config.yaml", "upload:none", ""):
        assert call(server, f"/image?name={name}")[0] == 404
    for path in ("/../server.py", "/page/../server.py", "/server.py", "//etc/passwd", "/%2e%2e/server.py"):
        assert call(server, path)[0] == 404


def test_other_hosts_other_origins_and_other_types_are_refused(server: InspectionServer) -> None:
    assert call(server, "/about", Host="evil.example")[0] == 403
    assert call(server, "/about", Host="192.168.0.7")[0] == 403
    assert call(server, "/about", Host=f"localhost:{server.server_address[1]}")[0] == 200
    assert call(server, "/about", Origin="http://evil.example")[0] == 403
    assert call(server, "/upload", b"x", Content_Type="text/plain")[0] == 415
    assert is_loopback(str(server.server_address[0]))


def test_nothing_from_elsewhere_is_loaded_or_run(server: InspectionServer) -> None:
    for path in ("/", "/page.js", "/page.css", "/about"):
        status, headers, content = call(server, path)
        assert status == 200 and headers["X-Content-Type-Options"] == "nosniff"
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy
        assert b"http:" not in content and b"https:" not in content and b"innerHTML =" not in content


def test_uploads_are_capped_in_bytes_and_pixels(server: InspectionServer) -> None:
    kind = {"Content_Type": "application/octet-stream"}
    status, _, content = call(server, "/upload", png(14_000, 12_000), **kind)
    assert (status == 400 and b"168000000" in content.replace(b",", b"")) or b"14000 x 12000" in content
    assert call(server, "/upload", b"<svg xmlns='http://www.w3.org/2000/svg'/>", **kind)[0] == 400
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.putrequest("POST", "/upload")
    connection.putheader("Content-Type", "application/octet-stream")
    connection.putheader("Content-Length", str(MAX_UPLOAD_BYTES + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_question_of_ones_own_is_answered_with_a_map(server: InspectionServer) -> None:
    drawn = io.BytesIO()
    Image.new("RGB", (80, 60), "red").save(drawn, "PNG")
    name = asked(server, "/upload", drawn.getvalue(), Content_Type="application/octet-stream")["image"]
    body = json.dumps({"images": [name], "question": "what is it?"}).encode()
    found = asked(server, "/ask", body, Content_Type="application/json")
    assert {one["answer"] for one in found["answers"]} == {ATTACK, "blue"}
    assert len(found["maps"]) == 1 and len(found["maps"][0]) == len(found["maps"][0][0]) == 3
    for wrong in ({"images": [name], "question": ""}, {"images": "x"}, {"images": [], "question": "what?"}, []):
        assert call(server, "/ask", json.dumps(wrong).encode(), Content_Type="application/json")[0] == 400


@pytest.mark.slow
def test_a_browser_shows_hostile_text_as_text(server: InspectionServer, tmp_path: Path) -> None:
    chromium, driver_file = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver_file is None:
        pytest.skip("needs Chromium and ChromeDriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "window-size=1366,850", f"user-data-dir={tmp_path}/profile"]
    for flag in flags:
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_file))
    wait = WebDriverWait(browser, 60)
    pictures = Path(os.environ["VLM_SCREENSHOTS"]) if "VLM_SCREENSHOTS" in os.environ else tmp_path

    def seen(css: str) -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, css)

    try:
        browser.get(server.url)
        wait.until(lambda _: len(seen(".card")) == 24)
        assert ATTACK in seen("#cards")[0].text and not seen(".card svg") and browser.title == "vlm inspect"
        browser.save_screenshot(str(pictures / "browse.png"))
        seen("#show option[value=wrong]")[0].click()
        wait.until(lambda _: seen(".card .wrong") and len(seen(".card .right")) <= len(seen(".card")))
        seen("#search")[0].send_keys("zebra")
        wait.until(lambda _: not seen(".card"))
        seen("#search")[0].send_keys(Keys.BACKSPACE * 5)
        wait.until(lambda _: seen(".card"))
        seen(".card")[0].send_keys(Keys.ENTER)  # reachable by keyboard
        wait.until(lambda _: seen("#answers tr") and seen("canvas"))
        assert ATTACK in seen("#answers")[0].text and browser.title == "vlm inspect"
        browser.save_screenshot(str(pictures / "ask.png"))
        seen("#detail")[0].send_keys(Keys.ESCAPE)
        Image.new("RGB", (300, 200), "green").save(tmp_path / "own.png")
        seen("#own")[0].click()
        seen("#files input")[0].send_keys(str(tmp_path / "own.png"))
        wait.until(lambda _: seen("#pictures img"))
        seen("#question")[0].send_keys("what is it?", Keys.ENTER)
        wait.until(lambda _: seen("#answers tr"))
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        )
        browser.save_screenshot(str(pictures / "dark.png"))
        problems = [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
        assert problems == []
    finally:
        browser.quit()

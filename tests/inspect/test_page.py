"""The page of `vlm inspect`: what it shows, what it refuses, and that a browser can use it."""

from __future__ import annotations

import csv
import http.client
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_runs import ATTACK, COLORS, TableRun, TinyRun

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
    assert all(item["right"][0] and item["predictions"][0] in item["answers"] for item in right["items"])
    assert not any(item["right"][0] or item["predictions"][0] in item["answers"] for item in wrong["items"])
    differ, better = (asked(server, f"/questions?show={show}") for show in ("differ", "better"))
    assert differ["total"] == everything["total"] == 31
    assert better["total"] and all(item["answers"] == ["blue"] for item in better["items"])
    assert asked(server, "/questions?kind=%3Cb%3Et%3C%2Fb%3E")["total"] == 31
    assert asked(server, "/questions?kind=other")["total"] == 0
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
    assert status == 400 and b"14000 x 12000 pixels is over the limit" in content
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
    assert {one["answer"] for one in found["answers"]} == set(COLORS) and found["answers"][0]["answer"] == "red"
    assert sum(one["probability"] for one in found["answers"]) == pytest.approx(1, abs=1e-3)
    assert len(found["maps"]) == 1 and len(found["maps"][0]) == len(found["maps"][0][0]) == 3
    for wrong in ({"images": [name], "question": ""}, {"images": "x"}, {"images": [], "question": "what?"}, []):
        assert call(server, "/ask", json.dumps(wrong).encode(), Content_Type="application/json")[0] == 400


def test_a_failure_tells_the_page_nothing_of_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> Any:
        raise RuntimeError("/home/somebody/secret")

    drawn = io.BytesIO()
    Image.new("RGB", (8, 8)).save(drawn, "PNG")
    with InspectionServer(Inspection(None, fails, 1)) as opened:
        threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        name = asked(opened, "/upload", drawn.getvalue(), Content_Type="application/octet-stream")["image"]
        body = json.dumps({"images": [name], "question": "what is it?"}).encode()
        status, _, content = call(opened, "/ask", body, Content_Type="application/json")
        assert status == 500 and b"secret" not in content and "/home/somebody/secret" in capsys.readouterr().err
        deep = b"[" * 15_000
        assert call(opened, "/ask", deep, Content_Type="application/json")[0] in (400, 500)
        assert asked(opened, "/about")["runs"] == []
        opened.shutdown()


def test_silent_connections_are_bounded_and_one_that_goes_away_is_no_news(
    server: InspectionServer, capsys: pytest.CaptureFixture[str]
) -> None:
    address = ("127.0.0.1", server.server_address[1])
    silent = [socket.create_connection(address, timeout=10) for _ in range(MAX_CONNECTIONS)]
    with socket.create_connection(address, timeout=10) as one_more:
        assert one_more.recv(1) == b""  # closed at once
    for connection in silent:
        # What is left unread or unsent is thrown away: the server sees a reset.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    deadline = time.monotonic() + 10
    while server.places._value < MAX_CONNECTIONS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asked(server, "/about") and capsys.readouterr().err == ""


def test_an_export_can_be_asked_and_has_no_predictions(table_run: TableRun, tmp_path: Path) -> None:
    exported = export(table_run.folder, tmp_path / "export")
    inspection = inspection_of([exported])
    assert inspection.evaluation is None and inspection.questions("all", "", "", 0)["total"] == 0
    drawn = io.BytesIO()
    Image.new("RGB", (80, 60), "blue").save(drawn, "PNG")
    name = inspection.upload(drawn.getvalue())["image"]
    assert inspection.ask([name], "what is it?", None)["answer"] == "blue"
    assert inspection.model is not None and inspection.model.head is not None
    for parameter in inspection.model.head.parameters():
        parameter.data = parameter.data * float("nan")
    with pytest.raises(UserError, match="must have diverged"):
        inspection.ask([name], "what is it?", None)
    for runs in ([table_run.folder, exported], [exported, table_run.folder]):
        with pytest.raises(UserError, match=r"export: no run's folder, and only that holds predictions"):
            inspection_of(runs)
    with pytest.raises(UserError, match="--set is about predictions"):
        inspection_of([exported], ["task.evaluation_split=test"])


def test_statements_about_two_images_are_shown_and_asked(
    statement_run: TinyRun, table_run: TableRun, capsys: pytest.CaptureFixture[str]
) -> None:
    inspection = inspection_of([statement_run.folder])
    item = inspection.questions("all", "", "", 0)["items"][0]
    assert inspection.about()["kinds"] == [] and item["kind"] == ""
    assert len(item["images"]) == 2 and len({inspection.picture(name) for name in item["images"]}) == 2
    found = inspection.ask(item["images"], item["question"], None)
    assert len(found["maps"]) == 2 and found["answer"] == item["predictions"][0]
    with pytest.raises(UserError, match=r"wants 2 image\(s\). Got 1"):
        inspection.ask(item["images"][:1], item["question"], None)
    assert main(["inspect", str(table_run.folder), str(statement_run.folder)]) == 2
    error = capsys.readouterr().err
    assert "answered other questions" in error and error.count("\n") == 1


def test_the_verb_serves_until_it_is_interrupted(table_run: TableRun) -> None:
    # Who runs the tests in the background has ctrl-C ignored, and so would what they start.
    restored = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from vlm.cli import main; "
    )
    command = [sys.executable, "-c", restored + "sys.exit(main())", "inspect", str(table_run.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.readline()
        assert printed.startswith("http://127.0.0.1:"), process.communicate()
        port = int(printed.split("/")[2].partition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/about")
        assert json.loads(connection.getresponse().read())["runs"] == ["run"]
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == "" and process.returncode == 0


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
    shots = Path(os.environ["VLM_SCREENSHOTS"]) if "VLM_SCREENSHOTS" in os.environ else tmp_path

    def seen(css: str) -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, css)

    try:
        browser.get(server.url)
        wait.until(lambda _: len(seen(".card")) == 24)
        assert ATTACK in seen("#cards")[0].text and not seen(".card svg") and browser.title == "vlm inspect"
        browser.save_screenshot(str(shots / "browse.png"))
        seen("#show option[value=wrong]")[0].click()
        wrong = asked(server, "/questions?show=wrong")["total"]
        wait.until(lambda _: seen("#count")[0].text == f"{wrong} questions")
        first = [card.find_element(By.CSS_SELECTOR, ".right, .wrong") for card in seen(".card")]  # of run A
        assert {mark.text for mark in first} == {"✗ wrong"}
        seen("#search")[0].send_keys("zebra")
        wait.until(lambda _: not seen(".card") and seen("#count")[0].text == "0 questions")
        seen("#search")[0].send_keys(Keys.BACKSPACE * 5)
        wait.until(lambda _: seen(".card"))
        seen(".card")[0].send_keys(Keys.ENTER)  # reachable by keyboard
        wait.until(lambda _: seen("#answers tr") and seen("canvas"))
        assert ATTACK in seen("#answers")[0].text and browser.title == "vlm inspect" and not seen("dialog svg")
        shown = seen("#pictures img")[0].get_attribute("src")
        browser.save_screenshot(str(shots / "ask.png"))
        seen("#detail")[0].send_keys(Keys.ESCAPE)
        Image.new("RGB", (300, 200), "green").save(tmp_path / "own.png")
        seen("#own")[0].click()
        assert not seen("#pictures img") and not seen("#answers tr") and not seen("canvas")
        seen("#files input")[0].send_keys(str(tmp_path / "own.png"))
        wait.until(lambda _: seen("#pictures img"))
        assert "upload" in seen("#pictures img")[0].get_attribute("src") != shown
        size = "return ['naturalWidth', 'naturalHeight'].map((side) => document.querySelector('#pictures img')[side])"
        wait.until(lambda _: browser.execute_script(size) == [300, 200])
        seen("#question")[0].send_keys("what is it?", Keys.ENTER)
        wait.until(lambda _: seen("#answers tr") and seen("#pictures canvas"))
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        )
        browser.save_screenshot(str(shots / "dark.png"))
        assert browser.get_log("browser") == []
    finally:
        browser.quit()

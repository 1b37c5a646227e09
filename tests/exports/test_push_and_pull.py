"""To the hub and back, against a server of this machine; and without a network."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hub_server import HubServer

import vlm
from vlm.errors import UserError
from vlm.hub import pull, push


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a hub of our own; the client's cache is the test's."""
    HubServer.files.clear()
    HubServer.branches.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_model_goes_to_the_hub_and_comes_back(pretrained_export: Path, server: str) -> None:
    (pretrained_export / "secret.txt").write_text("not a file of an export")
    try:
        push(pretrained_export, "me/scenes", endpoint=server)
    finally:
        (pretrained_export / "secret.txt").unlink()
    assert "model.safetensors" in HubServer.files[HubServer.branches["main"]]
    assert "secret.txt" not in HubServer.files[HubServer.branches["main"]]
    HubServer.files[HubServer.branches["main"]]["modeling.py"] = b"raise SystemExit"  # somebody else's file
    folder = pull("me/scenes", endpoint=server)
    assert not (folder / "modeling.py").exists()
    there, here = vlm.load(folder).model.state_dict(), vlm.load(pretrained_export).model.state_dict()
    assert all(torch.equal(there[name], here[name]) for name in here)
    by_commit = pull("me/scenes", revision=HubServer.branches["main"], endpoint=server)
    assert by_commit == folder
    with pytest.raises(UserError, match="could not be fetched from the hub at revision 'v9'"):
        pull("me/scenes", revision="v9", endpoint=server)
    with pytest.raises(UserError, match="could not be fetched from the hub"):
        pull("me/other", endpoint=server)


def test_without_a_network_the_hub_is_one_line(pretrained_export: Path) -> None:
    with pytest.raises(UserError, match=r"'someone/model' is no folder here, and could not be.*Without network"):
        vlm.load("someone/model")
    with pytest.raises(UserError, match=r"could not be uploaded as 'someone/model'.*token"):
        push(pretrained_export, "someone/model")
    with pytest.raises(UserError, match="expected OWNER/NAME"):
        push(pretrained_export, "model")
    with pytest.raises(UserError, match="a folder here has no revisions"):
        vlm.load(pretrained_export, revision="v1")

"""From the command line to a server: what `live` and `livekit` load, and what they say before they do."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.testclient import TestClient

from lavatar_jax.checkpoints.conversion import Task, convert_folder
from lavatar_jax.checkpoints.store import load_config, model_folder
from lavatar_jax.cli import run
from lavatar_jax.errors import UserError
from lavatar_jax.inference.load_host import prepare_host
from lavatar_jax.inference.pipeline import SlotState
from lavatar_jax.inference.session_state import SessionState, save_state
from lavatar_jax.models.attention import KV, RingCache
from lavatar_jax.parallel import PipelineLayout
from lavatar_jax.serving.live import Live
from tests import published
from tests.serving.conftest import wait_for

ROOT = Path(__file__).resolve().parents[2]
LOAD = "lavatar_jax.inference.load_host.load_model_folder"
ONE = PipelineLayout(stages=1, own_decoder=False)


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[PipelineLayout]:
    """Of the hosts that would have been made."""
    found: list[PipelineLayout] = []

    def make(avatar: Any, slots: int, layout: PipelineLayout, **_: Any) -> None:
        found.append(layout)

    monkeypatch.setattr("lavatar_jax.inference.load_host.SessionHost", make)
    return found


@pytest.mark.parametrize(
    ("devices", "layout"), [(1, ONE), (4, PipelineLayout(own_decoder=False)), (5, PipelineLayout())]
)
def test_devices_are_those_of_generate(
    layouts: list[PipelineLayout], devices: int, layout: PipelineLayout
) -> None:
    """Of nine that are there."""
    prepare_host("tiny", devices)(1)
    assert layouts == [layout]


@pytest.mark.parametrize("devices", [7, 16])
def test_devices_that_do_not_work_are_told_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    monkeypatch.setattr(LOAD, lambda _: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=f"--devices {devices}: "):
        prepare_host("tiny", devices)


@pytest.mark.parametrize("changes", [{"history": "clean"}, {"decode": "clip"}], ids=str)
def test_models_that_only_generate_can_sample_are_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    config = load_config(model_folder("tiny"))
    other = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **changes))
    monkeypatch.setattr("lavatar_jax.inference.load_host.load_config", lambda _: other)
    monkeypatch.setattr(LOAD, lambda _: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"tiny cannot talk live: .*use generate, on one device"):
        prepare_host("tiny", 1)


def test_a_cpu_shows_as_many_devices_as_are_asked_for() -> None:
    """In a process that has computed nothing yet, as that of `serve.py live --devices 5`."""
    code = """
import jax
from lavatar_jax.inference.load_host import prepare_host
prepare_host("tiny", 5)
print(len(jax.devices()))
"""
    clean = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert shown.stdout.strip() == "5", shown.stderr


def test_live_hands_its_devices_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def prepare(model: str, devices: int) -> None:
        asked.append((model, devices))
        raise UserError("enough")

    monkeypatch.setattr("lavatar_jax.inference.load_host.prepare_host", prepare)
    assert run(Live(port=18_765, devices=3).run) == 2
    assert asked == [("tiny", 3)]


def test_nobody_else_looks_at_saved_sessions(tmp_path: Path) -> None:
    """Whatever the umask; a folder that was there may be shared on purpose, its files are not."""
    before = os.umask(0)
    try:
        Live(state=tmp_path / "new")._check()
        (tmp_path / "old").mkdir()
        Live(state=tmp_path / "old")._check()
        part = tmp_path / "session"
        save_state(part, state())
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"new": 0o700, "old": 0o777, "session": 0o600}


def state() -> SessionState:
    empty = np.zeros(1, np.float32)
    slot = SlotState(0, RingCache(empty, empty, empty), KV(empty, empty), empty, (), 0)
    return SessionState(slot, {}, empty, None, None, None, {}, {})


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as tools/convert.py makes it, with a text encoder and a speech encoder, for 64x64 pixels."""
    pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    from tools.pth import PickledTensors

    source = published.write_published(tmp_path_factory.mktemp("published"))
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_folder(Task(wan=source.wan, out=folder), PickledTensors)
    config = json.loads((folder / "config.json").read_text())
    sampling = config["sampling"] | {"steps": 1, "ring_blocks": 1}  # there is less to compile
    (folder / "config.json").write_text(json.dumps(config | {"image_size": [64, 64], "sampling": sampling}))
    return folder


def test_a_converted_model_is_served(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words open a session and change it; its text encoder is loaded once."""
    apps: list[Any] = []
    monkeypatch.setattr("lavatar_jax.serving.server.serve", lambda app, *_: apps.append(app))
    Live(port=18_766, model=str(converted), sessions=1, data=tmp_path, tts="off", watermark=False).run()
    (app,) = apps
    monkeypatch.setattr("lavatar_jax.inference.prompt_reader.load_text_encoder", None)
    with TestClient(app, base_url="http://127.0.0.1:18766", client=("127.0.0.1", 50_000)) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200 or app.state.services.sessions.failed, 500)
        opened = client.post("/v1/sessions", json={"prompt": "a person talking"})
        assert opened.status_code == 201, opened.text
        bearer = {"Authorization": f"Bearer {opened.json()['token']}"}
        path = f"/v1/sessions/{opened.json()['id']}"
        session = app.state.services.sessions.rooms[opened.json()["id"]].session
        pipeline = app.state.services.sessions.host.pipeline
        before = np.asarray(pipeline.text.k)
        assert client.patch(path, json={"prompt": "smiling"}, headers=bearer).status_code == 200
        wait_for(lambda: (np.asarray(pipeline.text.k) != before).any())
        assert session.reason is None
        wait_for(lambda: session.stats.blocks > 2)


# What is wrong is told before a model is loaded


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(name: str) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr("lavatar_jax.inference.load_host.load_model_folder", load)
    monkeypatch.chdir(tmp_path)


def pem_files(password: bytes | None = None) -> tuple[Path, Path]:
    """A certificate and its key, as new files here."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "avatar.example")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    signed = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    number = len(list(Path().glob("*.pem")))
    files = Path(f"cert{number}.pem"), Path(f"key{number}.pem")
    files[0].write_bytes(signed.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, lock))
    return files


def refused(capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """The one line that `live` says."""
    assert run(Live(**{"port": 18_767, "tts": "off"} | options).run) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_certificates_are_tried(nothing_loaded: None, capsys: pytest.CaptureFixture[str]) -> None:
    good, other, locked = pem_files(), pem_files(), pem_files(b"password")
    Path("text.pem").write_text("this is no certificate")
    for cert, key in ((good[0], other[1]), locked, (Path("text.pem"), good[1]), (good[0], Path("text.pem"))):
        assert f"--tls-cert {cert} and --tls-key {key}" in refused(capsys, tls_cert=cert, tls_key=key)
    with pytest.raises(AssertionError, match="is being loaded"):
        Live(port=18_767, tls_cert=good[0], tls_key=good[1]).run()


def test_what_a_server_needs_is_looked_for(nothing_loaded: None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("faces").mkdir()
    assert "there is no picture in it" in refused(capsys, faces=Path("faces"))
    assert "--tts http" in refused(capsys, tts="http")
    assert "--devices 7: " in refused(capsys, devices=7)
    assert "no such model folder" in refused(capsys, model="nowhere")


def test_a_pair_that_cannot_sign(nothing_loaded: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("c2pa")
    cert, _ = pem_files()
    assert "no private key" in refused(capsys, c2pa_cert=cert, c2pa_key=cert)


def test_a_port_that_is_taken(nothing_loaded: None, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot listen there" in refused(capsys, port=port)

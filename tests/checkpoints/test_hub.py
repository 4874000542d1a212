"""Models by name, without a network: what is fetched is decided here, what a user reads when it fails too."""

import sys
from pathlib import Path

import pytest

from lavatar_jax.checkpoints.hub import LORA_FILES, WAN_FILES, resolve
from lavatar_jax.errors import UserError

NAME = "Somebody/Some-Model.1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    return pytest.importorskip("huggingface_hub")


def test_a_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # is not even imported
    assert resolve(tmp_path, ["config.json"]) == tmp_path
    assert resolve(str(tmp_path), ["config.json"]) == tmp_path


def test_only_the_files_that_are_needed_are_fetched(hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def download(repository: str, *, allow_patterns: list[str]) -> str:
        assert repository == NAME
        assert allow_patterns == ["config.json", "*.safetensors"]
        (tmp_path / "config.json").touch()
        (tmp_path / "a.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve(NAME, ("config.json", "*.safetensors")) == tmp_path


def test_a_snapshot_without_a_file_is_refused(hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match=r"it lacks Wan2\.1_VAE\.pth"):
        resolve(NAME, ["config.json", "Wan2.1_VAE.pth"])


@pytest.mark.parametrize(("files", "option"), [(WAN_FILES, "--wan"), (LORA_FILES, "--lora")])
def test_offline_the_message_says_what_to_fetch_and_where_it_belongs(
    hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], option: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        resolve(NAME, files, option=option)
    message = str(caught.value)
    assert "hub cannot be reached" in message
    assert f"hf download {NAME} --local-dir Some-Model.1" in message
    assert f"give {option} Some-Model.1" in message
    assert all(file in message for file in files)
    assert "\n" not in message


def test_what_the_hub_refuses_is_said(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("No space left\non device.")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match="No space left on device; fetch it"):
        resolve(NAME, ["config.json"])


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"lavatar-jax\[convert\]"):
        resolve(NAME, ["config.json"])


@pytest.mark.parametrize("name", ["nothing", "/no/such/folder", "./a/b", "a/b/c", "../b"])
def test_a_path_that_does_not_exist_is_not_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"no such folder \(or give OWNER/MODEL"):
        resolve(name, ["config.json"])

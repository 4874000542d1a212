"""Published weights by name (`Wan-AI/Wan2.2-S2V-14B`): fetched through huggingface_hub, kept in its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lavatar_jax.errors import UserError

# What conversion reads of the published repositories; they hold other files too.
WAN_FILES = (
    "config.json",
    "diffusion_pytorch_model*.safetensors.index.json",
    "diffusion_pytorch_model*.safetensors",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "Wan2.1_VAE.pth",
    "google/umt5-xxl/*",
    "wav2vec2-large-xlsr-53-english/config.json",
    "wav2vec2-large-xlsr-53-english/preprocessor_config.json",
    "wav2vec2-large-xlsr-53-english/model.safetensors",
)
LORA_FILES = ("liveavatar.safetensors",)


def resolve(name: str | Path, files: Sequence[str], *, option: str = "--wan") -> Path:
    """The local folder with `files` (names or patterns such as `*.safetensors`) of a model.

    `name`: a folder, which is returned as it is; or OWNER/MODEL on the hub, of which these files are fetched
    unless the cache already has them. `option` is the command line's name for the folder, for messages.
    Raises UserError that says which files are wanted, where to put them and how to fetch them, if they cannot
    be had.
    """
    if Path(name).is_dir():
        return Path(name)
    repository = str(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise UserError(f"{option} {name}: no such folder (or give OWNER/MODEL to fetch it from the hub)")
    local = repository.split("/")[1]
    wanted = " ".join(f"'{file}'" if "*" in file else file for file in files)
    by_hand = (
        f"fetch it where there is a network with: hf download {repository} --local-dir {local}"
        f"{''.join(f' --include {file}' for file in wanted.split())}"
        f" ; then put the folder {local} here and give {option} {local}"
    )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise UserError(
            f"{option} {name}: no such folder, and huggingface_hub, which fetches models by name, is not "
            f'installed; pip install "lavatar-jax[convert]", or {by_hand}'
        ) from None
    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(files)))
    except LocalEntryNotFoundError:
        reason = "it is not in the cache, and the hub cannot be reached"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    else:
        # Offline, a snapshot that was fetched for other files is returned as if it were complete.
        missing = [file for file in files if not any(folder.glob(file))]
        if not missing:
            return folder
        reason = f"it lacks {', '.join(missing)}"
    raise UserError(f"{option} {name}: no such folder, and not fetched from the hub: {reason}; {by_hand}")

"""Finding the config.json that a command line means: a directory, a file, or the local Hugging Face cache."""

import json
import os
from pathlib import Path


class ModelNotFoundError(ValueError):
    """No readable config.json where the command line points."""


def read_config(model: str) -> tuple[dict, Path]:
    """The config.json of a directory, a file, or a model of the local Hugging Face cache; and its path.

    Raises:
        ModelNotFoundError: nothing there (nothing is downloaded), or not a model's config.json.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        path = _cached_config(model)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{path} is not a readable config.json: {error}.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelNotFoundError(f"{path} is not the config.json of a model: it has no model_type.")
    return config, path


def _cached_config(model: str) -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repo = hub / ("models--" + model.strip("/").replace("/", "--"))
    main = repo / "refs" / "main"
    if main.is_file() and (found := repo / "snapshots" / main.read_text().strip() / "config.json").is_file():
        return found
    raise ModelNotFoundError(
        f"No model {model!r}: not a directory with a config.json, not a config.json, and not in the Hugging Face "
        f"cache at {hub}; nothing is downloaded here, so fetch it first: hf download {model} config.json."
    )

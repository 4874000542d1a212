"""The layering: imports point downward, torch stays in tools and tests. Checked over import statements."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lavatar_jax"

# What each part of the package may import of the rest. Prefixes of dotted names below the package.
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "files": ("errors",),
    "config": ("errors",),
    "types": ("config",),
    "huge_pages": (),
    "parallel": ("config", "errors"),
    "quant": (),
    "lora": ("config", "quant"),
    "diffusion": ("config",),
    "models": ("types", "config", "errors", "parallel", "quant", "lora"),
    "data": ("types", "config", "errors", "files", "models.logmel", "models.speech_level", "models.words"),
    "evaluation": (
        "types", "config", "errors", "files", "data", "models", "inference.rollout", "inference.talk",
    ),
    "checkpoints": ("types", "config", "errors", "files", "models", "lora", "quant", "parallel"),
    "inference": (
        "types", "config", "errors", "files", "models", "diffusion", "checkpoints", "parallel", "quant",
        "lora",
    ),
    "training": (
        "types", "config", "errors", "files", "models", "diffusion", "data", "checkpoints", "evaluation",
        "parallel", "lora", "quant", "inference.rollout", "inference.denoise", "inference.encode",
        "inference.decode",
    ),
    "serving": (
        "types", "config", "errors", "files", "models", "diffusion", "checkpoints", "inference", "parallel",
    ),
    "cli": ("types", "config", "errors", "files", "inference", "serving", "training"),
}  # fmt: skip


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a file imports; `from a import b` counts as a.b (b may be a module)."""
    names: set[str] = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    part = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    assert part in ALLOWED, f"{part} has no layering rule: add one to ALLOWED"
    for name in imported_modules(path):
        assert not is_under(name, "torch"), f"{path.name} imports torch"
        if not is_under(name, PACKAGE) or name == PACKAGE or name == f"{PACKAGE}.__version__":
            continue
        inner = name.removeprefix(PACKAGE + ".")
        allowed = (part, *ALLOWED[part])
        assert any(is_under(inner, prefix) for prefix in allowed), f"{part} may not import {inner}"


def test_a_relative_import_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_imports.ROOT", tmp_path)
    file = tmp_path / PACKAGE / "models" / "vae.py"
    file.parent.mkdir(parents=True)
    file.write_text("from . import layers\nfrom ..serving import server\nimport torch.nn\n")
    expected = {f"{PACKAGE}.models.layers", f"{PACKAGE}.serving.server", "torch.nn"}
    assert imported_modules(file) == expected

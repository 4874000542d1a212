"""The documents against the tree: links lead somewhere, and CI runs the commands that the README shows."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not target.startswith(("http://", "https://", "mailto:", "#")):
            assert (document.parent / target.split("#")[0]).exists(), f"{document.name}: {target}"


def test_ci_runs_the_commands_of_the_readme() -> None:
    commands = re.findall(r'^\w+_command="(.+)"$', (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert command in (ROOT / "README.md").read_text().splitlines()

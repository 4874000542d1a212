"""How many sessions a server takes when nobody says."""

from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from lavatar_jax.serving import sessions
from tests.serving.conftest import serving


@pytest.mark.parametrize(("load", "places"), [(0.6, 2), (0.2, 1), (0.01, 1)])
def test_as_many_as_the_machine_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, places: int
) -> None:
    """A block of 480 ms takes the stand-in 50 ms: by that, 5, 1 or 0 fit; 2 are prepared."""
    monkeypatch.setattr(sessions, "LOAD", load)
    with serving(tmp_path, slots=2, measure_places=True) as served:
        assert served.client.get("/v1/config").json()["places"] == places
        assert not served.host.sessions  # the one that was timed has left
        for _ in range(places):
            served.open()
        assert served.client.post("/v1/sessions", json={}).json()["error"]["code"] == "busy"
        assert f"lavatar_places {places}.0" in served.client.get("/metrics").text

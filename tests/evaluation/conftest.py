"""How the tests load modules of the `evaluate` library."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory):
    """A new cache, so that nothing is used which an earlier run left. Python imports all modules from the first place
    from which it has imported one: it is the same for all tests."""
    import evaluate.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        yield


@pytest.fixture
def offline(monkeypatch):
    """No network."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a metric asked the network"))

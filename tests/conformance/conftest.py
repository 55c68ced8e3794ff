import pytest

from tests.conformance.cases import MODELS


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", MODELS, ids=[variant.name for variant in MODELS])


@pytest.fixture(autouse=True)
def no_compiled_leftovers():
    import torch

    yield
    torch._dynamo.reset()

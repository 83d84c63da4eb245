"""Order of the tests: quick ones first, those that start vLLM last."""


def pytest_collection_modifyitems(items):
    """Stable: within both groups the order stays as collected."""
    items.sort(key=lambda item: "e2e" in item.path.parts)
